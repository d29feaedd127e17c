"""The decoder loop: requests become tokens, batch by batch.

One prefill over the prompts, then decode steps on static tensors, so that some steps are one CUDA graph (or one is a
few compiled regions on the CPU) and nothing waits for the host between tokens. The host looks at tokens some steps late
and drops what was decoded past an end. Text, files and figures are others' affair.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import hardware
from answer import GrowingText
from cache import StaticCache, check_kv_dtype
from compiling import compile_model
from model import Transformer
from quant.linears import settle_model, weight_bytes
from sampling import SamplingBatch, SamplingParams, sample, stray_token
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
        sampling = self.sampling_for(requests)
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
        B, sampling = len(requests), self.sampling_for(requests)
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

    def sampling_for(self, requests: Sequence[Request]) -> SamplingBatch:
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
    if (wrong := stray_token(prompt, vocab_size)) is not None:
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
