"""Throughput of the serving engine, and what its users wait for.

    python -m scripts.bench_serving --offline --checkpoint random:qwen3-0.6b --compile --json

`--offline` runs the engine in this process on nano-vllm's benchmark: 256 prompts of random tokens, prompt and output
lengths uniform in 100..1024, temperature 0.6, nothing ends an answer early.

    python -m scripts.bench_serving --url http://127.0.0.1:8000 --rate 1 --rate 2 --rate 4 --plot load.png

`--url` is the users of a server of the OpenAI API, one load after the other.
"""

import asyncio
import logging
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import checkpoint
import cli
import hardware
from cache import KV_DTYPES, check_kv_dtype
from quant.linears import RECIPES
from sampling import SamplingParams
from scripts import traffic
from scripts.plots import check_plot
from serving.engine import Engine, EngineOptions
from serving.request import Request

if TYPE_CHECKING:
    from serving.runner import Runner

log = logging.getLogger("tachyon")


@dataclass(frozen=True, kw_only=True)
class Options:
    offline: bool = cli.option(False, "run the engine in this process, without HTTP")
    url: str | None = cli.option(None, "send requests to the server at this address, as http://127.0.0.1:8000")
    checkpoint: str = cli.option(checkpoint.DEFAULT_CHECKPOINT, "as for generate.py")
    requests: int = cli.option(256, "how many")
    min_len: int = cli.option(100, "tokens in a prompt, and in an answer, at least")
    max_len: int = cli.option(1024, "and at most")
    temperature: float = cli.option(0.6, "of all requests")
    seed: int = cli.option(0, "of lengths and prompts")
    repeats: int = cli.option(1, "runs, each with prompts of its own; the median is shown")
    compile: bool = cli.option(False, "as for generate.py")
    dtype: str = cli.option("bfloat16", "of weights and cache", choices=tuple(hardware.DTYPES))
    quantize: str | None = cli.option(None, "as for generate.py", choices=tuple(RECIPES))
    kv_dtype: str | None = cli.option(None, "as for generate.py", choices=tuple(KV_DTYPES))
    device: str | None = cli.option(None, "cpu, cuda, cuda:N or mps (default: the best there is)")
    rate: tuple[str, ...] = cli.option(
        (), "--url: requests a second, as they come by chance (default: all at once); several times for several loads"
    )
    lengths: str = cli.option("sharegpt", "--url: of prompts and answers", choices=("sharegpt", "fixed"))
    prompt_len: int = cli.option(1024, "--url: tokens in a prompt; with --lengths sharegpt, at most")
    new_tokens: int = cli.option(1024, "--url: tokens in an answer; with --lengths sharegpt, at most")
    shared_prefix: int = cli.option(0, "--url: tokens that all prompts begin with, beside their own")
    ttft_limit_ms: float | None = cli.option(None, "--url: goodput counts requests whose first token came within this")
    inter_token_limit_ms: float | None = cli.option(None, "--url: and whose tokens came so fast on average")
    e2e_limit_ms: float | None = cli.option(None, "--url: and that were done within this")
    api_key: str | None = cli.option(None, "--url: the server's key")
    plot: Path | None = cli.option(None, "--url: draw latency against load into this .png, .svg or .pdf")
    json: bool = cli.option(False, "print one JSON document")

    def __post_init__(self) -> None:
        if self.offline == (self.url is not None):
            raise ValueError("give --offline or --url URL, one of them")
        if self.url is not None and not re.match("https?://[^/]", self.url):
            raise ValueError(f"--url {self.url} is no address; write http://HOST:PORT")
        for rate in self.rate:
            if not re.fullmatch(r"\d+(\.\d*)?|\.\d+|inf", rate) or float(rate) <= 0:
                raise ValueError(f"--rate must be a number above 0; got {rate}")
        for name in ("prompt_len", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}")
        if self.shared_prefix < 0:
            raise ValueError(f"--shared-prefix must be at least 0; got {self.shared_prefix}")
        for name in ("requests", "min_len", "max_len", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}")
        if self.min_len > self.max_len:
            raise ValueError(f"--min-len {self.min_len} is more than --max-len {self.max_len}")


def workload(options: Options, vocab_size: int, *, run: int, name: str = "") -> list[Request]:
    """The requests of a run: the same lengths in each, other prompts, so that no run finds what one before left.

    They are drawn in the order in which nano-vllm's bench.py draws its own, so that seed 0 gives the same.
    """
    draw = random.Random(options.seed)
    last = min(10000, vocab_size - 1)
    lengths = options.min_len, options.max_len
    prompts = [[draw.randint(0, last) for _ in range(draw.randint(*lengths))] for _ in range(options.requests)]
    prompts = [[(token + run) % (last + 1) for token in prompt] for prompt in prompts]
    return [
        Request(
            id=f"{name}{index}",
            prompt=prompt,
            params=SamplingParams(temperature=options.temperature, seed=index),
            max_new_tokens=draw.randint(*lengths),
        )
        for index, prompt in enumerate(prompts)
    ]


