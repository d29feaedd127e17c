"""From logits to the next token, row by row, without a host sync.

Every row of a batch has its own parameters, held as device tensors. The filters are pure functions on logits [B, V]
and compose to `probs`, the distribution that sampling draws from. The randomness is a
hash of (seed, position, token): a row draws the same tokens alone, in any batch, compiled or not, on any device,
and no generator state has to live inside a CUDA graph.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_UINT32 = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one row is sampled. The filters apply in the order of the fields; each default switches its filter off.

    What is far outside of any use is refused: in fp32 it would make infinities of logits, and these NaN.
    """

    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of tokens seen (Keskar et al. 2019)
    presence_penalty: float = 0.0  # subtracted once for every token generated so far
    frequency_penalty: float = 0.0  # subtracted for each time a token was generated
    temperature: float = 0.0  # 0 takes the most likely token, and so does anything below 1e-6
    top_k: int = 0  # the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # the fewest most likely tokens whose probabilities reach p (Holtzman et al. 2019)
    min_p: float = 0.0  # tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024)
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100.0, "between 0.01 and 100, where 1 is off"),
            "presence_penalty": (abs(self.presence_penalty) <= 1e4, "between -10000 and 10000, where 0 is off"),
            "frequency_penalty": (abs(self.frequency_penalty) <= 1e4, "between -10000 and 10000, where 0 is off"),
            "temperature": (0.0 <= self.temperature <= 1e4, "between 0, which is greedy, and 10000"),
            "top_k": (self.top_k >= 0, "at least 0, where 0 is off"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0 and at most 1, where 1 is off"),
            "min_p": (0.0 <= self.min_p <= 1.0, "between 0 and 1, where 0 is off"),
        }
        for name, (valid, allowed) in bounds.items():
            if not valid:
                raise ValueError(f"{name} must be {allowed}; got {getattr(self, name)}")
        if self.temperature < 1e-6:  # so cold that it is greedy, and the reciprocal of less may be infinite in fp32
            object.__setattr__(self, "temperature", 0.0)

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def simple(self) -> bool:
        """Whether a token is the one of the largest logit, or drawn by a temperature and nothing else."""
        if self.temperature == 0.0:
            return not self.penalizes
        return self == SamplingParams(temperature=self.temperature, seed=self.seed)


def stray_token(tokens: Collection[int], vocab_size: int) -> int | None:
    """The first of `tokens` that no model of so many tokens knows; None if it knows them all."""
    if not tokens or 0 <= min(tokens) <= max(tokens) < vocab_size:  # much faster than one by one
        return None
    return next(token for token in tokens if not 0 <= token < vocab_size)


class History:
    """The tokens that each of B rows has met, which is what penalties look at."""

    def __init__(self, prompt_seen: Tensor, counts: Tensor) -> None:
        self.prompt_seen = prompt_seen  # bool [B, V]
        self.counts = counts  # int32 [B, V], of generated tokens

    @classmethod
    def allocate(cls, rows: int, *, vocab_size: int, device: torch.device | str) -> "History":
        return cls(*(torch.zeros(rows, vocab_size, dtype=dtype, device=device) for dtype in (torch.bool, torch.int32)))

    def begin(self, row: int, prompt: Tensor, generated: Tensor) -> None:
        """Forget a row, and let it have met these tokens, int64 [any] each."""
        self.prompt_seen[row].fill_(False)[prompt] = True
        self.counts[row].fill_(0).scatter_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))

    def take(self, rows: Tensor) -> "History":
        """A copy of these rows."""
        return History(self.prompt_seen[rows], self.counts[rows])

    def count(self, rows: Tensor, tokens: Tensor) -> None:
        """Each of these rows [R], none of them twice, has generated another token, tokens [R]."""
        self.counts[rows, tokens] += 1

    def copy_(self, other: "History") -> None:
        self.prompt_seen.copy_(other.prompt_seen)
        self.counts.copy_(other.counts)


class SamplingBatch:
    """The parameters of B rows as device tensors [B, 1], and what the host knows of them to skip whole filters.

    `greedy`: every row takes the argmax. `candidates`: how many of the largest logits top-k and top-p have to look
    at; 0 when no row uses either. `floors`: some row uses min-p. `penalizes`: some row does, so there is a `history`:
    the one given, or a new one.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        *,
        vocab_size: int,
        device: torch.device | str,
        history: History | None = None,
    ) -> None:
        def column(values: list, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]  # [B, 1]

        self.repetition_penalty = column([p.repetition_penalty for p in params])
        self.presence_penalty = column([p.presence_penalty for p in params])
        self.frequency_penalty = column([p.frequency_penalty for p in params])
        self.temperature = column([p.temperature for p in params])
        self.top_k = column([min(p.top_k or vocab_size, vocab_size) for p in params], torch.int64)
        # A sum of fp32 probabilities can round to 1 before its end: off has to be out of its reach.
        self.top_p = column([p.top_p if p.top_p < 1.0 else math.inf for p in params])
        self.min_p = column([p.min_p for p in params])
        self.seed = column([p.seed % 2**63 for p in params], torch.int64)
        self.greedy = all(p.temperature == 0.0 for p in params)
        self.candidates = 0
        if any(p.top_k or p.top_p < 1.0 for p in params):
            self.candidates = min(max(p.top_k or vocab_size for p in params), vocab_size)
        self.floors = any(p.min_p for p in params)
        self.penalizes = any(p.penalizes for p in params)
        self.history = history
        if self.penalizes and history is None:
            self.history = History.allocate(len(params), vocab_size=vocab_size, device=device)

    def __len__(self) -> int:
        return self.temperature.shape[0]

    @property
    def argmax(self) -> bool:
        """Whether every row just takes its largest logit."""
        return self.greedy and not self.penalizes

    @property
    def kind(self) -> tuple[bool, int, bool, bool]:
        """Batches of one kind run the same operations, so they can share a compiled step or a CUDA graph."""
        return self.greedy, self.candidates, self.floors, self.penalizes

    @property
    def columns(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def copy_(self, other: "SamplingBatch") -> None:
        """Take over the values of a batch of the same kind and size, keeping this one's memory."""
        for name, value in self.columns.items():
            value.copy_(getattr(other, name))
        if self.penalizes:
            self.history.copy_(other.history)

    def see_prompt(self, row: int, tokens: Sequence[int]) -> None:
        """Let the repetition penalty know a row's prompt."""
        if self.penalizes:
            prompt = torch.tensor(tokens, device=self.temperature.device)
            self.history.begin(row, prompt, prompt[:0])

    def count(self, tokens: Tensor) -> None:
        """Let the penalties know the tokens [B] just generated."""
        if self.penalizes:
            self.history.count(torch.arange(len(tokens), device=tokens.device), tokens)


