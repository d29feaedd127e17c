"""Hours in minutes: mixed, partly hostile traffic for a server, and whether it stays as it was.

    python generate.py --serve --kv-cache-gb 0.3 & python -m scripts.soak --pid $! --minutes 10

Users who stay, who leave in the midst of an answer, who do not read, who send rubbish, who want grammars, several
samples or more than there is, all at once. Afterwards nothing may run and no block of the cache may be in use; the
server's memory is read on the way (Linux).
"""

import asyncio
import json
import logging
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import cli
from scripts.traffic import SAMPLE_TEXT, Target

log = logging.getLogger("tachyon")

START_S = 300.0  # for a server to start, which may have to load and to compile
SETTLE_S = 10.0  # from the last user's leaving until nothing may be held
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, kw_only=True)
class Options:
    url: str = cli.option("http://127.0.0.1:8000", "the server")
    pid: int | None = cli.option(None, "its process, whose memory is read")
    minutes: float = cli.option(10.0, "how long the traffic lasts")
    users: int = cli.option(16, "requests at a time")
    new_tokens: int = cli.option(40, "tokens in an answer, at most")
    patience_s: float = cli.option(3.0, "how long those who leave, or do not read, are there at most")
    seed: int = cli.option(0, "of the traffic")
    json: bool = cli.option(False, "print one JSON document")

    def __post_init__(self) -> None:
        if self.minutes <= 0 or self.users < 1 or self.new_tokens < 1:
            raise ValueError("--minutes must be above 0, --users and --new-tokens at least 1")


@dataclass
class Record:
    answers: Counter[str] = field(default_factory=Counter)  # by kind of user and status
    events: int = 0  # or whole answers
    memory_mb: list[tuple[float, float]] = field(default_factory=list)  # seconds, resident set


def memory_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        raise ValueError(f"there is no process {pid} any more: the server has ended") from None
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def make_body(draw: random.Random, new_tokens: int) -> tuple[str, dict]:
    words = SAMPLE_TEXT.split()
    text = " ".join(draw.choices(words, k=draw.choice((3, 30, 150))))
    common = {
        "max_tokens": draw.randint(1, new_tokens),
        "temperature": draw.choice((0.0, 1.0)),
        "stream": draw.random() < 0.6,
    }
    extra = draw.choice(
        (
            {},
            {"n": draw.randint(2, 3)},
            {"stop": [" the", "\n"]},
            {"logprobs": 2},
            {"guided_regex": "[a-z ]{3,20}"},
            {"presence_penalty": 0.5, "repetition_penalty": 1.2, "top_k": 20, "min_p": 0.05},
            {"priority": draw.randint(-3, 3), "cache_salt": draw.choice("abc")},
        )
    )
    if draw.random() < 0.5:
        extra = {"logprobs": True, "top_logprobs": 2} if "logprobs" in extra else extra
        history = "You are a helpful assistant who answers briefly. " * 8
        return CHAT, {
            "messages": [{"role": "system", "content": history}, {"role": "user", "content": text}],
            **common,
            **extra,
        }
    return TEXT, {"prompt": text, **common, **extra}


async def stays(target: Target, draw: random.Random, options: Options, record: Record) -> int:
    path, body = make_body(draw, options.new_tokens)
    reply = await target.send("POST", path, body)
    data = await reply.body()
    record.events += max(data.count(b'"finish_reason"'), 1) if reply.status == 200 else 0
    return reply.status


async def leaves(target: Target, draw: random.Random, options: Options, record: Record) -> int:
    path, body = make_body(draw, options.new_tokens)
    sending = asyncio.create_task(target.send("POST", path, body | {"max_tokens": 500, "ignore_eos": True}))
    done, _ = await asyncio.wait([sending], timeout=draw.random() * options.patience_s)
    if not done:
        sending.cancel()
        return 0
    reply = sending.result()
    await reply.reader.read(draw.choice((1, 2000)))
    reply.writer.transport.abort()
    return reply.status


async def dawdles(target: Target, draw: random.Random, options: Options, record: Record) -> int:
    """Opens a stream, reads nothing for a while, and leaves."""
    body = {"prompt": "a", "n": 3, "max_tokens": options.new_tokens, "stream": True, "ignore_eos": True}
    reply = await target.send("POST", TEXT, body)
    reply.writer.transport.pause_reading()
    await asyncio.sleep(draw.random() * options.patience_s)
    reply.writer.transport.abort()
    return reply.status


