"""Throughput of the serving engine, and what its users wait for.

    python -m scripts.bench_serving --offline --checkpoint random:qwen3-0.6b --compile --json

`--offline` runs the engine in this process on nano-vllm's benchmark: 256 prompts of random tokens, prompt and output
lengths uniform in 100..1024, temperature 0.6, nothing ends an answer early. With `--shared-prefix` it also shows what
the prefix cache saves, and with `--concurrency 1` what one user gets.

    python -m scripts.bench_serving --url http://127.0.0.1:8000 --rate 1 --rate 2 --rate 4 --plot load.png

`--url` is the users of a server of the OpenAI API, one load after the other.
"""

import asyncio
import dataclasses
import logging
import random
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import cli
import hardware
from sampling import SamplingParams
from scripts import traffic
from scripts.bench import ModelOptions
from scripts.plots import check_plot
from scripts.traffic import Seen
from serving.engine import Engine, EngineOptions
from serving.request import Request

log = logging.getLogger("tachyon")

ONLY_URL = ("rate", "ttft_limit_ms", "inter_token_limit_ms", "e2e_limit_ms", "api_key", "plot")
ONLY_OFFLINE = ("checkpoint", "compile", "dtype", "quantize", "kv_dtype", "device", "repeats")


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    offline: bool = cli.option(False, "run the engine in this process, without HTTP")
    url: str | None = cli.option(None, "send requests to the server at this address, as http://127.0.0.1:8000")
    requests: int = cli.option(256, "how many")
    concurrency: int = cli.option(0, "so many users, each with one request at a time; 0: no request waits for another")
    lengths: str | None = cli.option(
        None,
        "of prompts and answers: uniform in --min-len to --max-len (--offline's default), sharegpt (--url's), fixed",
        choices=traffic.LIKE,
    )
    min_len: int = cli.option(100, "uniform: tokens in a prompt, and in an answer, at least")
    max_len: int = cli.option(1024, "and at most")
    prompt_len: int = cli.option(1024, "fixed: tokens in a prompt; sharegpt: at most")
    new_tokens: int = cli.option(1024, "fixed: tokens in an answer; sharegpt: at most")
    shared_prefix: int = cli.option(0, "tokens that all prompts begin with, beside their own")
    temperature: float = cli.option(0.6, "of all requests")
    seed: int = cli.option(0, "of lengths and prompts")
    repeats: int = cli.option(1, "runs, each with prompts of its own; the median is shown")
    rate: tuple[str, ...] = cli.option(
        (), "--url: requests a second, as they come by chance (default: all at once); several times for several loads"
    )
    ttft_limit_ms: float | None = cli.option(None, "--url: goodput counts requests whose first token came within this")
    inter_token_limit_ms: float | None = cli.option(None, "--url: and whose tokens came so fast on average")
    e2e_limit_ms: float | None = cli.option(None, "--url: and that were done within this")
    api_key: str | None = cli.option(None, "--url: the server's key")
    plot: Path | None = cli.option(None, "--url: draw latency against load into this .png, .svg or .pdf")
    json: bool = cli.option(False, "print one JSON document")

    def __post_init__(self) -> None:
        if self.offline == (self.url is not None):
            raise ValueError("give --offline or --url URL, one of them")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ONLY_URL if self.offline else ONLY_OFFLINE:
            if getattr(self, name) != defaults[name]:
                mode = "--offline" if self.offline else "--url"
                raise ValueError(f"--{name.replace('_', '-')} does not go with {mode}; leave it out")
        if self.url is not None and not re.match("https?://[^/]", self.url):
            raise ValueError(f"--url {self.url} is no address; write http://HOST:PORT")
        for rate in self.rate:
            if not re.fullmatch(r"\d+(\.\d*)?|\.\d+|inf", rate) or float(rate) <= 0:
                raise ValueError(f"--rate must be a number above 0; got {rate}")
        least = dict.fromkeys(("requests", "min_len", "max_len", "prompt_len", "new_tokens", "repeats"), 1)
        for name, value in (least | {"concurrency": 0, "shared_prefix": 0}).items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {value}; got {getattr(self, name)}")
        if self.min_len > self.max_len:
            raise ValueError(f"--min-len {self.min_len} is more than --max-len {self.max_len}")
        if self.rate and self.concurrency:
            raise ValueError("--rate is of requests that come by chance, --concurrency of users that wait: give one")

    @property
    def like(self) -> str:
        return self.lengths or ("uniform" if self.offline else "sharegpt")

    @property
    def longest(self) -> int:
        """Tokens of a sequence at most."""
        own = 2 * self.max_len if self.like == "uniform" else self.prompt_len + self.new_tokens
        return self.shared_prefix + own

    def plan(self, vocabulary: Sequence[int], *, rate: float, seed: int) -> list[traffic.Ask]:
        uniform = self.like == "uniform"
        return traffic.plan(
            vocabulary,
            requests=self.requests,
            rate=rate,
            like=self.like,
            least=self.min_len,
            prompt=self.max_len if uniform else self.prompt_len,
            answer=self.max_len if uniform else self.new_tokens,
            shared_prefix=self.shared_prefix,
            seed=seed,
        )


