"""Draws the next token of each row of a step, by that row's own parameters.

`sampling.py` knows how; this file knows who: which slots a step draws for, what their requests ask for, and what
they have met so far, by slot. It takes logits and positions and gives tokens, all on the device, and waits for nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import hardware
from kernels.draw import draw
from sampling import History, SamplingBatch, sample
from serving import request
from serving.scheduler import Work

# How a token is drawn. "greedy": it is the one of the largest logit. "plain": by a temperature, which may be 0, and
# nothing else. "logits": by whatever a request may ask for, so somebody has to see the logits. Each can do for those
# before it.
KINDS = ("greedy", "plain", "logits")


@dataclass(kw_only=True, eq=False)
class Rows:
    """The sequences that a step draws a token for, and what drawing takes."""

    slots: list[int]
    index: Tensor  # int64 [n], the slots on the device
    kind: str  # one of KINDS, which does for all of them
    # Of kind "logits" only:
    sampling: SamplingBatch | None = None
    bias: list[Tensor] | None = None  # rows, tokens, and what those logits gain, [any] each
    reports: Sequence[tuple[int, int]] = ()  # (row, number of alternatives) where logprobs are asked for
    report_index: Tensor | None = None  # their rows, int64


class Drawing:
    """Draws for sequences in slots below `slots`."""

    def __init__(self, *, slots: int, vocab_size: int, device: torch.device) -> None:
        self.slots, self.vocab_size, self.device = slots, vocab_size, device
        self.temperature = torch.zeros(slots, device=device)
        self.seed = torch.zeros(slots, dtype=torch.int64, device=device)
        self.history: History | None = None  # by slot; made when the first penalized sequence joins
        self.latest: Rows | None = None

    def join(self, sequences: Sequence[request.Sequence]) -> None:
        """These take over their slots, with all the tokens that they know."""
        if not sequences:
            return
        self.latest = None
        index, temperature, seed = hardware.send(
            self.device,
            np.array([s.slot for s in sequences], dtype=np.int64),
            np.array([s.params.temperature for s in sequences], dtype=np.float32),
            np.array([s.params.seed % 2**63 for s in sequences], dtype=np.int64),
        )
        self.temperature[index], self.seed[index] = temperature, seed
        for sequence in sequences:
            if not sequence.params.penalizes:
                continue
            if self.history is None:
                self.history = History.allocate(self.slots, vocab_size=self.vocab_size, device=self.device)
            met = (np.array(x, dtype=np.int64) for x in (sequence.request.prompt, sequence.generated))
            self.history.begin(sequence.slot, *hardware.send(self.device, *met))

    def rows_of(self, works: Sequence[Work]) -> Rows:
        """Who these are, as it was in the step before where they are the same."""
        slots = [work.sequence.slot for work in works]
        if self.latest is None or slots != self.latest.slots:
            self.latest = self._new_rows([work.sequence for work in works], slots)
        return self.latest

    def _new_rows(self, sequences: Sequence[request.Sequence], slots: list[int]) -> Rows:
        kind = max(map(kind_of, sequences), key=KINDS.index, default="greedy")
        if kind != "logits":
            (index,) = hardware.send(self.device, np.array(slots, dtype=np.int64))
            return Rows(slots=slots, index=index, kind=kind)
        params, requests = [s.params for s in sequences], [s.request for s in sequences]
        bias = [(row, token, gain) for row, r in enumerate(requests) for token, gain in r.logit_bias.items()]
        reports = [(row, r.logprobs) for row, r in enumerate(requests) if r.logprobs is not None]
        sampling = SamplingBatch(params, vocab_size=self.vocab_size, device="cpu", history=self.history)
        index, row, token, gain, reported, *columns = hardware.send(
            self.device,
            np.array(slots, dtype=np.int64),
            np.array([row for row, _, _ in bias], dtype=np.int64),
            np.array([token for _, token, _ in bias], dtype=np.int64),
            np.array([gain for _, _, gain in bias], dtype=np.float32),
            np.array([row for row, _ in reports], dtype=np.int64),
            *(x.numpy() for x in sampling.columns.values()),
        )
        for name, column in zip(sampling.columns, columns, strict=True):
            setattr(sampling, name, column)
        return Rows(
            slots=slots,
            index=index,
            kind=kind,
            sampling=sampling,
            bias=[row, token, gain] if bias else None,
            reports=reports,
            report_index=reported,
        )

    def draw(self, rows: Rows, works: Sequence[Work], logits: Tensor, position: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens [n] that go to `position` [n], from logits [n, V], which may be overwritten.

        Also what `rows.reports` ask for: the tokens' log probabilities, the highest ones and whose those are.
        """
        if rows.kind == "greedy":
            return logits.argmax(-1), []
        if rows.kind == "plain":
            return draw(logits, rows.index, self.temperature, self.seed, position), []
        logits = logits.float()
        logprobs = logits[rows.report_index].log_softmax(-1) if rows.reports else None  # as the model has them
        if rows.bias is not None:
            row, token, gain = rows.bias
            logits[row, token] += gain
        self._forbid(works, logits)
        if rows.sampling.penalizes:
            rows.sampling.history = self.history.take(rows.index)
        tokens = sample(logits, rows.sampling, position)
        if rows.sampling.penalizes:
            self.history.count(rows.index, tokens)
        if logprobs is None:
            return tokens, []
        own = logprobs.gather(1, tokens[rows.report_index][:, None])[:, 0]
        top = logprobs.topk(min(max(n for _, n in rows.reports), self.vocab_size))
        return tokens, [own, top.values, top.indices]

    def _forbid(self, works: Sequence[Work], logits: Tensor) -> None:
        """Take out of logits [n, V] the tokens for which a row's constraint has no bit."""
        masks = {row: work.mask for row, work in enumerate(works) if work.mask is not None}
        if not masks:
            return
        index, words = hardware.send(self.device, np.array(list(masks)), np.stack(list(masks.values())))
        bits = torch.arange(32, dtype=torch.int32, device=self.device)
        allowed = (words[:, :, None] >> bits & 1).bool().flatten(1)[:, : self.vocab_size]
        forbidden = torch.ones(len(masks), self.vocab_size, dtype=torch.bool, device=self.device)
        forbidden[:, : allowed.shape[1]] = ~allowed  # a grammar may know fewer tokens than the head has rows
        logits[index] = logits[index].masked_fill(forbidden, -math.inf)


def kind_of(sequence: request.Sequence) -> str:
    """The first of KINDS that does for a sequence."""
    if not sequence.simple:
        return "logits"
    return "greedy" if sequence.params.temperature == 0.0 else "plain"
