"""Attention over block tables: kernels against their twins, and a decoder against the model over the plain view."""

import copy
import dataclasses
import itertools

import pytest
import torch

from cache import KV_DTYPES
from kernels import attention, codes, language, prompt_attention, tuning
from kernels.attention import Heads, Pages, Scratch
from kernels.decoder import Decoder
from kernels.tuning import AttentionPlan, PromptPlan
from paged import PagedBatch, PagedCache
from tests.conftest import TINY, tiny_model
from tests.test_kernels import DEVICE, random, same

pytest.importorskip("triton")

NAN = float("nan")
HEADS = {
    "one head a key head": Heads(n_heads=2, n_kv_heads=2, head_dim=16),
    "three a key head": Heads(n_heads=9, n_kv_heads=3, head_dim=64),
    "four, with norms": Heads(4, 1, 128, q_norm=1 + 0.1 * random(128), k_norm=1 + 0.1 * random(128), eps=1e-6),
    "seven, no rope": Heads(n_heads=7, n_kv_heads=1, head_dim=32, use_rope=False),
    "window": Heads(n_heads=4, n_kv_heads=2, head_dim=32, window=21),
    "long window": Heads(n_heads=4, n_kv_heads=2, head_dim=32, window=300),
    "window of one": Heads(n_heads=2, n_kv_heads=1, head_dim=16, window=1),
    "eight key heads, with norms": Heads(
        16, 8, 128, q_norm=1 + 0.1 * random(128), k_norm=1 + 0.1 * random(128), eps=1e-6
    ),
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
    "blocks over pages": AttentionPlan(64, 64, 64, 2),
    "several over pages, in a row": AttentionPlan(128, 128, 4, 4),
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


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("one head a key head", "blocks in a row"),
        ("three a key head", "one block a split"),
        ("four, with norms", "larger blocks"),
        ("seven, no rope", "one split"),
        ("window", "one block a split"),
        ("window", "blocks in a row"),
        ("window of one", "one split"),
        ("head dim 80", "larger blocks"),
        ("head dim 96, one key head", "blocks in a row"),
    ],
)
def test_decode_attention_over_a_block_table(name: str, plan: str) -> None:
    page = 32 if plan == "larger blocks" else 16
    check_decode(HEADS[name], [page * 3, 3, page * 2 - 1], page, PLANS[plan])


@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("plan", ["blocks over pages", "several over pages, in a row"])
@pytest.mark.parametrize("name", ["three a key head", "four, with norms", "long window", "head dim 80"])
def test_slots_of_several_blocks_at_a_time(name: str, plan: str, page: int) -> None:
    check_decode(HEADS[name], [450, 3, 127, 128], page, PLANS[plan])


@pytest.mark.parametrize("page", [16, 64, 256])
def test_plans_of_a_paged_cache_suit_its_blocks(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1, dtype=torch.bfloat16)
    monkeypatch.setattr(language, "hopper", lambda x: True)
    for slots in (256, 1024, 4096, 40960):
        few = tuning.attention_plan(8, 128, slots, x, page)
        assert (few == tuning.attention_plan(8, 128, slots, x)) == (page < 256)
        assert page >= few.BS or page < 256
    monkeypatch.setattr(language, "hopper", lambda x: False)
    for rows, D, dtype in itertools.product((1, 8, 200), (64, 128, 256), (torch.bfloat16, torch.float32)):
        x = torch.zeros(rows, 1, dtype=dtype)
        plan = tuning.attention_plan(8, D, 4096, x, page)
        assert page >= plan.BS and plan.shortest % plan.BS == 0 and plan.BS // plan.num_warps >= 8


def with_norms_in(heads: Heads, dtype: torch.dtype) -> Heads:
    return heads._replace(**{n: x.to(dtype) for n, x in heads._asdict().items() if isinstance(x, torch.Tensor)})


