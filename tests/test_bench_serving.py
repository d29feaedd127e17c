"""The serving benchmark: what it draws, what it counts, and that it measures a server as well as an engine."""

import asyncio
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import cli
from scripts import bench_serving, http_load
from scripts.http_load import Ask
from scripts.traffic import Lengths, Record, Traffic, spread, summarize
from serving.request import Request
from tests.fake_engine import Live, serve
from tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_directory: Path) -> Tokenizer:
    return load_tokenizer(tiny_directory)


@pytest.fixture(scope="module")
def live(tokenizer: Tokenizer) -> Iterator[Live]:
    letter = tokenizer.encode("a")[:1]

    def script(request: Request, index: int) -> Sequence[int]:
        return letter * (3 if request.prompt[0] == 7 else 10_000)  # ends too early after a token 7

    with serve(tokenizer, script, max_requests=6) as server:
        yield server


@pytest.fixture
def bench(live: Live, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable:
    monkeypatch.setattr(http_load, "SETTLE_S", 0.0)  # the fake engine says that it is never idle

    def run(*options: str) -> dict:
        cli.run(bench_serving.main, ["--url", live.url, "--vocab-size", "7", "--json", *options])
        return json.loads(capsys.readouterr().out)

    return run


# ---- What is drawn ---------------------------------------------------------------------------------------------------


def test_uniform_lengths_are_drawn_as_nano_vllm_draws_them() -> None:
    traffic = Traffic(Lengths("uniform:100:1024"), count=5, vocab_size=10001, seed=0)
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(5)]
    answers = [random.randint(100, 1024) for _ in range(5)]
    assert traffic.run(0) == list(zip(prompts, answers, strict=True))


def test_every_run_has_other_prompts_of_the_same_lengths_and_one_shared_prefix() -> None:
    traffic = Traffic(Lengths("fixed:8:3"), count=4, vocab_size=50, shared_prefix=20, seed=1)
    runs = [traffic.run(number) for number in range(3)]
    for run in runs:
        assert [(len(prompt), answer) for prompt, answer in run] == [(28, 3)] * 4
        assert len({tuple(prompt[:20]) for prompt, _ in run}) == 1
        assert len({tuple(prompt[20:]) for prompt, _ in run}) == 4
    assert len({tuple(prompt[:20]) for run in runs for prompt, _ in run}) == 3
    assert len({tuple(prompt[20:]) for run in runs for prompt, _ in run}) == 12
    endless = traffic.endless()
    first, second = ([next(endless)[0] for _ in range(4)] for _ in range(2))
    assert first != second and first[0][:20] == second[0][:20]


def test_sharegpt_like_lengths_have_the_means_they_say() -> None:
    lengths, draw = Lengths("sharegpt-like"), random.Random(0)
    prompts, answers = [lengths.prompt(draw) for _ in range(20000)], [lengths.answer(draw) for _ in range(20000)]
    assert statistics.fmean(prompts) == pytest.approx(161, rel=0.05)
    assert statistics.fmean(answers) == pytest.approx(338, rel=0.07)  # the longest are cut
    assert statistics.median(prompts) == pytest.approx(161 * math.exp(-0.5), rel=0.05)
    assert min(prompts) >= 1 and max(answers) <= 2048 and lengths.longest == 4096


@pytest.mark.parametrize("rate", [2000.0, 0.0])
def test_arrivals_keep_to_their_rate(rate: float) -> None:
    async def count() -> int:
        asks = iter([Ask(prompt=[1], answer=1)] * 300)
        duration = 0.05 if rate else None
        return len([ask async for ask in http_load.arrivals(asks, rate, duration, random.Random(3))])

    draw, due, expected = random.Random(3), 0.0, 0
    while rate and due < 0.05:
        due, expected = due + draw.expovariate(rate), expected + 1
    assert asyncio.run(count()) == (expected or 300)
    assert not rate or 60 < expected < 140


# ---- What is counted -------------------------------------------------------------------------------------------------


def test_percentiles_lie_between_the_values() -> None:
    assert spread([]) == {"mean": None, "p50": None, "p90": None, "p99": None}
    assert spread([3.0]) == {"mean": 3.0, "p50": 3.0, "p90": 3.0, "p99": 3.0}
    found = spread([*range(101)][::-1])
    assert found == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert spread([1.0, 2.0])["p90"] == pytest.approx(1.9)


