"""Runs the scheduler's steps on the device and fetches the tokens that they draw.

What a sequence's next step needs stays on the device, in tables by slot: its newest token, where that goes, its
blocks, its temperature. A step sends what it changes there in one small copy. One that only decodes sends nothing else:
on CUDA it is a graph over the tables, of which there is one for each of some batch sizes and, of few rows, lengths, and
draws its tokens too, if nobody asks for more than a temperature. One with prompts is a graph up to its logits, if those
prompts are short.
Nothing here waits for the device but `Ticket.wait`, for its own step. Who a row belongs to and when it ends is the
scheduler's.
"""

import bisect
import functools
import gc
import itertools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import hardware
from cache import check_kv_dtype, new_storage
from compiling import compile_model, has_kernels
from kernels.draw import draw
from model import Transformer
from paged import PagedBatch, PagedCache
from quant.linears import settle_model, weight_bytes
from sampling import SamplingBatch, SamplingParams, sample
from serving.drawing import KINDS, Drawing, Rows
from serving.request import TokenLogprobs
from serving.scheduler import Step

if TYPE_CHECKING:
    from kernels.decoder import Decoder
    from serving.engine import EngineOptions

# What mixed steps are padded to, to be graphs: tokens of prompts, and prompts, of which one pads.
MIXED_TOKENS, MIXED_PROMPTS = (32, 128, 256, 512, 1024, 2048), 8
# The same for what decodes beside them: graphs of the first two are made at the start, others when there are so many.
MIXED_DECODES = (0, 8, 32, 128)
FUSED_ROWS = 16  # up to so many greedy rows, the head's kernel finds the largest logits and writes none
# Between two graphs a GPU waits some 15 us, which counts where weights of so many bytes at most are read in half a
# millisecond. There up to so many rows draw so many tokens in a graph. A newcomer waits for up to two such graphs.
BURST_BYTES, BURST_ROWS, BURST = 2e9, 16, 4


class Form(NamedTuple):
    """What a graph of decode steps is for."""

    size: int  # rows
    kind: str  # one of KINDS
    shown: int  # slots of each sequence
    burst: int  # steps


class Ticket:
    """The results of a step that is under way."""

    def __init__(self, rows: Rows, tokens: Tensor, logprobs: Sequence[Tensor]) -> None:
        """Tokens [burst, n], and what reports ask for."""
        self.rows = rows
        self.arrival = hardware.Arrival(tokens, *logprobs)

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """The token of each Work that samples, decodes first, and its logprobs where they were asked for; of a burst
        one time after the other.
        """
        tokens, *logprobs = (x.tolist() for x in self.arrival.wait())
        tokens = list(itertools.chain(*tokens))
        reports: list[TokenLogprobs | None] = [None] * len(tokens)
        for (row, alternatives), own, values, ids in zip(self.rows.reports, *logprobs, strict=True):
            top = list(zip(ids, values, strict=True))[:alternatives]
            reports[row] = TokenLogprobs(tokens[row], own, top)
        return tokens, reports


