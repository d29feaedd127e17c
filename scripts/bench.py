"""Latency of one model: time to the first token and time per token, as medians over repeats.

    python -m scripts.bench --checkpoint random:llama-3.1-8b --prompt-len 32 --new-tokens 256 --compile --json

Prompts are random tokens and nothing ends an answer early, so a run is the decoder alone: no tokenizer, no text.
`--roofline` then takes a decode step apart, kernel by kernel: it is how to find the next percent.
"""

import dataclasses
import random
import statistics
import sys
import time
from dataclasses import dataclass

import checkpoint
import cli
import hardware
from cache import KV_DTYPES, check_kv_dtype
from generator import Generator, Request
from meter import Meter, weights_of
from model import Transformer
from quant.linears import RECIPES
from sampling import SamplingParams
from scripts import roofline


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What is measured."""

    checkpoint: str = cli.option(checkpoint.DEFAULT_CHECKPOINT, "as for generate.py")
    compile: bool = cli.option(False, "as for generate.py")
    dtype: str = cli.option("bfloat16", "of weights and cache", choices=tuple(hardware.DTYPES))
    quantize: str | None = cli.option(None, "as for generate.py", choices=tuple(RECIPES))
    kv_dtype: str | None = cli.option(None, "as for generate.py", choices=tuple(KV_DTYPES))
    device: str | None = cli.option(None, "cpu, cuda, cuda:N or mps (default: the best there is)")

    def load(self, *, longest: int) -> tuple[Transformer, float, str | None]:
        """The model, the seconds that it took, and its weights' recipe; ValueError if sequences are too long for it."""
        device = hardware.pick_device(self.device)
        check_kv_dtype(self.kv_dtype, device)
        start = time.perf_counter()
        source = checkpoint.open_checkpoint(self.checkpoint)
        if longest > source.config.max_seq_len:
            raise ValueError(f"sequences of {longest} tokens are more than the {source.config.max_seq_len} it holds")
        dtype = hardware.DTYPES[self.dtype]
        model = checkpoint.load_model(source, device=device, dtype=dtype, quantize=self.quantize)
        hardware.synchronize(device)
        return model, time.perf_counter() - start, self.quantize or source.quantized


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    prompt_len: int = cli.option(32, "tokens in each prompt")
    new_tokens: int = cli.option(256, "tokens in each answer")
    batch: int = cli.option(1, "rows decoded together")
    repeats: int = cli.option(5, "runs that the medians are over")
    roofline: bool = cli.option(
        False, "also time each kernel of a decode step against the device's read bandwidth; needs CUDA and --compile"
    )
    json: bool = cli.option(False, "print one JSON document")

    def __post_init__(self) -> None:
        for name in ("prompt_len", "new_tokens", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}")


def measure(options: Options, params: SamplingParams) -> dict:
    if options.roofline:
        roofline.check(hardware.pick_device(options.device), compile=options.compile)
    model, load_s, quantize = options.load(longest=options.prompt_len + options.new_tokens)
    return time_model(model, options, params, load_s=load_s, quantize=quantize)


