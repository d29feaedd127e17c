"""Attention of prompts over a paged cache: chunks of many sequences, of any length and with any past, in one launch.

A program takes some tokens of one sequence and all query heads of one key/value head: tokens times heads are the rows
of its tile, so that a short chunk fills a tile as well as a long one, and keys and values are read once for all of
these heads (flash attention: Dao et al. 2022, Dao 2023). They are read from the cache alone, where the chunk's own are
already. Where the sequences begin in the batch stands on the device: programs are as many as any division of the tokens
could need, and each finds its own.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import language, tuning
from kernels.attention import Heads, Pages, gather
from kernels.codes import decode
from kernels.language import jit, tl, triton


def prompt_attention(
    q: Tensor, input_pos: Tensor, starts: Tensor, k_cache: Tensor, v_cache: Tensor, heads: Heads, pages: Pages,
    *, k_scale: Tensor | None = None, v_scale: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention [T, H * D] of q [T, H, D] over caches [blocks, block_size, K, D]; into `out` if there is one.

    Tokens starts[i] to starts[i + 1], int32 [R + 1], are those of the sequence whose blocks are tables[rows[i]], and
    are at neighbouring positions input_pos [T]. Their keys and values are in the cache. Caches of codes come with their
    scales [blocks, block_size, K]; block_size is a power of two, 16 or more.
    """
    options = {"k_scale": k_scale, "v_scale": v_scale, "out": out}
    run = prompt_attention_kernel if language.on_gpu(q) else prompt_attention_twin
    return run(q, input_pos, starts, k_cache, v_cache, heads, pages, **options)


