"""What /metrics shows: vLLM's names, so that its dashboards work, and figures that add up."""

import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.engine import EngineStats
from serving.metrics import HISTOGRAMS, Histogram, Metrics
from tests.fake_engine import serve
from tokenizer import load_tokenizer

NAMES = {  # as vLLM's own dashboard asks for them
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:time_per_output_token_seconds_count",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_inference_time_seconds_sum",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
}


def parse(page: str) -> dict[tuple[str, str], float]:
    """Values by name and by the label that tells samples of one name apart."""
    values = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            values[sample.name, ",".join(labels.values())] = sample.value
    return values


def test_a_histogram_counts_each_value_once_and_bounds_are_inclusive() -> None:
    histogram = Histogram((1, 2))
    for value in (0.5, 1.0, 1.5, 7.0):
        histogram.observe(value)
    histogram.observe(2.0, times=3)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 6), ("+Inf", 7)]
    assert histogram.sum == 16.0


def test_the_page_has_vllms_names_and_the_engines_figures() -> None:
    stats = EngineStats(running=3, waiting=2, kv_usage=0.5, prefix_queries=90, prefix_hits=40, preemptions=1)
    metrics = Metrics('a "model"\\', lambda: stats)
    metrics.finished["length"] += 2
    page = metrics.page().decode()
    values = parse(page)
    assert {name for name, _ in values} >= NAMES
    assert values["vllm:num_requests_running", ""] == 3 and values["vllm:kv_cache_usage_perc", ""] == 0.5
    assert values["vllm:prefix_cache_hits_total", ""] == 40 and values["vllm:request_success_total", "length"] == 2
    lines = [line for line in page.splitlines() if line.startswith("vllm:")]
    assert all('model_name="a \\"model\\"\\\\"' in line for line in lines)


def test_the_times_of_a_request_add_up() -> None:
    metrics = Metrics("m", EngineStats)
    metrics.ended(arrived=10.0, queued_s=1.0, first=13.0, end=20.0, prompts=5, longest=8, made=15)
    sums = {name: histogram.sum for name, histogram in metrics.histograms.items()}
    parts = ("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds")
    assert [sums[name] for name in parts] == [1.0, 2.0, 7.0]
    assert sum(sums[name] for name in parts) == sums["e2e_request_latency_seconds"] == 10.0
    assert sums["request_time_per_output_token_seconds"] == 1.0  # 7 s over the 7 tokens after the first
    assert (sums["request_prompt_tokens"], sums["request_generation_tokens"]) == (5, 15)
    assert all(HISTOGRAMS[name][1] == tuple(sorted(HISTOGRAMS[name][1])) for name in HISTOGRAMS)


def test_traffic_is_counted(tiny_directory: Path) -> None:
    tokenizer = load_tokenizer(tiny_directory)
    with serve(tokenizer, lambda request, index: [1] * 5) as live:
        for length in (3, 5, 9):
            assert httpx.post(live.url + "/v1/completions", json={"prompt": "a", "max_tokens": length}).is_success
        assert httpx.post(live.url + "/v1/completions", json={"prompt": "a", "n": 2, "max_tokens": 2}).is_success
        httpx.post(live.url + "/v1/completions", json={"prompt": 1})
        httpx.get(live.url + "/nowhere/" + "x" * 50)
        page = httpx.get(live.url + "/metrics")
        assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
        values = parse(page.text)
    assert values["vllm:request_success_total", "length"] == 4 and values["vllm:request_success_total", "stop"] == 1
    assert values["vllm:generation_tokens_total", ""] == 3 + 5 + 5 + 4
    assert values["vllm:time_to_first_token_seconds_count", ""] == 5
    assert values["vllm:inter_token_latency_seconds_count", ""] == 2 + 4 + 4 + 2
    assert values["vllm:time_per_output_token_seconds_count", ""] == 12
    assert values["vllm:e2e_request_latency_seconds_count", ""] == 4
    assert values["vllm:request_generation_tokens_sum", ""] == 17
    assert values["http_requests_total", "/v1/completions,200"] == 4
    assert values["http_requests_total", "/v1/completions,400"] == 1
    assert values["http_requests_total", "other,404"] == 1  # an address that anybody makes up is no label


@pytest.mark.parametrize("name", ["num_requests_running", "request_success_total", "time_to_first_token_seconds_sum"])
def test_the_page_in_the_browser_reads_these_lines(name: str) -> None:
    """page.html parses the text itself: the form it expects."""
    script = (Path(__file__).parents[1] / "serving" / "page.html").read_text()
    assert name.removesuffix("_sum") in script
    pattern = re.search(r"/(\^vllm.*?\$)/", script)[1]
    page = Metrics("m", EngineStats).page().decode()
    assert any((match := re.match(pattern, line)) and match[1] == name for line in page.splitlines())
