"""Attention of one decoding token a row: norms, rotary embedding, cache write and attention in one launch.

A program takes one key/value head of one row and one split of the live cache. The query heads that share the head are
packed into one tile, so keys and values are read once. How far the cache is live stands in `input_pos` on the
device: splits are cut there, so one captured graph serves every length and the cost follows what is live. The program
that finishes last for a head combines the splits (flash decoding, Dao et al. 2023) and leaves its counter at zero.
The newest key and value never go through memory: the last split adds them from registers and writes them to the cache.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import elementwise, language, tuning
from kernels.language import jit, launch_options, tl, triton, wait


class Heads(NamedTuple):
    """What attention needs to know of a layer."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    q_norm: Tensor | None = None  # RMSNorm weights over the head dim, [D]
    k_norm: Tensor | None = None
    eps: float = 0.0
    use_rope: bool = True
    window: int = 0  # a token sees this many latest positions, itself included; 0: all


MOST_PROGRAMS = 2048  # in one launch: bounds the scratch memory


class Scratch:
    """Where splits leave their sums: fp32 [B, K, splits, G, D] and [B, K, splits, G, 2]; counters [B, K]."""

    def __init__(self, *, batch: int, heads: Heads, device: torch.device) -> None:
        G, programs = heads.n_heads // heads.n_kv_heads, max(MOST_PROGRAMS, batch * heads.n_kv_heads)
        self.sums = torch.empty(programs * G * heads.head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(programs * G * 2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(batch * heads.n_kv_heads, dtype=torch.int32, device=device)


def decode_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, k_cache: Tensor, v_cache: Tensor, heads: Heads,
    scratch: Scratch,
) -> Tensor:  # fmt: skip
    """Attention [B, H * D] of qkv [B, (H + 2 K) * D] at input_pos [B, 1]; stores k and v in the caches [B, S, K, D].

    cos and sin are tables [positions, D/2], fp32. Every row attends to its live slots: those up to its position.
    """
    if not language.on_gpu(qkv):
        return decode_attention_twin(qkv, cos, sin, input_pos, k_cache, v_cache, heads)
    return decode_attention_kernel(qkv, cos, sin, input_pos, k_cache, v_cache, heads, scratch)


def decode_attention_twin(
    qkv: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, k_cache: Tensor, v_cache: Tensor, heads: Heads
) -> Tensor:  # fmt: skip
    """`decode_attention` in plain torch."""
    B, S = k_cache.shape[:2]
    H, K, D = heads.n_heads, heads.n_kv_heads, heads.head_dim
    q = elementwise.rope_write_twin(
        qkv,
        cos[input_pos[:, 0]],
        sin[input_pos[:, 0]],
        n_heads=H,
        n_kv_heads=K,
        head_dim=D,
        q_norm=heads.q_norm,
        k_norm=heads.k_norm,
        eps=heads.eps,
        use_rope=heads.use_rope,
        k_cache=k_cache,
        v_cache=v_cache,
        input_pos=input_pos,
    )
    slot = torch.arange(S, device=qkv.device)
    mask = slot <= input_pos
    if heads.window:
        mask &= slot > input_pos - heads.window
    k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)  # [B, K, S, D]
    y = F.scaled_dot_product_attention(q.view(B, K, H // K, D), k, v, attn_mask=mask[:, None, None])
    return y.reshape(B, H * D)


def decode_attention_kernel(
    qkv: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, k_cache: Tensor, v_cache: Tensor, heads: Heads,
    scratch: Scratch,
) -> Tensor:  # fmt: skip
    """`decode_attention` by the kernel."""
    assert input_pos.is_contiguous()  # made so here, a copy would be a launch that this one does not wait for
    B, K, D = len(qkv), heads.n_kv_heads, heads.head_dim
    G = heads.n_heads // K
    out = qkv.new_empty(B, heads.n_heads * D)
    slots = k_cache.shape[1]
    plan = tuning.attention_plan(K, D, slots, qkv)
    splits = min(max(plan.programs // (B * K), 1), triton.cdiv(slots, plan.BS), max(MOST_PROGRAMS // (B * K), 1))
    _attention_kernel[(splits, K, B)](
        qkv,
        cos,
        sin,
        qkv if heads.q_norm is None else heads.q_norm,
        qkv if heads.k_norm is None else heads.k_norm,
        input_pos,
        k_cache,
        v_cache,
        out,
        scratch.sums,
        scratch.stats,
        scratch.counters,
        heads.eps,
        D**-0.5 * 1.4426950408889634,  # scores in units of log 2, for exp2
        *k_cache.stride()[:3],
        K=K,
        G=G,
        D=D,
        NORM=heads.q_norm is not None,
        ROPE=heads.use_rope,
        WINDOW=heads.window,
        SPLITS=splits,
        SHORTEST=plan.shortest,
        BS=plan.BS,
        BG=triton.next_power_of_2(G),
        BD=max(16, triton.next_power_of_2(D)),
        LOOP=slots > splits * plan.BS or plan.shortest > plan.BS,
        PDL=language.pdl(qkv),
        num_warps=plan.num_warps,
        **launch_options(qkv),
    )
    return out


@jit
def _head_row(x, weight, cos, sin, eps, d, D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr):
    """Heads at pointers x [rows, 1], normed and rotated, fp32 [rows, BD]; cos and signed sin are rows [1, BD]."""
    half: tl.constexpr = D // 2
    keep = (d < D)[None, :]
    other = tl.where(d < half, d + half, d - half)  # the dimension that d is rotated with
    h = tl.load(x + d[None, :], mask=keep, other=0.0)
    p = tl.load(x + other[None, :], mask=keep, other=0.0)
    dtype = h.dtype
    if NORM:
        f = h.to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(f * f, 1) / D + eps)
        h = (f * r[:, None]).to(dtype) * tl.load(weight + d, mask=d < D, other=0.0)[None, :]
        p = (p.to(tl.float32) * r[:, None]).to(dtype) * tl.load(weight + other, mask=d < D, other=0.0)[None, :]
    y = h.to(tl.float32)
    if ROPE:
        y = y * cos + p.to(tl.float32) * sin
    return y


@jit
def _block(k_cache, v_cache, cache, stride_s, start, end, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr):
    """Keys and values [BS, BD] from slot `start` on; zeros from `end` on."""
    s = start + tl.arange(0, BS)
    d = tl.arange(0, BD)
    at = cache + s.to(tl.int64)[:, None] * stride_s + d[None, :]
    live = (s < end)[:, None] & (d < D)[None, :]
    return tl.load(k_cache + at, mask=live, other=0.0), tl.load(v_cache + at, mask=live, other=0.0)


@jit
def _attend(q, k, v, k_new, v_new, start, end, pos, scale, top, total, acc, BS: tl.constexpr):
    """One block of online softmax (Milakov & Gimelshein 2018): running maximum, sum, and weighted values."""
    slot = start + tl.arange(0, BS)
    k = tl.where((slot == pos)[:, None], k_new, k)
    v = tl.where((slot == pos)[:, None], v_new, v)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [ROWS, BS]
    scores = tl.where((slot < end)[None, :], scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - highest[:, None])
    fade = tl.exp2(top - highest)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return highest, total * fade + tl.sum(p, 1), acc


@jit
def _attention_kernel(qkv, cos, sin, q_norm, k_norm, input_pos, k_cache, v_cache, out, sums, stats, counters, eps,
                      scale, stride_b, stride_s, stride_k, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                      NORM: tl.constexpr, ROPE: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
                      SHORTEST: tl.constexpr, BS: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
                      LOOP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    split, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Position and older keys and values were there before this step began: they need no wait.
    pos = tl.load(input_pos + b).to(tl.int32)
    first = 0
    if WINDOW:
        first = tl.maximum(pos - WINDOW + 1, 0)
    length = pos - first + 1  # the newest included
    share = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BS) * BS, SHORTEST)
    n_splits = tl.cdiv(length, share)
    if split < n_splits:
        dtype: tl.constexpr = k_cache.dtype.element_ty
        ROWS: tl.constexpr = BG if BG > 16 else 16  # a tensor core's least
        g = tl.arange(0, ROWS)
        d = tl.arange(0, BD)
        keep = (d < D)[None, :]
        cache = b.to(tl.int64) * stride_b + head * stride_k
        begin = first + split * share
        end = tl.minimum(begin + share, pos + 1)
        k, v = _block(k_cache, v_cache, cache, stride_s, begin, tl.minimum(end, pos), D, BS, BD)
        half: tl.constexpr = D // 2
        angle = pos.to(tl.int64) * half + tl.where(d < half, d, d - half)
        c = tl.load(cos + angle, mask=d < D, other=0.0)[None, :]
        s = tl.load(sin + angle, mask=d < D, other=0.0)[None, :]
        s = tl.where((d < half)[None, :], -s, s)
        wait(PDL)

        row = qkv + b.to(tl.int64) * ((G + 2) * K * D)
        new = row + (G * K + head + tl.zeros([1, 1], tl.int32)) * D
        v_new = tl.load(new + K * D + d[None, :], mask=keep, other=0.0).to(dtype)
        k_new = _head_row(new, k_norm, c, s, eps, d, D, NORM, ROPE).to(dtype)  # [1, BD]
        heads = row + (head * G + tl.minimum(g, G - 1))[:, None] * D
        q = _head_row(heads, q_norm, c, s, eps, d, D, NORM, ROPE).to(dtype)  # [ROWS, BD]
        if split == n_splits - 1:
            at = cache + pos.to(tl.int64) * stride_s + d[None, :]
            tl.store(k_cache + at, k_new, mask=keep)
            tl.store(v_cache + at, v_new, mask=keep)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BD], tl.float32)
        if LOOP:
            for start in range(begin, end, BS):
                # The next block is on its way while this one is used.
                k_next, v_next = _block(k_cache, v_cache, cache, stride_s, start + BS, tl.minimum(end, pos), D, BS, BD)
                top, total, acc = _attend(q, k, v, k_new, v_new, start, end, pos, scale, top, total, acc, BS)
                k = k_next
                v = v_next
        else:
            top, total, acc = _attend(q, k, v, k_new, v_new, begin, end, pos, scale, top, total, acc, BS)

        own = keep & (g < G)[:, None]
        result = out + (b * K + head).to(tl.int64) * (G * D) + g[:, None] * D + d[None, :]
        if n_splits == 1:
            tl.store(result, (acc / total[:, None]).to(out.dtype.element_ty), mask=own)
        else:
            group = (b * K + head) * SPLITS
            at = sums + (group + split) * (G * D) + g[:, None] * D + d[None, :]
            tl.store(at, acc, mask=own)
            at = stats + (group + split) * (G * 2) + g * 2
            tl.store(at, top, mask=g < G)
            tl.store(at + 1, total, mask=g < G)
            tl.debug_barrier()  # every thread's stores come before the count
            done = tl.atomic_add(counters + b * K + head, 1, sem="acq_rel")
            if done == n_splits - 1:
                _combine(out, sums, stats, group, (b * K + head).to(tl.int64), n_splits, G, D, SPLITS, BG, BD)
                tl.store(counters + b * K + head, 0)