def test_a_summary_has_latencies_of_whole_answers_and_goodput() -> None:
    def record(first: float, last: float, **fields) -> Record:
        return Record(sent=1.0, prompt_tokens=10, tokens=3, times=[1 + first, 1.5, 1 + last], end=1 + last, **fields)

    records = [
        record(0.1, 1.1),
        record(0.3, 1.3),
        record(0.1, 9.1),
        record(0.1, 1.1, error="status 500"),
        Record(sent=1.0, prompt_tokens=10, error="status 429"),
        Record(sent=1.0, prompt_tokens=10, error="status 429"),
        record(0.2, 0.4, left=True),
    ]
    figures = summarize(records, 10.0, limit_ttft_s=0.2, limit_token_s=1.0)
    assert (figures["completed"], figures["left"]) == (3, 1)
    assert figures["errors"] == {"status 500": 1, "status 429": 2}
    assert (figures["prompt_tokens"], figures["output_tokens"], figures["output_tok_s"]) == (30, 15, 1.5)
    assert figures["ttft_s"]["p50"] == pytest.approx(0.1) and figures["ttft_s"]["mean"] == pytest.approx(0.5 / 3)
    assert figures["token_s"]["p50"] == pytest.approx(0.5)
    assert figures["e2e_s"]["p50"] == pytest.approx(1.3)
    assert (figures["goodput_per_s"], figures["good_share"]) == (0.1, pytest.approx(1 / 7))
    assert summarize(records, 10.0)["goodput_per_s"] is None


# ---- In this process -------------------------------------------------------------------------------------------------