def run_offline(engine: Engine, requests: list[Request]) -> dict:
    """One run's figures. A request that failed is an error: its tokens would be missing from the sum."""
    prompt_tokens = sum(len(request.prompt) for request in requests)
    tokens, first, last_of = 0, {}, {}
    before, start = engine.stats(), time.perf_counter()
    for output in engine.run(requests):
        now = time.perf_counter() - start
        if output.finish_reason not in (None, "length"):
            raise ValueError(f"request {output.request_id} ended by {output.finish_reason}: {output.error}")
        tokens += len(output.token_ids)
        first.setdefault(output.request_id, now)
        last_of[output.request_id] = now
    wall = time.perf_counter() - start
    expected = sum(request.max_new_tokens for request in requests)
    if tokens != expected:
        raise ValueError(f"the engine made {tokens} tokens where {expected} were asked for")
    return {
        "wall_s": wall,
        "prompt_tokens": prompt_tokens,
        "output_tokens": tokens,
        "output_tok_s": tokens / wall,
        "total_tok_s": (tokens + prompt_tokens) / wall,
        "mean_ttft_s": sum(first.values()) / len(first),
        "mean_finished_s": sum(last_of.values()) / len(last_of),
        "preemptions": engine.stats().preemptions - before.preemptions,
    }


def offline(options: Options, engine_options: EngineOptions) -> dict:
    from serving.runner import make_runner

    device = hardware.pick_device(options.device)
    check_kv_dtype(options.kv_dtype, device)
    start = time.perf_counter()
    source = checkpoint.open_checkpoint(options.checkpoint)
    if 2 * options.max_len > source.config.max_seq_len:
        raise ValueError(f"two times --max-len {options.max_len} is more than the {source.config.max_seq_len} it holds")
    dtype = hardware.DTYPES[options.dtype]
    model = checkpoint.load_model(source, device=device, dtype=dtype, quantize=options.quantize)
    hardware.synchronize(device)
    load_s = time.perf_counter() - start
    start = time.perf_counter()
    runner: Runner = make_runner(model, engine_options, kv_dtype=options.kv_dtype, compile=options.compile)
    engine = Engine(runner, options=engine_options)
    compile_s = time.perf_counter() - start
    # Whatever is compiled, captured or loaded on first use is so before the clock starts.
    for _ in engine.run(workload(options, runner.vocab_size, run=options.repeats, name="warm-up")):
        pass
    runs = [
        run_offline(engine, workload(options, runner.vocab_size, run=repeat, name=f"{repeat}-"))
        for repeat in range(options.repeats)
    ]
    middle = sorted(runs, key=lambda run: run["output_tok_s"])[len(runs) // 2]
    return {
        "checkpoint": options.checkpoint,
        **middle,
        "runs": [run["output_tok_s"] for run in runs],
        **{name: getattr(options, name) for name in ("requests", "min_len", "max_len", "temperature", "seed")},
        "max_running": runner.max_running,
        "n_blocks": runner.n_blocks,
        "block_size": runner.block_size,
        "compile": options.compile,
        "load_s": load_s,
        "compile_s": compile_s,
        "peak_memory_gb": hardware.peak_memory_bytes(device) / 1e9,
        "device": hardware.device_name(device),
        "dtype": options.dtype,
        "quantize": options.quantize or source.quantized,
        "kv_dtype": options.kv_dtype,
    }


def show_offline(result: dict) -> Iterator[str]:
    yield f"{result['checkpoint']} on {result['device']}, {result['requests']} requests"
    made = f"{result['output_tokens']} tokens in {result['wall_s']:.2f} s"
    yield f"output         {result['output_tok_s']:9.0f} tok/s ({made})"
    yield f"with prompts   {result['total_tok_s']:9.0f} tok/s ({result['prompt_tokens']} prompt tokens)"
    yield f"first token    {result['mean_ttft_s'] * 1e3:9.0f} ms on average, all requests arriving at once"
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
            asks = traffic.plan(
                sorted(set(vocabulary)),
                requests=options.requests,
                rate=float(rate),
                like=options.lengths,
                prompt=options.prompt_len,
                answer=options.new_tokens,
                shared_prefix=options.shared_prefix,
                seed=options.seed + number,  # no load finds the prompts of the one before in the cache
            )
            seen = await traffic.drive(target, asks, model=model, temperature=options.temperature)
            loads.append({"rate": float(rate) if rate != "inf" else None, **traffic.summary(seen, limits)})
            log.info(f"{rate} requests a second: {loads[-1]['completed']} of {len(asks)} answered")
        return model

    model = asyncio.run(run())
    named = ("url", "requests", "lengths", "prompt_len", "new_tokens", "shared_prefix", "temperature", "seed")
    return {"model": model, **{name: getattr(options, name) for name in named}, "limits_ms": limits, "loads": loads}


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
