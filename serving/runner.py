"""Runs the scheduler's steps on the device and fetches the tokens that they draw.

What the next step of a sequence needs stays on the device, in tables by slot: its newest token, where that goes, its
blocks. A step sends what it changes in one small copy. Steps that only decode send nothing else: on CUDA they are
graphs over the tables, one for each of some batch sizes, and nothing on the way waits for the device; `Ticket.wait`
does, for its own step. Everything here is rows and tokens: who they belong to and when they end is the scheduler's.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cache import PagedBatch, PagedCache
from model import Transformer
from sampling import History, SamplingBatch, sample
from serving.request import TokenLogprobs
from serving.scheduler import Step, Work

if TYPE_CHECKING:
    from kernels.decoder import Decoder

FUSED_ROWS = 16  # up to so many greedy rows, the head's kernel finds the largest logits without writing any


class Ticket:
    """The results of a step under way: tensors on their way to the host."""

    def __init__(self, rows: "Rows", tokens: Tensor, logprobs: Sequence[Tensor]) -> None:
        self.rows = rows
        self.tokens, *self.logprobs = (_to_host(x) for x in (tokens, *logprobs))
        self.arrived: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """The token of each Work that samples, decodes first, with its logprobs where they were asked for."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens, logprobs = self.tokens.tolist(), [None] * len(self.tokens)
        if self.logprobs:
            for (row, alternatives), own, values, ids in zip(
                self.rows.reports, *(x.tolist() for x in self.logprobs), strict=True
            ):
                top = list(zip(ids, values, strict=True))[:alternatives]
                logprobs[row] = TokenLogprobs(tokens[row], own, top)
        return tokens, logprobs


