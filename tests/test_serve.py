"""The server as a whole: the API over the engine, and `generate.py --serve` as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

import cli
import generate
from checkpoint import load_model, open_checkpoint
from generator import Generator
from generator import Request as Prompt
from model import Transformer
from sampling import SamplingParams
from serving.api import ServerOptions
from serving.engine import EngineOptions
from serving.server import make_service
from tests.fake_engine import Live, request_bytes
from tests.test_metrics import parse
from tokenizer import Tokenizer

ROOT = Path(generate.__file__).parent
MESSAGES = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def tiny(tiny_directory: Path) -> tuple[Transformer, Tokenizer]:
    import torch

    source = open_checkpoint(str(tiny_directory))
    return load_model(source, device=torch.device("cpu"), dtype=torch.float32), source.tokenizer


@contextmanager
def running(tiny: tuple[Transformer, Tokenizer], **options) -> Iterator[Live]:
    """A server of the tiny model; `options` are the engine's."""
    model, tokenizer = tiny
    options = {"kv_cache_gb": 0.01, "max_running": 16, "max_step_tokens": 64, "block_size": 16} | options
    service = make_service(
        model,
        tokenizer,
        name="tiny",
        eos_ids=tokenizer.eos_ids,
        engine_options=EngineOptions(**options),
        options=ServerOptions(port=0),
        max_seq_len=600,
    )
    live = Live(service)
    try:
        yield live
    finally:
        live.stop()


@pytest.fixture(scope="module")
def shared(tiny: tuple[Transformer, Tokenizer]) -> Iterator[Live]:
    with running(tiny) as server:
        yield server


@pytest.fixture
def live(shared: Live) -> Iterator[Live]:
    """The shared server; after each test nothing runs, and no block is held."""
    yield shared
    shared.wait(lambda: not shared.service.replies)
    shared.wait(lambda: (stats := shared.engine.stats()).running == stats.waiting == 0)
    assert shared.engine.stats().kv_usage == 0.0


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


def complete(live: Live, **body) -> dict:
    response = httpx.post(live.url + "/v1/completions", json=body, timeout=60)
    assert response.is_success, response.text
    return response.json()


def text_of(live: Live, **body) -> str:
    return complete(live, **body)["choices"][0]["text"]


def alone(tiny: tuple[Transformer, Tokenizer], ids: Sequence[int], new: int) -> str:
    """What the decoder loop of generate.py makes of a prompt, greedily."""
    model, tokenizer = tiny
    request = Prompt(prompt=ids, params=SamplingParams(), max_new_tokens=new, stop_ids=frozenset(tokenizer.eos_ids))
    for _ in Generator(model, max_seq_len=600).run([request]):
        pass
    return tokenizer.decode(request.token_ids, continues=True)


# ---- One model, one answer -------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_command_line_whatever_the_company(live: Live, tiny) -> None:
    prompts = [f"hello there {'the ' * (7 * i % 40)}world {i}" for i in range(24)]
    tokenizer = tiny[1]
    with ThreadPoolExecutor(len(prompts)) as pool:
        texts = list(pool.map(lambda p: text_of(live, prompt=p, max_tokens=24, temperature=0), prompts))
    assert texts == [alone(tiny, tokenizer.encode(prompt), 24) for prompt in prompts]
    many = complete(live, prompt=prompts, max_tokens=24, temperature=0)
    assert [choice["text"] for choice in many["choices"]] == texts


def test_a_chat_is_the_templates_prompt_and_its_second_turn_reuses_the_first(client: openai.OpenAI, tiny) -> None:
    first = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=40)
    text = first.choices[0].message.content
    assert text.lstrip(" ") == alone(tiny, tiny[1].chat(MESSAGES), 40).lstrip(" ")
    again = [*MESSAGES, {"role": "assistant", "content": text}, {"role": "user", "content": "go on"}]
    second = client.chat.completions.create(model="tiny", messages=again, temperature=0, max_tokens=5)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert 0 < cached < second.usage.prompt_tokens and cached >= first.usage.prompt_tokens - 16


