"""Throughput of the serving engine, and what its users wait for.

    python -m scripts.bench_serving --offline --checkpoint random:qwen3-0.6b --compile --json

`--offline` runs the engine in this process on nano-vllm's benchmark: 256 prompts of random tokens, prompt and output
lengths uniform in 100..1024, temperature 0.6, nothing ends an answer early.
"""

import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import checkpoint
import cli
import hardware
from cache import KV_DTYPES, check_kv_dtype
from quant.linears import RECIPES
from sampling import SamplingParams
from serving.engine import Engine, EngineOptions
from serving.request import Request

if TYPE_CHECKING:
    from serving.runner import Runner


@dataclass(frozen=True, kw_only=True)
class Options:
    offline: bool = cli.option(False, "run the engine in this process, without HTTP")
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
    json: bool = cli.option(False, "print one JSON document")

    def __post_init__(self) -> None:
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


def main(arguments: list[str]) -> None:
    parser = cli.Parser(prog="python -m scripts.bench_serving", description=__doc__.split("\n\n")[0])
    cli.add_options(parser, Options)
    cli.add_options(parser, EngineOptions)
    parsed = parser.parse_args(arguments)
    options, engine_options = cli.take_options(Options, parsed), cli.take_options(EngineOptions, parsed)
    if not options.offline:
        raise ValueError("say --offline")
    checkpoint.cache_dir()  # holds what the compiled code needs: fails now rather than after the work
    result = offline(options, engine_options)
    if options.json:
        cli.print_json(result)
    else:
        print(*show_offline(result), sep="\n")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
