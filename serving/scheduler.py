"""Which tokens run next: iteration-level scheduling over paged memory.

A turn is `schedule` (a Step for the runner), `launched` (it is on its way: state moves on) and `accept` (its tokens
are here). The engine may schedule and launch the next step before it accepts the one before, so between `launched` and
`accept` a sequence's length is known and its newest tokens are not. A step has one budget of tokens: running sequences
take one each, then prompts that are partly done go on, then waiting ones come in, cut to what is left. Where nobody can
come in, few sequences may run several times in a step, which a device does without its host in between: a burst.

Memory is given to a prompt as a whole and to an answer block by block. When it runs out, the running sequence that is
served last is preempted: it keeps its tokens and computes their keys and values again later, or is swapped to the host.
Whatever a step still under way brings for a preempted or finished sequence is void, and told by its epoch. The
scheduler does not know the model, tensors or time limits.
"""

import itertools
import math
import operator
import time
from collections import abc, deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from serving.blocks import BlockPool
from serving.policies import POLICIES, Fcfs, WaitingQueue
from serving.request import Output, Request, Sequence, TokenLogprobs


class Work(NamedTuple):
    """Tokens of one sequence in one step."""

    sequence: Sequence
    start: int  # position of its first token in this step
    count: int
    samples: bool  # whether its last token yields a token
    epoch: int  # the sequence's when this was scheduled
    mask: np.ndarray | None = None  # what a constraint allows


_START = operator.itemgetter(1)  # of a Work


@dataclass(slots=True, eq=False)
class Step:
    """What the device does next, in this order: swaps out, swaps in, copies, one forward over decodes and prefills.

    Steps run in the order in which they were launched, copies to and from the host among them: a block freed by the
    host may be given away while a step that uses it is still under way.
    """

    # Of count 1: the newest token of a running sequence, which may so far exist on the device only. The longest first.
    decodes: list[Work] = field(default_factory=list)
    burst: int = 1  # how often they all run, each time with the token drawn before; more than once only by themselves
    # Known tokens: sequence.tokens[start : start + count]. Also recomputation after a preemption, and the last prompt
    # token once more for samples 2..n, which share the first one's blocks.
    prefills: list[Work] = field(default_factory=list)
    joined: list[Sequence] = field(default_factory=list)  # given a slot in this step
    table: list[tuple[int, int, int]] = field(default_factory=list)  # (slot, index, block): new in block tables
    copies: list[tuple[int, int]] = field(default_factory=list)  # (from, to); no block is on both sides
    swap_out: list[tuple[int, int]] = field(default_factory=list)  # (device block, host block)
    swap_in: list[tuple[int, int]] = field(default_factory=list)  # (host block, device block)


@dataclass(slots=True)
class Counters:
    """What has happened so far."""

    prefix_queries: int = 0  # tokens of prompts looked up in the prefix cache
    prefix_hits: int = 0  # of them found
    preemptions: int = 0
    swaps: int = 0  # of the preemptions, to the host
    prompt_tokens: int = 0
    generated_tokens: int = 0