def named_options(options: Options) -> dict:
    """What of a run the figures depend on."""
    names = ("requests", "concurrency", "shared_prefix", "temperature", "seed")
    lengths = ("min_len", "max_len") if options.like == "uniform" else ("prompt_len", "new_tokens")
    return {"lengths": options.like, **{name: getattr(options, name) for name in (*lengths, *names)}}


def workload(options: Options, vocab_size: int, *, run: int, name: str = "", apart: bool = False) -> list[Request]:
    """The requests of a run: of like lengths in each, other prompts, so that no run finds what one before left.

    Uniform lengths are drawn in the order in which nano-vllm's bench.py draws its own, so that seed 0 gives the same.
    `apart` keeps requests from finding each other's prefixes.
    """
    draw = random.Random(options.seed)
    last = min(10000, vocab_size - 1)
    if options.like == "uniform":
        lengths = options.min_len, options.max_len
        prompts = [[draw.randint(0, last) for _ in range(draw.randint(*lengths))] for _ in range(options.requests)]
        answers = [draw.randint(*lengths) for _ in prompts]
        prefix = random.Random(options.seed + run).choices(range(last + 1), k=options.shared_prefix)
        prompts = [prefix + [(token + run) % (last + 1) for token in prompt] for prompt in prompts]
    else:
        asks = options.plan(range(last + 1), rate=float("inf"), seed=options.seed + run)
        prompts, answers = [ask.prompt for ask in asks], [ask.length for ask in asks]
    return [
        Request(
            id=f"{name}{index}",
            prompt=prompt,
            params=SamplingParams(temperature=options.temperature, seed=index),
            max_new_tokens=answer,
            salt=f"{name}{index}" if apart else None,
        )
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def run_offline(engine: Engine, requests: Sequence[Request], concurrency: int) -> dict:
    """One run's figures. A request that failed is an error: its tokens would be missing from the sum."""
    left, running = deque(requests), 0
    seen: dict[str, Seen] = {}
    newest: dict[str, float] = {}
    before, start = engine.stats(), time.perf_counter()
    while left or running:
        while left and (running < concurrency or not concurrency):
            request = left.popleft()
            seen[request.id] = Seen(status=200, sent=time.perf_counter())
            engine.add(request)
            running += 1
        for output in engine.step():
            now, one = time.perf_counter(), seen[output.request_id]
            if output.finish_reason not in (None, "length"):
                raise ValueError(f"request {output.request_id} ended by {output.finish_reason}: {output.error}")
            if one.first is None:
                one.first, one.cached = now, output.cached_tokens
            elif output.token_ids:
                count = len(output.token_ids)
                one.gaps += [(now - newest[output.request_id]) / count] * count
            newest[output.request_id] = one.end = now
            one.tokens += len(output.token_ids)
            running -= output.finish_reason is not None
    wall = time.perf_counter() - start
    tokens, prompt_tokens = sum(one.tokens for one in seen.values()), sum(len(r.prompt) for r in requests)
    expected = sum(request.max_new_tokens for request in requests)
    if tokens != expected:
        raise ValueError(f"the engine made {tokens} tokens where {expected} were asked for")
    summary = traffic.summary(list(seen.values()), {})
    return {
        "wall_s": wall,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(one.cached for one in seen.values()),
        "output_tokens": tokens,
        "output_tok_s": tokens / wall,
        "total_tok_s": (tokens + prompt_tokens) / wall,
        **{name: summary[name] for name in ("ttft_ms", "inter_token_ms", "e2e_ms")},
        "preemptions": engine.stats().preemptions - before.preemptions,
    }


def run_and_compare(engine: Engine, options: Options, vocab_size: int, *, run: int) -> dict:
    """A run's figures; with a shared prefix, beside the first token's times of a run that may not share it."""
    if not options.shared_prefix:
        return run_offline(engine, workload(options, vocab_size, run=run, name=f"{run}-"), options.concurrency)
    apart = workload(options, vocab_size, run=run, name=f"{run}-apart-", apart=True)
    without = run_offline(engine, apart, options.concurrency)
    requests = workload(options, vocab_size, run=run, name=f"{run}-")
    first = dataclasses.replace(requests[0], id=f"{run}-first", max_new_tokens=1)
    first.prompt = [*requests[0].prompt[: options.shared_prefix], 0]
    run_offline(engine, [first], 1)  # leaves the prefix in the cache
    return {**run_offline(engine, requests, options.concurrency), "ttft_apart_ms": without["ttft_ms"]}


def offline(options: Options, engine_options: EngineOptions) -> dict:
    from serving.runner import make_runner

    model, load_s, quantize = options.load(longest=options.longest)
    start = time.perf_counter()
    runner = make_runner(model, engine_options, kv_dtype=options.kv_dtype, compile=options.compile)
    # All of a benchmark's requests may wait.
    engine = Engine(runner, options=dataclasses.replace(engine_options, max_queued=0, max_queued_tokens=0))
    compile_s = time.perf_counter() - start
    # Whatever is compiled, captured or loaded on first use is so before the clock starts.
    run_and_compare(engine, options, runner.vocab_size, run=options.repeats)
    runs = [run_and_compare(engine, options, runner.vocab_size, run=run) for run in range(options.repeats)]
    middle = sorted(runs, key=lambda run: run["output_tok_s"])[len(runs) // 2]
    return {
        "checkpoint": options.checkpoint,
        **middle,
        "runs": [run["output_tok_s"] for run in runs],
        **named_options(options),
        "max_running": runner.max_running,
        "n_blocks": runner.n_blocks,
        "block_size": runner.block_size,
        "compile": options.compile,
        "load_s": load_s,
        "compile_s": compile_s,
        "peak_memory_gb": hardware.peak_memory_bytes(model.norm.weight.device) / 1e9,
        "device": hardware.device_name(model.norm.weight.device),
        "dtype": options.dtype,
        "quantize": quantize,
        "kv_dtype": options.kv_dtype,
    }


def show_offline(result: dict) -> Iterator[str]:
    yield f"{result['checkpoint']} on {result['device']}, {result['requests']} requests"
    made = f"{result['output_tokens']} tokens in {result['wall_s']:.2f} s"
    yield f"output         {result['output_tok_s']:9.0f} tok/s ({made})"
    yield f"with prompts   {result['total_tok_s']:9.0f} tok/s ({result['prompt_tokens']} prompt tokens)"
    for name, text in {"ttft_ms": "first token", "inter_token_ms": "between tokens", "e2e_ms": "whole answer"}.items():
        if (spread := result[name]) is not None:
            more = ", ".join(f"{p} {spread[p]:.3f}" for p in ("p50", "p90", "p99"))
            yield f"{text:14} {spread['mean']:9.3f} ms on average; {more}"
    if "ttft_apart_ms" in result:
        with_it, without = result["ttft_ms"]["p50"], result["ttft_apart_ms"]["p50"]
        yield (
            f"shared prefix  {without / with_it:9.2f} times sooner (medians): the first token after {with_it:.1f} ms "
            f"with its {result['shared_prefix']} tokens cached, {without:.1f} ms without"
        )
    yield f"preemptions    {result['preemptions']:9}"
    yield f"peak memory    {result['peak_memory_gb']:9.2f} GB, {result['n_blocks']} blocks of {result['block_size']}"


def online(options: Options) -> dict:
    """The figures of each load on a running server."""
    target = traffic.Target(url=options.url, api_key=options.api_key)
    limits = {name: getattr(options, f"{name}_limit_ms") for name in ("ttft", "inter_token", "e2e")}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    loads = []

    async def run() -> str:
        model = (await target.ask("GET", "/v1/models"))["data"][0]["id"]
        vocabulary = (await target.ask("POST", "/tokenize", {"model": model, "prompt": traffic.SAMPLE_TEXT}))["tokens"]
        for number, rate in enumerate(options.rate or ("inf",)):
            # No load finds the prompts of the one before in the cache.
            asks = options.plan(sorted(set(vocabulary)), rate=float(rate), seed=options.seed + number)
            seen = await traffic.drive(
                target, asks, model=model, temperature=options.temperature, concurrency=options.concurrency
            )
            loads.append({"rate": float(rate) if rate != "inf" else None, **traffic.summary(seen, limits)})
            log.info(f"{rate} requests a second: {loads[-1]['completed']} of {len(asks)} answered")
        return model

    model = asyncio.run(run())
    return {"model": model, "url": options.url, **named_options(options), "limits_ms": limits, "loads": loads}


def show_online(result: dict) -> Iterator[str]:
    yield f"{result['model']} at {result['url']}, {result['requests']} requests for each load"
    yield "  rate  answered  req/s  good/s  tok/s | ms to the first token   | ms between tokens     | ms to the end"
    yield "                                       |   p50     p90     p99   |   p50    p90    p99   |    p50      p99"
    for load in result["loads"]:
        rate = "all" if load["rate"] is None else f"{load['rate']:g}"
        good = "-" if load["goodput_request_s"] is None else f"{load['goodput_request_s']:.2f}"
        line = f"{rate:>6} {load['completed']:9} {load['request_s']:6.2f} {good:>7} {load['output_tok_s']:6.0f} |"
        if load["completed"]:
            first, whole = load["ttft_ms"], load["e2e_ms"]
            between = load["inter_token_ms"] or dict.fromkeys(first, 0.0)  # of answers of one token
            line += "".join(f"{first[p]:7.0f} " for p in ("p50", "p90", "p99")) + " |"
            line += "".join(f"{between[p]:6.1f} " for p in ("p50", "p90", "p99")) + "  |"
            line += "".join(f"{whole[p]:8.0f} " for p in ("p50", "p99"))
        yield line + (f" failed: {load['failed']}" if load["failed"] else "")


def main(arguments: list[str]) -> None:
    parser = cli.Parser(prog="python -m scripts.bench_serving", description=__doc__.split("\n\n")[0])
    cli.add_options(parser, Options)
    cli.add_options(parser, EngineOptions)
    parsed = parser.parse_args(arguments)
    options, engine_options = cli.take_options(Options, parsed), cli.take_options(EngineOptions, parsed)
    if options.plot is not None:
        check_plot(options.plot)
    if not options.offline and engine_options != EngineOptions():
        raise ValueError("the engine's options are those of --offline; a server at --url has its own")
    if options.offline:
        checkpoint.cache_dir()  # holds what the compiled code needs: fails now rather than after the work
        result = offline(options, engine_options)
    else:
        result = online(options)
    if options.plot is not None:
        traffic.plot(result["loads"], options.plot)
    if options.json:
        cli.print_json(result)
    else:
        print(*(show_offline if options.offline else show_online)(result), sep="\n")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
