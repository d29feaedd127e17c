"""A server under everything that goes wrong at once: it stays up, answers the others and lets go of what it held.

The model is the fake one, whose tokens show any mistake of the engine; HTTP, engine, scheduler and blocks are real.
"""

import asyncio
import json
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from scripts.traffic import Target
from serving.api import ServerOptions, Service
from serving.engine import Engine, EngineOptions
from tests.fake_engine import Live, request_bytes
from tests.fake_runner import VOCAB, FakeRunner, FakeTicket, reference, request
from tokenizer import Tokenizer, load_tokenizer

LONGEST = 4000
PATIENCE_S = 60  # nothing here takes so long: who waits for it hangs


@pytest.fixture(scope="module")
def tokenizer(tiny_directory: Path) -> Tokenizer:
    return load_tokenizer(tiny_directory)


@pytest.fixture
def start(tokenizer: Tokenizer) -> Iterator[Callable]:
    """Starts a server of the fake model, with options of the engine and of the server; at the end nothing is held."""

    @contextmanager
    def start(*, n_blocks: int = 2000, **options) -> Iterator[Live]:
        options = {"max_running": 16, "max_queued": 0} | options
        own = {name: options.pop(name) for name in list(options) if hasattr(ServerOptions, name)}
        most = options["max_running"]
        runner = FakeRunner(n_blocks=n_blocks, max_running=most, max_step_tokens=most + 64, max_seq_len=LONGEST)
        live = Live(
            Service(
                lambda deliver: Engine(runner, options=EngineOptions(**options), deliver=deliver),
                tokenizer,
                name="fake",
                eos_ids=(),
                vocab_size=VOCAB,
                max_seq_len=LONGEST,
                options=ServerOptions(**{"port": 0, **own}),
            )
        )
        try:
            yield live
            live.wait(lambda: not live.service.replies and is_idle(live))
            live.engine.scheduler.pool.check([])
        finally:
            live.stop()

    return start


def is_idle(live: Live) -> bool:
    stats = live.engine.stats()
    return stats.alive and stats.running == stats.waiting == 0 and stats.kv_usage == 0.0


def text_of(tokenizer: Tokenizer, prompt: list[int], length: int) -> str:
    """What a request gives alone."""
    tokens, _ = reference(request("", prompt, max_new_tokens=length), max_seq_len=LONGEST)
    return tokenizer.decode(tokens, continues=True)


async def ask(live: Live, prompt: list[int], length: int, *, leave_after: int = 0, **fields) -> tuple[int, str, dict]:
    """Status, text and the end of an answer; whoever leaves does so after some bytes of it."""
    body = {"prompt": prompt, "max_tokens": length, "temperature": 0, "seed": 0, "stream": True, **fields}
    reply = await Target(url=live.url).send("POST", "/v1/completions", body)
    try:
        if leave_after:
            await reply.reader.readexactly(leave_after)
            reply.writer.transport.abort()
            return 0, "", {}
        data = await reply.body()
    finally:
        reply.writer.close()
    if reply.status != 200:
        return reply.status, "", {"retry_after": reply.headers.get("retry-after"), **json.loads(data)}
    *events, done, rest = data.decode().split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    events = [json.loads(event.removeprefix("data: ")) for event in events]
    text = "".join(choice["text"] for event in events for choice in event.get("choices", ()))
    return reply.status, text, events[-1]


def together(*asks) -> list:
    async def gather() -> list:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.gather(*asks)

    return asyncio.run(gather())


