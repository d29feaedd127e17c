"""What travels between the parts of the server: requests in, the state of their samples, outputs back.

Everything here is tokens; text belongs to the API, memory to `blocks.py`, order to `scheduler.py`. A request asks for
`n` samples, and each of them is a `Sequence`: the host's view of one row of the model. With overlap the host is a step
behind the device, so a sequence tells what is known (`tokens`) from what was launched (`computed`, `pending`).
"""

import dataclasses
import time
from collections import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from sampling import SamplingParams


class Constraint(Protocol):
    """A grammar's state for one sample. It may raise anything: its own sample ends then."""

    def mask(self) -> np.ndarray:
        """Which tokens may come next: int32 [ceil(V / 32)], a set bit allows; unchanged until the next `accept`."""

    def accept(self, token: int) -> bool:
        """Takes the token drawn. False: the grammar is complete and nothing may follow it."""


@dataclass(kw_only=True, eq=False)
class Request:
    """What a caller asks for."""

    id: str
    prompt: abc.Sequence[int]
    params: "SamplingParams"  # sample i of n draws with seed + i
    n: int = 1
    max_new_tokens: int = 256
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0  # lower is served first, by the policy "priority"
    salt: str | None = None  # prefixes are shared only between equal salts
    logprobs: int | None = None  # how many alternatives to report for each token; 0: the token's own only
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    constraint: Callable[[], Constraint] | None = None  # makes one for each sample
    arrived: float = field(default_factory=time.monotonic)
    queued: float = 0.0  # when the engine took it, from which on its time is limited


class TokenLogprobs(NamedTuple):
    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True)
class Output:
    """What one turn of the engine made for one sample."""

    request_id: str
    index: int  # which of n
    token_ids: list[int]  # new since the last Output; a stop id that ended the sample is not among them
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"
    error: str | None = None
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    queued_s: float = 0.0  # from the request's arrival to the sample's first step


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request, as the host knows it. Only the scheduler writes these fields."""

    request: Request
    index: int  # which of n
    order: int  # of arrival, over all sequences
    end: int  # the length at which it is finished
    params: "SamplingParams" = field(init=False)  # the request's, with this sample's seed
    constraint: Constraint | None = None
    mask: np.ndarray | None = None  # of the constraint, for the next token that is not drawn yet
    simple: bool = field(init=False)  # its logits and a temperature settle its tokens: nobody else has to see them
    tokens: abc.Sequence[int] = field(init=False)  # prompt and generated, known to the host
    computed: int = 0  # tokens whose keys and values are written by the steps launched so far
    pending: int = 0  # tokens that launched steps draw and the host does not know yet
    blocks: list[int] = field(default_factory=list)  # on the device: its block table
    slot: int | None = None  # row of the runner's device tables while running
    epoch: int = 0  # goes up when it is preempted or finished: results of steps launched before are void
    finish_reason: str | None = None
    # The scheduler's own:
    capacity: int = 0  # it decodes without a second look while `computed` is below
    serials: list[int] = field(default_factory=list)  # names of its first blocks in the prefix cache
    host_blocks: list[int] = field(default_factory=list)  # where it is swapped out to
    followers: list["Sequence"] = field(default_factory=list)  # samples that wait for this one's prefill
    leader: "Sequence | None" = None  # whose follower it was
    resumed_at: int = 0  # tokens it knew when it last came back from a preemption
    stamp: int = 0  # of its latest entry in the waiting queue; 0: not waiting
    level: int = 0  # of the multi-level feedback queue
    served: float = 0.0  # of its level's quantum
    started: bool = False
    cached_tokens: int = 0
    queued_s: float = 0.0

    def __post_init__(self) -> None:
        request = self.request
        self.params = dataclasses.replace(request.params, seed=request.params.seed + self.index)
        self.tokens = request.prompt
        if request.constraint is not None:
            self.constraint = request.constraint()
            self.mask = self.constraint.mask()
        self.simple = self.params.simple and not (
            request.logit_bias or request.logprobs is not None or self.constraint is not None
        )

    def append(self, token: int) -> None:
        """One more token is known. Until their first one, samples share their prompt: it may be long, and they many."""
        if self.tokens is self.request.prompt:
            self.tokens = list(self.tokens)
        self.tokens.append(token)

    @property
    def length(self) -> int:
        """Tokens, those on the device only included."""
        return len(self.tokens) + self.pending

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]