class Scheduler:
    """The queue, the running sequences and their memory.

    `watermark` is the share of blocks that stays free when a sequence comes in beside others, so that those can grow
    and do not preempt it at once. Up to `burst_rows` sequences draw `burst` tokens in a step while nobody can come in.
    """

    def __init__(
        self,
        *,
        n_blocks: int,
        block_size: int,
        max_running: int,
        max_step_tokens: int,
        max_seq_len: int,
        policy: str | Fcfs = "fcfs",
        prefix_caching: bool = True,
        n_host_blocks: int = 0,
        watermark: float = 0.01,
        burst: int = 1,
        burst_rows: int = 0,
    ) -> None:
        if max_running < 1 or max_step_tokens < max_running:
            raise ValueError(
                f"a step of {max_step_tokens} tokens cannot serve {max_running} running sequences; "
                "raise --max-step-tokens or lower --max-running"
            )
        if n_blocks < 2:
            raise ValueError(f"{n_blocks} blocks hold no sequence; give the cache more memory")
        if isinstance(policy, str):
            if policy not in POLICIES:
                raise ValueError(f"there is no policy {policy}; there are {', '.join(POLICIES)}")
            policy = POLICIES[policy]()
        self.policy = policy
        self.pool = BlockPool(n_blocks, block_size)
        self.block_size = block_size
        self.max_running, self.max_step_tokens = max_running, max_step_tokens
        # The last token is never stored. A sequence alone always fits, which is what makes progress certain.
        self.max_seq_len = min(max_seq_len, self.pool.total * block_size + 1)
        self.prefix_caching = prefix_caching
        self.watermark = math.ceil(watermark * self.pool.total)
        self.burst, self.burst_rows = burst, burst_rows
        self.waiting = WaitingQueue(policy)
        self.decoding: dict[Sequence, None] = {}  # running, in the order they came in; prompts are done
        self.prefilling: dict[Sequence, None] = {}  # running, prompts partly done
        self.requests: dict[str, list[Sequence]] = {}  # samples not finished, of each request
        self.in_flight: deque[Step] = deque()  # scheduled, not accepted
        self.counters = Counters()
        self._slots = list(range(max_running))[::-1]
        self._host = list(range(n_host_blocks))[::-1]
        self._step = Step()  # in the making
        self._left = 0  # tokens that it has room for
        self._host_leaving: list[int] = []  # host blocks that it reads
        self._held: list[int] = []  # sources of its copies
        self._orders = itertools.count()
        self._samples = 0  # not finished
        self._blocked: tuple[Sequence | None, int] = (None, 0)  # had no memory, and the pool's count of releases then

    @property
    def running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def n_waiting(self) -> int:
        """Samples that wait, those included that follow another's prefill."""
        return self._samples - self.running

    # ---- Requests come and go ----------------------------------------------------------------------------------------

    def sequences(self, request: Request) -> list[Sequence]:
        """A request's samples, not queued yet; ValueError if it can never run. Any thread may call this."""
        length = len(request.prompt)
        if not length:
            raise ValueError("the prompt is empty; give at least one token")
        if length >= self.max_seq_len:
            raise ValueError(
                f"the prompt has {length} tokens and a sequence holds {self.max_seq_len}, answer included; shorten the "
                "prompt, or give the server a longer context or more memory for its cache"
            )
        for name, least in {"n": 1, "max_new_tokens": 1, "logprobs": 0}.items():
            if (value := getattr(request, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        end = min(length + request.max_new_tokens, self.max_seq_len)
        return [Sequence(request, index, next(self._orders), end) for index in range(request.n)]

    def add(self, request: Request) -> None:
        self.enqueue(self.sequences(request))

    def enqueue(self, sequences: list[Sequence]) -> None:
        """Let a request's samples wait: the first for its turn, the others for the first one's prompt."""
        first, *others = sequences
        if first.request.id in self.requests:
            raise ValueError(f"there is a request {first.request.id} already")
        self.requests[first.request.id] = sequences
        self._samples += len(sequences)
        first.followers = others
        for sequence in sequences:
            self.policy.enter(sequence)
        for sequence in others:
            sequence.leader = first
        self.waiting.push(first)

    def abort(
        self, request_id: str, index: int | None = None, *, reason: str = "abort", error: str | None = None
    ) -> list[Output]:
        """End a request, or one of its samples, now."""
        ended = [s for s in self.requests.get(request_id, ()) if index in (None, s.index)]
        for sequence in ended:
            self._finish(sequence, reason)
        return [
            Output(request_id, s.index, [], None, s.finish_reason, error, s.cached_tokens, s.queued_s) for s in ended
        ]

    def fail(self, error: str) -> list[Output]:
        """End all requests in flight, whose step went wrong, and count on nothing that any memory holds."""
        works = itertools.chain(*((*step.decodes, *step.prefills) for step in self.in_flight))
        failed = {work.sequence.request.id: None for work in works if work.sequence.epoch == work.epoch}
        self.in_flight.clear()
        outputs = [output for request_id in failed for output in self.abort(request_id, reason="error", error=error)]
        for sequence in [*self.prefilling, *self.decoding]:
            self._preempt(sequence, swap=False)
        for sequence in itertools.chain(*self.requests.values()):
            self._drop_host_blocks(sequence)
        self._step = Step()
        self.pool.forget()
        return outputs

    def _finish(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        if sequence.slot is not None:
            self._leave(sequence)
        elif sequence.stamp:
            self.waiting.remove(sequence)
        else:
            sequence.leader.followers.remove(sequence)
        self._drop_host_blocks(sequence)
        self._release_followers(sequence)
        self._samples -= 1
        samples = self.requests[sequence.request.id]
        samples.remove(sequence)
        if not samples:
            del self.requests[sequence.request.id]

    def _release_followers(self, sequence: Sequence) -> None:
        for follower in sequence.followers:
            self.waiting.push(follower)
        sequence.followers = []

    # ---- A turn ------------------------------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """What to run next; None if nothing can run before a step in flight is accepted."""
        for sequence in self.policy.starving():
            self.waiting.push(sequence)
        step, ready = self._step, self._grow()
        new, kind = tuple.__new__, Work  # this is the loop over every running sequence: a constructor costs twice that
        step.decodes = [
            new(kind, (s, s.computed, 1, True, s.epoch, s.mask))
            for s in self.decoding
            if s.computed < s.capacity or s in ready
        ]
        # A device begins with the first row: were a long one among the last, it would end up running alone.
        step.decodes.sort(key=_START, reverse=True)
        self._left = self.max_step_tokens - len(step.decodes)
        self._fill()
        self._host += self._host_leaving
        self.pool.release(self._held)
        self._host_leaving, self._held = [], []
        if not step.decodes and not step.prefills:
            return None  # what is swapped out, if anything, leads the next step
        if self._may_burst():
            step.burst = self.burst
        self._step = Step()
        self.in_flight.append(step)
        return step

    def _may_burst(self) -> bool:
        """Whether the step in the making has all that runs, and nobody has to look at any of it for so many tokens."""
        decodes, burst = self._step.decodes, self.burst
        if burst == 1 or len(decodes) > self.burst_rows or self._step.prefills or len(decodes) < self.running:
            return False
        if self.n_waiting and (self._slots or self.policy.displaces):
            return False  # who waits may come in next
        return all(s.simple and s.computed + burst <= s.capacity for s, *_ in decodes)

    def launched(self, step: Step) -> None:
        """The step is on its way: what it writes may be read by the steps after it."""
        for work in step.decodes:
            sequence = work[0]
            sequence.computed += step.burst
            sequence.pending += step.burst
        for sequence, start, count, samples, _, _ in step.prefills:
            sequence.computed = start + count
            self._publish(sequence)
            if samples:
                sequence.pending = 1
                del self.prefilling[sequence]
                self.decoding[sequence] = None
                self._set_capacity(sequence)
                self._release_followers(sequence)
        self.policy.ran(step)

    def accept(
        self, step: Step, tokens: abc.Sequence[int], logprobs: abc.Sequence[TokenLogprobs | None]
    ) -> list[Output]:
        """Take what a step has drawn: a token for each work that samples, decodes first; in a burst, so for each time
        that they ran, one after the other.
        """
        expected = self.in_flight.popleft()
        assert step is expected, "steps are accepted in the order they were scheduled"
        outputs, drawn = [], 0
        works = step.decodes + [work for work in step.prefills if work.samples]
        n = len(works)
        assert len(tokens) == len(logprobs) == n * step.burst, "there is a token for each work each time"
        for i, (sequence, _, _, _, epoch, _) in enumerate(works):
            if sequence.epoch != epoch:
                continue
            request, reason, error = sequence.request, None, None
            new, reported = [], None if logprobs[i] is None else [logprobs[i]]
            for token in tokens[i::n]:
                sequence.pending -= 1
                drawn += 1
                if token in request.stop_ids:
                    reported, reason = None, "stop"
                    break
                new.append(token)
                sequence.append(token)
                if sequence.constraint is not None:
                    reason, error = _advance(sequence, token)
                if reason is None and len(sequence.tokens) >= sequence.end:
                    reason = "length"
                if reason is not None:
                    break
            if reason is not None:
                self._finish(sequence, reason)
            cached, queued_s = sequence.cached_tokens, sequence.queued_s
            outputs.append(Output(request.id, sequence.index, new, reported, reason, error, cached, queued_s))
        self.counters.generated_tokens += drawn
        return outputs

    def _fill(self) -> None:
        """Spend what decoding leaves: on prompts that are partly done, and on the queue.

        Those of lower levels in the queue come before prompts partly done. Who comes before one leaves it a quarter.
        """
        partly = sorted(self.prefilling, key=self._rank) if self.prefilling else []
        for sequence in partly:
            level, kept = self.policy.level(sequence), self._quarter()
            while self._left > kept and self._admit(below=level):
                self._prefill(next(reversed(self.prefilling)), kept=kept)
            self._prefill(sequence, kept=0 if sequence is partly[-1] else self._quarter())
        while self._left > 0 and self._admit():
            self._prefill(next(reversed(self.prefilling)))

    def _quarter(self) -> int:
        return -(-self._left // 4)

    def _prefill(self, sequence: Sequence, *, kept: int = 0) -> None:
        """Put known tokens of a sequence into the step, as many as it has room for, if it is running still."""
        count = min(len(sequence.tokens) - sequence.computed, self._left - kept)
        if count > 0 and sequence.slot is not None:
            samples = sequence.computed + count == len(sequence.tokens)
            mask = sequence.mask if samples else None
            self._step.prefills.append(Work(sequence, sequence.computed, count, samples, sequence.epoch, mask))
            self._left -= count

    def _rank(self, sequence: Sequence) -> tuple[int, int]:
        """Whose is lowest is served first, and preempted last."""
        return self.policy.level(sequence), sequence.order

    # ---- Memory ------------------------------------------------------------------------------------------------------

    def _grow(self) -> set[Sequence]:
        """See to the decoding sequences that need it, for memory or a grammar. Returns constrained ones that can run.

        Of those `capacity` stays 0, so that they come here in every turn.
        """
        ahead = self.burst if len(self.decoding) <= self.burst_rows else 1
        needy = [s for s in self.decoding if s.computed + ahead > s.capacity]
        # Of these all tokens are under way: their memory comes back in a moment, and nobody has to go for it.
        ending = any(s.computed >= s.end - 1 for s in needy)
        ready = set()
        for sequence in needy:
            if sequence.slot is None or sequence.computed >= sequence.end - 1:
                continue
            if sequence.constraint is not None and sequence.pending:
                continue
            while (room := self._room(sequence)) < min(sequence.computed + ahead, sequence.end - 1):
                self._publish(sequence)
                # Nobody has to go for the later tokens of a burst.
                if not self._extend(sequence, preempt=not ending and sequence.computed == room):
                    break
            if sequence.computed == self._room(sequence):
                continue  # it pauses
            if sequence.constraint is None:
                self._set_capacity(sequence)
            else:
                ready.add(sequence)
        return ready

    def _room(self, sequence: Sequence) -> int:
        """Tokens that its blocks hold."""
        return len(sequence.blocks) * self.block_size

    def _set_capacity(self, sequence: Sequence) -> None:
        if sequence.constraint is None:
            sequence.capacity = min(self._room(sequence), sequence.end - 1)

    def _extend(self, sequence: Sequence, *, preempt: bool) -> bool:
        """One more block for a running sequence; False if only those served before it could make room."""
        while not self.pool.available:
            last = max((*self.decoding, *self.prefilling), key=self._rank)
            if last is sequence or not preempt:
                return False
            self._preempt(last)
        (block,) = self.pool.allocate(1)
        self._step.table.append((sequence.slot, len(sequence.blocks), block))
        sequence.blocks.append(block)
        return True

    def _admit(self, *, below: int | None = None) -> bool:
        """Bring in the first of the queue, if its level is below, with a slot and memory for all its tokens."""
        sequence = self.waiting.head()
        if sequence is None or (below is not None and self.policy.level(sequence) >= below):
            return False
        if not self._place(sequence):
            return False
        self.waiting.remove(sequence)
        self.prefilling[sequence] = None
        slot = sequence.slot = self._slots.pop()
        self._step.joined.append(sequence)
        self._step.table += [(slot, index, block) for index, block in enumerate(sequence.blocks)]
        return True

    def _place(self, sequence: Sequence) -> bool:
        """Blocks for all known tokens: found in the cache, shared with the first sample, swapped in, or empty."""
        if not self.policy.displaces and (not self._slots or self._blocked == (sequence, self.pool.released)):
            return False
        length, size, leader = len(sequence.tokens), self.block_size, sequence.leader
        shared: list[int] = []
        names: list[int] = []
        source: list[int] = []  # of a copy
        if sequence.host_blocks:
            computed = sequence.computed
        elif leader is not None and leader.slot is not None and leader.computed >= length == len(leader.request.prompt):
            # Runs the last token of the prompt again, and so writes to a block that the leader goes on to use.
            computed = length - 1
            whole = computed // size
            shared, names, source = leader.blocks[:whole], leader.serials[:whole], [leader.blocks[whole]]
        else:
            if self.prefix_caching:
                shared, names = self.pool.match(sequence.tokens, sequence.request.salt)
            computed = len(shared) * size
        owned = shared + source  # from here on: making room must not give them away
        self.pool.share(owned)
        needed = -(-length // size) - len(shared)
        if not self._make_room(sequence, needed):
            self.pool.release(owned)
            self._blocked = sequence, self.pool.released
            return False
        new = self.pool.allocate(needed)
        if source:
            self._step.copies.append((source[0], new[0]))
            self._held += source
        self._step.swap_in += zip(sequence.host_blocks, new, strict=False)
        self._host_leaving += sequence.host_blocks
        sequence.host_blocks = []
        sequence.blocks, sequence.serials, sequence.computed = shared + new, names, computed
        if not sequence.started:
            self._count_start(sequence, forked=bool(source))
        return True

    def _count_start(self, sequence: Sequence, *, forked: bool) -> None:
        sequence.started = True
        sequence.queued_s = time.monotonic() - sequence.request.arrived
        if forked:
            sequence.cached_tokens = sequence.leader.cached_tokens
            return
        sequence.cached_tokens = sequence.computed
        self.counters.prefix_queries += len(sequence.tokens)
        self.counters.prefix_hits += sequence.computed
        if sequence.index == 0:
            self.counters.prompt_tokens += len(sequence.tokens)

    def _make_room(self, sequence: Sequence, blocks: int) -> bool:
        spare = self.watermark if self.running else 0
        if self._slots and self.pool.available >= blocks + spare:
            return True
        return self.policy.displaces and self._displace(sequence, blocks, spare)

    def _displace(self, sequence: Sequence, blocks: int, spare: int) -> bool:
        """Preempt sequences of higher levels until one has room; False, and none is, where that would not do.

        Who came back from a preemption stays until it has a new token, so that everybody gets on.
        """
        level = self.policy.level(sequence)
        running = [*self.decoding, *self.prefilling]
        worse = [
            s
            for s in running
            if self.policy.level(s) > level and len(s.tokens) > s.resumed_at and s.computed < s.end - 1
        ]
        worse.sort(key=self._rank)
        available, displaced = self.pool.available, []
        while not (self._slots or displaced) or available < blocks + spare:
            if not worse:
                return False
            displaced.append(worse.pop())
            available += sum(self.pool.refs[block] == 1 for block in displaced[-1].blocks)
            if len(displaced) == len(running):
                spare = 0
        for victim in displaced:
            self._preempt(victim)
        step = self._step
        step.decodes = [work for work in step.decodes if work.sequence.epoch == work.epoch]
        step.prefills = [work for work in step.prefills if work.sequence.epoch == work.epoch]
        self._left = self.max_step_tokens - len(step.decodes) - sum(work.count for work in step.prefills)
        return True

    def _preempt(self, sequence: Sequence, *, swap: bool = True) -> None:
        """Back to the queue, with the tokens the host knows; those it does not know are drawn again, the same."""
        step, slot, blocks = self._step, sequence.slot, sequence.blocks
        step.table = [entry for entry in step.table if entry[0] != slot]
        computed = min(sequence.computed, len(sequence.tokens) - 1)
        needed = -(-computed // self.block_size)
        self._leave(sequence)
        self.counters.preemptions += 1
        sequence.computed = 0
        if swap and 0 < needed <= len(self._host):
            self.counters.swaps += 1
            sequence.computed = computed
            sequence.host_blocks = [self._host.pop() for _ in range(needed)]
            step.swap_out += zip(blocks, sequence.host_blocks, strict=False)
        sequence.resumed_at = len(sequence.tokens)
        self.waiting.push(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take slot and blocks from a running sequence."""
        self._publish(sequence)
        self.decoding.pop(sequence, None)
        self.prefilling.pop(sequence, None)
        self._slots.append(sequence.slot)
        self.pool.release(sequence.blocks)
        sequence.slot, sequence.blocks, sequence.serials = None, [], []
        sequence.capacity = sequence.pending = 0
        sequence.epoch += 1

    def _drop_host_blocks(self, sequence: Sequence) -> None:
        """Forget what was swapped out."""
        dropped = set(sequence.host_blocks)
        if not dropped:
            return
        self._step.swap_out = [pair for pair in self._step.swap_out if pair[1] not in dropped]
        self._host += sequence.host_blocks
        sequence.host_blocks, sequence.computed = [], 0

    def _publish(self, sequence: Sequence) -> None:
        """Let the blocks be found that launched steps have filled with tokens that the host knows."""
        if not self.prefix_caching:
            return
        size, names, tokens = self.block_size, sequence.serials, sequence.tokens
        for index in range(len(names), min(sequence.computed, len(tokens)) // size):
            before = names[-1] if names else sequence.request.salt
            names.append(
                self.pool.publish(sequence.blocks[index], before, tuple(tokens[index * size : (index + 1) * size]))
            )

    def check(self) -> None:
        """Assert that the books are right."""
        running = [*self.decoding, *self.prefilling]
        self.pool.check([s.blocks for s in running])
        assert self.pool.free + self.pool.used + self.pool.cached == self.pool.total
        samples = list(itertools.chain(*self.requests.values()))
        assert len(samples) == self._samples and all(s.finish_reason is None for s in samples)
        assert {s for s in samples if s.slot is not None} == set(running)
        assert sorted([*self._slots, *(s.slot for s in running)]) == list(range(self.max_running))
        waiting = [s for s in samples if s.stamp]
        followers = list(itertools.chain(*(s.followers for s in samples)))
        assert len(waiting) == len(self.waiting) and len(running) + len(waiting) + len(followers) == len(samples)
        for sequence in self.decoding:
            assert sequence.pending >= 0 and sequence.computed == len(sequence.tokens) - 1 + sequence.pending
        assert not self._host_leaving and not self._held
        swapped = list(itertools.chain(*(s.host_blocks for s in samples)))
        assert sorted([*self._host, *swapped]) == list(range(len(self._host) + len(swapped))), "host blocks leak"


def _advance(sequence: Sequence, token: int) -> tuple[str | None, str | None]:
    """Take a constrained sequence's token: the reason and the error it ends with, if it does."""
    try:
        if not sequence.constraint.accept(token):
            return "stop", None
        sequence.mask = sequence.constraint.mask()
    except Exception as error:  # whatever a grammar does, it is one request's
        return "error", f"the constraint failed: {error}"
    return None, None
