"""Generate text: the decoder loop and its command line.

    python generate.py --compile --checkpoint CKPT --prompt TEXT

`Generator` turns requests into tokens: one prefill over the prompts, then decode steps on static tensors, so that some
steps are one CUDA graph (or one is a few compiled regions on the CPU) and nothing waits for the host between tokens.
The host looks at tokens some steps late and drops what was decoded past an end. The rest of this file is the command
line: prompts in, text, samples and figures out.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import random
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import chat
import checkpoint
import cli
import hardware
from answer import GrowingText
from cache import KV_DTYPES, StaticCache, check_kv_dtype
from compiling import compile_model
from model import Transformer
from quant.linears import RECIPES, settle_model, weight_bytes
from sampling import SamplingBatch, SamplingParams, sample
from tokenizer import Tokenizer


@dataclass(kw_only=True, eq=False)
class Request:
    """One prompt and what became of it. Setting `finish_reason` from outside ends it."""

    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = 256
    stop_ids: frozenset[int] = frozenset()
    token_ids: list[int] = field(default_factory=list)  # a stop id that ended the answer is not among them
    finish_reason: str | None = None  # "stop" | "length"


class Generator:
    """Decodes requests with one model over one static cache.

    Eager runs the model; compiled, what `compile_model` makes of it, by the same code. On CUDA decode steps are then
    captured in a graph for each batch size, cache bucket, kind of sampling and number of steps.
    """

    prefill_tokens = 8192  # in one forward, over all rows: bounds the activations' memory
    burst = 4  # decode steps in one CUDA graph: between two graphs a GPU waits some microseconds
    lookahead = 1  # bursts enqueued on CUDA beyond the one whose tokens are waited for: up to 7 steps are in vain

    def __init__(
        self,
        model: Transformer,
        *,
        max_seq_len: int,
        batch_size: int = 1,
        compile: bool = False,
        kv_dtype: str | None = None,
    ) -> None:
        config, weight = model.config, model.norm.weight
        self.model, self.device, self.kv_dtype = model, weight.device, kv_dtype
        check_kv_dtype(kv_dtype, self.device)
        self.max_seq_len = min(max_seq_len, config.max_seq_len)
        self.batch_size = batch_size
        self.cache = StaticCache.allocate(
            n_layers=config.n_layers,
            batch=batch_size,
            max_seq_len=-(-self.max_seq_len // 64) * 64,  # what attention kernels like their masks aligned to
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            dtype=weight.dtype,
            device=self.device,
            kv_dtype=kv_dtype,
        )
        self.cached: list[int] = []  # tokens whose keys and values the first row holds
        self.compiled = compile
        self.burst = self.burst if compile and self.device.type == "cuda" else 1
        # The latest steps' tokens of each row, the newest last, and where that goes.
        self.tokens = torch.zeros(self.burst, batch_size, 1, dtype=torch.int64, device=self.device)
        self.input_pos = torch.zeros_like(self.tokens[0])
        if self.device.type == "cpu":
            settle_model(model)  # not in the first answer, which may be interrupted
        self.decoder = (
            compile_model(model, max_seq_len=self.cache.max_seq_len, batch_size=batch_size) if compile else model
        )
        self.fused = self.decoder is not model  # kernels, which also end a greedy step and choose the buckets
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        self.graph_pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.samplings: dict[tuple, SamplingBatch] = {}

    def step_bytes(self, length: int, rows: int = 1) -> int:
        """Bytes a decode step has to read: each weight once, and the live cache."""
        return weight_bytes(self.model) + self.cache.narrow(length, rows=rows).nbytes

    @torch.no_grad()
    def run(self, requests: Sequence[Request]) -> Iterator[Request]:
        """Decode up to `batch_size` requests together; yields a request whenever it got a token or finished.

        A single request reuses the keys and values that the one before it left for a common prefix.
        """
        for request in requests:
            check_prompt(request.prompt, self.max_seq_len, self.model.config.vocab_size)
        B = len(requests)
        if not 0 < B <= self.batch_size:
            raise ValueError(f"got {B} requests for a batch size of {self.batch_size}")
        start = self._reuse(requests)
        sampling = self._sampling(requests)
        longest = max(len(r.prompt) for r in requests)
        last_step = max(min(r.max_new_tokens, self.max_seq_len - len(r.prompt)) for r in requests) - 1
        self.prefill([r.prompt for r in requests], start, sampling)
        pending: deque[hardware.Arrival] = deque()
        lookahead = self.lookahead if self.device.type == "cuda" else 0
        step = 0
        try:
            yield from self._accept(requests, self.tokens[-1, :B, 0].tolist())
            while any(r.finish_reason is None for r in requests):
                while step < last_step and len(pending) <= lookahead:
                    steps = self.burst if last_step - step >= self.burst else 1
                    step += steps
                    self.decode(min(longest + step, self.max_seq_len), sampling, steps)
                    pending.append(hardware.Arrival(self.tokens[-steps:, :B, 0]))
                (tokens,) = pending.popleft().wait()
                for newest in tokens.tolist():  # [steps, B]
                    yield from self._accept(requests, newest)
        finally:
            if B == 1:  # also when the caller stops early: what is known to be written stays usable
                self.cached = [*requests[0].prompt, *requests[0].token_ids[:-1]]

    def prefill(self, prompts: Sequence[Sequence[int]], start: int, sampling: SamplingBatch) -> None:
        """Fill the cache with prompts from slot `start` on, and set the state to each row's first new token.

        Rows are padded on the right: a row's causal attention never sees its padding, and decoding overwrites it.
        """
        B, T = len(prompts), max(map(len, prompts))
        padded = torch.tensor([[*p, *[0] * (T - len(p))] for p in prompts]).to(self.device)  # [B, T]
        last = torch.tensor([len(p) - 1 for p in prompts]).to(self.device)  # [B]
        rows = torch.arange(B, device=self.device)
        chunk = max(1, self.prefill_tokens // B)
        x = None
        for begin in range(start, T, chunk):
            end = min(begin + chunk, T)
            input_pos = torch.arange(begin, end, device=self.device).expand(B, -1)  # [B, T]
            one = end - begin == 1  # runs as a decode step does
            view = self.cache.narrow(self._bucket(end) if one else end, rows=B, tail=not one)
            hidden = self.decoder.hidden(padded[:, begin:end], input_pos, view)  # [B, T, C]
            here = hidden[rows, (last - begin).clamp(0, end - begin - 1)]  # [B, C]
            x = here if x is None else torch.where((last >= begin)[:, None], here, x)
        self.tokens[-1, :B, 0] = self._draw(self.decoder.logits(x), sampling, last + 1)
        self.input_pos[:B, 0] = last + 1

    def decode(self, length: int, sampling: SamplingBatch, steps: int = 1) -> None:
        """Steps of the state: in each the newest token of each row goes through the model and gives way to the next.

        `length` is the longest row's at the last step, newest token included; there are 1 or `burst` steps. On CUDA the
        first call of a kind runs as it is, which compiles whatever is missing; the second captures it.
        """
        B, bucket = len(sampling), self._bucket(length)
        if self.device.type != "cuda" or not self.compiled:
            return self._steps(bucket, sampling, steps)
        key = (B, bucket, sampling.kind, steps)
        if key not in self.graphs:
            self.graphs[key] = None
            return self._steps(bucket, sampling, steps)
        if self.graphs[key] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.graph_pool):
                self._steps(bucket, sampling, steps)
            self.graphs[key] = graph
        self.graphs[key].replay()

    def warm_up(self, requests: Sequence[Request]) -> None:
        """Compile and capture everything that these requests will use, on made-up tokens."""
        B, sampling = len(requests), self._sampling(requests)
        longest = max(len(r.prompt) for r in requests)
        end = min(longest + max(r.max_new_tokens for r in requests), self.max_seq_len)
        with torch.no_grad():
            # On CUDA longer prompts run the same code as 128 tokens do; on the CPU a prompt compiles nothing.
            length = min(longest, 128 if self.device.type == "cuda" else 16)
            self.prefill([[0] * length] * B, 0, sampling)
            for bucket in sorted({self._bucket(length) for length in range(longest + 1, end + 1)}):
                for steps in sorted({1, self.burst}):
                    for _ in range(2):
                        self.decode(bucket, sampling, steps)
        self.cached = []
        hardware.synchronize(self.device)

    def _steps(self, length: int, sampling: SamplingBatch, steps: int) -> None:
        newest = self.tokens[-1]
        for following in self.tokens[-steps:]:
            self._step(length, sampling, newest[: len(sampling)], following[: len(sampling)])
            newest = following

    def _step(self, length: int, sampling: SamplingBatch, newest: Tensor, following: Tensor) -> None:
        """The newest tokens [B, 1] go through the model, and those that follow are written to `following` [B, 1]."""
        B = len(sampling)
        input_pos = self.input_pos[:B]
        x = self.decoder.hidden(newest, input_pos, self.cache.narrow(length, rows=B))
        if self.fused and sampling.argmax:
            return self.decoder.greedy(x, following, input_pos, self.max_seq_len - 1)
        input_pos.add_(1).clamp_(max=self.max_seq_len - 1)  # a finished row in a batch that goes on stays inside
        following[:, 0] = self._draw(self.decoder.logits(x)[:, 0], sampling, input_pos[:, 0])

    @functools.cached_property
    def sample(self) -> Callable[[Tensor, SamplingBatch, Tensor], Tensor]:
        return torch.compile(sample)

    def _draw(self, logits: Tensor, sampling: SamplingBatch, position: Tensor) -> Tensor:
        pick = self.sample if self.compiled and not sampling.greedy else sample  # an argmax is not worth compiling
        token = pick(logits, sampling, position)
        sampling.count(token)
        return token

    def _bucket(self, length: int) -> int:
        """The cache length that attention reads: a few sizes per octave, so that few graphs serve all lengths."""
        if self.fused:
            return self.decoder.bucket(length)
        granule = max(256 if self.graph_pool else 64, 1 << max(0, (length - 1).bit_length() - 3))
        return min(-(-length // granule) * granule, self.cache.max_seq_len)

    def _reuse(self, requests: Sequence[Request]) -> int:
        """How many slots already hold what the prompt wants; at least its last token is left to run."""
        cached, self.cached = self.cached, []
        if len(requests) > 1:
            return 0
        prompt = requests[0].prompt[:-1]
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, cached, strict=False))
        return sum(1 for _ in shared)

    def _sampling(self, requests: Sequence[Request]) -> SamplingBatch:
        """The requests' sampling parameters, in the memory that graphs of their kind were captured with."""
        new = SamplingBatch([r.params for r in requests], vocab_size=self.model.config.vocab_size, device=self.device)
        for row, request in enumerate(requests):
            new.see_prompt(row, request.prompt)
        kept = self.samplings.setdefault((len(requests), new.kind), new)
        kept.copy_(new)
        return kept

    def _accept(self, requests: Sequence[Request], tokens: Sequence[int]) -> Iterator[Request]:
        for request, token in zip(requests, tokens, strict=True):
            if request.finish_reason is not None:
                continue
            if token in request.stop_ids:
                request.finish_reason = "stop"
            else:
                request.token_ids.append(token)
                room = self.max_seq_len - len(request.prompt)
                if len(request.token_ids) >= min(request.max_new_tokens, room):
                    request.finish_reason = "length"
            yield request


