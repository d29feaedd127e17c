"""Traffic to measure a server with: how long prompts and answers are, and what came of the requests.

Token ids and times only: who runs the requests, in this process or over HTTP, is not known here. Prompts are random
tokens, so nothing is found in a prefix cache but what is shared on purpose.
"""

import math
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PERCENTILES = (50, 90, 99)

# "sharegpt-like" lengths are lognormal, with the means that the PagedAttention paper (arXiv 2309.06180, figure 11)
# gives for ShareGPT, 161 tokens a prompt and 338 an answer. It shows the spread in a histogram only; a sigma of 1 is a
# choice: half of the prompts have fewer than 98 tokens, one in ten more than 350. Both are cut at the paper's 2,048.
SHAREGPT_MEANS = 161.0, 338.0
SHAREGPT_SIGMA = 1.0
SHAREGPT_LONGEST = 2048


class Lengths:
    """How many tokens prompts and answers have: fixed:PROMPT:ANSWER, uniform:LEAST:MOST (of both) or sharegpt-like."""

    def __init__(self, text: str) -> None:
        self.kind, *rest = text.split(":")
        wanted = {"fixed": 2, "uniform": 2, "sharegpt-like": 0}.get(self.kind)
        if wanted != len(rest) or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in rest):
            raise ValueError(
                f"--lengths {text!r} is none of fixed:PROMPT:ANSWER, uniform:LEAST:MOST and sharegpt-like, "
                "lengths in tokens, at least 1"
            )
        self.pair = [int(part) for part in rest]
        if self.kind == "uniform" and self.pair[0] > self.pair[1]:
            raise ValueError(f"--lengths {text}: {self.pair[0]} is more than {self.pair[1]}")

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its answer together, at most."""
        return {"fixed": sum(self.pair), "uniform": 2 * max(self.pair, default=0)}.get(self.kind, 2 * SHAREGPT_LONGEST)

    def prompt(self, draw: random.Random) -> int:
        return self._length(draw, 0)

    def answer(self, draw: random.Random) -> int:
        return self._length(draw, 1)

    def _length(self, draw: random.Random, which: int) -> int:
        if self.kind == "fixed":
            return self.pair[which]
        if self.kind == "uniform":
            return draw.randint(*self.pair)
        location = math.log(SHAREGPT_MEANS[which]) - SHAREGPT_SIGMA**2 / 2
        return min(max(round(draw.lognormvariate(location, SHAREGPT_SIGMA)), 1), SHAREGPT_LONGEST)


class Traffic:
    """The prompts of a run, and how long their answers should be.

    They are drawn in the order in which nano-vllm's bench.py draws its own, so that seed 0 gives the same. Further
    runs have the same lengths and other prompts, so that no run finds what one before left in a cache.
    """

    def __init__(self, lengths: Lengths, *, count: int, vocab_size: int, shared_prefix: int = 0, seed: int = 0) -> None:
        draw = random.Random(seed)
        self.last = vocab_size - 1  # the largest token
        self.prompts = [[draw.randint(0, self.last) for _ in range(lengths.prompt(draw))] for _ in range(count)]
        self.answers = [lengths.answer(draw) for _ in range(count)]
        self.shared = [draw.randint(0, self.last) for _ in range(shared_prefix)]

    def run(self, number: int) -> list[tuple[list[int], int]]:
        """Prompts and answers' lengths of one run, with a shared prefix of its own."""
        prefix = self.prefix(number)
        return [
            (prefix + self._other(prompt, number), answer)
            for prompt, answer in zip(self.prompts, self.answers, strict=True)
        ]

    def endless(self) -> Iterator[tuple[list[int], int]]:
        """One run after another, with the same shared prefix."""
        number = 0
        while True:
            for prompt, answer in zip(self.prompts, self.answers, strict=True):
                yield self.shared + self._other(prompt, number), answer
            number += 1

    def prefix(self, number: int) -> list[int]:
        return self._other(self.shared, number)

    def _other(self, prompt: Sequence[int], number: int) -> list[int]:
        return [(token + number) % (self.last + 1) for token in prompt]


