"""Who owns which block of the paged cache, and which content can be found again.

A block holds the keys and values of `block_size` consecutive tokens. Sequences own blocks by reference counts, so
equal prefixes are stored once. A full block is published under the key (what came before it, its own tokens): "before"
is the unique name of the block in front, so a chain of keys spells a whole prefix, tokens are compared and not just
their hash, and a name is never given twice. Blocks that nobody owns keep their content and key until they are needed,
the least recently used first. This file does not know tensors, requests or steps: who publishes a block vouches that
the step that fills it was launched before any step that reads it.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

Name = int | str | None  # of a published block; a chain begins with its salt


class BlockPool:
    """`n_blocks` blocks, of which block 0 is the null block: padding writes to it, nobody owns it.

    Every other block is free (nothing worth keeping), used (owned at least once) or cached (not owned, published).
    """

    def __init__(self, n_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.total = n_blocks - 1
        self.refs = [0] * n_blocks
        self.released = 0  # goes up whenever a block becomes available
        self._free = list(range(n_blocks - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._published: dict[tuple[Name, tuple[int, ...]], int] = {}
        self._keys: list[tuple[Name, tuple[int, ...]] | None] = [None] * n_blocks
        self._names = [0] * n_blocks  # of published blocks
        self._new_names = itertools.count(1)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        return self.total - self.available

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with no content, owned once; there must be so many available."""
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._unpublish(block)
        self.refs[block] = 1
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """Own published or owned blocks once more."""
        for block in blocks:
            if self.refs[block] == 0:
                del self._cached[block]
            self.refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give up owning a sequence's blocks. The last goes first: a chain is of use from its beginning only."""
        refs = self.refs
        for block in reversed(blocks):
            refs[block] -= 1
            if refs[block] == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
                self.released += 1

    def match(self, tokens: Sequence[int], salt: str | None) -> tuple[list[int], list[int]]:
        """The published blocks that begin with `tokens`, and their names; the last token is never among them.

        What is found is not owned yet.
        """
        size, before = self.block_size, salt
        blocks: list[int] = []
        names: list[int] = []
        for begin in range(0, (len(tokens) - 1) // size * size, size):
            block = self._published.get((before, tuple(tokens[begin : begin + size])))
            if block is None:
                break
            before = self._names[block]
            blocks.append(block)
            names.append(before)
        return blocks, names

    def publish(self, block: int, before: Name, tokens: tuple[int, ...]) -> int:
        """Let a full block be found behind the block named `before` (or a salt). Returns the content's name.

        Where another block already holds the same, this one stays unpublished and the name is the other's.
        """
        key = before, tokens
        known = self._published.get(key)
        if known is not None:
            return self._names[known]
        self._published[key] = block
        self._keys[block] = key
        self._names[block] = name = next(self._new_names)
        return name

    def forget(self) -> None:
        """Unpublish everything: what the blocks hold is not known any more."""
        for block in list(self._published.values()):
            self._unpublish(block)
        self._free.extend(self._cached)
        self._cached.clear()

    def _unpublish(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None and self._published.pop(key) == block
        self._keys[block] = None

    def check(self, owners: Sequence[Sequence[int]]) -> None:
        """Assert that the books are right; `owners` are the block tables of all sequences."""
        refs = [0] * len(self.refs)
        for block in itertools.chain(*owners):
            refs[block] += 1
        assert refs == self.refs and refs[0] == 0, "reference counts differ from what sequences own"
        assert all(len(set(blocks)) == len(blocks) for blocks in owners), "a sequence owns a block twice"
        kept = {*self._free, *self._cached}
        assert len(kept) == self.available and 0 not in kept, "a block is available twice"
        assert kept == {block for block in range(1, len(refs)) if refs[block] == 0}, "used and available overlap"
        keys = {block: key for block, key in enumerate(self._keys) if key is not None}
        assert {block: key for key, block in self._published.items()} == keys
        assert keys.keys() >= self._cached.keys() and not keys.keys() & set(self._free)