def penalize(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Repetition penalty over prompt and answer; presence and frequency penalties over the answer."""
    if not batch.penalizes:
        return logits
    seen, counts = batch.history.prompt_seen, batch.history.counts
    scale = torch.where(seen | (counts > 0), batch.repetition_penalty, 1.0)
    logits = torch.where(logits > 0, logits / scale, logits * scale)
    return logits - batch.presence_penalty * (counts > 0) - batch.frequency_penalty * counts


def top_k_top_p(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Logits [B, V] with -inf outside each row's top k, then outside its top p. Ties with the last kept one stay."""
    if not batch.candidates:
        return logits
    if batch.candidates < logits.shape[-1]:
        best = torch.topk(logits, batch.candidates).values  # [B, candidates], descending
    else:
        best = logits.sort(descending=True).values
    rank = torch.arange(best.shape[-1], device=best.device)
    p = best.masked_fill(rank >= batch.top_k, -math.inf).softmax(-1)
    before = p.cumsum(-1) - p  # probability of the tokens ahead of this one
    kept = ((rank < batch.top_k) & (before < batch.top_p)).sum(-1, keepdim=True)  # [B, 1]
    kept = kept.clamp_(min=1)  # a row of NaN, and a top p that is 0 in fp32, keep none
    return logits.masked_fill(logits < best.gather(-1, kept - 1), -math.inf)


def min_p(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Logits [B, V] with -inf where a token is less than min_p times as likely as the row's likeliest."""
    if not batch.floors:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + batch.min_p.log(), -math.inf)


def warp(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Penalties, temperature and filters applied to logits [B, V]. Rows at temperature 0 stay unscaled."""
    logits = penalize(logits.float(), batch)
    if batch.greedy:
        return logits
    logits = logits * torch.where(batch.temperature == 0.0, 1.0, batch.temperature).reciprocal()
    return min_p(top_k_top_p(logits, batch), batch)


def probs(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The distribution [B, V] that `sample` draws from; all on the most likely token where the temperature is 0."""
    logits = warp(logits, batch)
    one_hot = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where(batch.temperature == 0.0, one_hot, logits.softmax(-1))


def sample(logits: Tensor, batch: SamplingBatch, position: Tensor) -> Tensor:
    """The next token [B] from logits [B, V]; `position` [B] is where it goes, and with the seed decides the draw.

    The Gumbel-max trick: the argmax of logits plus Gumbel noise is a draw from their softmax.
    """
    logits = warp(logits, batch)
    if batch.greedy:
        return logits.argmax(-1)
    gumbel = -torch.log(-torch.log(uniform(batch.seed, position[:, None], logits.shape[-1])))
    return argmax_in_chunks(torch.where(batch.temperature == 0.0, logits, logits + gumbel))


CHUNK = 1024


def argmax_in_chunks(x: Tensor) -> Tensor:
    """Where each row of x [B, V] is largest, [B]. In two levels: compiled, one over a row would run on one core."""
    chunks = F.pad(x, (0, -x.shape[-1] % CHUNK), value=-math.inf).unflatten(-1, (-1, CHUNK))  # [B, V / CHUNK, CHUNK]
    best, column = chunks.max(-1)  # 2 x [B, V / CHUNK]
    chunk = best.argmax(-1, keepdim=True)  # [B, 1]
    return (chunk * CHUNK + column.gather(-1, chunk))[:, 0]


def uniform(seed: Tensor, position: Tensor, n: int) -> Tensor:
    """Noise in the open interval (0, 1), fp32 [B, n], a pure function of seed [B, 1], position [B, 1] and column.

    As SplitMix does: hashes of a counter. Seed and position say where it begins, and what odd step it takes: with one
    step for all, rows would be pieces of one sequence, and some of them would overlap.
    """
    row = _hash(_hash(_hash(seed & _UINT32) ^ (seed >> 32)) ^ position)  # [B, 1]
    step = _hash(row + 1 & _UINT32) | 1
    column = torch.arange(n, device=seed.device)
    bits = _hash(row + column * step & _UINT32) >> 9  # 23 bits: with the half below, fp32 holds them exactly
    return (bits.float() + 0.5) * 2.0**-23


def _hash(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer on int64 tensors of 32-bit values: the product wraps, but its low half is right."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _UINT32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _UINT32
    return x ^ (x >> 16)
