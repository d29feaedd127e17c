"""Many requests to an OpenAI-compatible server, and when their tokens came.

Every request has a connection of its own, so its time to the first token includes that of connecting.
"""

import asyncio
import json
import random
import resource
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scripts.http_client import Call, Server, get, model_of
from scripts.traffic import Lengths, Record

try:
    import uvloop
except ModuleNotFoundError:  # as on Windows
    uvloop = None

if TYPE_CHECKING:
    from scripts.bench_serving import Options

CONNECTIONS = 64  # being made at a time: a burst of thousands would overflow what a server lets wait
WATCH_S = 5.0  # between looks at the server's own figures
SETTLE_S = 10.0  # for the server to give up what nobody waits for any more
WATCHED = {  # their names in /metrics
    "resident_mb": ("process_resident_memory_bytes", 1e-6),
    "kv_usage": ("vllm:kv_cache_usage_perc", 1.0),
    "running": ("vllm:num_requests_running", 1.0),
    "waiting": ("vllm:num_requests_waiting", 1.0),
}


@dataclass(kw_only=True)
class Ask:
    """A request: what its body says besides the prompt, and after how many events we leave it."""

    prompt: list[int]
    answer: int
    fields: dict[str, Any] = field(default_factory=dict)
    leave_after: int | None = None
    exact: bool = True  # an answer of another length is a failure

    def body(self, model: str) -> bytes:
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        own = {"model": model, "prompt": self.prompt, "max_tokens": self.answer, "ignore_eos": True}
        return json.dumps(stream | own | self.fields).encode()


class Load:
    """A run: asks requests of a server, keeps a `Record` of each, and watches the server's memory meanwhile."""

    def __init__(self, server: Server, model: str, *, timeout_s: float) -> None:
        self.server, self.model, self.timeout_s = server, model, timeout_s
        self.records: list[Record] = []
        self.examples: dict[str, str] = {}  # of each kind of failure, the first one's message
        self.watched: list[dict[str, float]] = []
        self._address = server.address
        self._connecting = asyncio.Semaphore(CONNECTIONS)

    async def run(
        self, asks: Iterator[Ask], *, rate: float, concurrency: int, duration_s: float | None, draw: random.Random
    ) -> float:
        """Ask by a rate (0: all at once) or, with a concurrency, whenever fewer are under way. Returns the time taken.

        It ends when `asks` does or after a duration, and with the answer to the last request.
        """
        start = time.perf_counter()
        watcher = asyncio.create_task(self._watch(start))
        try:
            async with asyncio.TaskGroup() as group:
                if concurrency:
                    until = None if duration_s is None else start + duration_s
                    for _ in range(concurrency):
                        group.create_task(self._one_by_one(asks, until))
                else:
                    async for ask in arrivals(asks, rate, duration_s, draw):
                        group.create_task(self.ask(ask))
            return time.perf_counter() - start
        finally:
            watcher.cancel()

    async def _one_by_one(self, asks: Iterator[Ask], until: float | None) -> None:
        for ask in asks:  # the other users of this concurrency take from it as well
            if until is not None and time.perf_counter() >= until:
                return
            await self.ask(ask)

    async def ask(self, ask: Ask) -> None:
        record = Record(sent=time.perf_counter(), prompt_tokens=len(ask.prompt), answers=ask.fields.get("n", 1))
        self.records.append(record)
        message = self.server.message("POST", "/v1/completions", ask.body(self.model))
        call: Call | None = None

        def on_event(event: dict, now: float) -> bool:
            return self._note(record, ask, event, now)

        try:
            async with asyncio.timeout(self.timeout_s):
                async with self._connecting:
                    _, call = await asyncio.get_running_loop().create_connection(
                        lambda: Call(message, on_event), **self._address
                    )
                await call.over
            self._close(record, ask, call)
        except TimeoutError:
            self._fail(record, "a timeout", f"nothing more for {self.timeout_s:g} s")
        except OSError as error:
            self._fail(record, "no connection", str(error))
        finally:
            record.end = time.perf_counter()
            if call is not None:
                call.end()

    def _note(self, record: Record, ask: Ask, event: dict, now: float) -> bool:
        """Take an event of a stream; says whether we leave now."""
        if (error := event.get("error")) is not None:
            self._fail(record, "an error in the stream", json.dumps(error))
        if event.get("usage"):
            self._count(record, event["usage"])
        if any(choice.get("text") or choice.get("finish_reason") for choice in event.get("choices", ())):
            record.times.append(now)
            record.left = ask.leave_after is not None and len(record.times) >= ask.leave_after
        return record.left

    def _count(self, record: Record, usage: dict) -> None:
        record.tokens = usage["completion_tokens"]
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def _close(self, record: Record, ask: Ask, call: Call) -> None:
        """Judge a request that is over."""
        if record.left:
            record.tokens = len(record.times)
        if record.left or record.error is not None:
            return
        if call.broken:
            self._fail(record, call.broken, "after the status " + str(call.status or "that never came"))
        elif call.status != 200:
            self._fail(record, f"status {call.status}", call.body[:500].decode("utf-8", "replace"))
        elif not record.times:  # it was not asked to stream
            try:
                self._count(record, json.loads(call.body)["usage"])
                record.times.append(time.perf_counter())
            except (ValueError, KeyError):
                self._fail(record, "an empty answer", call.body[:500].decode("utf-8", "replace"))
        elif not record.tokens:  # the server does not say
            record.tokens = len(record.times)
        elif ask.exact and record.tokens != ask.answer:
            self._fail(record, "a short answer", f"{record.tokens} tokens where {ask.answer} were asked for")

    def _fail(self, record: Record, kind: str, message: str) -> None:
        record.error = kind
        self.examples.setdefault(kind, message)

    async def _watch(self, start: float) -> None:
        while True:
            if (figures := await self.figures()) is not None:
                self.watched.append({"s": round(time.perf_counter() - start, 1), **figures})
            await asyncio.sleep(WATCH_S)

    async def figures(self) -> dict[str, float] | None:
        """What the server says of itself; None if it does not."""
        with suppress(OSError, TimeoutError):
            status, body = await get(self.server, "/metrics")
            if status == 200:
                return read_metrics(body.decode())
        return None

    async def settled(self) -> dict[str, float] | None:
        """The server's figures when nothing is left to do, or as they are after some seconds."""
        deadline = time.perf_counter() + SETTLE_S
        while (figures := await self.figures()) is not None and time.perf_counter() < deadline:
            if not any(figures.get(name) for name in ("kv_usage", "running", "waiting")):
                break
            await asyncio.sleep(0.1)
        return figures