@dataclass(kw_only=True, eq=False)
class Rows:
    """The sequences that a step draws a token for, and what drawing takes."""

    slots: list[int]
    index: Tensor  # int64 [n], the slots on the device
    sampling: SamplingBatch | None  # None: every row takes its largest logit, as it is
    bias: tuple[Tensor, Tensor, Tensor] | None = None  # rows, tokens and what their logits gain, [any] each
    reports: Sequence[tuple[int, int]] = ()  # (row, number of alternatives) where logprobs are asked for
    report_index: Tensor | None = None  # their rows, int64


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
        max_seq_len: int | None = None,
        n_host_blocks: int = 0,
        kv_dtype: str | None = None,
        decoder: "Transformer | Decoder | None" = None,
    ) -> None:
        """`decoder` is what runs the model, as `compile_model` makes it. Blocks bound `max_seq_len`: one is the null block."""
        config, weight = model.config, model.norm.weight
        self.decoder = model if decoder is None else decoder
        self.device, self.vocab_size = weight.device, config.vocab_size
        self.n_blocks, self.block_size, self.n_host_blocks = n_blocks, block_size, n_host_blocks
        self.max_running, self.max_step_tokens = max_running, max_step_tokens
        self.max_seq_len = min(max_seq_len or config.max_seq_len, config.max_seq_len, (n_blocks - 1) * block_size)
        self.cache = PagedCache.allocate(
            n_blocks=n_blocks,
            block_size=block_size,
            n_layers=config.n_layers,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            dtype=weight.dtype,
            device=self.device,
            kv_dtype=kv_dtype,
        )
        pinned = self.device.type == "cuda"
        self.host_blocks = [  # [n_host_blocks, n_layers, block_size, ...] each
            torch.empty(n_host_blocks, len(x), *x.shape[2:], dtype=x.dtype, pin_memory=pinned)
            for x in (self.cache.tensors if n_host_blocks else ())
        ]
        # By slot. The last row is the null row, which pads batches: it stays at position 0 of the null block.
        self.null_row = max_running
        self.newest = torch.zeros(max_running + 1, dtype=torch.int64, device=self.device)
        self.position = torch.zeros_like(self.newest)  # of the newest token
        blocks = -(-self.max_seq_len // block_size)
        self.tables = torch.zeros(max_running + 1, blocks, dtype=torch.int32, device=self.device)
        self.history: History | None = None  # by slot as well; made when the first sequence is penalized

        self.fused = decoder is not None and decoder is not model  # kernels, which also end a greedy step
        self.graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor | None]]] = {}
        # What decode graphs run, the first so many of them: slots, as the kernels and as torch take them.
        self.rows = torch.full((max_running,), self.null_row, dtype=torch.int32, device=self.device)
        self.drawn: Rows | None = None  # of the latest step ...
        self.shown: Rows | None = None  # ... and those that `rows` holds

    # ---- A step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def launch(self, step: Step) -> Ticket:
        """Enqueue a step. Where the device is the CPU it has run on return."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread
        self._move_blocks(step)
        self._update_tables(step)
        works = [work for work in itertools.chain(step.decodes, step.prefills) if work.samples]
        rows = self._rows_of(works, anew=bool(step.joined))
        if step.prefills:
            logits = self._mixed(step, rows)
            tokens = logits.argmax(-1) if rows.sampling is None else None
        else:
            tokens, logits = self._decode(rows)
        if rows.sampling is None:
            if step.prefills:
                self.newest[rows.index] = tokens
            return Ticket(rows, tokens, ())
        return self._draw(rows, works, logits)

    def _move_blocks(self, step: Step) -> None:
        if step.swap_out:
            device, host = zip(*step.swap_out, strict=True)
            (index,) = self._send(np.array(device))
            for x, kept in zip(self.cache.tensors, self.host_blocks, strict=True):
                for block, there in zip(x[:, index].transpose(0, 1).contiguous(), host, strict=True):
                    kept[there].copy_(block, non_blocking=True)
        if step.swap_in:
            host, device = zip(*step.swap_in, strict=True)
            (index,) = self._send(np.array(device))
            for x, kept in zip(self.cache.tensors, self.host_blocks, strict=True):
                blocks = torch.stack([kept[there].to(self.device, non_blocking=True) for there in host], dim=1)
                x[:, index] = blocks
        if step.copies:
            self.cache.copy(*self._send(*np.array(step.copies).T.copy()))

    def _update_tables(self, step: Step) -> None:
        """The entries of tables that a step changes, those of sequences that join among them."""
        joined = [(s.slot, s.tokens[-1], len(s.tokens) - 1) for s in step.joined]
        if step.table or joined:
            changes = np.array([*step.table, *joined], dtype=np.int64).T.copy()  # [3, any]
            (changes,) = self._send(changes)
            (slot, index, block), (joins, newest, position) = changes.split((len(step.table), len(joined)), dim=1)
            self.tables[slot, index] = block.int()
            self.newest[joins], self.position[joins] = newest, position
        for sequence in step.joined:
            if sequence.params.penalizes:
                if self.history is None:
                    self.history = History.allocate(len(self.newest), vocab_size=self.vocab_size, device=self.device)
                met = self._send(*(np.array(x, dtype=np.int64) for x in (sequence.request.prompt, sequence.generated)))
                self.history.begin(sequence.slot, *met)

    def _mixed(self, step: Step, rows: Rows) -> Tensor:
        """One forward over decodes and prefills: logits [n, V] of those that sample."""
        works, D = [*step.decodes, *step.prefills], len(step.decodes)
        ends = list(itertools.accumulate(work.count for work in works))
        tokens, at = np.zeros(ends[-1], dtype=np.int64), np.empty(ends[-1], dtype=np.int64)
        for i, (work, end) in enumerate(zip(works, ends, strict=True)):
            here = slice(end - work.count, end)
            at[here] = np.arange(work.start, work.start + work.count)
            if i >= D:
                tokens[here] = work.sequence.tokens[work.start : work.start + work.count]
        tokens, at, last, slots, starts = self._send(
            tokens,
            at,
            np.array([end - 1 for work, end in zip(works, ends, strict=True) if work.samples], dtype=np.int64),
            np.array([work.sequence.slot for work in works], dtype=np.int32),
            np.array([D, *ends[D:]], dtype=np.int32),
        )
        longest = max(work.count for work in step.prefills)
        tokens[:D] = self.newest[slots[:D]]
        view = self.cache.view(PagedBatch(self.tables, slots, D, starts, longest))
        x = self.decoder.hidden(tokens[None], at[None], view)  # [1, T, C]
        self.position[rows.index] = at[last] + 1
        return self.decoder.logits(x[:, last])[0].float()

    def _decode(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """One step of running sequences: their largest logits' tokens [n], and logits [n, V] unless they are fused."""
        n = len(rows.slots)
        size = n if self.device.type == "cpu" else next(size for size in buckets(self.max_running) if size >= n)
        if rows is not self.shown:
            self.rows[:n], self.rows[n:] = rows.index, self.null_row
            self.shown = rows
        fused = rows.sampling is None and self._fuses(size)
        graph, results = self.graphs.get((size, fused), (None, None))
        if graph is None:
            results = self._step(size, fused)
        else:
            graph.replay()
        return tuple(None if x is None else x[:n] for x in results)

    def _fuses(self, size: int) -> bool:
        return self.fused and size <= FUSED_ROWS

    def _step(self, size: int, fused: bool) -> tuple[Tensor, Tensor | None]:
        """A decode step of the first `size` of `rows`: reads and writes the tables alone, so that a graph can hold it."""
        rows = self.rows[:size]
        index = rows.long()
        tokens, at = self.newest[index], self.position[index]
        ends = torch.full((1,), size, dtype=torch.int32, device=self.device)
        x = self.decoder.hidden(tokens[None], at[None], self.cache.view(PagedBatch(self.tables, rows, size, ends, 0)))
        logits = None
        if fused:
            self.decoder.greedy(x.view(size, 1, -1), tokens[:, None], at[:, None], self.max_seq_len)
        else:
            logits = self.decoder.logits(x)[0].float()  # [size, V]
            tokens, at = logits.argmax(-1), at + 1
        self.newest[index], self.position[index] = tokens, at
        self.position[self.null_row].zero_()
        return tokens, logits

    # ---- Drawing -----------------------------------------------------------------------------------------------------

    def _rows_of(self, works: Sequence[Work], *, anew: bool) -> Rows:
        """What the rows of a step are, kept from the step before where it had the same."""
        slots = [work.sequence.slot for work in works]
        if anew or self.drawn is None or slots != self.drawn.slots:
            self.drawn = self._new_rows([work.sequence for work in works], slots)
        return self.drawn

    def _new_rows(self, sequences: Sequence, slots: list[int]) -> Rows:
        (index,) = self._send(np.array(slots, dtype=np.int64))
        params, requests = [s.params for s in sequences], [s.request for s in sequences]
        bias = [(row, token, x) for row, r in enumerate(requests) for token, x in r.logit_bias.items()]
        reports = [(row, r.logprobs) for row, r in enumerate(requests) if r.logprobs is not None]
        constrained = any(s.constraint is not None for s in sequences)
        if not (bias or reports or constrained or any(p.penalizes or p.temperature for p in params)):
            return Rows(slots=slots, index=index, sampling=None)
        sampling = SamplingBatch(params, vocab_size=self.vocab_size, device="cpu", history=self.history)
        for name, x in zip(sampling.columns, self._send(*(x.numpy() for x in sampling.columns.values())), strict=True):
            setattr(sampling, name, x)
        rows = Rows(slots=slots, index=index, sampling=sampling, reports=reports)
        if bias:
            row, token, gain = zip(*bias, strict=True)
            rows.bias = self._send(np.array(row), np.array(token), np.array(gain, dtype=np.float32))
        if reports:
            (rows.report_index,) = self._send(np.array([row for row, _ in reports]))
        return rows

    def _draw(self, rows: Rows, works: Sequence[Work], logits: Tensor) -> Ticket:
        """The tokens that follow, from logits [n, V], by each row's parameters. Overwrites the logits."""
        logprobs = logits[rows.report_index].log_softmax(-1) if rows.reports else None  # the model's own
        if rows.bias is not None:
            row, token, gain = rows.bias
            logits[row, token] += gain
        self._forbid(works, logits)
        if rows.sampling.penalizes:
            rows.sampling.history = self.history.take(rows.index)
        tokens = sample(logits, rows.sampling, self.position[rows.index])
        if rows.sampling.penalizes:
            self.history.count(rows.index, tokens)
        self.newest[rows.index] = tokens
        if not rows.reports:
            return Ticket(rows, tokens, ())
        own = logprobs.gather(1, tokens[rows.report_index][:, None])[:, 0]
        top = logprobs.topk(min(max(n for _, n in rows.reports), self.vocab_size))
        return Ticket(rows, tokens, (own, top.values, top.indices))

    def _forbid(self, works: Sequence[Work], logits: Tensor) -> None:
        """-inf where a constraint has no bit."""
        masks = {row: work.mask for row, work in enumerate(works) if work.mask is not None}
        if not masks:
            return
        index, words = self._send(np.array(list(masks)), np.stack(list(masks.values())))
        bits = torch.arange(32, dtype=torch.int32, device=self.device)
        allowed = (words[:, :, None] >> bits & 1).flatten(1)[:, : self.vocab_size].bool()  # [masks, at most V]
        at_most = allowed.shape[1]
        logits[index, :at_most] = logits[index, :at_most].masked_fill(~allowed, -torch.inf)
        logits[index, at_most:] = -torch.inf

    # ---- Getting ready -----------------------------------------------------------------------------------------------

    def _send(self, *arrays: np.ndarray) -> list[Tensor]:
        """Small arrays on the device, by one copy that nobody waits for.

        torch keeps the pinned memory of a copy under way from being given away, so each step takes its own.
        """
        if self.device.type != "cuda":
            return [torch.from_numpy(x) for x in arrays]
        offsets = [0, *itertools.accumulate(-(-x.nbytes // 16) * 16 for x in arrays)]
        host = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=True)
        pieces = [
            host[begin : begin + x.nbytes].view(torch.from_numpy(x).dtype).view(x.shape)
            for x, begin in zip(arrays, offsets, strict=False)
        ]