def check_prompt(prompt: Sequence[int], max_seq_len: int, vocab_size: int) -> None:
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token")
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < vocab_size)
        raise ValueError(
            f"the prompt has the token {wrong} and the model knows {vocab_size}; its tokenizer is another model's"
        )
    if len(prompt) >= max_seq_len:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and the context holds {max_seq_len}, answer included; "
            "shorten the prompt, or raise --max-seq-len where the model allows it"
        )


class Answer(GrowingText):
    """The text of a request as it grows. A stop string ends the request."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer, stop: Sequence[str] = (), *, continues: bool = False
    ) -> None:
        super().__init__(tokenizer, stop, continues=continues)
        self.request = request
        self._tokens = 0  # how many of the request's tokens are in the text

    def update(self) -> str:
        """The text that became certain since the last call."""
        new = self.push(self.request.token_ids[self._tokens :], last=self.request.finish_reason is not None)
        self._tokens = len(self.request.token_ids)
        if self.stopped:
            self.request.finish_reason = "stop"
        return new


class Meter:
    """Clocks over groups of requests: time to the first token, and what the decode steps after it moved."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.prompt_tokens = self.new_tokens = 0
        self.ttft_s: list[float] = []
        self.decode_s = self.decode_tokens = self.decode_bytes = 0.0

    def run(self, requests: Sequence[Request]) -> Iterator[Request]:
        """`Generator.run`, measured."""
        start, first = time.perf_counter(), None
        try:
            for request in self.generator.run(requests):
                first = first or time.perf_counter()
                yield request
        finally:
            end = time.perf_counter()
            tokens = [len(r.token_ids) for r in requests]
            if first is not None:
                self.prompt_tokens += sum(len(r.prompt) for r in requests)
                self.new_tokens += sum(tokens)
                steps = max(max(tokens) - 1, 0)  # a group goes on until its longest answer ends
                live = max(len(r.prompt) for r in requests) + steps // 2
                self.ttft_s.append(first - start)
                self.decode_s += end - first
                self.decode_tokens += max(sum(tokens) - len(tokens), 0)
                self.decode_bytes += steps * self.generator.step_bytes(live, len(requests))

    def stats(self, *, load_s: float, compile_s: float, quantize: str | None = None) -> dict:
        return run_stats(
            self.generator.device,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            ttft_s=self.ttft_s,
            decode_tok_s=self.decode_tokens / self.decode_s if self.decode_s else 0.0,
            bytes_per_s=self.decode_bytes / self.decode_s if self.decode_s else 0.0,
            compile_s=compile_s,
            load_s=load_s,
            dtype=str(self.generator.cache.layers[0].dtype).removeprefix("torch."),
            quantize=quantize,
            kv_dtype=self.generator.kv_dtype,
        )


