"""Attention over block tables: kernels against their twins, and a decoder against the model over the plain view."""

import pytest
import torch

from cache import KV_DTYPES
from kernels import attention, codes, paged, tuning
from kernels.attention import Heads, Pages, Scratch
from kernels.tuning import AttentionPlan, PromptPlan
from tests.test_kernels import DEVICE, random, same

pytest.importorskip("triton")

NAN = float("nan")
HEADS = {
    "one head a key head": Heads(n_heads=2, n_kv_heads=2, head_dim=16),
    "three a key head": Heads(n_heads=9, n_kv_heads=3, head_dim=64),
    "four, with norms": Heads(4, 1, 128, q_norm=1 + 0.1 * random(128), k_norm=1 + 0.1 * random(128), eps=1e-6),
    "seven, no rope": Heads(n_heads=7, n_kv_heads=1, head_dim=32, use_rope=False),
    "window": Heads(n_heads=4, n_kv_heads=2, head_dim=32, window=21),
    "window of one": Heads(n_heads=2, n_kv_heads=1, head_dim=16, window=1),
    "head dim 80": Heads(n_heads=2, n_kv_heads=1, head_dim=80),
    "head dim 96, one key head": Heads(n_heads=5, n_kv_heads=1, head_dim=96, window=40),
}