def time_model(
    model: Transformer, options: Options, params: SamplingParams, *, load_s: float, quantize: str | None
) -> dict:
    """The figures of a loaded model; of `options`, those that say how to load it are not looked at."""
    config, device = model.config, model.norm.weight.device
    length = options.prompt_len + options.new_tokens
    if length > config.max_seq_len:
        raise ValueError(f"--prompt-len and --new-tokens make {length}; the model holds {config.max_seq_len}")
    generator = Generator(
        model, max_seq_len=length, batch_size=options.batch, compile=options.compile, kv_dtype=options.kv_dtype
    )

    def requests() -> list[Request]:
        return [
            Request(
                prompt=random.choices(range(config.vocab_size), k=options.prompt_len),
                params=dataclasses.replace(params, seed=row),
                max_new_tokens=options.new_tokens,
            )
            for row in range(options.batch)
        ]

    start = time.perf_counter()
    if options.compile:
        generator.warm_up(requests())
    compile_s = time.perf_counter() - start
    runs, first_token_s = [], None
    for _ in range(options.repeats + 1):  # the first one warms caches and clocks up
        meter = Meter(generator)
        for _ in meter.run(requests()):
            first_token_s = first_token_s or hardware.process_age()
        generator.cached = []  # every run prefills its whole prompt
        runs.append(meter.stats(load_s=load_s, compile_s=compile_s, quantize=quantize))
    median = {
        name: statistics.median(run[name] for run in runs[1:])
        for name in ("ttft_s", "decode_tok_s", "decode_gbs", "bandwidth_fraction")
    }
    matmul = None
    if options.prompt_len >= COMPUTE_BOUND:
        matmul = hardware.measure_matmul_rate(device, model.norm.weight.dtype) / 1e12
    result = {
        "checkpoint": options.checkpoint,
        **runs[-1],
        **{name: getattr(options, name) for name in ("prompt_len", "new_tokens", "batch", "repeats", "compile")},
        **median,
        "ms_per_token": 1e3 * options.batch / median["decode_tok_s"] if median["decode_tok_s"] else None,
        "prefill_tok_s": options.batch * options.prompt_len / median["ttft_s"],
        "prefill_tflops": prefill_work(generator, options) / median["ttft_s"] / 1e12,
        "matmul_tflops": matmul,
        "first_token_after_start_s": first_token_s,
    }
    if options.roofline:
        middle = options.prompt_len + options.new_tokens // 2
        result["roofline"] = roofline.trace(generator, requests(), middle)
    return result


COMPUTE_BOUND = 512  # tokens in a prompt from which on its matrices are limited by arithmetic


def prefill_work(generator: Generator, options: Options) -> float:
    """Floating-point operations of the prompts: two a weight and token, causal attention, one row of the head."""
    config, T = generator.model.config, options.prompt_len
    heads = config.n_heads * config.head_dim
    qkv_o = config.dim * (2 * heads + 2 * config.n_kv_heads * config.head_dim)
    layer = 2 * T * (qkv_o + 3 * config.dim * config.ffn_dim) + 2 * T * T * heads
    return options.batch * (config.n_layers * layer + 2 * config.dim * config.vocab_size)


def main(arguments: list[str]) -> None:
    parser = cli.Parser(prog="python -m scripts.bench", description=__doc__.split("\n\n")[0])
    cli.add_options(parser, Options)
    cli.add_options(parser, SamplingParams, texts=cli.SAMPLING_HELP)
    parsed = parser.parse_args(arguments)
    options = cli.take_options(Options, parsed)
    params = cli.take_options(SamplingParams, parsed, skip=("seed",))
    checkpoint.cache_dir()  # holds what the figures need: fails now rather than after the work
    result = measure(options, params)
    if options.json:
        cli.print_json(result)
        return
    print(f"{result['checkpoint']}, {weights_of(result)} on {result['device']}, batch {result['batch']}")
    print(f"first token    {result['ttft_s'] * 1e3:9.1f} ms for {result['prompt_len']} tokens")
    if result["matmul_tflops"]:
        share = result["prefill_tflops"] / result["matmul_tflops"]
        print(
            f"prefill        {result['prefill_tflops']:9.1f} TFLOP/s = {share:.1%} of the "
            f"{result['matmul_tflops']:.1f} TFLOP/s of a large matrix product"
        )
    if result["ms_per_token"]:
        print(f"each token     {result['ms_per_token']:9.3f} ms = {result['decode_tok_s']:.1f} tok/s over all rows")
        print(
            f"memory read    {result['decode_gbs']:9.1f} GB/s = {result['bandwidth_fraction']:.1%} of the "
            f"{result['read_gbs']:.1f} GB/s that this device reads"
        )
    if result["first_token_after_start_s"] is not None:
        print(
            f"from the start {result['first_token_after_start_s']:9.1f} s to the first token "
            f"(load {result['load_s']:.1f}, compile {result['compile_s']:.1f})"
        )
    print(f"peak memory    {result['peak_memory_gb']:9.2f} GB")
    if options.roofline:
        print("", roofline.show(result["roofline"]), sep="\n")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
