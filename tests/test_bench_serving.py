"""scripts/bench_serving: the workload it stands for, and that its figures are of what happened."""

import itertools
import json
import math
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

import cli
from checkpoint import open_checkpoint
from sampling import SamplingParams
from scripts import bench_serving, traffic
from scripts.bench_serving import Options, run_offline
from scripts.traffic import Seen
from serving.engine import Engine, EngineOptions
from serving.request import Request
from tests.fake_engine import Live, serve
from tests.fake_runner import FakeRunner
from tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(autouse=True)
def environment(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TACHYON_CACHE", str(cache_folder))


@pytest.fixture(scope="module")
def tokenizer(tiny_directory: Path) -> Tokenizer:
    return load_tokenizer(tiny_directory)


@pytest.fixture
def live(tokenizer: Tokenizer) -> Iterator[Live]:
    with serve(tokenizer, lambda request, index: [5] * 99) as live:
        yield live


@pytest.fixture
def run(capsys: pytest.CaptureFixture):
    def run(*options: object) -> dict:
        capsys.readouterr()
        cli.run(bench_serving.main, [*map(str, options), "--json"])
        return json.loads(capsys.readouterr().out)

    return run


def test_the_offline_workload_is_nano_vllms() -> None:
    """The numbers that its bench.py draws with seed 0: prompt by prompt, then the answers' lengths."""
    requests = bench_serving.workload(Options(offline=True), 151936, run=0)
    draw = random.Random(0)
    prompts = [[draw.randint(0, 10000) for _ in range(draw.randint(100, 1024))] for _ in range(256)]
    assert [len(request.prompt) for request in requests] == [len(prompt) for prompt in prompts]
    assert requests[0].prompt == prompts[0]
    assert [request.max_new_tokens for request in requests] == [draw.randint(100, 1024) for _ in range(256)]
    assert all(not request.stop_ids and request.params.temperature == 0.6 for request in requests)
    assert max(map(max, (r.prompt for r in bench_serving.workload(Options(offline=True), 50, run=0)))) == 49


def test_offline_counts_every_token(run, tiny_directory: Path) -> None:
    options = ("--requests", 5, "--min-len", 3, "--max-len", 12, "--kv-cache-gb", 0.002, "--max-running", 4)
    result = run(
        "--offline", "--checkpoint", tiny_directory, "--device", "cpu", "--dtype", "float32", "--repeats", 2, *options
    )
    vocab_size = open_checkpoint(str(tiny_directory)).config.vocab_size
    made = bench_serving.workload(Options(offline=True, requests=5, min_len=3, max_len=12), vocab_size, run=0)
    assert result["output_tokens"] == sum(request.max_new_tokens for request in made)
    assert result["prompt_tokens"] == sum(len(request.prompt) for request in made)
    assert result["output_tok_s"] == pytest.approx(result["output_tokens"] / result["wall_s"])
    assert len(result["runs"]) == 2 and result["preemptions"] >= 0 and result["max_running"] == 4


@pytest.mark.parametrize("lengths", ["fixed", "uniform"])
def test_offline_shows_what_a_shared_prefix_saves(run, tiny_directory: Path, lengths: str, capsys) -> None:
    options = ["--offline", "--checkpoint", tiny_directory, "--device", "cpu", "--dtype", "float32", "--requests", 3]
    options += ["--lengths", lengths, "--prompt-len", 5, "--new-tokens", 2, "--min-len", 2, "--max-len", 5]
    options += ["--shared-prefix", 400, "--concurrency", 1, "--kv-cache-gb", 0.02]
    result = run(*options)
    assert result["cached_tokens"] == 3 * 400  # whole blocks
    assert result["ttft_apart_ms"].keys() == result["ttft_ms"].keys()
    cli.run(bench_serving.main, [*map(str, options)])
    assert "times sooner" in capsys.readouterr().out


def test_offline_users_wait_for_their_own_answer_only(run, tiny_directory: Path) -> None:
    options = ("--offline", "--checkpoint", tiny_directory, "--device", "cpu", "--dtype", "float32", "--requests", 6)
    options += ("--lengths", "fixed", "--prompt-len", 3, "--new-tokens", 30, "--kv-cache-gb", 0.01, "--max-running", 1)
    together, alone = run(*options), run(*options, "--concurrency", 1)
    assert alone["output_tokens"] == together["output_tokens"] == 180
    assert alone["ttft_ms"]["p90"] < together["ttft_ms"]["p90"]
    assert alone["inter_token_ms"]["p50"] * 29 < alone["e2e_ms"]["p99"]


def test_tokens_that_come_together_have_the_time_between_them_in_equal_parts() -> None:
    runner = FakeRunner(n_blocks=101, block_size=16, burst=4)
    requests = [Request(id="x", prompt=[1, 2, 3], params=SamplingParams(), max_new_tokens=40)]
    result = run_offline(Engine(runner, options=EngineOptions()), requests, 1)
    assert runner.steps < 20
    one = result["inter_token_ms"]["mean"] * 39
    assert one == pytest.approx(result["e2e_ms"]["p50"] - result["ttft_ms"]["p50"], rel=1e-6)


def test_online_users_have_one_request_at_a_time(run, live: Live) -> None:
    most = []
    script, live.engine.turn_s = live.engine.script, 0.002
    live.engine.script = lambda request, index: most.append(len(live.engine.live)) or script(request, index)
    (load,) = run("--url", live.url, "--requests", 12, "--concurrency", 3, "--new-tokens", 8)["loads"]
    assert load["completed"] == len(most) == 12 and max(most) == 2  # beside each new one
    assert load["cached_tokens"] == 12  # the fake engine finds one token of each


def test_events_of_several_tokens_are_counted_as_so_many(run, live: Live) -> None:
    live.engine.turn_s, live.engine.burst = 0.005, 4
    (load,) = run("--url", live.url, "--requests", 1, "--lengths", "fixed", "--prompt-len", 5, "--new-tokens", 40)[
        "loads"
    ]
    decoding = load["e2e_ms"]["p50"] - load["ttft_ms"]["p50"]
    assert 0.5 * decoding < load["inter_token_ms"]["mean"] * 39 <= decoding


def test_traffic_is_the_same_for_a_seed_and_comes_at_its_rate() -> None:
    fields = {"requests": 4000, "like": "sharegpt", "least": 1, "prompt": 500, "answer": 300, "shared_prefix": 7}
    asks = traffic.plan(range(50), rate=8.0, seed=3, **fields)
    assert asks == traffic.plan(range(50), rate=8.0, seed=3, **fields)
    assert asks[0].at == 0 and asks[-1].at == pytest.approx(4000 / 8, rel=0.1)
    gaps = [b.at - a.at for a, b in itertools.pairwise(asks)]
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.1)  # as of a Poisson process
    assert all(ask.prompt[:7] == asks[0].prompt[:7] and 7 + 4 <= len(ask.prompt) <= 507 for ask in asks)
    assert statistics.median(ask.length for ask in asks) == pytest.approx(338 * math.exp(-0.5), rel=0.1)
    assert len({tuple(ask.prompt) for ask in asks}) > 3900
    fixed = traffic.plan(range(50), rate=float("inf"), seed=3, **fields | {"like": "fixed"})
    assert {(ask.at, len(ask.prompt), ask.length) for ask in fixed} == {(0.0, 507, 300)}
    uniform = traffic.plan(range(50), rate=8.0, seed=3, **fields | {"like": "uniform", "least": 200})
    assert {len(ask.prompt) - 7 for ask in uniform} == set(range(200, 501))
    assert {ask.length for ask in uniform} == set(range(200, 301))
    longer = traffic.plan(range(50), rate=8.0, seed=3, **fields | {"prompt": 2048, "answer": 2048})
    assert statistics.fmean(len(ask.prompt) - 7 for ask in longer) == pytest.approx(161, rel=0.1)
    assert statistics.fmean(ask.length for ask in longer) == pytest.approx(338, rel=0.1)


