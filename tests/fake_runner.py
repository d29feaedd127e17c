"""A runner for the tests of the scheduler and the engine, with a deterministic function in place of the model.

It keeps what a device keeps, by slot and by block, and believes the steps: what a token "attends" to is read through
the block table, and each entry depends on all entries before it. So a wrong table, a block given away too early, a
prefix of other content or a missing copy ends in other tokens than `reference` gives.
"""

from collections.abc import Sequence

import numpy as np

from sampling import SamplingParams
from serving.request import Constraint, Request, TokenLogprobs
from serving.scheduler import Step, Work

VOCAB = 97
_PRIME = 1_000_003


def _entry(token: int, position: int, context: int) -> int:
    """What is stored for a token: it stands for keys and values."""
    return (token * 7919 + position * 104_729 + context * 31 + 17) % _PRIME


def _attend(entries: Sequence[int]) -> int:
    return sum(entry * (2 * position + 3) for position, entry in enumerate(entries)) % _PRIME


def _draw(state: int, seed: int, position: int, mask: np.ndarray | None) -> int:
    token = (state * 48_271 + seed * 1299 + position * 31) % _PRIME % VOCAB
    while mask is not None and not int(mask[token // 32]) >> token % 32 & 1:
        token = (token + 1) % VOCAB
    return token


def mask_of(allowed: Sequence[int]) -> np.ndarray:
    mask = np.zeros(-(-VOCAB // 32), dtype=np.uint32)
    for token in allowed:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask.view(np.int32)


class Every(Constraint):
    """Allows the tokens of one residue class after another, and is complete after `length` tokens."""

    def __init__(self, length: int, classes: int = 5) -> None:
        self.taken, self.length, self.classes = 0, length, classes

    def mask(self) -> np.ndarray:
        return mask_of(range(self.taken % self.classes, VOCAB, self.classes))

    def accept(self, token: int) -> bool:
        assert token % self.classes == self.taken % self.classes, "a token the mask forbids"
        self.taken += 1
        return self.taken < self.length


def request(name: str, prompt: Sequence[int], **fields) -> Request:
    fields.setdefault("params", SamplingParams(seed=fields.pop("seed", 0)))
    return Request(id=name, prompt=prompt, **fields)


def reference(wanted: Request, index: int = 0, *, max_seq_len: int) -> tuple[list[int], str]:
    """What one sample of a request gives alone, computed without blocks, steps and slots, and why it ends."""
    entries: list[int] = []
    constraint = wanted.constraint() if wanted.constraint else None
    tokens = list(wanted.prompt)
    while True:
        for position in range(len(entries), len(tokens)):
            entries.append(_entry(tokens[position], position, _attend(entries)))
        mask = constraint.mask() if constraint else None
        token = _draw(_attend(entries), wanted.params.seed + index, len(tokens), mask)
        found = tokens[len(wanted.prompt) :]
        if token in wanted.stop_ids:
            return found, "stop"
        tokens.append(token)
        if constraint and not constraint.accept(token):
            return [*found, token], "stop"
        if len(tokens) >= min(len(wanted.prompt) + wanted.max_new_tokens, max_seq_len):
            return [*found, token], "length"


class FakeTicket:
    def __init__(self, tokens: list[int], logprobs: list[TokenLogprobs | None]) -> None:
        self.results = tokens, logprobs

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        return self.results


class FakeRunner:
    vocab_size = VOCAB
    overlaps = True

    def __init__(
        self,
        *,
        n_blocks: int = 11,
        block_size: int = 4,
        max_running: int = 8,
        max_step_tokens: int = 32,
        max_seq_len: int = 1000,
        n_host_blocks: int = 0,
        burst: int = 1,
        burst_rows: int = 4,
    ) -> None:
        self.n_blocks, self.block_size, self.max_seq_len = n_blocks, block_size, max_seq_len
        self.max_running, self.max_step_tokens, self.n_host_blocks = max_running, max_step_tokens, n_host_blocks
        self.burst, self.burst_rows = burst, burst_rows
        self.device = [[-1] * block_size for _ in range(n_blocks)]
        self.host = [[-1] * block_size for _ in range(n_host_blocks)]
        self.tables: list[dict[int, int]] = [{} for _ in range(max_running)]
        self.newest = [-1] * max_running
        self.params: list[SamplingParams | None] = [None] * max_running
        self.steps = 0
        self.prefilled = 0  # tokens
        self.largest = 0  # tokens of one step

    def launch(self, step: Step) -> FakeTicket:
        self.steps += 1
        tokens = len(step.decodes) + sum(work.count for work in step.prefills)
        self.prefilled += tokens - len(step.decodes)
        self.largest = max(self.largest, tokens)
        assert 0 < tokens <= self.max_step_tokens
        self._move(step)
        for sequence in step.joined:
            self.params[sequence.slot] = sequence.params
            self.newest[sequence.slot] = -1
        entries = [entry[:2] for entry in step.table]
        assert len(set(entries)) == len(entries), "two blocks for one entry of a table"
        for slot, index, block in step.table:
            assert block != 0
            self.tables[slot][index] = block
        works = [*step.decodes, *step.prefills]
        assert len({work.sequence.slot for work in works}) == len(works), "two works for one slot"
        assert step.burst == 1 or (0 < len(works) <= self.burst_rows and not step.prefills)
        drawn, logprobs = [], []
        for turn in range(step.burst):
            # Several sequences run side by side on a device: nobody may read what another writes in the same step.
            written = [self._forward(work, turn, decodes=i < len(step.decodes)) for i, work in enumerate(works)]
            for places in written:
                for block, offset, entry in places:
                    self.device[block][offset] = entry
            for work in works:
                if work.samples:
                    token = self._sample(work, turn)
                    drawn.append(token)
                    asked = work.sequence.request.logprobs is not None
                    assert step.burst == 1 or not asked
                    logprobs.append(TokenLogprobs(token, -1.0, []) if asked else None)
        return FakeTicket(drawn, logprobs)

    def _move(self, step: Step) -> None:
        for pairs in (step.swap_out, step.swap_in, step.copies):
            targets = [pair[1] for pair in pairs]
            assert len(set(targets)) == len(targets), "two sources for one block"
        assert not {a for a, _ in step.copies} & {b for _, b in step.copies}
        for device, host in step.swap_out:
            self.host[host] = list(self.device[device])
        for host, device in step.swap_in:
            self.device[device] = list(self.host[host])
        for source, target in step.copies:
            self.device[target] = list(self.device[source])

    def _read(self, slot: int, length: int) -> list[int]:
        table, size = self.tables[slot], self.block_size
        return [self.device[table[i // size]][i % size] for i in range(length)]

    def _forward(self, work: Work, turn: int, *, decodes: bool) -> list[tuple[int, int, int]]:
        """The entries that a work writes in a turn of a burst, as (block, offset, entry)."""
        slot = work.sequence.slot
        tokens = [self.newest[slot]] if decodes else work.sequence.tokens[work.start : work.start + work.count]
        assert len(tokens) == work.count and min(tokens) >= 0
        start = work.start + turn
        entries, written = self._read(slot, start), []
        for position, token in enumerate(tokens, start):
            entries.append(_entry(token, position, _attend(entries)))
            block = self.tables[slot][position // self.block_size]
            written.append((block, position % self.block_size, entries[-1]))
        return written

    def _sample(self, work: Work, turn: int) -> int:
        slot, length = work.sequence.slot, work.start + turn + work.count
        state = _attend(self._read(slot, length))
        self.newest[slot] = token = _draw(state, self.params[slot].seed, length, work.mask)
        return token