class Runner:
    """One model over one paged cache, with room for `max_running` sequences at a time."""

    def __init__(
        self,
        model: Transformer,
        *,
        n_blocks: int,
        block_size: int,
        max_running: int,
        max_step_tokens: int,
        n_host_blocks: int = 0,
        kv_dtype: str | None = None,
        decoder: "Transformer | Decoder | None" = None,
    ) -> None:
        """`decoder` is what runs the model, as `compile_model` makes it. A sequence is no longer than all blocks."""
        self.decoder = decoder or model
        self.device, self.vocab_size = model.norm.weight.device, model.config.vocab_size
        self.n_blocks, self.block_size, self.n_host_blocks = n_blocks, block_size, n_host_blocks
        self.max_running, self.max_step_tokens = max_running, max_step_tokens
        self.burst, self.burst_rows = 1, BURST_ROWS
        self.max_seq_len = min(model.config.max_seq_len, (n_blocks - 1) * block_size)
        self.overlaps = self.device.type == "cuda"
        self.cache = PagedCache(_storage(model, n_blocks, block_size, kv_dtype), model.norm.weight.dtype)
        self.host_blocks = [  # [n_host_blocks, n_layers, block_size, ...] each
            torch.empty(n_host_blocks, len(x), *x.shape[2:], dtype=x.dtype, pin_memory=self.overlaps)
            for x in self.cache.tensors
            if n_host_blocks
        ]
        # By slot: the newest token, and where it goes. The last row pads batches, with block 0, which is nobody's.
        self.null_row = max_running
        self.state = torch.zeros(2, max_running + 1, dtype=torch.int64, device=self.device)
        self.newest, self.position = self.state
        n = -(-self.max_seq_len // block_size)
        self.tables = torch.zeros(max_running + 1, n, dtype=torch.int32, device=self.device)
        self.drawing = Drawing(slots=max_running + 1, vocab_size=self.vocab_size, device=self.device)
        # The slots that decode steps run, the first so many, as torch and as the kernels index; and who they are.
        self.decoding = torch.full((max_running,), self.null_row, device=self.device)
        self.decoding_int32 = self.decoding.int()
        self.decoded: Rows | None = None
        self.sizes = torch.arange(max_running + 1, dtype=torch.int32, device=self.device)
        self.kernels = self.decoder is not model  # which can be captured, and end a greedy step by themselves
        self.captures = self.kernels and self.overlaps
        if self.captures and weight_bytes(model) <= BURST_BYTES:
            self.burst = BURST
        self.buckets = buckets(max_running)
        self.graphs: dict[Form, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.graph_pool = torch.cuda.graph_pool_handle() if self.overlaps else None
        # Of steps that are mixed, by their size, with what they read.
        self.mixed_graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, list[Tensor]]] = {}
        self.mixed_decodes = [*(n for n in MIXED_DECODES if n < max_running), max_running]
        steps = zip(MIXED_TOKENS, (0, *MIXED_TOKENS), strict=False)
        self.mixed_tokens = [n for n, less in steps if n <= self.max_seq_len and less < max_step_tokens]

    @torch.no_grad()
    def launch(self, step: Step) -> Ticket:
        """Enqueue a step. On the CPU it is done on return."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread
        self._move_blocks(step)
        if step.table:
            slots, indices, blocks = np.array(step.table).T
            slot, index, block = hardware.send(self.device, slots, indices, blocks.astype(np.int32))
            self.tables[slot, index] = block
        self.drawing.join(step.joined)
        works = step.decodes + [work for work in step.prefills if work.samples]
        rows = self.drawing.rows_of(works)
        if not step.prefills and rows.kind != "logits":
            return Ticket(rows, self._decode(rows, step)[:, : len(works)], [])
        x = self._mixed(step) if step.prefills else self._decode(rows, step)
        # In no graph, each of which would keep memory for its own.
        logits = self._logits(x if works else x[:, :0])[: len(works)]
        tokens, reports = self.drawing.draw(rows, works, logits, self.position[rows.index])
        self.newest[rows.index] = tokens
        return Ticket(rows, tokens[None], reports)

    def _move_blocks(self, step: Step) -> None:
        if step.swap_out:
            device, host = zip(*step.swap_out, strict=True)
            (index,) = hardware.send(self.device, np.array(device))
            for x, kept in zip(self.cache.tensors, self.host_blocks, strict=True):
                for there, block in zip(host, x[:, index].transpose(0, 1).contiguous(), strict=True):
                    kept[there].copy_(block, non_blocking=True)
        if step.swap_in:
            host, device = zip(*step.swap_in, strict=True)
            (index,) = hardware.send(self.device, np.array(device))
            for x, kept in zip(self.cache.tensors, self.host_blocks, strict=True):
                x[:, index] = torch.stack([kept[there].to(self.device, non_blocking=True) for there in host], dim=1)
        if step.copies:
            self.cache.copy(*hardware.send(self.device, *np.array(step.copies).T))

    def _mixed(self, step: Step) -> Tensor:
        """One forward over decodes and prefills: the last layer's output [1, n, C] for those that sample, and padding.

        On the device a step of few tokens takes less time than its launches take on the host. Padded to one of a few
        sizes it is a graph too, made when the size is first needed.
        """
        size = self._mixed_size(step)
        inputs = hardware.send(self.device, *lay_out(step, self.null_row, size))
        if size is None:
            x = self._mixed_step(*inputs, len(step.decodes), max(work.count for work in step.prefills))
        else:
            if size not in self.mixed_graphs:
                self.prepare_mixed(size)
            graph, x, there = self.mixed_graphs[size]
            for static, new in zip(there, inputs, strict=True):
                static.copy_(new)
            graph.replay()
        return x

    def _capture(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of what `run` enqueues, which does not run yet, and where its result will be."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.graph_pool):
            result = run()
        return graph, result

    def _mixed_size(self, step: Step) -> tuple[int, int] | None:
        """To how many decodes and tokens of prompts to pad a step for a graph; None if it is run as it is."""
        if not self.captures or len(step.prefills) >= MIXED_PROMPTS:
            return None
        decodes, tokens = len(step.decodes), sum(work.count for work in step.prefills)
        size = next((n for n in self.mixed_tokens if n >= tokens), None)
        return None if size is None else (next(n for n in self.mixed_decodes if n >= decodes), size)

    def _mixed_step(
        self, tokens: Tensor, at: Tensor, last: Tensor, drawn: Tensor, slots: Tensor, starts: Tensor, D: int, most: int
    ) -> Tensor:
        """What `lay_out` gives, run: [1, n, C] for the tokens at `last`. No prompt has more than `most` tokens."""
        tokens[:D] = self.newest[slots[:D]]
        x = self._hidden(tokens, at, slots, D, starts, most)
        self.position[drawn] = at[last] + 1
        self.position[self.null_row :].zero_()
        return x[:, last]

    def _decode(self, rows: Rows, step: Step) -> Tensor:
        """A step of running sequences, and padding: what `_steps` gives for them."""
        n = len(rows.slots)
        size = self.buckets[bisect.bisect_left(self.buckets, n)] if self.graphs else n
        if rows is not self.decoded:
            self._show(rows.index)
            self.decoded = rows
        longest = step.decodes[0].start + step.burst
        shown = next(length for length in self._lengths(size) if length >= longest)
        form = Form(size, rows.kind if rows.kind in self._kinds(size) else "plain", shown, step.burst)
        if form in self.graphs:
            graph, result = self.graphs[form]
            graph.replay()
        else:
            result = self._steps(form)
        return result

    def _kinds(self, size: int) -> tuple[str, ...]:
        """Those of KINDS that steps of a size are of: where logits are written, drawing takes greedy rows along."""
        return KINDS[1:] if self.kernels and size > FUSED_ROWS else KINDS

    def _lengths(self, size: int) -> list[int]:
        """How many slots of each sequence attention is shown in steps of a size, the fewest first."""
        some = self.decoder.paged_buckets(size, self.block_size) if self.captures else ()
        return [*(n for n in some if n < self.max_seq_len), self.max_seq_len]

    def _forms(self, size: int) -> list[Form]:
        """All that steps of a size may be."""
        bursts = {1, self.burst if size <= self.burst_rows else 1}
        forms = itertools.starmap(Form, itertools.product([size], self._kinds(size), self._lengths(size), bursts))
        return [form for form in forms if form.kind != "logits" or form.burst == 1]

    def _show(self, index: Tensor) -> None:
        """Let decode steps run these slots, and the null row, from its beginning, in the place of those missing."""
        self.decoding[: len(index)], self.decoding[len(index) :] = index, self.null_row
        self.decoding_int32.copy_(self.decoding)
        self.state[:, self.null_row :].zero_()

    def _steps(self, form: Form) -> Tensor:
        """A burst of steps of the first slots in `decoding`: tokens [burst, size], or what `_logits` takes.

        It reads and writes tables alone, so a graph can hold it. Who is drawn from logits is given its token later.
        """
        index = self.decoding[: form.size]
        state = torch.empty(form.burst + 1, form.size, dtype=torch.int64, device=self.device)
        torch.index_select(self.state, 1, index, out=state[-2:])  # tokens, and behind them where the newest goes
        newest, at = state[-2:]
        for following in state[:-1]:
            x = self._step(form, newest, at, following)
            newest = following
        self.state[:, index] = state[-2:]
        return x if form.kind == "logits" else state[:-1]

    def _step(self, form: Form, newest: Tensor, at: Tensor, following: Tensor) -> Tensor:
        """The newest tokens [size] at `at` [size] go through the model; those that follow are written, and `at` moves
        on. Returns the last layer's output [1, size, C].
        """
        size, kind = form.size, form.kind
        index, slots = self.decoding[:size], self.decoding_int32[:size]
        x = self._hidden(newest, at, slots, size, self.sizes[size:][:1], 0, form.shown)
        if kind == "greedy" and self.kernels:
            self.decoder.greedy(x.view(size, 1, -1), following[:, None], at[:, None], self.max_seq_len)
            return x
        at += 1
        if kind == "greedy":
            torch.argmax(self._logits(x), -1, out=following)
        elif kind == "plain":
            draw(self._logits(x), index, self.drawing.temperature, self.drawing.seed, at, out=following)
        return x

    def _hidden(
        self, tokens: Tensor, at: Tensor, slots: Tensor, decodes: int, starts: Tensor, longest: int, shown: int = 0
    ) -> Tensor:
        """[1, T, C]; attention is shown so many slots of each sequence, or all."""
        tables = self.tables[:, : -(-shown // self.block_size)] if shown else self.tables
        view = self.cache.view(PagedBatch(tables, slots, decodes, starts, longest))
        return self.decoder.hidden(tokens[None], at[None], view)

    def _logits(self, x: Tensor) -> Tensor:
        """[n, V] from x [1, n, C]."""
        logits = self.decoder.logits(x)[0] if x.shape[1] else x.new_zeros(0, self.vocab_size)
        return logits.float() if logits.device.type == "cpu" else logits  # where an argmax over bf16 is slow

    # ---- Getting ready -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run_largest(self) -> None:
        """What takes the most memory: a full step of new tokens, and all rows sampled."""
        T, most = self.max_step_tokens, min(self.max_step_tokens, self.max_seq_len)
        starts = torch.tensor([*range(0, T, most), T], dtype=torch.int32).to(self.device)
        slots = torch.full((len(starts) - 1,), self.null_row, dtype=torch.int32, device=self.device)
        at = torch.arange(T, device=self.device) % most
        x = self._hidden(torch.zeros_like(at), at, slots, 0, starts, most)
        logits = self._logits(x[:, :1].expand(-1, self.max_running, -1).contiguous())
        params = [SamplingParams(temperature=1.0, top_p=0.9)] * self.max_running
        sample(logits, SamplingBatch(params, vocab_size=self.vocab_size, device=self.device), self.newest[:-1])

    def warm_up(self) -> None:
        """Do now what the first requests would else have to wait for. The largest go first: others fit their memory."""
        for size in reversed(self.buckets if self.captures else [1, min(2, self.max_running)]):
            self.prepare(size)
        if self.captures:
            for size in itertools.product(self.mixed_decodes[:2], reversed(self.mixed_tokens)):
                self.prepare_mixed(size)

    @torch.no_grad()
    def prepare(self, size: int) -> None:
        """Compile what decode steps of a size need, and capture them on CUDA."""
        self.decoded = None
        for form in self._forms(size):
            self._show(self.decoding[:0])  # each from position 0 on
            self._steps(form)
            if self.captures:
                self.graphs[form] = self._capture(functools.partial(self._steps, form))

    @torch.no_grad()
    def prepare_mixed(self, size: tuple[int, int]) -> None:
        """The same for steps with prompts, of one of the sizes that `_mixed_size` gives."""
        inputs = hardware.send(self.device, *lay_out(Step(), self.null_row, size))
        run = functools.partial(self._mixed_step, *inputs, *size)
        run()
        self.mixed_graphs[size] = *self._capture(run), inputs


def lay_out(step: Step, null_row: int, size: tuple[int, int] | None = None) -> list[np.ndarray]:
    """A step's tokens [T], their positions [T]; which of them are sampled from [n], and for which slots [n]; the slots
    of its sequences [R] and where the tokens of those after the decodes begin, as a `PagedBatch` has them.

    With `size`, decodes and tokens of prompts, the null row takes the place of what the step has less: as so many
    decodes, as empty prompts, and as a last of `MIXED_PROMPTS`, which has all the tokens that are missing.
    """
    D, P = len(step.decodes), len(step.prefills)
    decodes, tokens = size or (D, sum(work.count for work in step.prefills))
    T, prompts = decodes + tokens, P if size is None else MIXED_PROMPTS
    ids, at = np.zeros(T, dtype=np.int64), np.zeros(T, dtype=np.int64)
    slots = np.full(decodes + prompts, null_row, dtype=np.int32)
    starts = np.full(prompts + 1, T, dtype=np.int32)
    drawn = [(i, work.sequence.slot) for i, work in enumerate(step.decodes)]
    at[:D] = [work.start for work in step.decodes]
    slots[:D] = [slot for _, slot in drawn]
    begin = decodes
    for i, (sequence, start, count, samples, *_) in enumerate(step.prefills):
        end = begin + count
        ids[begin:end] = sequence.tokens[start : start + count]
        at[begin:end] = np.arange(start, start + count)
        slots[decodes + i], starts[i] = sequence.slot, begin
        if samples:
            drawn.append((end - 1, sequence.slot))
        begin = end
    starts[P:prompts] = begin
    n = len(drawn) if size is None else len(slots)
    drawn += [(0, null_row)] * (n - len(drawn))
    last, rows = np.array(drawn, dtype=np.int64).reshape(n, 2).T
    return [ids, at, last, rows, slots, starts]


def buckets(most: int) -> list[int]:
    """The sizes that decode graphs have: a batch fits one with little to spare, the largest exactly."""
    return [*(size for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, *range(128, most, 32)) if size < most), most]


def _storage(
    model: Transformer, n_blocks: int, block_size: int, kv_dtype: str | None, device: str | None = None
) -> list[Tensor]:
    config, weight = model.config, model.norm.weight
    return new_storage(
        n_layers=config.n_layers,
        batch=n_blocks,
        max_seq_len=block_size,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        dtype=weight.dtype,
        device=device or weight.device,
        kv_dtype=kv_dtype,
    )


def make_runner(
    model: Transformer, options: "EngineOptions", *, kv_dtype: str | None = None, compile: bool = False
) -> Runner:
    """A runner that is ready, with the cache that the options and the device's memory allow."""
    device = model.norm.weight.device
    check_kv_dtype(kv_dtype, device)
    if device.type == "cpu":
        limit_library_caches()
        settle_model(model)
    decoder = model
    compile = compile and (device.type == "cpu" or has_kernels(device))  # what is left has no use for whole graphs
    if compile:
        decoder = compile_model(model, max_seq_len=model.config.max_seq_len, batch_size=options.max_running)
    block_size = options.block_size or (64 if device.type == "cuda" else 16)
    if decoder is not model and device.type == "cuda" and (block_size < 16 or block_size & (block_size - 1)):
        raise ValueError(f"--block-size must be a power of two, 16 or more, for the kernels; got {block_size}")
    # On a CPU a long step would hold up all answers for seconds.
    max_step_tokens = options.max_step_tokens or max(8192 if device.type == "cuda" else 512, options.max_running)
    block_bytes = sum(x.nbytes for x in _storage(model, 1, block_size, kv_dtype, "meta"))

    def new(n_blocks: int, n_host_blocks: int = 0) -> Runner:
        return Runner(
            model,
            n_blocks=n_blocks,
            block_size=block_size,
            max_running=options.max_running,
            max_step_tokens=max_step_tokens,
            n_host_blocks=n_host_blocks,
            kv_dtype=kv_dtype,
            decoder=decoder,
        )

    if options.kv_cache_gb is None and device.type == "cuda":
        fitting = -(-min(model.config.max_seq_len, max_step_tokens) // block_size) + 1
        memory = free_memory(device, options.gpu_memory_utilization, lambda: new(fitting))
        remedy = "raise --gpu-memory-utilization or lower --max-step-tokens"
    else:
        memory = (options.kv_cache_gb or 1.0) * 1e9
        remedy = "raise --kv-cache-gb"
    n_blocks = int(memory // block_bytes)
    if n_blocks < 2:
        raise ValueError(
            f"there are {max(memory, 0) / 1e9:.3f} GB for the cache, where two blocks of {block_size} tokens take "
            f"{2 * block_bytes / 1e9:.3f} GB; {remedy}"
        )
    try:
        runner = new(n_blocks, int(options.swap_gb * 1e9 // block_bytes))
    except RuntimeError as error:  # the CPU's allocator has no error of its own
        if "memory" not in str(error):
            raise
        asked = f"{n_blocks * block_bytes / 1e9:.1f} GB" + (f" and {options.swap_gb:g} GB" if options.swap_gb else "")
        ways = "--kv-cache-gb, --gpu-memory-utilization or --swap-gb"
        raise ValueError(f"there is no memory for {asked} of cache; lower {ways}") from None
    if compile:
        runner.warm_up()
    if device.type == "cuda":
        runner.run_largest()  # so that no request meets what that compiles, or a lack of memory beside the graphs
    hardware.synchronize(device)
    return runner


def limit_library_caches() -> None:
    """Keep oneDNN from holding code for a thousand lengths of a step: mixed traffic made it grow for ten minutes.

    It reads these at its first product, so this comes too late in a process that has computed something before.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def free_memory(device: torch.device, share: float, trial: Callable[[], Runner]) -> float:
    """Bytes that a cache may take of a share of a GPU: what is left when a `trial` has run its largest steps.

    Graphs share the memory of what they compute on the way, so those of the largest steps stand for all.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    runner = trial()
    if runner.captures:
        runner.prepare(runner.max_running)
        for tokens in runner.mixed_tokens[-1:]:
            runner.prepare_mixed((runner.max_running, tokens))
    runner.run_largest()  # last: a capture gives back what steps outside of graphs have held
    used = free - torch.cuda.mem_get_info(device)[0] - runner.cache.nbytes
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    return free - used - (1 - share) * total