def test_half_of_two_hundred_clients_vanish_in_mid_stream(start: Callable, tokenizer: Tokenizer) -> None:
    prompts = [[3 + i % 90, 5, i // 90, 7] for i in range(200)]
    with start(max_running=32) as live:
        stay = [ask(live, prompt, 40) for prompt in prompts[::2]]
        leave = [ask(live, prompt, 2000, leave_after=1 + 37 * i) for i, prompt in enumerate(prompts[1::2])]
        answers = together(*stay, *leave)
        for prompt, (status, text, last) in zip(prompts[::2], answers, strict=False):
            assert (status, text) == (200, text_of(tokenizer, prompt, 40))
            assert last["choices"][0]["finish_reason"] == "length"
        live.wait(lambda: is_idle(live))
        assert live.engine.stats().generated_tokens < 100 * 40 + 100 * 1000  # nobody's tokens are not made


def test_slow_readers_hold_nobody_up_and_are_dropped(start: Callable, tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("serving.replies.MAX_UNREAD", 30_000)
    with start(max_running=40) as live:
        live.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = {"prompt": [1, 2], "max_tokens": 400, "n": 8, "stream": True, "logprobs": 5}
        slow = [live.raw(request_bytes(body), size=4096) for _ in range(4)]
        live.wait(lambda: live.engine.stats().generated_tokens > 0)
        answers = together(*(ask(live, [9, i], 30) for i in range(8)))
        assert [text for _, text, _ in answers] == [text_of(tokenizer, [9, i], 30) for i in range(8)]
        live.wait(lambda: is_idle(live), seconds=40)
        for connection in slow:
            with connection:
                data = b"".join(iter(lambda connection=connection: connection.recv(1 << 16), b""))
            assert b"200 OK" in data and b"[DONE]" not in data
        assert live.engine.stats().generated_tokens < 4 * 8 * 400


def test_a_reader_who_reads_is_not_slow_however_much_there_is_to_read(start: Callable, monkeypatch) -> None:
    monkeypatch.setattr("serving.replies.MAX_UNREAD", 1000)  # less than one step has for it
    with start() as live:
        ((status, _, last),) = together(ask(live, [1, 2], 100, n=8, logprobs=5))
        assert status == 200 and last["choices"][0]["finish_reason"] == "length"


class Failing:
    """A runner's `launch` of which the tenth step goes wrong, at once or when its results are waited for."""

    def __init__(self, live: Live, error: Exception, *, late: bool) -> None:
        self.launch, self.error, self.late, self.steps = live.engine.runner.launch, error, late, 0
        self.hurt: set[str] = set()

    def __call__(self, step) -> FakeTicket:
        self.steps += 1
        if self.steps != 10:
            return self.launch(step)
        self.hurt |= {work.sequence.request.id for work in (*step.decodes, *step.prefills)}
        if not self.late:
            raise self.error
        ticket = self.launch(step)
        ticket.wait = self.fail
        return ticket

    def fail(self) -> None:
        raise self.error


@pytest.mark.parametrize("late", [False, True], ids=["launch", "wait"])
@pytest.mark.parametrize(
    "error", [RuntimeError("wrong in step 10"), torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")]
)
def test_a_step_that_fails_ends_its_own_requests_alone(
    start: Callable, tokenizer: Tokenizer, error: Exception, late: bool, monkeypatch, caplog
) -> None:
    with start(max_running=8) as live:
        failing = Failing(live, error, late=late)
        monkeypatch.setattr(live.engine.runner, "launch", failing)
        prompts = [[i, 11, 12] for i in range(40)]
        answers = together(*(ask(live, prompt, 20) for prompt in prompts))
        failed = 0
        for prompt, (status, text, last) in zip(prompts, answers, strict=True):
            if "error" in last:
                failed += 1
                assert status in (200, 500) and "the model failed" in last["error"]["message"]
                assert "\n" not in last["error"]["message"]
            else:
                assert (status, text) == (200, text_of(tokenizer, prompt, 20))
        assert 1 <= len(failing.hurt) <= failed <= 8
        # The blocks of those that failed hold nothing that anybody is given.
        again = together(*(ask(live, prompt, 20) for prompt in prompts))
        assert [text for _, text, _ in again] == [text_of(tokenizer, prompt, 20) for prompt in prompts]


def test_thousands_of_requests_at_once_are_served_or_told_to_come_again(start: Callable, tokenizer: Tokenizer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(3000, (hard - 500) // 2)  # both ends of each connection are files of this process
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with start(max_running=64, max_queued=500) as live:
            launch = live.engine.runner.launch  # made slower than clients come, however slowly these do

            def slow(step) -> FakeTicket:
                time.sleep(0.03)
                return launch(step)

            live.engine.runner.launch = slow
            answers = together(*(ask(live, [i % 90, 4], 3) for i in range(count)))
            statuses = Counter(status for status, _, _ in answers)
            assert statuses.keys() == {200, 429} and statuses[200] >= 500, statuses
            for i, (status, text, last) in enumerate(answers):
                if status == 200:
                    assert text == text_of(tokenizer, [i % 90, 4], 3)
                else:
                    assert 1 <= int(last["retry_after"]) <= 60 and last["error"]["code"] == "rate_limit_exceeded"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ten_thousand_prompts_may_wait_where_nothing_limits_them(start: Callable) -> None:
    with start(max_running=64) as live:
        prompts = [[i % 90, 1 + i // 90] for i in range(100)]
        answers = together(*(ask(live, prompts, 2) for _ in range(100)))
        assert [(status, last["choices"][0]["finish_reason"]) for status, _, last in answers] == [(200, "length")] * 100
        assert live.engine.stats().generated_tokens >= 20_000


def test_rubbish_between_the_streams_hurts_none_of_them(start: Callable, tokenizer: Tokenizer) -> None:
    async def rubbish(live: Live, data: bytes, length: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}"
        writer.write(f"{head}\r\n\r\n".encode() + data)
        status = int((await reader.readline()).split()[1])
        writer.transport.abort()
        return status

    bodies = [b'{"prompt": "\xff\xfe"}', b"\x00" * 100, b"[" * 5000, b'{"prompt": [1, 2', b'{"prompt": "' + b"a" * 5000]
    with start(max_body_mb=0.01) as live:
        streams = [ask(live, [i, 8], 60) for i in range(10)]
        wrong = [rubbish(live, body, len(body)) for body in bodies * 8]
        huge = [rubbish(live, b"a" * 20_000, 10**9) for _ in range(10)]
        answers = together(*streams, *wrong, *huge)
        assert [text for _, text, _ in answers[:10]] == [text_of(tokenizer, [i, 8], 60) for i in range(10)]
        assert set(answers[10:50]) == {400} and set(answers[50:]) == {413}


@pytest.mark.parametrize("drain_s", [30.0, 0.1])
def test_a_server_told_to_end_finishes_what_it_can_in_time(start: Callable, drain_s: float, monkeypatch) -> None:
    with start(max_running=8, drain_s=drain_s) as live:
        launch = live.engine.runner.launch

        def launch_late(step) -> FakeTicket:
            """On the engine's thread; the first step waits until everybody has come."""
            if not live.server.should_exit:
                live.wait(lambda: len(live.service.replies) == 60)
                live.server.handle_exit(15, None)
            return launch(step)

        monkeypatch.setattr(live.engine.runner, "launch", launch_late)
        answers = together(*(ask(live, [i, 6], 40 if drain_s > 1 else 2000) for i in range(60)))
        live.thread.join(PATIENCE_S)
        assert not live.thread.is_alive()
        if drain_s > 1:
            assert all(last["choices"][0]["finish_reason"] == "length" for _, _, last in answers)
        else:
            assert all("shutting down" in last["error"]["message"] for _, _, last in answers)
            assert {status for status, _, _ in answers} == {200, 503}  # in the midst of a stream, and before one
