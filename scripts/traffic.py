"""Traffic for a server and what its users saw: arrivals, streams read as they come, percentiles.

It speaks HTTP to any server of the OpenAI API, on connections of its own: one request each, as different users would.
How long prompts and answers are is drawn before anything is sent, so a seed gives the same traffic to every server.
"""

import asyncio
import contextlib
import json
import math
import random
import ssl
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from scripts.plots import picture

TIMEOUT_S = 1200.0  # for one request, its time in a queue included
SAMPLE_TEXT = "It was a bright day in April, and 1 + 2 = 3. The quick brown fox jumps over a lazy dog; why not?\n"
LIKE = ("uniform", "sharegpt", "fixed")
# Log-normal lengths with the means that the PagedAttention paper (arXiv 2309.06180, figure 11) gives for ShareGPT, 161
# tokens of a prompt and 338 of an answer. It shows the spread in a histogram only: a sigma of 1 is a choice.
SHAREGPT = {"prompt": 161, "answer": 338}
SHAREGPT_SIGMA = 1.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server, as the command line names it."""

    url: str
    api_key: str | None = None

    def head(self, method: str, path: str, length: int) -> bytes:
        parts = urlsplit(self.url)
        lines = [f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close"]
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        lines += [f"Authorization: Bearer {self.api_key}"] if self.api_key else []
        return "\r\n".join([*lines, "", ""]).encode()

    async def send(self, method: str, path: str, body: dict | None = None) -> "Reply":
        parts, data = urlsplit(self.url), b"" if body is None else json.dumps(body).encode()
        secure = parts.scheme == "https"
        port, context = parts.port or (443 if secure else 80), ssl.create_default_context() if secure else None
        try:
            reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context)
        except OSError as error:
            raise OSError(f"no server answers at {self.url} ({error}); start one there, or give its --url") from None
        with contextlib.ExitStack() as failing:
            failing.callback(writer.close)
            writer.write(self.head(method, path, len(data)) + data)
            status = int((await reader.readline()).split()[1])
            headers = {}
            while line := (await reader.readline()).strip():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            failing.pop_all()
        return Reply(status, headers, reader, writer)

    async def ask(self, method: str, path: str, body: dict | None = None) -> dict:
        """A JSON answer; ValueError where it is an error."""
        reply = await self.send(method, path, body)
        data = await reply.body()
        if reply.status != 200:
            raise ValueError(f"{self.url}{path} answers {reply.status}: {data.decode('utf-8', 'replace')[:300]}")
        return json.loads(data)


class Reply(NamedTuple):
    """An answer of which status and headers are read. Whoever does not read its whole `body` closes it."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader  # where the body begins
    writer: asyncio.StreamWriter

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, whichever way its end is told."""
        if self.headers.get("transfer-encoding") != "chunked":
            while data := await self.reader.read(1 << 16):
                yield data
            return
        while size := int((await self.reader.readline()).split(b";")[0], 16):
            yield (await self.reader.readexactly(size + 2))[:-2]

    async def body(self) -> bytes:
        try:
            return b"".join([chunk async for chunk in self.chunks()])
        finally:
            self.writer.close()


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request to be: when, from the start of the traffic, and what."""

    at: float
    prompt: list[int]
    length: int
    seed: int


@dataclass(kw_only=True)
class Seen:
    """What the user of one request saw, in seconds."""

    status: int = 0  # of HTTP; 0: no answer, or one that broke off
    sent: float = 0.0
    first: float | None = None
    gaps: list[float] = field(default_factory=list)  # a token's, between two events with text
    end: float = 0.0
    tokens: int = 0
    cached: int = 0  # tokens of its prompt that the server had

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.first is not None and self.tokens > 0


def lengths(draw: random.Random, *, like: str, least: int, prompt: int, answer: int) -> tuple[int, int]:
    """Tokens of a prompt and its answer: fixed, or drawn, and those given are then the most."""
    if like == "fixed":
        return prompt, answer
    if like == "uniform":
        return draw.randint(least, prompt), draw.randint(least, answer)
    medians = [mean * math.exp(-(SHAREGPT_SIGMA**2) / 2) for mean in SHAREGPT.values()]
    drawn = [draw.lognormvariate(math.log(median), SHAREGPT_SIGMA) for median in medians]
    return tuple(max(4, min(most, round(length))) for length, most in zip(drawn, (prompt, answer), strict=True))


