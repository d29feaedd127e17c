"""How likely a model finds given tokens: what perplexity, lm-eval's tasks and comparisons of models measure alike.

`positions` is the one pass over rows of tokens. Statistics are fp32, and the logits of only a few positions exist at a
time: a vocabulary's worth for each token of a text would be gigabytes.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from generator import Generator

LOGITS = 2**25  # numbers of fp32 logits at a time: 128 MiB

Row = tuple[Sequence[int], int]  # tokens, and how many of the last ones are scored


class Position(NamedTuple):
    """N scored positions of some rows."""

    row: Tensor  # [N] int64, on the CPU
    target: Tensor  # [N] int64: the token that comes next
    hidden: Tensor  # [N, C]: the last layer's output


class Score(NamedTuple):
    nll: float  # the sum of negative log likelihoods, in nats
    greedy: bool  # every scored token was the most likely one


@torch.no_grad()
def positions(generator: Generator, rows: Sequence[Row]) -> Iterator[Position]:
    """Everything of the rows that is scored, a few positions at a time, always the same ones for the same rows.

    Rows are padded on the right, which a causal model's earlier positions never see.
    """
    model, device = generator.model, generator.device
    B, T = len(rows), max(len(tokens) for tokens, _ in rows) - 1
    padded = torch.tensor([[*tokens, *[0] * (T + 1 - len(tokens))] for tokens, _ in rows])  # [B, T + 1]
    scored = torch.zeros(B, T, dtype=torch.bool)
    for row, (tokens, count) in enumerate(rows):
        scored[row, len(tokens) - 1 - count : len(tokens) - 1] = True
    inputs, generator.cached = padded.to(device), []
    chunk = max(1, generator.prefill_tokens // B)
    for begin in range(0, T, chunk):
        end = min(begin + chunk, T)
        input_pos = torch.arange(begin, end, device=device).expand(B, -1)  # [B, T]
        view = generator.cache.narrow(end, rows=B, tail=end - begin > 1)
        hidden = model.hidden(inputs[:, begin:end], input_pos, view)  # [B, T, C]
        row, column = scored[:, begin:end].nonzero(as_tuple=True)
        for some in torch.arange(len(row)).split(max(1, LOGITS // model.config.vocab_size)):
            x = hidden[row[some].to(device), column[some].to(device)]  # [N, C]
            yield Position(row[some], padded[row[some], begin + column[some] + 1].to(device), x)


@torch.no_grad()
def score(generator: Generator, rows: Sequence[Row]) -> list[Score]:
    """For each row of tokens, how likely its scored ones are, each given all before it."""
    nll, misses = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.int64)
    for row, target, x in positions(generator, rows):
        logits = generator.model.logits(x[None])[0].float()  # [N, V]
        nll.index_add_(0, row, F.cross_entropy(logits, target, reduction="none").cpu().double())
        misses.index_add_(0, row, (logits.argmax(-1) != target).cpu().long())
    return [Score(n, m == 0) for n, m in zip(nll.tolist(), misses.tolist(), strict=True)]


def windows_of(tokens: Sequence[int], *, context: int, windows: int | None) -> list[Row]:
    """The rows to score: `context` tokens to predict each, and one to start from."""
    most = (len(tokens) - 1) // context
    if most < (windows or 1):
        raise ValueError(
            f"{windows or 1} windows of {context} tokens need {(windows or 1) * context + 1} tokens and the text has "
            f"{len(tokens)}; give a longer --text, or less --windows or --context"
        )
    return [(tokens[i * context : (i + 1) * context + 1], context) for i in range(windows or most)]


def note(text: str, done: int, total: int, *, keep: bool = True) -> None:
    """Progress, as a line on a terminal; unless to `keep`, it is gone at the end."""
    if sys.stderr.isatty():
        end = "" if done < total else "\n" if keep else "\r\033[K"
        print(f"\r\033[K{text} {done}/{total}", end=end, file=sys.stderr, flush=True)
