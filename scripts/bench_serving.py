"""Throughput of the serving engine, and what its users wait for.

    python -m scripts.bench_serving --offline --checkpoint random:qwen3-0.6b --compile --json
    python -m scripts.bench_serving --url http://127.0.0.1:8000 --rate 1,2,4,8 --lengths sharegpt-like --plot load.png

`--offline` runs the engine in this process on nano-vllm's benchmark: 256 prompts of random tokens, prompt and output
lengths uniform in 100..1024, temperature 0.6, nothing ends an answer early. `--url` asks the same of a server that
runs already, ours or another of the OpenAI API, over HTTP.
"""

import dataclasses
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
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
from scripts.plots import check_plot, picture
from scripts.traffic import Lengths, Record, Traffic
from serving.engine import Engine, EngineOptions
from serving.request import Request

if TYPE_CHECKING:
    from serving.runner import Runner

REQUESTS = 256
OF_URL = ("url", "rate", "duration", "api_key", "mixed", "give_up_s", "plot")  # options without a meaning offline ...
OF_OFFLINE = ("offline", "checkpoint", "repeats", "compile", "dtype", "quantize", "kv_dtype", "device")  # ... and else


@dataclass(frozen=True, kw_only=True)
class Options:
    offline: bool = cli.option(False, "run the engine in this process, without HTTP")
    url: str | None = cli.option(None, "measure the server there, as http://127.0.0.1:8000")
    requests: int | None = cli.option(None, f"how many (default: {REQUESTS}, or as many as come in --duration)")
    duration: float | None = cli.option(None, "seconds in which requests are sent")
    rate: str = cli.option("0", "requests a second on average, coming at random; 0: all at once; or a list, as 1,2,4,8")
    concurrency: int = cli.option(0, "so many users, each with one request at a time; 0: requests wait for no other")
    lengths: str = cli.option(
        "uniform:100:1024",
        "tokens of prompts and answers: fixed:PROMPT:ANSWER, uniform:LEAST:MOST (of both) or sharegpt-like",
    )
    shared_prefix: int = cli.option(0, "tokens that all prompts begin with, before those of --lengths")
    mixed: bool = cli.option(False, "vary what requests ask for; some leave early, some are wrong: for endurance")
    vocab_size: int = cli.option(10001, "prompts are drawn from so many tokens, or from all that the model knows")
    temperature: float = cli.option(0.6, "of all requests")
    seed: int = cli.option(0, "of lengths, prompts and arrivals")
    limit_ttft_ms: float | None = cli.option(None, "goodput counts answers whose first token came so soon ...")
    limit_itl_ms: float | None = cli.option(None, "... and whose later tokens took so long each on average, or less")
    give_up_s: float = cli.option(600.0, "seconds after which we wait no more for a whole answer")
    api_key: str | None = cli.option(None, "the server's, if it wants one")
    plot: Path | None = cli.option(None, "draw latency against the rates to this file (.png, .svg, .pdf)")
    checkpoint: str = cli.option(checkpoint.DEFAULT_CHECKPOINT, "as for generate.py")
    repeats: int = cli.option(1, "runs, each with prompts of its own; the median is shown")
    compile: bool = cli.option(False, "as for generate.py")
    dtype: str = cli.option("bfloat16", "of weights and cache", choices=tuple(hardware.DTYPES))
    quantize: str | None = cli.option(None, "as for generate.py", choices=tuple(RECIPES))
    kv_dtype: str | None = cli.option(None, "as for generate.py", choices=tuple(KV_DTYPES))
    device: str | None = cli.option(None, "cpu, cuda, cuda:N or mps (default: the best there is)")
    json: bool = cli.option(False, "print one JSON document")

    def __post_init__(self) -> None:
        if self.offline == (self.url is not None):
            raise ValueError("say --offline or --url ADDRESS")
        for name in OF_URL if self.offline else OF_OFFLINE:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default and name != "offline":
                mode = "--offline" if self.offline else "--url"
                raise ValueError(f"--{name.replace('_', '-')} has no meaning with {mode}; leave it out")
        for name, least in {"requests": 1, "repeats": 1, "vocab_size": 1, "concurrency": 0, "shared_prefix": 0}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got {value}")
        for name in ("duration", "give_up_s", "limit_ttft_ms", "limit_itl_ms"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0; got {value}")
        if not self.temperature >= 0:
            raise ValueError(f"--temperature must be at least 0; got {self.temperature}")
        rates = self.rates
        if self.concurrency and rates != [0.0]:
            raise ValueError("--rate and --concurrency are two ways to send requests; choose one")
        if self.duration is not None and not self.concurrency and 0.0 in rates:
            raise ValueError("--duration needs --rate or --concurrency: all at once would have no end")
        if self.plot is not None and len(rates) < 2:
            raise ValueError("--plot draws latency against load; give several rates, as --rate 1,2,4,8")
        Lengths(self.lengths)

    @property
    def rates(self) -> list[float]:
        try:
            rates = [float(part) for part in self.rate.split(",")]
        except ValueError:
            rates = [-1.0]
        if not all(0 <= rate < float("inf") for rate in rates):
            raise ValueError(f"--rate must be requests a second, or several with commas between; got {self.rate!r}")
        return rates

    def summarize(self, records: Sequence[Record], wall_s: float) -> dict:
        limits = [None if ms is None else ms / 1e3 for ms in (self.limit_ttft_ms, self.limit_itl_ms)]
        return traffic.summarize(records, wall_s, limit_ttft_s=limits[0], limit_token_s=limits[1])

    def traffic(self, most: int | None = None) -> Traffic:
        """For a model that knows so many tokens."""
        return Traffic(
            Lengths(self.lengths),
            count=self.requests or REQUESTS,
            vocab_size=min(self.vocab_size, most or self.vocab_size),
            shared_prefix=self.shared_prefix,
            seed=self.seed,
        )

    @property
    def shown(self) -> dict:
        """What of a run the figures depend on."""
        names = ("concurrency", "lengths", "shared_prefix", "temperature", "seed", "limit_ttft_ms", "limit_itl_ms")
        return {name: getattr(self, name) for name in names}


# ---- In this process -------------------------------------------------------------------------------------------------


def to_requests(
    asks: Iterable[tuple[list[int], int]], options: Options, *, name: str, shared: bool = True
) -> list[Request]:
    """Unless they are `shared`, prefixes are kept apart by salts."""
    return [
        Request(
            id=f"{name}{index}",
            prompt=prompt,
            params=SamplingParams(temperature=options.temperature, seed=index),
            max_new_tokens=answer,
            salt=None if shared else f"{name}{index}",
        )
        for index, (prompt, answer) in enumerate(asks)
    ]


def run_engine(engine: Engine, requests: Sequence[Request], options: Options) -> dict:
    """One run's figures. A request that failed is an error: its tokens would be missing from the sum."""
    left, running = deque(requests), 0
    records: dict[str, Record] = {}
    before, start = engine.stats(), time.perf_counter()
    while left or running:
        while left and (running < options.concurrency or not options.concurrency):
            request = left.popleft()
            records[request.id] = Record(sent=time.perf_counter(), prompt_tokens=len(request.prompt))
            engine.add(request)
            running += 1
        for output in engine.step():
            if output.finish_reason not in (None, "length"):
                raise ValueError(f"request {output.request_id} ended by {output.finish_reason}: {output.error}")
            record, now = records[output.request_id], time.perf_counter()
            record.tokens += len(output.token_ids)
            record.cached_tokens = max(record.cached_tokens, output.cached_tokens)
            record.times += [now] if output.token_ids else []
            if output.finish_reason is not None:
                record.end = now
                running -= 1
    figures = options.summarize(list(records.values()), time.perf_counter() - start)
    expected = sum(request.max_new_tokens for request in requests)
    if figures["output_tokens"] != expected:
        raise ValueError(f"the engine made {figures['output_tokens']} tokens where {expected} were asked for")
    return {**figures, "preemptions": engine.stats().preemptions - before.preemptions}


def one_run(engine: Engine, load: Traffic, options: Options, number: int) -> dict:
    """A run's figures; with a shared prefix, also the first token's time where nothing is shared."""
    if not options.shared_prefix:
        return run_engine(engine, to_requests(load.run(number), options, name=f"{number}-"), options)
    apart = run_engine(engine, to_requests(load.run(number), options, name=f"{number}-apart-", shared=False), options)
    first = to_requests([([*load.prefix(number), 0], 1)], options, name=f"{number}-first-")
    run_engine(engine, first, options)  # leaves the prefix in the cache
    figures = run_engine(engine, to_requests(load.run(number), options, name=f"{number}-"), options)
    return {**figures, "ttft_not_cached_s": apart["ttft_s"]}


def offline(options: Options, engine_options: EngineOptions) -> dict:
    from serving.runner import make_runner

    device = hardware.pick_device(options.device)
    check_kv_dtype(options.kv_dtype, device)
    start = time.perf_counter()
    source = checkpoint.open_checkpoint(options.checkpoint)
    longest, most = Lengths(options.lengths).longest + options.shared_prefix, source.config.max_seq_len
    if longest > most:
        raise ValueError(
            f"--lengths {options.lengths} make sequences of up to {longest} tokens; the model holds {most}"
        )
    dtype = hardware.DTYPES[options.dtype]
    model = checkpoint.load_model(source, device=device, dtype=dtype, quantize=options.quantize)
    hardware.synchronize(device)
    load_s = time.perf_counter() - start
    start = time.perf_counter()
    runner: Runner = make_runner(model, engine_options, kv_dtype=options.kv_dtype, compile=options.compile)
    # A benchmark's own requests may all wait.
    engine = Engine(runner, options=dataclasses.replace(engine_options, max_queued=0, max_queued_tokens=0))
    compile_s = time.perf_counter() - start
    load = options.traffic(runner.vocab_size)
    # Whatever is compiled, captured or loaded on first use is so before the clock starts.
    one_run(engine, load, options, options.repeats)
    runs = [one_run(engine, load, options, number) for number in range(options.repeats)]
    middle = sorted(runs, key=lambda run: run["output_tok_s"])[len(runs) // 2]
    return {
        "checkpoint": options.checkpoint,
        "requests": options.requests or REQUESTS,
        **middle,
        "runs": [run["output_tok_s"] for run in runs],
        **options.shown,
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
    yield from traffic.show(result)
    if "ttft_not_cached_s" in result:
        with_ms, without_ms = result["ttft_s"]["p50"] * 1e3, result["ttft_not_cached_s"]["p50"] * 1e3
        yield (
            f"shared prefix  {without_ms / with_ms:9.2f} times sooner: first token after {with_ms:.1f} ms with the "
            f"{result['shared_prefix']} tokens cached, {without_ms:.1f} ms without (medians)"
        )
    yield f"preemptions    {result['preemptions']:9}"
    yield f"peak memory    {result['peak_memory_gb']:9.2f} GB, {result['n_blocks']} blocks of {result['block_size']}"


# ---- Over HTTP -------------------------------------------------------------------------------------------------------


def over_http(options: Options) -> dict:
    """A run for each rate, one after another."""
    try:
        from scripts import http_load
    except ModuleNotFoundError as error:
        raise ValueError(f"--url needs {error.name}, which `pip install -e .[serve]` brings") from None
    return http_load.measure(options)


def show_http(result: dict) -> Iterator[str]:
    yield f"{result['model']} at {result['url']}"
    for run in result["runs"]:
        yield ""
        yield f"{run['rate']:g} requests a second" if run["rate"] else "as many as there may be"
        yield from traffic.show(run)
        yield from (f"  the first {kind}: {message}" for kind, message in run["examples"].items())
        yield from show_memory(run["server"])
        if run["server_after"]:
            yield f"afterwards     {run['server_after'].get('kv_usage', 0):9.1%} of the server's cache is in use"


def show_memory(looks: Sequence[dict]) -> Iterator[str]:
    """How the server's memory went: at the first look, in the middle, at the last."""
    looks = [look for look in looks if "resident_mb" in look]
    if looks:
        chosen = dict.fromkeys((0, len(looks) // 4, len(looks) // 2, 3 * len(looks) // 4, len(looks) - 1))
        text = ", ".join(f"{looks[i]['resident_mb']:.1f} MB after {looks[i]['s']:.0f} s" for i in chosen)
        yield f"server's memory  {text}"


def plot(runs: Sequence[dict], path: Path) -> None:
    """Draw time to the first token and between tokens against the rate: a line for each percentile."""
    names = {"ttft_s": "first token", "inter_token_s": "between events"}
    with picture(path, size=(10, 4.5), panels=2) as (figure, panels):
        for axes, (key, name) in zip(panels, names.items(), strict=True):
            for p in traffic.PERCENTILES:
                values = [run[key][f"p{p}"] for run in runs]
                points = [(run["rate"], 1e3 * v) for run, v in zip(runs, values, strict=True) if v is not None]
                axes.plot(*zip(*points, strict=True), marker="o", label=f"{p} %") if points else None
            axes.set_xlabel("requests a second")
            axes.set_ylabel(f"{name}, ms")
            axes.set_yscale("log")
            axes.grid(color="0.92")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")


def check_engine_options(engine_options: EngineOptions) -> None:
    for field in dataclasses.fields(engine_options):
        if getattr(engine_options, field.name) != field.default:
            raise ValueError(f"--{field.name.replace('_', '-')} is decided where the server is started; leave it out")


def main(arguments: list[str]) -> None:
    parser = cli.Parser(prog="python -m scripts.bench_serving", description=__doc__.split("\n\n")[0])
    cli.add_options(parser, Options)
    cli.add_options(parser, EngineOptions)
    parsed = parser.parse_args(arguments)
    options, engine_options = cli.take_options(Options, parsed), cli.take_options(EngineOptions, parsed)
    if options.offline:
        checkpoint.cache_dir()  # holds what the compiled code needs: fails now rather than after the work
        result, show = offline(options, engine_options), show_offline
    else:
        check_engine_options(engine_options)
        if options.plot is not None:
            check_plot(options.plot)
        result, show = over_http(options), show_http
        if options.plot is not None:
            plot(result["runs"], options.plot)
    if options.json:
        cli.print_json(result)
    else:
        print(*show(result), sep="\n")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
