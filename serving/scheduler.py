"""Which tokens run next: iteration-level scheduling over paged memory."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from serving.request import Sequence


class Work(NamedTuple):
    """Tokens of one sequence in one step."""

    sequence: Sequence
    start: int  # position of its first token in this step
    count: int
    samples: bool  # whether its last token yields a token
    epoch: int  # the sequence's when this was scheduled
    mask: np.ndarray | None = None  # what a constraint allows


@dataclass(slots=True, eq=False)
class Step:
    """What the device does next, in this order: swaps out, swaps in, copies, one forward over decodes and prefills.

    Steps run in the order in which they were launched, copies to and from the host among them: a block freed by the
    host may be given away while a step that uses it is still under way.
    """

    # Of count 1: the newest token of a running sequence, which may so far exist on the device only.
    decodes: list[Work] = field(default_factory=list)
    # Known tokens: sequence.tokens[start : start + count]. Also recomputation after a preemption, and the last prompt
    # token once more for samples 2..n, which share the first one's blocks.
    prefills: list[Work] = field(default_factory=list)
    joined: list[Sequence] = field(default_factory=list)  # given a slot in this step
    table: list[tuple[int, int, int]] = field(default_factory=list)  # (slot, index, block): new in block tables
    copies: list[tuple[int, int]] = field(default_factory=list)  # (from, to); no block is on both sides
    swap_out: list[tuple[int, int]] = field(default_factory=list)  # (device block, host block)
    swap_in: list[tuple[int, int]] = field(default_factory=list)  # (host block, device block)