def plan(
    vocabulary: Sequence[int],
    *,
    requests: int,
    rate: float,
    like: str,
    least: int,
    prompt: int,
    answer: int,
    shared_prefix: int,
    seed: int,
) -> list[Ask]:
    """Requests of a Poisson process of `rate` a second; at infinity all come at once."""
    draw = random.Random(seed)
    prefix = draw.choices(vocabulary, k=shared_prefix)
    asks, at = [], 0.0
    for index in range(requests):
        own, length = lengths(draw, like=like, least=least, prompt=prompt, answer=answer)
        asks.append(Ask(at=at, prompt=prefix + draw.choices(vocabulary, k=own), length=length, seed=index))
        at += draw.expovariate(1.0) / rate
    return asks


async def read(target: Target, ask: Ask, *, model: str, temperature: float) -> Seen:
    """Send one request and read its stream."""
    body = {"model": model, "prompt": ask.prompt, "max_tokens": ask.length, "temperature": temperature}
    body |= {"seed": ask.seed, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    seen = Seen(sent=time.perf_counter())
    reply = None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reply = await target.send("POST", "/v1/completions", body)
            seen.status, newest, rest = reply.status, None, b""
            async for chunk in reply.chunks():
                *events, rest = (rest + chunk).split(b"\n\n")
                now = time.perf_counter()
                for event in events if seen.status == 200 else ():
                    if event == b"data: [DONE]":
                        continue
                    data = json.loads(event.removeprefix(b"data: "))
                    if "error" in data:
                        seen.status = 0
                    elif data["choices"]:
                        seen.first = seen.first or now
                        seen.gaps += [now - newest] if newest is not None else []
                        newest = now
                    if data.get("usage"):
                        seen.tokens = data["usage"]["completion_tokens"]
                        seen.cached = (data["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    except (OSError, EOFError, TimeoutError, ValueError, IndexError):  # refused, broken off, or no HTTP
        seen.status = 0
    finally:
        if reply is not None:
            reply.writer.close()
    seen.end = time.perf_counter()
    if seen.gaps and seen.tokens > 1:  # an event may have several tokens; it does not say how many
        seen.gaps = [gap * len(seen.gaps) / (seen.tokens - 1) for gap in seen.gaps]
    return seen


async def drive(
    target: Target, asks: Sequence[Ask], *, model: str, temperature: float, concurrency: int = 0
) -> list[Seen]:
    """Send every request at its time, whatever became of those before; or, with a concurrency, as so many users do."""
    start = time.perf_counter()
    places = asyncio.Semaphore(concurrency or len(asks))

    async def one(ask: Ask) -> Seen:
        await asyncio.sleep(ask.at - (time.perf_counter() - start))
        async with places:
            return await read(target, ask, model=model, temperature=temperature)

    return await asyncio.gather(*(one(ask) for ask in asks))


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds, each a value that occurred."""
    if not values:
        return None
    ordered = sorted(values)
    found = {f"p{p}": ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] for p in (50, 90, 95, 99)}
    return {name: 1e3 * value for name, value in {"mean": statistics.fmean(values), **found}.items()}


def summary(seen: Sequence[Seen], limits: dict[str, float]) -> dict:
    """Figures of one load. `limits` in milliseconds by the name of a figure; goodput counts who stayed within all."""
    good = [s for s in seen if s.ok]
    span = max(s.end for s in seen) - min(s.sent for s in seen)

    def within(s: Seen) -> bool:
        values = {"ttft": s.first - s.sent, "inter_token": statistics.fmean(s.gaps or [0.0]), "e2e": s.end - s.sent}
        return all(1e3 * values[name] <= limit for name, limit in limits.items())

    statuses: dict[str, int] = {}
    for s in seen:
        if not s.ok:
            statuses[str(s.status)] = statuses.get(str(s.status), 0) + 1
    return {
        "completed": len(good),
        "failed": statuses,
        "duration_s": span,
        "request_s": len(good) / span,
        "output_tok_s": sum(s.tokens for s in good) / span,
        "cached_tokens": sum(s.cached for s in good),
        "ttft_ms": spread([s.first - s.sent for s in good]),
        "inter_token_ms": spread([gap for s in good for gap in s.gaps]),
        "e2e_ms": spread([s.end - s.sent for s in good]),
        "goodput_request_s": sum(map(within, good)) / span if limits else None,
    }


def plot(loads: Sequence[dict], path: Path) -> None:
    """Draw latency against load, a panel for each kind of it."""
    panels = {"ttft_ms": "first token", "inter_token_ms": "between tokens", "e2e_ms": "whole answer"}
    with picture(path, size=(12, 4), panels=len(panels)) as (_, axes):
        for axis, (name, title) in zip(axes, panels.items(), strict=True):
            points = [(load["request_s"], load[name]) for load in loads if load[name]]
            for percentile in ("p50", "p90", "p99"):
                axis.plot([x for x, _ in points], [y[percentile] for _, y in points], marker="o", label=percentile)
            axis.set(title=title, xlabel="requests answered a second", ylabel="ms")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[0].legend()