def run_stats(
    device: torch.device, *, prompt_tokens: int, new_tokens: int, ttft_s: Sequence[float], decode_tok_s: float,
    bytes_per_s: float, **known: object,
) -> dict:  # fmt: skip
    """A run's stats: its figures, what they mean on this device, and what is `known` of how it was run."""
    peak = hardware.peak_memory_bytes(device)  # before the probe takes more
    bandwidth = hardware.read_bandwidth(device, checkpoint.cache_dir(), seen=bytes_per_s)
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "ttft_s": sorted(ttft_s)[len(ttft_s) // 2] if ttft_s else None,
        "decode_tok_s": decode_tok_s,
        "decode_gbs": bytes_per_s / 1e9,
        "read_gbs": bandwidth / 1e9,
        "bandwidth_fraction": bytes_per_s / bandwidth,
        "peak_memory_gb": peak / 1e9,
        "device": hardware.device_name(device),
        **known,
    }


def describe(stats: dict) -> str:
    """Stats in one line for people."""
    if not stats["decode_tok_s"]:  # nothing but first tokens, if that
        speed = f"{stats['new_tokens']} new tokens"
    else:
        speed = (
            f"{stats['new_tokens']} new tokens at {stats['decode_tok_s']:.1f} tok/s, {stats['decode_gbs']:.1f} GB/s = "
            f"{stats['bandwidth_fraction']:.0%} of the {stats['read_gbs']:.1f} GB/s that this device reads"
        )
    ttft = f"{stats['ttft_s'] * 1e3:.0f} ms" if stats["ttft_s"] is not None else "none"
    return (
        f"{stats['prompt_tokens']} prompt tokens, first token after {ttft}; {speed}; load {stats['load_s']:.1f} s, "
        f"compile {stats['compile_s']:.1f} s, peak memory {stats['peak_memory_gb']:.2f} GB; "
        f"{weights_of(stats)} on {stats['device']}"
    )


