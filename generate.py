"""The command line: prompts in; text, samples and figures out.

    python generate.py --compile --checkpoint CKPT --prompt TEXT

`generator.py` has the decoder loop that it runs, `serving/` the batching engine of `--serve` and of .jsonl files.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import chat
import checkpoint
import cli
import hardware
from cache import KV_DTYPES, check_kv_dtype
from generator import Answer, Generator, Request, check_prompt
from meter import Meter, describe, run_stats
from model import Transformer
from quant.linears import RECIPES, weight_bytes
from sampling import SamplingParams
from tokenizer import Tokenizer

log = logging.getLogger("tachyon")

JSONL_BATCH = 256
CHAT_CONTEXT = 16384  # a cache of the whole context of a model made for 128k may not fit beside it


SERVING = ("serve", "checkpoint", "compile", "dtype", "quantize", "kv-dtype", "device", "max-seq-len")
NOT_FOR_LINES = ("echo", "profile")
NOT_IN_A_CHAT = ("prompt", "prompt-file", "json", "echo", "profile", "num-samples", "batch-size")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line decides, sampling apart."""

    checkpoint: str = cli.option(
        checkpoint.DEFAULT_CHECKPOINT,
        "a directory in Hugging Face layout, a .gguf file, a Hub id org/name[@revision], the built-in smollm2-135m, "
        "random:PRESET or random:path/to/config.json",
    )
    prompt: str | None = cli.option(None, "text to continue; without it or --prompt-file, standard input is the prompt")
    prompt_file: Path | None = cli.option(
        None,
        "one prompt a line, or a JSON list of strings; a .jsonl file has a JSON object or string a line, any number of "
        "them, and an answer is printed as a line of JSON when it is done",
    )
    chat: bool = cli.option(False, "put each prompt into the model's chat template")
    system: str | None = cli.option(None, "system message for --chat and --interactive")
    interactive: bool = cli.option(False, "chat: /reset, /stats, /save FILE, Ctrl-C stops an answer, Ctrl-D leaves")
    serve: bool = cli.option(False, "serve the OpenAI API over HTTP; --serve --help lists what a server can be told")
    compile: bool = cli.option(False, "compile the model; on CUDA, decode in CUDA graphs")
    max_new_tokens: int = cli.option(256, "length of an answer at most")
    stop: tuple[str, ...] = cli.option((), "end an answer before this text; may be given several times", metavar="TEXT")
    ignore_eos: bool = cli.option(False, "go on past the end-of-text token, for measuring")
    num_samples: int = cli.option(1, "answers for each prompt, with seeds counting up")
    batch_size: int | None = cli.option(
        None, f"how many answers are decoded together (default: 1, and {JSONL_BATCH} for a .jsonl file)"
    )
    seed: int | None = cli.option(None, "makes sampling repeatable (default: a new one each time)")
    dtype: str = cli.option("bfloat16", "of weights and cache", choices=tuple(hardware.DTYPES))
    quantize: str | None = cli.option(
        None, "round the weights to int8, int4 or fp8 while loading", choices=tuple(RECIPES)
    )
    kv_dtype: str | None = cli.option(
        None, "store the key/value cache in int8 or fp8 (default: in --dtype)", choices=tuple(KV_DTYPES)
    )
    device: str | None = cli.option(None, "cpu, cuda, cuda:N or mps (default: the best there is)")
    max_seq_len: int | None = cli.option(
        None, f"context, answer included (default: what the prompts need; in a chat, {CHAT_CONTEXT} at most)"
    )
    echo: bool = cli.option(False, "print the prompt before the answer")
    json: bool = cli.option(False, "print one JSON document: samples and stats")
    profile: Path | None = cli.option(None, "write a Chrome trace of the generation to this file")

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_samples", "batch_size", "max_seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
        fields = dataclasses.fields(self)
        given = [field.name.replace("_", "-") for field in fields if getattr(self, field.name) != field.default]
        if self.serve and (others := [name for name in given if name not in SERVING]):
            raise ValueError(f"--serve takes everything else from its requests; leave out --{others[0]}")
        if self.interactive and (others := [name for name in given if name in NOT_IN_A_CHAT]):
            raise ValueError(f"--interactive reads its prompts from you, one at a time; leave out --{others[0]}")
        if self.lines and (others := [name for name in given if name in NOT_FOR_LINES]):
            raise ValueError(f"a .jsonl file is answered by the batching engine, without --{others[0]}; leave it out")
        if self.prompt is not None and self.prompt_file:
            raise ValueError("give --prompt or --prompt-file, not both")
        if "" in self.stop:
            raise ValueError("--stop must not be empty")

    @property
    def lines(self) -> bool:
        """Whether prompts are JSON lines, for the batching engine."""
        return self.prompt_file is not None and self.prompt_file.suffix == ".jsonl"