class Pool:
    """A paged cache of one layer. Rows live up to `lengths`, and have a slot more; no other slot may be read."""

    def __init__(self, heads: Heads, lengths: list[int], *, page: int, dtype=torch.float32, kv_dtype=None) -> None:
        per_row = max(lengths) // page + 2
        self.tables = torch.zeros(len(lengths) + 1, per_row, dtype=torch.int32, device=DEVICE)  # the last: all null
        n_blocks = 2 + sum(n // page + 1 for n in lengths)
        free = (torch.randperm(n_blocks - 1) + 1).tolist()
        self.live = torch.zeros(n_blocks, page, dtype=torch.bool, device=DEVICE)
        for row, length in enumerate(lengths):
            for i in range(length // page + 1):
                block = self.tables[row, i] = free.pop()
                self.live[block, : max(length - i * page, 0)] = True
        k, v = random(2, n_blocks, page, heads.n_kv_heads, heads.head_dim, dtype=dtype)
        self.k_scale = self.v_scale = None
        if kv_dtype is not None:
            (k, self.k_scale), (v, self.v_scale) = (codes.encode(x, KV_DTYPES[kv_dtype]) for x in (k, v))
            self.k_scale[~self.live], self.v_scale[~self.live] = NAN, NAN
        else:
            k[~self.live], v[~self.live] = NAN, NAN
        self.k, self.v = k, v

    @property
    def scales(self) -> dict:
        return {"k_scale": self.k_scale, "v_scale": self.v_scale}

    @property
    def tensors(self) -> list:
        return [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]

    def twin(self) -> "Pool":
        """A copy without NaN: plain torch multiplies them by zero."""
        copy = Pool.__new__(Pool)
        copy.__dict__ = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in self.__dict__.items()}
        for x in copy.tensors:
            if x.dtype.is_floating_point and x.dtype.itemsize > 1:
                x.nan_to_num_(0.0)
        return copy


def angles(length: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(length, D // 2, device=DEVICE) * 6
    return angle.cos(), angle.sin()


PLANS = {  # how the slots are cut
    "one block a split": AttentionPlan(16, 16, 64, 2),
    "blocks in a row": AttentionPlan(16, 32, 4, 1),
    "one split": AttentionPlan(16, 16, 1, 2),
    "larger blocks": AttentionPlan(32, 64, 8, 4),
}


def check_decode(heads: Heads, positions: list[int], page: int, plan: AttentionPlan, kv_dtype=None, tolerance=3e-5):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "attention_plan", lambda *_: plan)
        pool = Pool(heads, positions, page=page, kv_dtype=kv_dtype)
        B = len(positions)
        rows = torch.tensor([*reversed(range(B)), B, B], dtype=torch.int32, device=DEVICE)  # two of padding
        pos = torch.tensor([*reversed(positions), 0, 0], device=DEVICE)[:, None]
        qkv = random(B + 2, (heads.n_heads + 2 * heads.n_kv_heads) * heads.head_dim)
        cos, sin = angles(max(positions) + 1, heads.head_dim)
        twin, scratch = pool.twin(), Scratch(batch=B + 5, heads=heads, device=qkv.device)
        pages = Pages(pool.tables, rows)
        want = attention.decode_attention_twin(
            qkv, cos, sin, pos, twin.k, twin.v, heads, **twin.scales, pages=Pages(twin.tables, rows)
        )
        for _ in range(2):  # a second time over the counters that the first one left
            out = torch.full_like(want, NAN)
            got = attention.decode_attention_kernel(
                qkv, cos, sin, pos, pool.k, pool.v, heads, scratch, **pool.scales, pages=pages, out=out
            )
            assert got is out
            same(got, want, tolerance)
        live = pool.live.clone()
        for row, position in enumerate(positions):
            live[pool.tables[row, position // page], position % page] = True
        live[0] = False
        for ours, theirs in zip(pool.tensors, twin.tensors, strict=True):
            if kv_dtype is None or ours.dtype == torch.float32:
                same(ours[live], theirs[live], 1e-6)
            else:
                assert (ours[live].float() != theirs[live].float()).sum() <= 2
        if kv_dtype is None:
            untouched = ~live
            untouched[0, 0] = False
            assert pool.k[untouched].isnan().all() and pool.v[untouched].isnan().all()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", HEADS)
def test_decode_attention_over_a_block_table(name: str, plan: str) -> None:
    page = 32 if plan == "larger blocks" else 16
    check_decode(HEADS[name], [page * 4, 3, page * 2 - 1], page, PLANS[plan])


def check_prompts(
    heads: Heads, chunks: list[tuple[int, int]], page: int, plan: PromptPlan, dtype=torch.float32, kv_dtype=None,
    tolerance: float = 3e-5,
) -> None:  # fmt: skip
    """Chunks are pairs: how many tokens came before, and how many it has."""
    pool = Pool(heads, [past + count for past, count in chunks], page=page, dtype=dtype, kv_dtype=kv_dtype)
    twin = pool.twin()
    order = torch.randperm(len(chunks)).tolist()
    rows = torch.tensor(order, dtype=torch.int32, device=DEVICE)
    pos = torch.cat([torch.arange(chunks[i][0], sum(chunks[i])) for i in order]).to(DEVICE)
    starts = torch.tensor([0] + [chunks[i][1] for i in order], device=DEVICE).cumsum(0).int()
    q = random(len(pos), heads.n_heads, heads.head_dim, dtype=dtype)
    if dtype != torch.float32:
        twin.k, twin.v = twin.k.float(), twin.v.float()
    want = paged.prompt_attention_twin(
        q.float(), pos, starts, twin.k, twin.v, heads, Pages(pool.tables, rows), **twin.scales
    )
    out = torch.full_like(want, NAN, dtype=dtype)
    got = paged.prompt_attention_kernel(
        q, pos, starts, pool.k, pool.v, heads, Pages(pool.tables, rows), **pool.scales, out=out, plan=plan
    )
    assert got is out
    same(got, want, tolerance)


CHUNKS = [(0, 1), (0, 35), (15, 18), (32, 16), (29, 1)]
PROMPT_PLANS = {"small": PromptPlan(16, 16, 4, 2), "large": PromptPlan(64, 32, 4, 2)}


@pytest.mark.parametrize("plan", PROMPT_PLANS)
@pytest.mark.parametrize("name", HEADS)
def test_prompt_attention_over_a_block_table(name: str, plan: str) -> None:
    check_prompts(HEADS[name], CHUNKS, 16 if plan == "small" else 64, PROMPT_PLANS[plan])