def weights_of(stats: dict) -> str:
    """What the weights and the cache are stored in, for people."""
    parts = [f"{stats[name]} {what}" for name, what in (("quantize", "weights"), ("kv_dtype", "cache")) if stats[name]]
    return f"{', '.join(parts)}, else {stats['dtype']}" if parts else stats["dtype"]


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


SAMPLING_HELP = {
    "repetition_penalty": "above 1 makes tokens of the prompt and the answer less likely",
    "presence_penalty": "subtracted from the logit of a token that the answer has",
    "frequency_penalty": "subtracted each time that the answer has it",
    "temperature": "0 takes the most likely token; 1 samples the model's own distribution",
    "top_k": "sample among the k most likely tokens; 0 is off",
    "top_p": "sample among the fewest tokens whose probabilities reach p; 1 is off",
    "min_p": "sample among tokens at least min_p times as likely as the likeliest; 0 is off",
}


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


def show_progress(done: int, total: int) -> None:
    """Loading, as a line on a terminal."""
    if sys.stderr.isatty():
        end = "\r" if done < total else "\r\033[K"
        print(f"loading {done / total:4.0%}", end=end, file=sys.stderr, flush=True)


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
            source, device=device, dtype=dtype, quantize=options.quantize, progress=show_progress
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
    cli.add_options(parser, SamplingParams, texts=SAMPLING_HELP)
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
    model = checkpoint.load_model(source, device=device, dtype=dtype, quantize=options.quantize, progress=show_progress)
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