def read_prompts(options: Options) -> list[str]:
    if options.prompt is not None:
        return [options.prompt]
    if options.prompt_file is None:
        text = "" if sys.stdin.isatty() else cli.decode_text(sys.stdin.buffer.read(), "standard input")
        if not text.strip():
            raise ValueError("no prompt: give --prompt TEXT, --prompt-file FILE, --interactive, or standard input")
        return [text.removesuffix("\n")]
    text = cli.read_text(options.prompt_file)
    if options.prompt_file.suffix == ".json" or re.match(r'\s*\[\s*["\]]', text):
        try:
            prompts = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{options.prompt_file} is not valid JSON: {error}") from None
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"{options.prompt_file} must be a JSON list of strings")
    else:
        prompts = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{options.prompt_file} has no prompt: write one a line, or a JSON list of strings")
    return prompts


def make_requests(
    options: Options,
    source: checkpoint.Checkpoint,
    system: list[dict],
    params: SamplingParams,
    stop_ids: frozenset[int],
    limit: int,
) -> tuple[list[Request], list[str]]:
    """One request, and the text of its prompt, for each sample of each prompt."""
    if options.max_new_tokens >= limit:
        log.info(f"answers end where the context of {limit} tokens does, before --max-new-tokens")
    requests, prompts = [], []
    for text in read_prompts(options):
        if options.chat or system:  # a system message needs a template to stand in
            prompt = source.tokenizer.chat([*system, {"role": "user", "content": text}])
        else:
            prompt = source.tokenizer.encode(text)
        check_prompt(prompt, limit, source.config.vocab_size)
        new = min(options.max_new_tokens, limit - len(prompt))
        for index in range(options.num_samples):
            own = dataclasses.replace(params, seed=params.seed + index)
            requests.append(Request(prompt=prompt, params=own, max_new_tokens=new, stop_ids=stop_ids))
            prompts.append(text)
    return requests, prompts


def complete(
    meter: Meter, requests: list[Request], prompts: list[str], tokenizer: Tokenizer, options: Options
) -> list[dict]:
    """Decode every request in groups of the batch size, printing text as it comes, and return the samples."""
    samples = []
    size = meter.generator.batch_size
    for begin in range(0, len(requests), size):
        group = requests[begin : begin + size]
        continues = not (options.chat or options.system is not None)
        answers = {request: Answer(request, tokenizer, options.stop, continues=continues) for request in group}
        stream = len(group) == 1 and not options.json
        if stream:
            _print_head(begin, prompts, options)
        for request in meter.run(group):
            text = answers[request].update()
            if stream:
                print(text, end="", flush=True)
        for index, (request, answer) in enumerate(answers.items(), begin):
            if not stream and not options.json:
                _print_head(index, prompts, options)
                print(answer.text, end="")
            if not options.json:
                print()
            samples.append(
                {
                    "prompt_tokens": len(request.prompt),
                    "token_ids": request.token_ids,
                    "text": (prompts[index] if options.echo else "") + answer.text,
                    "finish_reason": request.finish_reason,
                }
            )
    return samples