@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])
@pytest.mark.parametrize("name", ["three a key head", "eight key heads, with norms"])
@pytest.mark.parametrize(("slots", "position"), [(256, 255), (256, 3), (1024, 700), (4096, 4095), (8192, 5000)])
def test_few_rows_by_their_plans(
    slots: int, position: int, name: str, kv_dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision, over tables that show as much as a context of each kind has at most."""
    if DEVICE == "cpu" and (slots > 1024 or kv_dtype):
        pytest.skip("the interpreter would take long, and multiplies bf16 matrices as if they were integers")
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    monkeypatch.setattr(language, "hopper", lambda x: True)
    heads, pool = HEADS[name], Pool(HEADS[name], [position], page=64, dtype=dtype, kv_dtype=kv_dtype)
    shown = torch.zeros(1, slots // 64, dtype=torch.int32, device=DEVICE)
    shown[0, : position // 64 + 1] = pool.tables[0, : position // 64 + 1]
    pages = Pages(shown, torch.zeros(1, dtype=torch.int32, device=DEVICE))
    pos = torch.tensor([[position]], device=DEVICE)
    qkv = random(1, (heads.n_heads + 2 * heads.n_kv_heads) * heads.head_dim, dtype=dtype)
    cos, sin = angles(position + 1, heads.head_dim)
    twin = pool.twin()
    if kv_dtype is None:
        twin.k, twin.v = twin.k.float(), twin.v.float()
    want = attention.decode_attention_twin(
        qkv.float(), cos, sin, pos, twin.k, twin.v, with_norms_in(heads, torch.float32), **twin.scales, pages=pages
    )
    heads, scratch = with_norms_in(heads, dtype), Scratch(batch=1, heads=heads, device=qkv.device)
    for _ in range(2):
        got = attention.decode_attention_kernel(
            qkv, cos, sin, pos, pool.k, pool.v, heads, scratch, **pool.scales, pages=pages
        )
        same(got, want, 1e-2)


def test_blocks_of_64_slots() -> None:
    check_decode(HEADS["one head a key head"], [150], 64, AttentionPlan(64, 64, 2, 4))


@pytest.mark.parametrize(("kv_dtype", "name"), [("int8", "window"), ("fp8", "three a key head")])
@pytest.mark.usefixtures("rounded_fp8")
@pytest.mark.parametrize("plan", ["blocks in a row", "several over pages, in a row"])
def test_decode_attention_over_blocks_of_codes(kv_dtype: str, name: str, plan: str) -> None:
    check_decode(HEADS[name], [133, 16], 16, PLANS[plan], kv_dtype, 2e-3)


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
    want = prompt_attention.prompt_attention_twin(
        q.float(), pos, starts, twin.k, twin.v, heads, Pages(pool.tables, rows), **twin.scales
    )
    out = torch.full_like(want, NAN, dtype=dtype)
    got = prompt_attention.prompt_attention_kernel(
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


@pytest.mark.parametrize(("kv_dtype", "name"), [("int8", "window"), ("fp8", "three a key head")])
@pytest.mark.usefixtures("rounded_fp8")
def test_prompt_attention_over_blocks_of_codes(kv_dtype: str, name: str) -> None:
    check_prompts(HEADS[name], CHUNKS, 16, PROMPT_PLANS["small"], kv_dtype=kv_dtype)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_prompt_attention_in_half_precision(kv_dtype: str | None) -> None:
    if DEVICE == "cpu" and kv_dtype:
        pytest.skip("the interpreter multiplies bf16 matrices as if they were integers")
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    check_prompts(HEADS["three a key head"], CHUNKS, 16, PROMPT_PLANS["small"], dtype, kv_dtype, 1e-2)


def test_more_sequences_than_are_searched_at_a_time() -> None:
    check_prompts(HEADS["one head a key head"], [(i % 3, 1 + i % 2) for i in range(70)], 16, PROMPT_PLANS["small"])


MODELS = {
    "llama": TINY,
    "q/k norm, tied": dataclasses.replace(TINY, qk_norm=True, tied_head=True),
    "window": dataclasses.replace(TINY, sliding_window=5, sliding_layers=(1,)),
}


@pytest.mark.parametrize(("name", "kv_dtype"), [*((name, None) for name in MODELS), ("llama", "int8")])
def test_a_decoder_over_blocks_gives_the_models_logits(
    monkeypatch: pytest.MonkeyPatch, name: str, kv_dtype: str | None
) -> None:
    model = tiny_model(MODELS[name], device=DEVICE)
    config = model.config
    monkeypatch.setattr(language, "on_gpu", lambda x: True)  # the kernels, by the interpreter if need be
    decoder = Decoder(copy.deepcopy(model), max_seq_len=48, batch_size=4)
    caches = [
        PagedCache.allocate(
            n_blocks=9, block_size=16, n_layers=config.n_layers, n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim, dtype=torch.float32, device=DEVICE, kv_dtype=kv_dtype,
        )
        for _ in range(2)
    ]  # fmt: skip
    tables = torch.tensor([[5, 2, 7], [1, 8, 3], [4, 6, 0], [0, 0, 0]], dtype=torch.int32, device=DEVICE)
    # (row, position of the first token, tokens) of each forward; those that decode come first, row 3 pads
    forwards = [
        (0, [(1, 0, 17), (0, 0, 3)]),
        (1, [(0, 3, 1), (1, 17, 9), (2, 0, 1)]),
        (4, [(2, 1, 1), (0, 4, 1), (3, 0, 1), (1, 26, 1)]),
    ]
    for n, work in forwards:
        counts = torch.tensor([count for _, _, count in work])
        batch = PagedBatch(
            tables=tables,
            rows=torch.tensor([row for row, _, _ in work], dtype=torch.int32, device=DEVICE),
            decodes=n,
            starts=torch.cat((torch.tensor([n]), n + counts[n:].cumsum(0))).int().to(DEVICE),
            longest=max(counts[n:].tolist(), default=0),
        )
        tokens = torch.randint(config.vocab_size, (1, int(counts.sum())), device=DEVICE)
        pos = torch.cat([torch.arange(at, at + count) for _, at, count in work])[None].to(DEVICE)
        with torch.no_grad():
            got = decoder.logits(decoder.hidden(tokens, pos, caches[0].view(batch)))
            want = model(tokens, pos, caches[1].view(batch))
        # Where rounding moves a number over the middle of two codes, the two have different ones.
        same(got, want, 1e-4 if kv_dtype is None else 5e-3)


def test_a_padded_forward_gives_what_it_gives_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(device=DEVICE)
    config = model.config
    monkeypatch.setattr(language, "on_gpu", lambda x: True)
    decoder = Decoder(copy.deepcopy(model), max_seq_len=48, batch_size=4)
    cache = PagedCache.allocate(
        n_blocks=9, block_size=16, n_layers=config.n_layers, n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim, dtype=torch.float32, device=DEVICE,
    )  # fmt: skip
    tables = torch.tensor([[5, 2, 7], [1, 8, 3], [0, 0, 0]], dtype=torch.int32, device=DEVICE)  # row 2 pads

    def logits(tokens: list[int], pos: list[int], rows: list[int], decodes: int, starts: list[int]) -> torch.Tensor:
        row, start = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (rows, starts))
        batch = PagedBatch(tables, row, decodes, start, len(tokens))
        ids, at = (torch.tensor([x], device=DEVICE) for x in (tokens, pos))
        with torch.no_grad():
            return decoder.logits(decoder.hidden(ids, at, cache.view(batch)))[0]

    logits([3, 1, 4, 1, 5], [0, 1, 2, 3, 4], [0], 0, [0, 5])  # what came before
    want = logits([9, 2, 6, 5], [5, 0, 1, 2], [0, 1], 1, [1, 4])
    got = logits([9, 0, 0, 2, 6, 5, *[0] * 18], [5, 0, 0, 0, 1, 2, *[0] * 18], [0, 2, 2, 1, 2, 2], 3, [3, 6, 6, 24])
    same(got[[0, 3, 4, 5]], want, 1e-5)
    assert got.isfinite().all()