@jit
def _combine(out, sums, stats, group, head, n_splits, G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
             BG: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """The splits' sums [n_splits, G, D] of one head, weighted by their softmax's parts."""
    STEP: tl.constexpr = 8  # splits in flight at a time
    i = tl.arange(0, STEP)
    g = tl.arange(0, BG)
    d = tl.arange(0, BD)
    own = (g < G)[:, None] & (d < D)[None, :]
    top = tl.full([BG], float("-inf"), tl.float32)
    total = tl.zeros([BG], tl.float32)
    acc = tl.zeros([BG, BD], tl.float32)
    for start in range(0, n_splits, STEP):
        split = start + i
        here = (split < n_splits)[:, None] & (g < G)[None, :]
        at = stats + (group + split)[:, None] * (G * 2) + g[None, :] * 2
        tops = tl.load(at, mask=here, other=float("-inf"), cache_modifier=".cg")  # [STEP, BG]
        totals = tl.load(at + 1, mask=here, other=0.0, cache_modifier=".cg")
        at = sums + (group + split)[:, None, None] * (G * D) + g[None, :, None] * D + d[None, None, :]
        part = tl.load(at, mask=here[:, :, None] & (d < D)[None, None, :], other=0.0, cache_modifier=".cg")
        highest = tl.maximum(top, tl.max(tops, 0))
        highest = tl.where(g < G, highest, 0.0)
        weight = tl.exp2(tops - highest[None, :])
        fade = tl.exp2(top - highest)
        total = total * fade + tl.sum(weight * totals, 0)
        acc = acc * fade[:, None] + tl.sum(part * weight[:, :, None], 0)
        top = highest
    y = acc / tl.where(g < G, total, 1.0)[:, None]
    tl.store(out + head * (G * D) + g[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=own)