def _print_head(index: int, prompts: list[str], options: Options) -> None:
    if len(prompts) > 1:
        print(f"--- {index + 1} of {len(prompts)}")
    if options.echo:
        print(prompts[index], end="", flush=True)


def run_lines(
    options: Options,
    source: checkpoint.Checkpoint,
    model: Transformer,
    params: SamplingParams,
    stop_ids: frozenset[int],
    *,
    load_s: float,
) -> dict:
    """Answer a file of JSON lines by the batching engine, and print each answer unless it is for `--json`: the stats,
    with the samples among them if it is.
    """
    from serving import offline
    from serving.engine import Engine, EngineOptions
    from serving.runner import make_runner

    tokenizer, size = source.tokenizer, options.batch_size or JSONL_BATCH
    defaults = offline.Defaults(
        params=params,
        max_new_tokens=options.max_new_tokens,
        n=options.num_samples,
        stop=options.stop,
        stop_ids=stop_ids,
        chat=options.chat,
        system=options.system,
        max_seq_len=options.max_seq_len,
    )
    start = time.perf_counter()
    engine_options = EngineOptions(max_running=size, max_queued=0)
    runner = make_runner(model, engine_options, kv_dtype=options.kv_dtype, compile=options.compile)
    compile_s = time.perf_counter() - start
    engine = Engine(runner, options=engine_options)
    weights, moved, ttft_s, samples = weight_bytes(model), 0.0, [], []
    errors = 0

    def count_bytes() -> None:
        nonlocal moved
        moved += weights + engine.stats().kv_usage * runner.cache.nbytes

    jobs = (offline.make_job(*line, defaults, tokenizer) for line in offline.read(options.prompt_file))
    start = time.perf_counter()
    for job in offline.run(engine, jobs, window=2 * size, turned=count_bytes):
        if job.first_token is not None:
            ttft_s.append(job.first_token - job.request.arrived)
        errors += job.error is not None
        if options.json:
            samples += job.samples
            continue
        for line in job.samples:
            print(json.dumps(line, ensure_ascii=False), flush=True)
    seconds, counts = time.perf_counter() - start, engine.stats()
    stats = run_stats(
        model.norm.weight.device,
        prompt_tokens=counts.prompt_tokens,
        new_tokens=counts.generated_tokens,
        ttft_s=ttft_s,
        decode_tok_s=counts.generated_tokens / seconds,  # prompts included, which the same steps have
        bytes_per_s=moved / seconds,
        compile_s=compile_s,
        load_s=load_s,
        dtype=options.dtype,
        quantize=options.quantize or source.quantized,
        kv_dtype=options.kv_dtype,
        errors=errors,
        preemptions=counts.preemptions,
    )
    return {"samples": sorted(samples, key=lambda sample: sample["line"]), "stats": stats}


def serve(options: Options, parsed: argparse.Namespace) -> None:
    """Load the model and answer requests until a signal ends it."""
    from serving import server

    engine_options, server_options = server.take_options(parsed)
    device = hardware.pick_device(options.device)
    check_kv_dtype(options.kv_dtype, device)
    checkpoint.cache_dir()  # holds what is compiled: fails now rather than after the work
    with server.bind(server_options) as bound:  # likewise
        source = checkpoint.open_checkpoint(options.checkpoint)
        tokenizer = source.tokenizer  # ValueError where there is none, before the weights are read
        sampling = server_options.sampling(source.sampling)
        dtype = hardware.DTYPES[options.dtype]
        model = checkpoint.load_model(
            source, device=device, dtype=dtype, quantize=options.quantize, progress=cli.show_progress
        )
        service = server.make_service(
            model,
            tokenizer,
            name=source.name,
            eos_ids=source.eos_ids,
            sampling=sampling,
            engine_options=engine_options,
            options=server_options,
            max_seq_len=options.max_seq_len,
            kv_dtype=options.kv_dtype,
            compile=options.compile,
        )
        server.run(service, bound)