def test_percentiles_are_values_that_occurred() -> None:
    assert traffic.spread([0.001 * n for n in range(1, 101)]) == pytest.approx(
        {"mean": 50.5, "p50": 50, "p90": 90, "p95": 95, "p99": 99}
    )
    assert traffic.spread([0.2])["p99"] == 200 and traffic.spread([]) is None


def test_figures_of_a_load() -> None:
    seen = [
        Seen(status=200, sent=0.0, first=0.1, gaps=[0.1, 0.3], end=0.5, tokens=3),
        Seen(status=200, sent=1.0, first=1.5, gaps=[0.1], end=2.0, tokens=2),
        Seen(status=429, sent=1.0, end=1.01),
        Seen(status=0, sent=1.0, first=1.1, end=1.2),
    ]
    figures = traffic.summary(seen, {"ttft": 200.0, "inter_token": 250.0})
    assert (figures["completed"], figures["failed"], figures["duration_s"]) == (2, {"429": 1, "0": 1}, 2.0)
    assert (figures["request_s"], figures["output_tok_s"], figures["goodput_request_s"]) == (1.0, 2.5, 0.5)
    assert figures["ttft_ms"]["p99"] == pytest.approx(500) and figures["inter_token_ms"]["p50"] == pytest.approx(100)
    assert traffic.summary(seen, {"inter_token": 150.0})["goodput_request_s"] == 0.5
    assert traffic.summary(seen, {})["goodput_request_s"] is None