@dataclass(kw_only=True)
class Record:
    """What came of one request. Times are of one clock, in seconds."""

    sent: float
    prompt_tokens: int
    cached_tokens: int = 0
    answers: int = 1
    tokens: int = 0  # of all its answers
    times: list[float] = field(default_factory=list)  # when its tokens came, the first one's first
    end: float = 0.0
    error: str | None = None  # what kind of failure
    left: bool = False  # ended by us, on purpose

    @property
    def whole(self) -> bool:
        return self.error is None and not self.left and bool(self.times)

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False)]

    @property
    def token_s(self) -> float:
        """From the first token on, the mean time that each took."""
        later = self.tokens / self.answers - 1
        return (self.times[-1] - self.times[0]) / later if later > 0 else 0.0


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and percentiles; None where there is nothing to take them of."""
    ordered = sorted(values)
    result = {"mean": statistics.fmean(ordered) if ordered else None}
    for p in PERCENTILES:
        place = p / 100 * (len(ordered) - 1)
        low = int(place)
        between = ordered[low : low + 2]
        result[f"p{p}"] = between[0] + (between[-1] - between[0]) * (place - low) if between else None
    return result


def summarize(
    records: Sequence[Record], wall_s: float, *, limit_ttft_s: float | None = None, limit_token_s: float | None = None
) -> dict:
    """A run's figures. Speeds count every token made; latencies are those of the requests that were answered whole."""
    whole = [record for record in records if record.whole]
    prompt_tokens, tokens = sum(r.prompt_tokens for r in whole), sum(r.tokens for r in records)
    good = [
        record
        for record in whole
        if (limit_ttft_s is None or record.ttft_s <= limit_ttft_s)
        and (limit_token_s is None or record.token_s <= limit_token_s)
    ]
    limited = limit_ttft_s is not None or limit_token_s is not None
    return {
        "wall_s": wall_s,
        "completed": len(whole),
        "left": sum(record.left for record in records),
        "errors": dict(Counter(record.error for record in records if record.error is not None)),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(record.cached_tokens for record in whole),
        "output_tokens": tokens,
        "output_tok_s": tokens / wall_s,
        "total_tok_s": (tokens + prompt_tokens) / wall_s,
        "requests_per_s": len(whole) / wall_s,
        "ttft_s": spread([record.ttft_s for record in whole]),
        "inter_token_s": spread([gap for record in whole for gap in record.gaps]),
        "token_s": spread([record.token_s for record in whole if record.tokens > 1]),
        "e2e_s": spread([record.end - record.sent for record in whole]),
        "goodput_per_s": len(good) / wall_s if limited else None,
        "good_share": len(good) / len(records) if limited and records else None,
    }


def show(figures: dict) -> Iterator[str]:
    """The figures of `summarize`, for people."""
    made = f"{figures['output_tokens']} tokens in {figures['wall_s']:.2f} s"
    cached = f", {figures['cached_tokens']} of them cached" if figures["cached_tokens"] else ""
    yield f"output         {figures['output_tok_s']:9.0f} tok/s ({made})"
    yield f"with prompts   {figures['total_tok_s']:9.0f} tok/s ({figures['prompt_tokens']} prompt tokens{cached})"
    yield f"requests       {figures['requests_per_s']:9.2f} a second ({figures['completed']} answered)"
    yield "in ms               " + "".join(f"{name:>10}" for name in ("mean", *(f"{p} %" for p in PERCENTILES)))
    names = {
        "ttft_s": "first token",
        "inter_token_s": "between events",
        "token_s": "each token",
        "e2e_s": "whole answer",
    }
    for key, name in names.items():
        cells = ["-" if value is None else f"{value * 1e3:.1f}" for value in figures[key].values()]
        yield f"  {name:<18}" + "".join(f"{cell:>10}" for cell in cells)
    if figures["goodput_per_s"] is not None:
        yield f"within limits  {figures['goodput_per_s']:9.2f} a second ({figures['good_share']:.1%} of all requests)"
    if figures["left"]:
        yield f"left early     {figures['left']:9}"
    for kind, count in figures["errors"].items():
        yield f"failed         {count:9} by {kind}"