def prompt_attention_twin(
    q: Tensor, input_pos: Tensor, starts: Tensor, k_cache: Tensor, v_cache: Tensor, heads: Heads, pages: Pages,
    *, k_scale: Tensor | None = None, v_scale: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`prompt_attention` in plain torch."""
    out = q.new_empty(len(q), q[0].numel()) if out is None else out
    for i, (begin, end) in enumerate(pairwise(starts.tolist())):
        one = Pages(pages.tables, pages.rows[i : i + 1])
        k, v = gather(k_cache, one), gather(v_cache, one)  # [1, S, K, D]
        if k_scale is not None:
            k, v = decode(k, gather(k_scale, one), q.dtype), decode(v, gather(v_scale, one), q.dtype)
        pos, slot = input_pos[begin:end, None], torch.arange(k.shape[1], device=q.device)
        mask = slot <= pos
        if heads.window:
            mask &= slot > pos - heads.window
        queries = q[None, begin:end].transpose(1, 2)  # [1, H, t, D]
        y = F.scaled_dot_product_attention(
            queries, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
        )
        out[begin:end] = y.transpose(1, 2).flatten(2)[0]
    return out


def prompt_attention_kernel(
    q: Tensor, input_pos: Tensor, starts: Tensor, k_cache: Tensor, v_cache: Tensor, heads: Heads, pages: Pages,
    *, k_scale: Tensor | None = None, v_scale: Tensor | None = None, out: Tensor | None = None,
    plan: tuning.PromptPlan | None = None,
) -> Tensor:  # fmt: skip
    """`prompt_attention` by the kernel."""
    (T, H, D), K, (tables, rows) = q.shape, heads.n_kv_heads, pages
    page, G = k_cache.shape[1], H // K
    assert q.is_contiguous() and input_pos.is_contiguous() and rows.is_contiguous() and tables.stride(1) == 1
    assert k_cache.stride() == v_cache.stride() and k_cache.stride(0) == page * k_cache.stride(1)
    assert k_scale is None or k_scale.stride() == tuple(s // D for s in k_cache.stride()[:3])
    assert page & (page - 1) == 0
    out = q.new_empty(T, H * D) if out is None else out
    plan = plan or tuning.prompt_plan(page, q)
    BM = max(plan.BM, triton.next_power_of_2(G))
    tokens = BM // G  # in a tile
    R = len(starts) - 1
    _prompt_kernel[(T // tokens + R, K)](
        q,
        input_pos,
        starts,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        tables,
        rows,
        out,
        R,
        D**-0.5 * 1.4426950408889634,  # scores in units of log 2, for exp2
        tables.stride(0),
        *k_cache.stride()[1:3],
        K=K,
        G=G,
        D=D,
        WINDOW=heads.window,
        TOKENS=tokens,
        BM=BM,
        BN=plan.BN,
        BD=max(16, triton.next_power_of_2(D)),
        PAGE=page,
        num_warps=plan.num_warps,
        num_stages=plan.depth,
    )
    return out


@jit
def _own_sequence(starts, R, place, TOKENS: tl.constexpr):
    """Whose tile is at `place`. Sequence i has the places from starts[i] // TOKENS + i on, which are enough for it."""
    STEP: tl.constexpr = 64
    i = tl.arange(0, STEP)
    begun = 0
    for first in range(0, R, STEP):
        start = tl.load(starts + first + i, mask=first + i < R, other=0x3FFFFFFF)
        begun += tl.sum((start // TOKENS + first + i <= place).to(tl.int32), 0)
    return begun - 1


@jit
def _place_in_cache(table, slot, last, PAGE: tl.constexpr):
    """Where a slot of the sequence with that table is, counted over all blocks; past `last` there is none."""
    slot = tl.minimum(slot, last)
    return tl.load(table + slot // PAGE).to(tl.int64) * PAGE + slot % PAGE


@jit
def _attend_blocks(q, k_cache, v_cache, k_scale, v_scale, table, pos, low, high, last, scale, stride_s, top, total, acc,
                   D: tl.constexpr, WINDOW: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
                   MASKED: tl.constexpr):  # fmt: skip
    """Online softmax (Milakov & Gimelshein 2018) of queries [BM, BD] at positions `pos` over slots low to high.

    Slots are taken BN at a time, which are of one block. Without MASKED every query sees all of them.
    """
    dtype: tl.constexpr = q.dtype
    # With a value's scale in it a weight may be too small for fp16.
    weights: tl.constexpr = tl.bfloat16 if dtype == tl.float16 and v_cache.dtype.element_ty != dtype else dtype
    n = tl.arange(0, BN)
    d = tl.arange(0, BD)
    at = n[:, None].to(tl.int64) * stride_s + d[None, :]
    keep = (d < D)[None, :]
    place = _place_in_cache(table, low, last, PAGE)
    for start in range(low, high, BN):
        here = place
        place = _place_in_cache(table, start + BN, last, PAGE)  # the table is read one step ahead
        block = here * stride_s
        live = keep
        if MASKED:
            live = keep & (start + n <= last)[:, None]
        if D == BD:
            k = tl.load(k_cache + block + at)
        else:
            k = tl.load(k_cache + block + at, mask=keep, other=0.0)
        scores = tl.dot(q, tl.trans(k.to(dtype)), input_precision="ieee")  # [BM, BN]
        if k_scale is not None:
            scores *= tl.load(k_scale + (here + n) * (stride_s // D))[None, :]
        if MASKED:
            seen = (start + n)[None, :] <= pos[:, None]
            if WINDOW:
                seen &= (start + n)[None, :] > pos[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1) * scale)
        base = highest
        if WINDOW:  # a query may not have seen any yet
            base = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(scores * scale - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        if D == BD and not MASKED:
            v = tl.load(v_cache + block + at)
        else:
            v = tl.load(v_cache + block + at, mask=live, other=0.0)  # a weight of zero times what lies there
        if v_scale is not None:
            v_scales = tl.load(v_scale + (here + n) * (stride_s // D), mask=start + n <= last, other=0.0)
            p *= v_scales[None, :]
        acc = tl.dot(p.to(weights), v.to(weights), acc * fade[:, None], input_precision="ieee")
        top = highest
    return top, total, acc


@jit(do_not_specialize=["input_pos", "rows", "R"])  # whose alignment differs from batch to batch
def _prompt_kernel(q, input_pos, starts, k_cache, v_cache, k_scale, v_scale, tables, rows, out, R, scale, stride_t,
                   stride_s, stride_k, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
                   TOKENS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                   PAGE: tl.constexpr):  # fmt: skip
    """TOKENS tokens of one sequence, for the G query heads of one key head.

    The tile's row r is head r % G of token r // G. BD is D rounded up, PAGE the slots of a block, a multiple of BN.
    """
    place = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tokens, which have the most to see, begin first
    head = tl.program_id(1)
    i = _own_sequence(starts, R, place, TOKENS)
    start, end = tl.load(starts + i), tl.load(starts + i + 1)
    token = start + (place - (start // TOKENS + i)) * TOKENS
    count = tl.minimum(end - token, TOKENS)
    if count > 0:
        table = tables + tl.load(rows + i).to(tl.int64) * stride_t
        pos = tl.load(input_pos + token).to(tl.int32)  # of the first token
        last = pos + count - 1
        r = tl.arange(0, BM)
        d = tl.arange(0, BD)
        own = tl.minimum(r // G, count - 1)
        at = ((token + own).to(tl.int64) * K + head) * (G * D) + r % G * D
        x = tl.load(q + at[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BD], tl.float32)
        k_cache += (head * stride_k).to(tl.int64)
        v_cache += (head * stride_k).to(tl.int64)
        if k_scale is not None:
            k_scale += head * stride_k // D
            v_scale += head * stride_k // D
        if WINDOW:
            low = tl.maximum(pos - WINDOW + 1, 0) // BN * BN
        else:
            low = (pos + 1) // BN * BN  # up to here every token sees all
            top, total, acc = _attend_blocks(
                x, k_cache, v_cache, k_scale, v_scale, table, pos + own, 0, low, last, scale, stride_s, top, total, acc,
                D, WINDOW, BN, BD, PAGE, False,
            )  # fmt: skip
        top, total, acc = _attend_blocks(
            x, k_cache, v_cache, k_scale, v_scale, table, pos + own, low, last + 1, last, scale, stride_s, top, total,
            acc, D, WINDOW, BN, BD, PAGE, True,
        )  # fmt: skip
        y = (acc * (1.0 / total)[:, None]).to(out.dtype.element_ty)
        tl.store(out + at[:, None] + d[None, :], y, mask=(r < count * G)[:, None] & (d < D)[None, :])