def test_online_figures_are_of_the_servers_answers(run, live: Live, tmp_path: Path) -> None:
    picture = tmp_path / "load.png"
    options = ("--requests", 6, "--lengths", "fixed", "--prompt-len", 9, "--new-tokens", 4, "--shared-prefix", 3)
    result = run("--url", live.url, *options, "--rate", 200, "--rate", 300, "--e2e-limit-ms", 60000, "--plot", picture)
    assert [(load["rate"], load["completed"], load["failed"]) for load in result["loads"]] == [
        (200, 6, {}),
        (300, 6, {}),
    ]
    for load in result["loads"]:
        assert load["output_tok_s"] == pytest.approx(24 / load["duration_s"])
        assert load["goodput_request_s"] == load["request_s"] > 0
        assert 0 < load["ttft_ms"]["p50"] <= load["e2e_ms"]["p50"]
    assert {(len(request.prompt), request.max_new_tokens) for request in live.engine.requests} == {(12, 4)}
    assert len({tuple(request.prompt[:3]) for request in live.engine.requests}) == 2  # a prefix for each load
    assert picture.stat().st_size > 5000


def test_what_a_server_refuses_is_counted_and_not_averaged(run, live: Live, capsys) -> None:
    live.engine.max_requests = 0
    (load,) = run("--url", live.url, "--requests", 3, "--new-tokens", 4)["loads"]
    assert (load["completed"], load["failed"], load["ttft_ms"]) == (0, {"429": 3}, None)
    cli.run(bench_serving.main, ["--url", live.url, "--requests", "3", "--new-tokens", "4"])
    assert "failed: {'429': 3}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--offline or --url"),
        (("--offline", "--url", "http://a"), "--offline or --url"),
        (("--url", "localhost:8000"), "http://HOST:PORT"),
        (("--url", "http://127.0.0.1:9", "--rate", "0"), "--rate must be"),
        (("--url", "http://127.0.0.1:9", "--rate", "-1"), "--rate must be"),
        (("--url", "http://127.0.0.1:9", "--plot", "x.txt"), "--plot x.txt"),
        (("--url", "http://127.0.0.1:9"), "127.0.0.1"),  # nobody listens
        (("--offline", "--requests", "0"), "--requests"),
        (("--offline", "--min-len", "9", "--max-len", "8"), "--min-len 9"),
        (("--offline", "--max-len", "100000"), "more than"),
        (("--offline", "--shared-prefix", "100000"), "more than"),
        (("--offline", "--concurrency", "-1"), "--concurrency must be"),
        (("--offline", "--rate", "1"), "--rate does not go with --offline"),
        (("--offline", "--plot", "x.png"), "--plot does not go with --offline"),
        (("--url", "http://127.0.0.1:9", "--compile"), "--compile does not go with --url"),
        (("--url", "http://127.0.0.1:9", "--kv-cache-gb", "1"), "a server at --url has its own"),
        (("--url", "http://127.0.0.1:9", "--rate", "1", "--concurrency", "2"), "--rate is of"),
    ],
)
def test_options_that_cannot_be(options: tuple[str, ...], words: str, capsys, tiny_directory: Path) -> None:
    model = () if "--url" in options else ("--checkpoint", str(tiny_directory), "--device", "cpu")
    with pytest.raises(SystemExit):
        cli.run(bench_serving.main, [*model, *options])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