def test_offline_prints_one_json_document(tiny_directory: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--offline", "--checkpoint", str(tiny_directory), "--device", "cpu", "--kv-cache-gb", "0.005"]
    cli.run(bench_serving.main, [*options, "--lengths", "uniform:2:9", "--requests", "7", "--repeats", "3", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["completed"] == result["requests"] == 7 and len(result["runs"]) == 3
    assert result["output_tok_s"] == pytest.approx(result["output_tokens"] / result["wall_s"])
    assert result["errors"] == {} and result["cached_tokens"] == 0
    cli.run(bench_serving.main, [*options, "--lengths", "fixed:3:4", "--requests", "2"])
    assert "tok/s" in capsys.readouterr().out


def test_offline_tells_what_a_shared_prefix_saves(tiny_directory: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--offline", "--checkpoint", str(tiny_directory), "--device", "cpu", "--kv-cache-gb", "0.02"]
    options += ["--lengths", "fixed:5:2", "--requests", "3", "--shared-prefix", "400", "--concurrency", "1"]
    cli.run(bench_serving.main, [*options, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["cached_tokens"] == 3 * 400
    assert result["ttft_not_cached_s"]["p50"] > result["ttft_s"]["p50"]
    cli.run(bench_serving.main, options)
    assert "times sooner" in capsys.readouterr().out


def test_offline_one_at_a_time_makes_no_request_wait(tiny_directory: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--offline", "--checkpoint", str(tiny_directory), "--device", "cpu", "--kv-cache-gb", "0.005"]
    options += ["--lengths", "fixed:3:30", "--requests", "6", "--max-running", "1", "--json"]
    cli.run(bench_serving.main, options)
    together = json.loads(capsys.readouterr().out)
    cli.run(bench_serving.main, [*options, "--concurrency", "1"])
    alone = json.loads(capsys.readouterr().out)
    assert alone["output_tokens"] == together["output_tokens"] == 180
    assert alone["ttft_s"]["p90"] < together["ttft_s"]["p90"] / 2


# ---- Over HTTP -------------------------------------------------------------------------------------------------------


def test_a_server_is_measured(bench: Callable, live: Live) -> None:
    result = bench("--lengths", "fixed:5:12", "--requests", "9", "--concurrency", "3", "--limit-ttft-ms", "60000")
    (run,) = result["runs"]
    assert (result["model"], run["requests"], run["completed"], run["errors"]) == ("fake", 9, 9, {})
    assert (run["prompt_tokens"], run["output_tokens"]) == (45, 108)
    assert run["cached_tokens"] == 9  # the fake engine says 1 for each
    assert 0 < run["ttft_s"]["p50"] <= run["e2e_s"]["p50"] and run["inter_token_s"]["p50"] > 0
    assert run["good_share"] == 1.0
    assert run["server"][0]["resident_mb"] > 10 and "kv_usage" in run["server_after"]
    request = live.engine.requests[-1]
    assert (len(request.prompt), request.max_new_tokens, request.params.temperature) == (5, 12, 0.6)


def test_failures_are_counted_by_kind(bench: Callable, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.engine, "turn_s", 0.02)
    (run,) = bench("--lengths", "fixed:5:12", "--requests", "30")["runs"]
    assert run["completed"] == 6 and run["errors"] == {"status 429": 24}
    assert "being answered already" in run["examples"]["status 429"]
    (run,) = bench("--lengths", "fixed:1:12", "--vocab-size", "8", "--requests", "40", "--concurrency", "4")["runs"]
    assert set(run["errors"]) == {"a short answer"} and run["completed"] + run["errors"]["a short answer"] == 40
    monkeypatch.setattr(live.engine, "broken", "the model failed")
    (run,) = bench("--lengths", "fixed:5:12", "--requests", "3")["runs"]
    assert run["errors"] == {"status 500": 3} and run["ttft_s"]["p50"] is None


def test_an_error_in_a_stream_is_one_of_its_request(bench: Callable, live: Live, monkeypatch) -> None:
    turn, turns = live.engine._turn, []

    def failing(key, request, *state):
        turns.append(key)
        if len(turns) == 5:
            monkeypatch.setattr(live.engine, "broken", "out of luck")
        return turn(key, request, *state)

    monkeypatch.setattr(live.engine, "_turn", failing)
    (run,) = bench("--lengths", "fixed:5:100", "--requests", "1")["runs"]
    assert run["errors"] == {"an error in the stream": 1}
    assert "out of luck" in run["examples"]["an error in the stream"]


def test_who_does_not_answer_in_time_is_given_up(bench: Callable, live: Live) -> None:
    live.engine.held.set()
    try:
        (run,) = bench("--lengths", "fixed:5:12", "--requests", "2", "--give-up-s", "0.2")["runs"]
    finally:
        live.engine.held.clear()
    assert run["errors"] == {"a timeout": 2}
    live.wait(lambda: not live.service.replies)


def test_mixed_traffic_reaches_every_kind_of_request(bench: Callable, live: Live, capsys) -> None:
    live.engine.requests.clear()
    options = ["--lengths", "uniform:2:40", "--shared-prefix", "20", "--concurrency", "4", "--mixed"]
    (run,) = bench(*options, "--requests", "150")["runs"]
    assert run["left"] > 5 and set(run["errors"]) == {"status 400"}, run["examples"]
    assert run["completed"] + run["left"] + run["errors"]["status 400"] == 150
    taken = live.engine.requests
    assert {request.n for request in taken} >= {1, 2, 3, 4}
    assert {request.params.temperature for request in taken} == {0.0, 0.7, 1.5}
    assert any(request.constraint for request in taken) and any(request.logprobs == 3 for request in taken)
    live.wait(lambda: not live.engine.live)


def test_several_rates_are_run_and_drawn(bench: Callable, tmp_path: Path, capsys, live: Live) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "load.png"
    options = ["--lengths", "fixed:3:4", "--duration", "0.2"]
    result = bench(*options, "--rate", "20,40", "--plot", str(picture))
    assert [run["rate"] for run in result["runs"]] == [20, 40]
    assert all(run["completed"] == run["requests"] > 0 for run in result["runs"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    cli.run(bench_serving.main, ["--url", live.url + "/v1/", "--vocab-size", "7", *options, "--rate", "20"])
    shown = capsys.readouterr().out
    assert "20 requests a second" in shown and "server's memory" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--offline or --url"),
        (["--offline", "--url", "http://127.0.0.1:1"], "--offline or --url"),
        (["--offline", "--rate", "3"], "--rate has no meaning"),
        (["--offline", "--mixed"], "--mixed has no meaning"),
        (["--offline", "--lengths", "uniform:9:3"], "9 is more than 3"),
        (["--offline", "--lengths", "fixed:9"], "--lengths 'fixed:9'"),
        (["--offline", "--lengths", "fixed:0:5"], "at least 1"),
        (["--offline", "--lengths", "fixed:5000:5", "--checkpoint", "TINY"], "up to 5005 tokens"),
        (["--url", "http://127.0.0.1:1", "--compile"], "--compile has no meaning"),
        (["--url", "http://127.0.0.1:1", "--max-running", "3"], "--max-running is decided where"),
        (["--url", "http://127.0.0.1:1"], "no server answers"),
        (["--url", "127.0.0.1:8000"], "is no address"),
        (["--url", "http://127.0.0.1:x"], "is no address"),
        (["--url", "http://127.0.0.1:1", "--rate", "1,x"], "--rate must be"),
        (["--url", "http://127.0.0.1:1", "--rate", "-1"], "--rate must be"),
        (["--url", "http://127.0.0.1:1", "--rate", "1", "--concurrency", "2"], "two ways"),
        (["--url", "http://127.0.0.1:1", "--duration", "3"], "--duration needs"),
        (["--url", "http://127.0.0.1:1", "--duration", "nan", "--rate", "1"], "--duration must be"),
        (["--url", "http://127.0.0.1:1", "--requests", "0"], "--requests must be"),
        (["--url", "http://127.0.0.1:1", "--plot", "x.png"], "several rates"),
        (["--url", "http://127.0.0.1:1", "--rate", "1,2", "--plot", "x.gif"], "x.gif"),
    ],
)
def test_options_that_cannot_be_are_refused(options: list[str], words: str, tiny_directory: Path, capsys) -> None:
    arguments = [option.replace("TINY", str(tiny_directory)) for option in options]
    with pytest.raises(SystemExit) as error:
        cli.run(bench_serving.main, arguments)
    message = capsys.readouterr().err
    assert error.value.code == 2 and words in message and message.count("\n") == 1


def test_a_context_too_small_for_the_lengths_is_refused_before_anything_is_sent(live: Live, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.run(bench_serving.main, ["--url", live.url, "--lengths", "fixed:4000:200"])
    assert "the server holds 4096" in capsys.readouterr().err