async def errs(target: Target, draw: random.Random, options: Options, record: Record) -> int:
    reply = await target.send("POST", TEXT, {"prompt": "a"} | draw.choice(WRONG))
    json.loads(await reply.body())["error"]["message"]
    return reply.status


WRONG = (
    {"tools": [1]},
    {"temperature": -1},
    {"max_tokens": 10**7},
    {"guided_regex": "("},
    {"model": "none"},
    {"prompt": 7},
)
KINDS = {stays: 6, leaves: 2, dawdles: 1, errs: 1}


async def user(target: Target, draw: random.Random, options: Options, record: Record, until: float) -> None:
    while time.monotonic() < until:
        (kind,) = draw.choices(list(KINDS), weights=list(KINDS.values()))
        try:
            status = await kind(target, draw, options, record)
        except (OSError, EOFError, IndexError):
            status = -1
            await asyncio.sleep(0.1)
        record.answers[f"{kind.__name__} {status}"] += 1


async def figures(target: Target) -> dict[str, float]:
    """The server's gauges, by name."""
    text = (await (await target.send("GET", "/metrics")).body()).decode()
    found = re.findall(
        r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{.*\} (\S+)$", text, re.M
    )
    return {name: float(value) for name, value in found}


async def ready(target: Target, pid: int | None) -> None:
    """Waits for a server that `pid` is, and may have been started just now. OSError where nobody answers."""
    until = time.monotonic() + (0.0 if pid is None else START_S)
    while True:
        try:
            await target.ask("GET", "/health")
            return
        except OSError:
            if time.monotonic() > until:
                raise
        memory_mb(pid)  # ValueError where it has ended
        await asyncio.sleep(0.2)


async def soak(options: Options) -> dict:
    target, record = Target(url=options.url), Record()
    await ready(target, options.pid)
    start = time.monotonic()
    until = start + 60 * options.minutes
    users = [
        asyncio.create_task(user(target, random.Random(options.seed * 1000 + i), options, record, until))
        for i in range(options.users)
    ]
    while time.monotonic() < until:
        await asyncio.sleep(min(10.0, until - time.monotonic()))
        if options.pid is not None:
            record.memory_mb.append((round(time.monotonic() - start, 1), round(memory_mb(options.pid), 1)))
            log.info(
                f"{record.memory_mb[-1][0]:.0f} s: {record.answers.total()} requests, {record.memory_mb[-1][1]} MB"
            )
    await asyncio.gather(*users)
    quiet = time.monotonic() + SETTLE_S
    while any((after := await figures(target)).values()) and time.monotonic() < quiet:
        await asyncio.sleep(0.1)
    # The first fifth warms up: caches of tokens and grammars fill, and the allocator finds its size.
    settled = [mb for second, mb in record.memory_mb if second > 12 * options.minutes]
    return {
        "minutes": options.minutes,
        "users": options.users,
        "requests": record.answers.total(),
        "answers": dict(sorted(record.answers.items())),
        "events": record.events,
        "after": after,
        "memory_mb": record.memory_mb,
        "settled_mb": [settled[0], settled[-1]] if settled else None,
        "most_mb": max((mb for _, mb in record.memory_mb), default=None),
    }


def main(arguments: list[str]) -> None:
    parser = cli.Parser(prog="python -m scripts.soak", description=__doc__.split("\n\n")[0])
    cli.add_options(parser, Options)
    options = cli.take_options(Options, parser.parse_args(arguments))
    result = asyncio.run(soak(options))
    if options.json:
        cli.print_json(result)
    else:
        print(f"{result['requests']} requests of {result['users']} users in {result['minutes']:g} minutes")
        print(*(f"  {count:6} {kind}" for kind, count in result["answers"].items()), sep="\n")
        print(f"afterwards {result['after']}")
        if result["settled_mb"]:
            print("memory {:.0f} MB when warm, {:.0f} MB at the end".format(*result["settled_mb"]))
    if any(result["after"].values()):
        raise ValueError(f"the server still holds something: {result['after']}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
