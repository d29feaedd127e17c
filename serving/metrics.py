"""Prometheus metrics under vLLM's names, so that dashboards made for it show this server.

Counting happens once per token on the event loop, so it is plain Python numbers; prometheus-client's objects are made
when somebody scrapes. What the engine counts itself is read from its `stats()` then.
"""

import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from serving.engine import EngineStats

TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
REQUEST = (
    0.03,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
)
LENGTH = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))

HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("From the request's arrival to its first token", TTFT),
    "inter_token_latency_seconds": ("Between two tokens of an answer", TOKEN),
    "time_per_output_token_seconds": ("The same, by its older name", TOKEN),
    "request_time_per_output_token_seconds": ("An answer's mean time for a token after its first", TOKEN),
    "e2e_request_latency_seconds": ("From the request's arrival to its end", REQUEST),
    "request_queue_time_seconds": ("From the request's arrival to the first step that worked on it", REQUEST),
    "request_prefill_time_seconds": ("From there to its first token", REQUEST),
    "request_decode_time_seconds": ("From its first token to its last", REQUEST),
    "request_inference_time_seconds": ("From the first step that worked on it to its last token", REQUEST),
    "request_prompt_tokens": ("Tokens in a request's prompts", LENGTH),
    "request_generation_tokens": ("Tokens in a request's answers", LENGTH),
}


class Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, int]]:
        total, result = 0, []
        for bound, count in zip([*map(float, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            result.append((str(bound), total))
        return result


class Metrics(Collector):
    def __init__(self, model_name: str, stats: "Callable[[], EngineStats]") -> None:
        self.model_name, self.stats = model_name, stats
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self.first_token = self.histograms["time_to_first_token_seconds"].observe
        self.next_token = self.histograms["inter_token_latency_seconds"].observe
        self.finished: Counter[str] = Counter({reason: 0 for reason in ("stop", "length", "abort", "error")})
        self.http: Counter[tuple[str, str]] = Counter()  # answers by (path, status)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)  # memory, files, CPU time

    def ended(
        self, *, arrived: float, queued_s: float, first: float, end: float, prompts: int, longest: int, made: int
    ) -> None:
        """A request that is over, in times of one clock; `made` tokens, of which the longest answer has `longest`."""
        values = {
            "e2e_request_latency_seconds": end - arrived,
            "request_queue_time_seconds": queued_s,
            "request_prefill_time_seconds": max(first - arrived - queued_s, 0.0),
            "request_decode_time_seconds": end - first,
            "request_inference_time_seconds": end - arrived - queued_s,
            "request_prompt_tokens": prompts,
            "request_generation_tokens": made,
        }
        if longest > 1:
            values["request_time_per_output_token_seconds"] = (end - first) / (longest - 1)
        for name, value in values.items():
            self.histograms[name].observe(value)

    def page(self) -> bytes:
        """The text that /metrics serves."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        gauges = {
            "num_requests_running": ("Samples that steps work on", stats.running),
            "num_requests_waiting": ("Samples that wait for room", stats.waiting),
            "kv_cache_usage_perc": ("Share of the cache's blocks in use, 0 to 1", stats.kv_usage),
            "gpu_cache_usage_perc": ("The same, by its older name", stats.kv_usage),
        }
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache", stats.prefix_queries),
            "prefix_cache_hits": ("Prompt tokens found there", stats.prefix_hits),
            "num_preemptions": ("Samples that had to give up their blocks", stats.preemptions),
            "prompt_tokens": ("Prompt tokens of the requests taken", stats.prompt_tokens),
            "generation_tokens": ("Tokens made", stats.generated_tokens),
        }
        for name, (text, value) in gauges.items():
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self.model_name], value)
            yield family
        for name, (text, value) in counters.items():
            family = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self.model_name], value)
            yield family
        success = CounterMetricFamily(
            "vllm:request_success", "Answers by how they ended", labels=["model_name", "finished_reason"]
        )
        for reason, count in self.finished.items():
            success.add_metric([self.model_name, reason], count)
        yield success
        http = CounterMetricFamily("http_requests", "HTTP answers", labels=["path", "status"])
        for labels, count in self.http.items():
            http.add_metric(labels, count)
        yield http
        for name, (text, _) in HISTOGRAMS.items():
            # The two names of one thing are counted once.
            source = "inter_token_latency_seconds" if name == "time_per_output_token_seconds" else name
            histogram = self.histograms[source]
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self.model_name], histogram.buckets(), histogram.sum)
            yield family