def measure(options: "Options") -> dict:
    """A run for each of the options' rates, one after another."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a connection is a file
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = Server(options.url.rstrip("/"), options.api_key)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop else None) as runner:
            return runner.run(_measure(server, options))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _measure(server: Server, options: "Options") -> dict:
    model = await model_of(server)
    longest, most = Lengths(options.lengths).longest + options.shared_prefix, model.get("max_model_len")
    if most is not None and longest > most:
        raise ValueError(f"--lengths {options.lengths}: sequences of up to {longest} tokens; the server holds {most}")
    traffic = options.traffic()
    runs = []
    for number, rate in enumerate(options.rates):
        draw = random.Random(options.seed)
        if options.duration is None or options.requests is not None:
            asks: Iterator[tuple[list[int], int]] = iter(traffic.run(number))
        else:
            asks = traffic.endless()
        load = Load(server, model["id"], timeout_s=options.give_up_s)
        wall_s = await load.run(
            varied(asks, shared=options.shared_prefix, draw=draw) if options.mixed else plain(asks, options),
            rate=rate,
            concurrency=options.concurrency,
            duration_s=options.duration,
            draw=draw,
        )
        figures = options.summarize(load.records, wall_s)
        after = await load.settled()
        more = {"examples": load.examples, "server": load.watched, "server_after": after}
        runs.append({"rate": rate, "requests": len(load.records), **figures, **more})
    return {"url": server.url, "model": model["id"], "mixed": options.mixed, **options.shown, "runs": runs}


async def arrivals(
    asks: Iterator[Ask], rate: float, duration_s: float | None, draw: random.Random
) -> AsyncIterator[Ask]:
    """Requests when they come: a Poisson process. One who is late because of us does not make the next late."""
    start = time.perf_counter()
    due = 0.0
    for ask in asks:
        if duration_s is not None and due >= duration_s:
            return
        if (wait := start + due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        yield ask
        if rate:
            due += draw.expovariate(rate)


def read_metrics(page: str) -> dict[str, float]:
    figures = {}
    for line in page.splitlines():
        name, _, value = line.rpartition(" ")
        for ours, (theirs, scale) in WATCHED.items():
            if name.partition("{")[0] == theirs:
                figures[ours] = float(value) * scale
    return figures


def plain(asks: Iterator[tuple[list[int], int]], options: "Options") -> Iterator[Ask]:
    for prompt, answer in asks:
        yield Ask(prompt=prompt, answer=answer, fields={"temperature": options.temperature})


def varied(asks: Iterator[tuple[list[int], int]], *, shared: int, draw: random.Random) -> Iterator[Ask]:
    """Requests of every kind: some leave early, ask for several answers, for grammars, or for what is refused."""
    for prompt, answer in asks:
        ask = Ask(prompt=prompt if draw.random() < 0.5 else prompt[shared:], answer=answer, exact=False)
        kind, fields = draw.random(), ask.fields
        fields["seed"] = draw.randrange(2**31)
        fields["temperature"] = draw.choice([0.0, 0.7, 1.5])
        if kind < 0.15:
            ask.leave_after = draw.randint(1, 8)
        elif kind < 0.3:
            fields["n"] = draw.randint(2, 4)
        elif kind < 0.4:
            fields |= {"top_p": 0.9, "top_k": 40, "min_p": 0.02, "presence_penalty": 0.5, "frequency_penalty": 0.3}
        elif kind < 0.5:
            fields |= {"logprobs": 3, "logit_bias": {"5": -100, "7": 2}}
        elif kind < 0.6:
            fields |= {"stop": ["e", "\n\n"], "ignore_eos": False}
        elif kind < 0.65:
            fields |= {"structured_outputs": {"regex": f"[a-z ]{{4,{draw.randint(8, 40)}}}"}, "ignore_eos": False}
        elif kind < 0.75:
            fields |= {"stream": False, "stream_options": None}
        elif kind < 0.8:
            fields["prompt"] = draw.choice([[], [-1], "", 5, ["a"] * 10_000])
        yield ask