def add_server_options(parser: cli.Parser) -> None:
    try:
        from serving import server
    except ModuleNotFoundError as error:
        raise ValueError(f"--serve needs {error.name}, which `pip install -e .[serve]` brings") from None
    server.add_options(parser)


def main(arguments: list[str]) -> None:
    parser = cli.Parser(description="Generate text with a decoder-only language model.")
    cli.add_options(parser, Options)
    cli.add_options(parser, SamplingParams, texts=cli.SAMPLING_HELP)
    if "--serve" in arguments:
        add_server_options(parser)
    parsed = parser.parse_args(arguments)
    options = cli.take_options(Options, parsed)
    if options.serve:
        params = cli.take_options(SamplingParams, parsed, skip=("seed",))
        if params != SamplingParams():
            raise ValueError("--serve takes sampling parameters from its requests; leave them out")
        return serve(options, parsed)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    params = dataclasses.replace(cli.take_options(SamplingParams, parsed, skip=("seed",)), seed=seed)
    device, dtype = hardware.pick_device(options.device), hardware.DTYPES[options.dtype]
    check_kv_dtype(options.kv_dtype, device)
    checkpoint.cache_dir()  # holds what the figures need: fails now rather than after the work
    if options.profile:
        options.profile.touch()  # likewise

    start = time.perf_counter()
    source = checkpoint.open_checkpoint(options.checkpoint)
    tokenizer, limit = source.tokenizer, source.config.max_seq_len
    if options.max_seq_len is not None and options.max_seq_len > limit:
        raise ValueError(f"--max-seq-len {options.max_seq_len} is more than the {limit} that {source.name} holds")
    limit = options.max_seq_len or limit
    stop_ids = frozenset() if options.ignore_eos else frozenset(source.eos_ids)
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    requests: list[Request] = []
    prompts: list[str] = []
    if options.lines:
        from serving import offline

        offline.check(options.prompt_file)  # now rather than after an hour
    elif not options.interactive:
        requests, prompts = make_requests(options, source, system, params, stop_ids, limit)
        limit = options.max_seq_len or max(len(r.prompt) + r.max_new_tokens for r in requests)
    elif options.max_seq_len is None:
        limit = min(limit, CHAT_CONTEXT)
    model = checkpoint.load_model(
        source, device=device, dtype=dtype, quantize=options.quantize, progress=cli.show_progress
    )
    load_s = time.perf_counter() - start
    if options.lines:
        return show(run_lines(options, source, model, params, stop_ids, load_s=load_s), options)

    batch_size = min(options.batch_size or 1, len(requests)) if requests else 1
    generator = Generator(
        model, max_seq_len=limit, batch_size=batch_size, compile=options.compile, kv_dtype=options.kv_dtype
    )
    start = time.perf_counter()
    if options.compile:
        generator.warm_up(requests[:batch_size] or [Request(prompt=[0, 0], params=params, max_new_tokens=256)])
    compile_s = time.perf_counter() - start
    meter = Meter(generator)
    quantized = options.quantize or source.quantized
    figures = functools.partial(meter.stats, load_s=load_s, compile_s=compile_s, quantize=quantized)
    if options.interactive:

        def answer(prompt: list[int]) -> Iterator[str]:
            new = min(options.max_new_tokens, max(limit - len(prompt), 1))
            request = Request(prompt=prompt, params=params, max_new_tokens=new, stop_ids=stop_ids)
            text = Answer(request, tokenizer, options.stop)
            for _ in meter.run([request]):
                yield text.update()

        chat.repl(tokenizer.chat, answer, system, lambda: describe(figures()))
        return
    with torch.profiler.profile() if options.profile else contextlib.nullcontext() as profiler:
        samples = complete(meter, requests, prompts, tokenizer, options)
    if profiler is not None:
        profiler.export_chrome_trace(str(options.profile))
    show({"samples": samples, "stats": figures()}, options)


def show(result: dict, options: Options) -> None:
    """The end of a run: the document that was asked for, or its figures."""
    if options.json:
        cli.print_json(result)
    else:
        print(describe(result["stats"]), file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