def test_salts_keep_prefixes_apart(live: Live) -> None:
    def cached(salt: str) -> int:
        answer = complete(live, prompt="the salted " * 20, max_tokens=1, cache_salt=salt)
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("one") == 0 and cached("one") > 0 and cached("two") == 0


def test_seeds_repeat_and_samples_count_them_up(live: Live) -> None:
    body = {"prompt": "hello", "max_tokens": 12, "temperature": 1.0}
    several = [choice["text"] for choice in complete(live, **body, seed=5, n=3)["choices"]]
    assert several == [text_of(live, **body, seed=5 + i) for i in range(3)]
    assert len(set(several)) == 3
    assert text_of(live, **body) != text_of(live, **body)


def test_logprobs_are_of_the_models_distribution(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=6, logprobs=True, top_logprobs=5
    )
    for entry in answer.choices[0].logprobs.content:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 5 and values == sorted(values, reverse=True)
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, pytest.approx(values[0]))
        assert values[0] <= 0.0


def test_logit_bias_decides(live: Live, tiny) -> None:
    (token,) = tiny[1].encode("x")
    answer = complete(live, prompt="hello", max_tokens=5, temperature=0, logit_bias={str(token): 100})
    assert answer["choices"][0]["text"] == "xxxxx"


def test_a_schema_holds_a_model_that_knows_nothing_of_it(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["kind", "n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=4, seed=1, max_tokens=200, response_format=form
    )
    for choice in answer.choices:
        value = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and value["kind"] in "ab" and 0 <= value["n"] <= 99


def test_a_regex_is_kept_to_beside_free_answers(live: Live) -> None:
    with ThreadPoolExecutor(8) as pool:
        held = [pool.submit(text_of, live, prompt="a", max_tokens=30, guided_regex="[0-9]{4}") for _ in range(4)]
        free = [pool.submit(text_of, live, prompt="a", max_tokens=30, temperature=0) for _ in range(4)]
    assert all(re.fullmatch("[0-9]{4}", future.result()) for future in held)
    assert len({future.result() for future in free}) == 1


def test_a_stop_string_ends_the_sample_in_the_engine(live: Live) -> None:
    before = live.engine.stats().generated_tokens
    whole = text_of(live, prompt="hello there", max_tokens=60, temperature=0, ignore_eos=True)
    stop = whole[5:8]
    begin = live.engine.stats().generated_tokens
    answer = complete(live, prompt="hello there", max_tokens=500, temperature=0, ignore_eos=True, stop=stop)
    assert answer["choices"][0]["text"] == whole[: whole.index(stop)]
    live.wait(lambda: live.engine.stats().running == 0)
    assert live.engine.stats().generated_tokens - begin < 60 <= begin - before


# ---- Faults ----------------------------------------------------------------------------------------------------------


def test_clients_that_vanish_leave_no_block_and_the_others_their_answers(live: Live) -> None:
    body = {"prompt": "hello there", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    expected = text_of(live, **body)
    leaving = [live.raw(request_bytes(body | {"stream": True})) for _ in range(30)]
    with ThreadPoolExecutor(6) as pool:
        staying = [pool.submit(text_of, live, **body) for _ in range(6)]
        for connection in leaving:
            with connection:
                assert connection.recv(10)
        assert [future.result() for future in staying] == [expected] * 6


def test_a_forward_that_fails_is_an_error_of_its_requests_and_of_no_other(live: Live, monkeypatch) -> None:
    launch, calls = live.engine.runner.launch, []

    def fails(step):
        calls.append(step)
        if len(calls) == 10:
            raise RuntimeError("the tenth step went wrong")
        return launch(step)

    monkeypatch.setattr(live.engine.runner, "launch", fails)
    body = {"prompt": "hello", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    response = httpx.post(live.url + "/v1/completions", json=body, timeout=60)
    assert response.status_code == 500 and "the tenth step went wrong" in response.json()["error"]["message"]
    assert len(text_of(live, **body)) > 0
    assert httpx.get(live.url + "/health").status_code == 200


def test_a_full_queue_is_429_and_the_others_are_answered(tiny) -> None:
    with running(tiny, max_queued=4, max_running=2) as live:
        url, body = live.url + "/v1/completions", {"prompt": "hello", "max_tokens": 60, "ignore_eos": True}
        with ThreadPoolExecutor(24) as pool:
            responses = list(pool.map(lambda _: httpx.post(url, json=body, timeout=60), range(24)))
        statuses = {response.status_code for response in responses}
        assert statuses == {200, 429}
        assert all(int(r.headers["retry-after"]) >= 1 for r in responses if r.status_code == 429)
        assert text_of(live, prompt="hello", max_tokens=2)


def test_time_in_the_queue_is_limited(tiny) -> None:
    with running(tiny, max_running=1, queue_timeout_s=0.05) as live:
        first = live.raw(request_bytes({"prompt": "hello", "max_tokens": 500, "ignore_eos": True}))
        with first:
            live.wait(lambda: live.engine.stats().running == 1)
            response = httpx.post(live.url + "/v1/completions", json={"prompt": "a"}, timeout=60)
        assert response.status_code == 503 and "waited for a place" in response.json()["error"]["message"]


def test_a_prompt_that_no_cache_holds_is_refused(tiny) -> None:
    with running(tiny, kv_cache_gb=0.0005) as live:
        response = httpx.post(live.url + "/v1/completions", json={"prompt": "the " * 590}, timeout=60)
        assert response.status_code == 400


def test_the_metrics_are_the_engines(live: Live) -> None:
    before = parse(httpx.get(live.url + "/metrics").text)
    complete(live, prompt="measured " * 20, max_tokens=7, ignore_eos=True)
    complete(live, prompt="measured " * 20, max_tokens=7, ignore_eos=True)
    live.wait(lambda: live.engine.stats().running == 0)
    after = parse(httpx.get(live.url + "/metrics").text)
    grown = {name: after[name] - before[name] for name in after if name in before}
    assert grown["vllm:generation_tokens_total", ""] == 14
    assert grown["vllm:request_success_total", "length"] == 2
    assert 0 < grown["vllm:prefix_cache_hits_total", ""] < grown["vllm:prefix_cache_queries_total", ""]
    assert grown["vllm:request_decode_time_seconds_count", ""] == 2


# ---- The command -----------------------------------------------------------------------------------------------------


@contextmanager
def command(*options: object, cache: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """`generate.py --serve` as a process, and its URL."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), "--serve", "--port", "0", *map(str, options)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TACHYON_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
    )
    try:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if match := re.search(r" at (http://\S+)", line):
                break
        else:
            raise AssertionError("".join(seen))
        yield process, match[1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_sigterm_under_load_finishes_the_streams_and_exits_0(tiny_directory: Path, cache_folder: Path) -> None:
    options = ("--checkpoint", tiny_directory, "--dtype", "float32", "--device", "cpu", "--kv-cache-gb", 0.01)
    with command(*options, cache=cache_folder) as (process, url):
        with httpx.Client(base_url=url, timeout=60) as client:
            while client.get("/health").status_code != 200:
                time.sleep(0.01)
        results = []

        def read() -> None:
            body = {"prompt": "hello", "max_tokens": 300, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as response:
                started.release()
                results.append([line for line in response.iter_lines() if line])

        started = threading.Semaphore(0)
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in threads:
            started.acquire()
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        log = process.stderr.read()
        assert process.wait(30) == 0, log
        assert [lines[-1] for lines in results] == ["data: [DONE]"] * 4
        assert all('"finish_reason": "length"' in lines[-2] for lines in results)
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [entry["tokens"] for entry in entries if entry["path"] == "/v1/completions"] == [300] * 4
    assert "SIGTERM: finishing 4 requests" in log and "Traceback" not in log and "leaked" not in log


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "a"), "leave out --prompt"),
        (("--interactive",), "leave out --interactive"),
        (("--json",), "leave out --json"),
        (("--batch-size", "2"), "leave out --batch-size"),
        (("--temperature", "0.5"), "sampling parameters"),
        (("--port", "-1"), "--port must be between"),
        (("--max-running", "0"), "--max-running must be at least 1"),
        (("--checkpoint", "random:llama-3.2-1b"), "has no tokenizer"),
        (("--sampling-defaults", "mine"), "invalid choice: 'mine'"),
        (("--host", "256.0.0.1"), ""),
    ],
)
def test_options_that_do_not_go_with_a_server(options: tuple[str, ...], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(generate.main, ["--serve", "--device", "cpu", "--port", "0", *options])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_options_of_a_server_without_one_are_refused_and_its_help_lists_them(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.run(generate.main, ["--prompt", "a", "--port", "8000"])
    assert "unrecognized arguments: --port" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.run(generate.main, ["--serve", "--help"])
    out = capsys.readouterr().out
    assert "--api-key" in out and "--max-running" in out


def test_a_server_without_its_extra_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "serving.server", None)
    monkeypatch.delattr("serving.server", raising=False)
    with pytest.raises(SystemExit):
        cli.run(generate.main, ["--serve"])
    assert "pip install -e .[serve]" in capsys.readouterr().err


# ---- A real model ----------------------------------------------------------------------------------------------------


@pytest.mark.network
def test_the_official_client_talks_to_the_built_in_model(tmp_path: Path) -> None:
    """The whole contract against smollm2-135m, as a user starts it."""
    from checkpoint import cache_dir

    with command("--kv-cache-gb", 0.1, "--max-step-tokens", 256, cache=cache_dir()) as (process, url):
        for line in curl_lines():
            shown = subprocess.run(
                line.replace("http://127.0.0.1:8000", url), shell=True, capture_output=True, text=True
            )
            assert shown.returncode == 0 and shown.stdout, line + shown.stderr
            if "PIN" in line:
                assert re.fullmatch("[0-9]{4}", json.loads(shown.stdout)["choices"][0]["text"])
        with openai.OpenAI(base_url=url + "/v1", api_key="unused", max_retries=0, timeout=120) as client:
            _talk(client)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def curl_lines() -> list[str]:
    """The README's, word for word."""
    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"^    (curl .*(?:\n      .*)*)", text[text.index("## Serve") :], re.MULTILINE)
    assert len(lines) == 6
    return [line.replace("curl ", "curl --fail -sS ", 1) for line in lines]


def _talk(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == "smollm2-135m"
    ask = {"model": model.id, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    greedy = ask | {"temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**greedy)
    text = whole.choices[0].message.content
    assert "Paris" in text and whole.usage.completion_tokens <= 12
    events = list(client.chat.completions.create(**greedy, stream=True, stream_options={"include_usage": True}))
    assert "".join(e.choices[0].delta.content for e in events[:-1]) == text
    # The same prompt was cached: all of it but its last, partly filled block.
    assert events[-1].usage.prompt_tokens_details.cached_tokens >= whole.usage.prompt_tokens - 32
    cut = client.chat.completions.create(**greedy, stop="Paris")
    assert cut.choices[0].message.content == text[: text.index("Paris")] and cut.choices[0].finish_reason == "stop"
    drawn = client.chat.completions.create(**ask, n=2, seed=7, temperature=0.8, top_p=0.9, max_tokens=8)
    again = client.chat.completions.create(**ask, n=2, seed=7, temperature=0.8, top_p=0.9, max_tokens=8)
    assert [c.message.content for c in drawn.choices] == [c.message.content for c in again.choices]
    shown = client.chat.completions.create(**greedy, logprobs=True, top_logprobs=3)
    entries = shown.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == text
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    held = client.chat.completions.create(**ask, temperature=0, max_tokens=80, response_format=form)
    assert json.loads(held.choices[0].message.content).keys() == {"city", "people"}
    story = client.completions.create(model=model.id, prompt="Once upon a time", max_tokens=6, temperature=0, echo=True)
    assert story.choices[0].text.startswith("Once upon a time") and story.choices[0].finish_reason == "length"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**ask | {"model": "gpt-4"})
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**ask, tools=[{"type": "function", "function": {"name": "f"}}])
    stream = client.chat.completions.create(**ask, max_tokens=2000, stream=True)
    next(iter(stream))
    stream.close()  # leaves; the server must be idle soon
    deadline = time.monotonic() + 20
    while parse(httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text)["vllm:num_requests_running", ""]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
