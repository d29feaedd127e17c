"""A key/value cache in blocks of a few slots, of which tables make sequences, so that memory goes where tokens are.

A forward's tokens, of many sequences, lie in one row behind each other: first the decoding ones, a token each, then
those with more. The blocks are a static cache whose rows are short, and attention is that of a static cache over the
blocks put in order: this is how a CPU runs it, and what the kernels are held against, which read blocks where they
lie. Which sequence has which block, and what a block holds, is decided elsewhere.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache import StaticLayer, layer_of, layers_of, masks_of, new_storage


class PagedBatch(NamedTuple):
    """Which tokens of a forward over tokens [1, T] belong to which sequence."""

    tables: Tensor  # int32 [sequences, blocks]: where a sequence's blocks lie, in order
    rows: Tensor  # int32 [R]: each sequence's row of `tables`
    decodes: int  # the first so many sequences have a token each ...
    starts: Tensor  # int32 [R - decodes + 1]: ... those of the others begin here in the forward, and end here
    longest: int  # the most tokens that one of those others has


class Part(NamedTuple):
    """Tokens that attend together: B sequences of T tokens each."""

    tokens: slice  # in the forward
    blocks: Tensor  # int64 [B, blocks]
    length: int  # S: how many of these blocks' slots are looked at
    mask: Tensor | None  # [B, 1, T, S], as `StaticLayer.attend` takes it


class PagedLayer:
    """One layer's blocks [n_blocks, block_size, K, D], as the sequences of one forward use them."""

    def __init__(self, pool: StaticLayer, view: "PagedView") -> None:
        self.pool, self.view = pool, view
        self.k, self.v, self.k_scale, self.v_scale = pool.k, pool.v, pool.k_scale, pool.v_scale

    def write(self, k: Tensor, v: Tensor, input_pos: Tensor) -> None:
        self.pool.put(*self.view.places, k[0], v[0])

    def attend(self, q: Tensor, parts: Sequence[Part]) -> Tensor:
        """Attention of q [1, T, H, D], part by part, over a copy of the blocks in order."""
        H, D = q.shape[2:]
        ys = []
        for tokens, blocks, length, mask in parts:
            rows = [x[blocks].flatten(1, 2)[:, :length] for x in self.pool.tensors]  # [B, S, ...]
            y = layer_of(rows, self.pool.dtype).attend(q[0, tokens].view(blocks.shape[0], -1, H, D), mask)
            ys.append(y.reshape(1, -1, H, D))
        return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)


class PagedView:
    """What one forward sees of a `PagedCache`: tokens [1, T] of the sequences that `batch` names.

    In plain torch, for the CPU, and what the kernels are held against: those take the blocks, the tables and no masks.
    """

    def __init__(self, pools: Sequence[StaticLayer], batch: PagedBatch) -> None:
        self.batch = batch
        self.layers = [PagedLayer(pool, self) for pool in pools]
        self.places: tuple[Tensor, Tensor] | None = None  # int64 [T] each: the block and the slot in it of each token

    def masks(self, input_pos: Tensor, window: int | None) -> tuple[list[Part], list[Part]]:
        """Who attends over what, in full and in sliding-window layers. Settles where keys are written, too."""
        batch, pos, block_size = self.batch, input_pos[0], self.layers[0].k.shape[1]
        starts, rows = batch.starts.tolist(), batch.rows.long()
        counts = torch.cat((torch.ones_like(rows[: batch.decodes]), batch.starts.diff()))
        owner = rows.repeat_interleave(counts, output_size=len(pos))  # [T]
        self.places = batch.tables[owner, pos // block_size].long(), pos % block_size

        def part(rows: Tensor, tokens: slice) -> tuple[Part, Part]:
            at = pos[tokens].view(len(rows), -1)  # [B, T]
            length = int(at.max()) + 1
            n = -(-length // block_size)
            if at.shape[1] == 1:  # whole blocks, and two at least: what a CPU compiles
                n = max(n, 2)
                length = n * block_size
            blocks = batch.tables[rows, :n].long()
            if at.shape[1] == length and (window is None or window >= length):  # plainly causal
                return (Part(tokens, blocks, length, None),) * 2
            return tuple(Part(tokens, blocks, length, mask) for mask in masks_of(at, length, window))

        parts = [part(rows[: batch.decodes], slice(0, batch.decodes))] if batch.decodes else []
        for row, begin, end in zip(rows[batch.decodes :].split(1), starts, starts[1:], strict=False):
            parts.append(part(row, slice(begin, end)))
        full, sliding = zip(*parts, strict=True)
        return list(full), list(sliding)


class PagedCache:
    """Blocks of slots for every layer. Block 0 belongs to nobody: what pads a batch is written there."""

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.tensors = tensors  # [n_layers, n_blocks, block_size, ...] each
        self.layers = layers_of(tensors, dtype)

    @classmethod
    def allocate(cls, *, n_blocks: int, block_size: int, dtype: torch.dtype, **storage: Any) -> "PagedCache":
        """A cache for a model in `dtype`; `new_storage` says what else it takes."""
        return cls(new_storage(batch=n_blocks, max_seq_len=block_size, dtype=dtype, **storage), dtype)

    @property
    def n_blocks(self) -> int:
        return self.tensors[0].shape[1]

    @property
    def block_size(self) -> int:
        return self.tensors[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Let blocks be copies of others, int64 [any] each; none is on both sides."""
        for x in self.tensors:
            x[:, targets] = x[:, sources]

    def view(self, batch: PagedBatch) -> PagedView:
        return PagedView(self.layers, batch)
