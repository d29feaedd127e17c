"""Who is served first: first come, by priority, or a multi-level feedback queue.

A policy gives each sequence a level. Lower levels are served first, and within a level who came first. Where a policy
`displaces`, a waiting sequence takes the place of running ones of higher levels; otherwise only memory that has run out
preempts. A policy knows nothing of memory and steps' budgets.
"""

import heapq
import itertools
from collections import deque
from typing import TYPE_CHECKING

from serving.request import Sequence

if TYPE_CHECKING:
    from serving.scheduler import Step


class Fcfs:
    """First come, first served."""

    displaces = False

    def enter(self, sequence: Sequence) -> None:
        """A new sequence."""

    def wait(self, sequence: Sequence) -> None:
        """A sequence begins to wait."""

    def ran(self, step: "Step") -> None:
        """A step was launched."""

    def starving(self) -> list[Sequence]:
        """Called once a turn: waiting sequences whose level has changed."""
        return []

    def level(self, sequence: Sequence) -> int:
        return 0


class Priority(Fcfs):
    """By the requests' `priority`, lower first."""

    displaces = True

    def level(self, sequence: Sequence) -> int:
        return sequence.request.priority


class Mlfq(Fcfs):
    """FastServe's skip-join multi-level feedback queue (Wu et al. 2023): short jobs first, lengths unknown.

    A level's quantum is twice that of the level before; who has used it up sinks a level. What the first step costs is
    known from the prompt's length, so a sequence joins at the first level whose quantum covers it. Who has waited for
    `patience` turns begins again at the top. Quanta count decoded tokens; `prefill` tokens of a prompt cost one.
    """

    displaces = True
    rising = 16  # sequences in one turn at most: ten thousand that have waited equally long would hold up a step

    def __init__(self, *, quantum: int = 16, levels: int = 8, prefill: int = 128, patience: int = 2000) -> None:
        self.quanta = [quantum << level for level in range(levels)]
        self.prefill, self.patience = prefill, patience
        self._turn = 0
        self._waiting: deque[tuple[int, int, Sequence]] = deque()  # (turn, stamp, sequence)

    def enter(self, sequence: Sequence) -> None:
        cost = len(sequence.request.prompt) / self.prefill
        while sequence.level < len(self.quanta) - 1 and self.quanta[sequence.level] < cost:
            sequence.level += 1

    def wait(self, sequence: Sequence) -> None:
        self._waiting.append((self._turn, sequence.stamp, sequence))

    def ran(self, step: "Step") -> None:
        quanta = self.quanta
        for work in step.decodes:
            sequence = work.sequence
            sequence.served += step.burst
            if sequence.served >= quanta[sequence.level]:
                self._sink(sequence)
        for work in step.prefills:
            sequence = work.sequence
            sequence.served += work.count / self.prefill
            if sequence.served >= quanta[sequence.level]:
                self._sink(sequence)

    def _sink(self, sequence: Sequence) -> None:
        if sequence.level < len(self.quanta) - 1:
            sequence.level += 1
            sequence.served = 0.0

    def starving(self) -> list[Sequence]:
        self._turn += 1
        starving = []
        while self._waiting and self._waiting[0][0] + self.patience < self._turn and len(starving) < self.rising:
            _, stamp, sequence = self._waiting.popleft()
            if sequence.stamp == stamp:  # else it has run since
                sequence.level, sequence.served = 0, 0.0
                starving.append(sequence)
        return starving

    def level(self, sequence: Sequence) -> int:
        return sequence.level


POLICIES = {"fcfs": Fcfs, "priority": Priority, "mlfq": Mlfq}


class WaitingQueue:
    """Sequences that wait, in a policy's order. What left the heap's middle is only marked, and dropped later."""

    def __init__(self, policy: Fcfs) -> None:
        self.policy = policy
        self._heap: list[tuple[int, int, int, Sequence]] = []  # (level, order, stamp, sequence)
        self._stamps = itertools.count(1)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, sequence: Sequence) -> None:
        """Put a sequence in, or, where it is in already, where its level now belongs."""
        self._count += not sequence.stamp
        sequence.stamp = next(self._stamps)
        heapq.heappush(self._heap, (self.policy.level(sequence), sequence.order, sequence.stamp, sequence))
        self.policy.wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        sequence.stamp = 0
        self._count -= 1
        if len(self._heap) > 2 * self._count + 64:
            self._heap = [entry for entry in self._heap if entry[3].stamp == entry[2]]
            heapq.heapify(self._heap)

    def head(self) -> Sequence | None:
        heap = self._heap
        while heap and heap[0][3].stamp != heap[0][2]:
            heapq.heappop(heap)
        return heap[0][3] if heap else None
