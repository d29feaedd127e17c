"""Attention of one decoding token a row: norms, rotary embedding, cache write and attention in one launch.

A program takes one key/value head of one row and one split of the live cache. The query heads that share the head are
packed into one tile, so keys and values are read once. How far the cache is live stands in `input_pos` on the
device: splits are cut there, so one captured graph serves every length and the cost follows what is live. The program
that finishes last for a head combines the splits (flash decoding, Dao et al. 2023) and leaves its counter at zero.
The newest key and value never go through memory: the last split begins its softmax with the key's score, adds the
value at its end, and writes both to the cache.

A cache of 8-bit codes has a scale for each head of each token. Codes are what the products take, in which they are
exact; a key's scale then multiplies its score, and a value's the weight that it gets.

A cache may be paged: a row's slots then lie in blocks that a table names in order. The slots that are taken at a time
are of one block, so that all that differs is where they begin, and the table is read one step ahead of them. For very
few rows, where latency counts, they may be of several blocks instead.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import elementwise, language, tuning
from kernels.codes import decode
from kernels.language import along, as_codes, jit, launch_options, scale_of, tl, triton, wait


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

    @property
    def rope_options(self) -> dict:
        """What `elementwise.rope_write` takes of them."""
        return {name: value for name, value in self._asdict().items() if name != "window"}


class Pages(NamedTuple):
    """Where the slots of a paged cache's rows are: slot s of row b in block tables[rows[b], s // block_size]."""

    tables: Tensor  # int32 [any, blocks]
    rows: Tensor  # int32 [B]


MOST_PROGRAMS = 2048  # in one launch, or four for each head: bounds the scratch memory


class Scratch:
    """Where splits leave their sums: fp32 [B, K, splits, G, D] and [B, K, splits, G, 2]; counters [B, K]."""

    def __init__(self, *, batch: int, heads: Heads, device: torch.device) -> None:
        G = heads.n_heads // heads.n_kv_heads
        self.programs = max(MOST_PROGRAMS, 4 * batch * heads.n_kv_heads)
        self.sums = torch.empty(self.programs * G * heads.head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(self.programs * G * 2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(batch * heads.n_kv_heads, dtype=torch.int32, device=device)


def decode_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, k_cache: Tensor, v_cache: Tensor, heads: Heads,
    scratch: Scratch, *, k_scale: Tensor | None = None, v_scale: Tensor | None = None, pages: Pages | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention [B, H * D] of qkv [B, (H + 2 K) * D] at input_pos [B, 1]; stores k and v in the caches [B, S, K, D].

    cos and sin are tables [positions, D/2], fp32. Every row attends to its live slots: those up to its position.
    Caches of codes come with their scales [B, S, K], fp32. With `pages` the caches are [blocks, block_size, K, D], and
    so for their scales; block_size is a power of two, 16 or more. The result goes to `out` if there is one.
    """
    options = {"k_scale": k_scale, "v_scale": v_scale, "pages": pages, "out": out}
    if not language.on_gpu(qkv):
        return decode_attention_twin(qkv, cos, sin, input_pos, k_cache, v_cache, heads, **options)
    return decode_attention_kernel(qkv, cos, sin, input_pos, k_cache, v_cache, heads, scratch, **options)


def decode_attention_twin(
    qkv: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, k_cache: Tensor, v_cache: Tensor, heads: Heads,
    *, k_scale: Tensor | None = None, v_scale: Tensor | None = None, pages: Pages | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`decode_attention` in plain torch."""
    if pages is not None:
        paged = k_cache, v_cache, k_scale, v_scale
        k_cache, v_cache, k_scale, v_scale = (gather(x, pages) for x in paged)
    B, S = k_cache.shape[:2]
    H, K, D = heads.n_heads, heads.n_kv_heads, heads.head_dim
    q = elementwise.rope_write_twin(
        qkv,
        cos[input_pos[:, 0]],
        sin[input_pos[:, 0]],
        **heads.rope_options,
        k_cache=k_cache,
        v_cache=v_cache,
        input_pos=input_pos,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    if pages is not None:
        row = torch.arange(B, device=qkv.device)
        block, offset = slots_of(pages, input_pos, paged[0].shape[1])
        for x, whole in zip(paged, (k_cache, v_cache, k_scale, v_scale), strict=True):
            if x is not None:
                x[block[:, 0], offset[:, 0]] = whole[row, input_pos[:, 0]]
    slot = torch.arange(S, device=qkv.device)
    mask = slot <= input_pos
    if heads.window:
        mask &= slot > input_pos - heads.window
    if k_scale is not None:
        k_cache, v_cache = decode(k_cache, k_scale, qkv.dtype), decode(v_cache, v_scale, qkv.dtype)
    k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)  # [B, K, S, D]
    y = F.scaled_dot_product_attention(q.view(B, K, H // K, D), k, v, attn_mask=mask[:, None, None])
    y = y.reshape(B, H * D)
    return y if out is None else out.copy_(y)


def gather(paged: Tensor | None, pages: Pages) -> Tensor | None:
    """The slots [B, S, ...] of rows whose blocks are in `paged` [blocks, block_size, ...]."""
    return None if paged is None else paged[pages.tables[pages.rows].long()].flatten(1, 2)


def slots_of(pages: Pages, input_pos: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The blocks and the places in them of positions input_pos [B, T], int64."""
    return pages.tables[pages.rows[:, None], input_pos // block_size].long(), input_pos % block_size


def decode_attention_kernel(
    qkv: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, k_cache: Tensor, v_cache: Tensor, heads: Heads,
    scratch: Scratch, *, k_scale: Tensor | None = None, v_scale: Tensor | None = None, pages: Pages | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`decode_attention` by the kernel."""
    assert k_scale is None or k_scale.stride() == tuple(s // heads.head_dim for s in k_cache.stride()[:3])
    assert input_pos.is_contiguous()  # made so here, a copy would be a launch that this one does not wait for
    B, K, D = len(qkv), heads.n_kv_heads, heads.head_dim
    G = heads.n_heads // K
    out = qkv.new_empty(B, heads.n_heads * D) if out is None else out
    page, slots = 0, k_cache.shape[1]
    row_stride, tables, rows = k_cache.stride(0), None, None
    if pages is not None:
        page, (tables, rows) = slots, pages
        assert k_cache.stride(0) == page * k_cache.stride(1) and page & (page - 1) == 0
        assert tables.stride(1) == 1 and rows.is_contiguous()
        row_stride, slots = tables.stride(0), page * tables.shape[1]
    plan = tuning.attention_plan(K, D, slots, qkv, page)
    splits = min(max(plan.programs // (B * K), 1), triton.cdiv(slots, plan.BS), max(scratch.programs // (B * K), 1))
    # Attention of 256 rows takes 250 us, not 228, where it begins beside the product before it, whose shared memory
    # leaves a processor little of its cache. Of a few rows the early start is worth more.
    early = not page or B <= 16
    loop = slots > splits * plan.BS or plan.shortest > plan.BS
    _attention_kernel[(splits, K, B)](
        qkv,
        cos,
        sin,
        qkv if heads.q_norm is None else heads.q_norm,
        qkv if heads.k_norm is None else heads.k_norm,
        input_pos,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        tables,
        rows,
        out,
        scratch.sums,
        scratch.stats,
        scratch.counters,
        heads.eps,
        D**-0.5 * 1.4426950408889634,  # scores in units of log 2, for exp2
        row_stride,
        *k_cache.stride()[1:3],
        K=K,
        G=G,
        D=D,
        NORM=heads.q_norm is not None,
        ROPE=heads.use_rope,
        WINDOW=heads.window,
        SPLITS=0 if page else splits,
        SHORTEST=plan.shortest,
        BS=plan.BS,
        BG=triton.next_power_of_2(G),
        BD=max(8 * plan.num_warps, 32, triton.next_power_of_2(D)),
        S=plan.num_warps,
        LOOP=loop,
        PAGE=page,
        PDL=language.pdl(qkv),
        num_warps=plan.num_warps,
        **(launch_options(qkv) if early else {}),
        # The registers of three programs of four warps.
        **({"maxnreg": 168} if page >= plan.BS and loop and plan.num_warps <= 4 and language.pdl(qkv) else {}),
    )
    return out


@jit
def _head_rows(x, weight, cos, sin, eps, d, D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr):
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


# Keys and values are loaded as a tensor core's operand wants them, so that they pass from memory into a product without
# a move between threads. A right side of 16 x 8 has lane 4 r + t hold, of column r, the rows 2t, 2t + 1, 2t + 8 and
# 2t + 9. A sum does not mind its order: a key's eight neighbours in one load may be these rows twice, if the queries
# agree. Tensors are shaped [t 4, r 8, warp, ..., up to 16 bytes], which Triton spreads over lanes, warps and registers.


@jit
def _keys(cache, table, start, end, stride_s, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, S: tl.constexpr,
          SPREAD: tl.constexpr):  # fmt: skip
    """Keys of BS slots from `start` on, zeros from `end` on, as a product's right side [BD, BS].

    The dimensions are in the order of `_as_keys`. If the slots are SPREAD, `table` says where each is.
    """
    slot = start + along(3, BS // S // 8, 6) * (8 * S) + along(2, S, 6) * 8 + along(1, 8, 6)
    d = along(4, BD // 32, 6) * 32 + along(0, 4, 6) * 8 + along(5, 8, 6)
    place = _places(table, slot, slot, end, SPREAD)
    k = tl.load(cache + place * stride_s + d, mask=(slot < end) & (d < D), other=0.0)
    k = tl.reshape(k, [4, 8, S, BS // S // 8, BD // 32, 2, 2, 2])
    return tl.reshape(tl.permute(k, [4, 5, 6, 0, 7, 3, 2, 1]), [BD, BS])


@jit
def _as_keys(q, ROWS: tl.constexpr, BD: tl.constexpr):
    """Queries [ROWS, BD] with the dimensions in the order of `_keys`."""
    q = tl.reshape(q, [ROWS, BD // 32, 4, 2, 2, 2])
    return tl.reshape(tl.permute(q, [0, 1, 3, 4, 2, 5]), [ROWS, BD])


@jit
def _values(cache, table, start, end, stride_s, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, S: tl.constexpr,
            SPREAD: tl.constexpr):  # fmt: skip
    """Values of BS slots from `start` on, zeros from `end` on, as a product's right side [BS, BD].

    A warp has all slots and its part of the dimensions, which are in the order that `_in_order` ends.
    """
    EACH: tl.constexpr = BD // (8 * S)  # dimensions of a lane
    VEC: tl.constexpr = min(EACH, 8)
    sixteen = start + along(3, BS // 16, 8) * 16  # of one block, whatever its size
    slot = sixteen + along(4, 2, 8) * 8 + along(0, 4, 8) * 2 + along(5, 2, 8)
    place = _places(table, slot, sixteen, end, SPREAD)
    d = (
        (along(2, S, 8) * (EACH // VEC) + along(6, EACH // VEC, 8)) * (8 * VEC)
        + along(1, 8, 8) * VEC
        + along(7, VEC, 8)
    )
    v = tl.load(cache + place * stride_s + d, mask=(slot < end) & (d < D), other=0.0)
    return tl.reshape(tl.permute(v, [3, 4, 0, 5, 6, 7, 2, 1]), [BS, BD])


@jit
def _value_dims(BD: tl.constexpr, S: tl.constexpr):
    """Which dimensions the columns of `_values` are."""
    VEC: tl.constexpr = min(BD // (8 * S), 8)
    n = tl.arange(0, BD)
    outer = n // (8 * S * VEC) + n // 8 % S * (BD // (8 * S) // VEC)
    return outer * (8 * VEC) + n % 8 * VEC + n // (8 * S) % VEC


@jit
def _in_order(y, ROWS: tl.constexpr, BD: tl.constexpr, S: tl.constexpr):
    """What came of `_values`, [ROWS, BD], with the dimensions in their own order."""
    VEC: tl.constexpr = min(BD // (8 * S), 8)
    y = tl.reshape(y, [ROWS, BD // (8 * S) // VEC, VEC, S, 8])
    return tl.reshape(tl.permute(y, [0, 3, 1, 4, 2]), [ROWS, BD])


@jit
def _encode(x, scale, dtype: tl.constexpr):
    """x [..., D] as a cache of `dtype` holds it: codes and scales [..., 1]; x and 1, if there are no scales."""
    s = 1.0
    if scale is not None:
        x = x.to(tl.float32)
        s = scale_of(tl.max(tl.abs(x), len(x.shape) - 1, keep_dims=True), dtype)
        x = as_codes(x, s, dtype)
    return x, s


@jit
def _scales(scale, table, start, end, stride_s, BS: tl.constexpr, SPREAD: tl.constexpr):
    """Scales of BS slots from `start` on, zeros from `end` on, [1, BS]; 1 for a cache that has none."""
    s = 1.0
    if scale is not None:
        slot = start + tl.arange(0, BS)
        place = _places(table, slot, slot, end, SPREAD)
        s = tl.load(scale + place * stride_s, mask=slot < end, other=0.0)[None, :]
    return s


@jit
def _key_block(k_cache, k_scale, table, moved, start, end, stride_s: tl.constexpr, D: tl.constexpr, BS: tl.constexpr,
               BD: tl.constexpr, S: tl.constexpr, SPREAD: tl.constexpr):  # fmt: skip
    """Keys and scales of BS slots from `start` on, zeros from `end` on, `moved` from the places of their numbers."""
    at = tl.cast(moved, tl.int64)
    scale_s: tl.constexpr = stride_s // D  # scales [B, S, K] lie as the codes [B, S, K, D] do
    if k_scale is not None:
        k_scale += at * scale_s
    k = _keys(k_cache + at * stride_s, table, start, end, stride_s, D, BS, BD, S, SPREAD)
    return k, _scales(k_scale, table, start, end, scale_s, BS, SPREAD)


@jit
def _value_block(v_cache, v_scale, table, moved, start, end, stride_s: tl.constexpr, D: tl.constexpr, BS: tl.constexpr,
                 BD: tl.constexpr, S: tl.constexpr, SPREAD: tl.constexpr):  # fmt: skip
    """As `_key_block`, of values."""
    at = tl.cast(moved, tl.int64)
    scale_s: tl.constexpr = stride_s // D
    if v_scale is not None:
        v_scale += at * scale_s
    v = _values(v_cache + at * stride_s, table, start, end, stride_s, D, BS, BD, S, SPREAD)
    return v, _scales(v_scale, table, start, end, scale_s, BS, SPREAD)


@jit
def _places(table, slot, neighbour, end, SPREAD: tl.constexpr):
    """Where slots are: at their numbers; if they are SPREAD, where `table` has the block of a `neighbour` of each."""
    place = slot.to(tl.int64)
    if SPREAD:
        place += _moved(table, neighbour, end, SPREAD)
    return place


@jit
def _moved(table, slot, pos, PAGE: tl.constexpr):
    """By how much a slot's place in a paged cache differs from its number; past `pos` there is none."""
    block = tl.minimum(slot, pos) // PAGE
    return (tl.load(table + block).to(tl.int64) - block) * PAGE


@jit
def _attend(q, k, v, k_scale, v_scale, start, first, end, scale, top, total, acc, BS: tl.constexpr,
            CUT: tl.constexpr):  # fmt: skip
    """One block of online softmax (Milakov & Gimelshein 2018): running maximum, sum [ROWS, 8], weighted values.

    With CUT slots before `first` may be in it, which do not count.
    """
    scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * (k_scale * scale)  # [ROWS, BS]
    slot = start + tl.arange(0, BS)
    live = slot < end
    if CUT:
        live &= slot >= first
    scores = tl.where(live[None, :], scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - highest[:, None])
    fade = tl.exp2(top - highest)[:, None]
    # The sum as a product as well: it needs no exchange between warps.
    total = tl.dot(p.to(q.dtype), tl.full([BS, 8], 1.0, q.dtype), total * fade, input_precision="ieee")
    # With a value's scale in it a weight may be too small for fp16.
    dtype: tl.constexpr = tl.bfloat16 if q.dtype == tl.float16 and v.dtype != q.dtype else q.dtype
    return highest, total, tl.dot((p * v_scale).to(dtype), v.to(dtype), acc * fade, input_precision="ieee")


@jit
def _attention_kernel(qkv, cos, sin, q_norm, k_norm, input_pos, k_cache, v_cache, k_scale, v_scale, tables, rows, out,
                      sums, stats, counters, eps, scale, stride_b, stride_s: tl.constexpr, stride_k: tl.constexpr,
                      K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
                      WINDOW: tl.constexpr, SPLITS: tl.constexpr, SHORTEST: tl.constexpr, BS: tl.constexpr,
                      BG: tl.constexpr, BD: tl.constexpr, S: tl.constexpr, LOOP: tl.constexpr, PAGE: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    """One split of a row's slots for the query heads of one key head, and by the last program their combination.

    S is the number of warps, BS how many slots are taken at a time, in a LOOP where a split has more; BG and BD are G
    and D rounded up. A split has SHORTEST slots at least. In a paged cache blocks have PAGE slots, a multiple of BS or
    a part of it, stride_b is that of the tables, and SPLITS is 0, so that batches of all sizes run the same code.
    """
    split, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Position and older keys and values were there before this step began: they need no wait. The embedding is what
    # keeps it so, being launched only after all of the step before.
    pos = tl.load(input_pos + b).to(tl.int32)
    cache = b.to(tl.int64) * stride_b + head * stride_k
    SPREAD: tl.constexpr = PAGE if BS > PAGE else 0
    table = tables
    if PAGE:
        table += tl.load(rows + b).to(tl.int64) * stride_b
        cache = (head * stride_k).to(tl.int64)
    first = 0
    origin = 0  # where the first split begins: in a paged cache at slots that are taken together
    CUT: tl.constexpr = WINDOW > 0 and PAGE > 0
    TOGETHER: tl.constexpr = PAGE > 0 and BS <= PAGE  # slots that are taken at a time are of one block
    LATER: tl.constexpr = TOGETHER and LOOP  # values are asked for when they are due
    if WINDOW:
        first = tl.maximum(pos - WINDOW + 1, 0)
        origin = first // BS * BS if PAGE else first
    length = pos - origin + 1  # the newest included
    splits = SPLITS if SPLITS > 0 else tl.num_programs(0)
    share = tl.maximum(tl.cdiv(tl.cdiv(length, splits), BS) * BS, SHORTEST)
    if PAGE and LOOP:  # up to so many slots, parts and their combination would take longer
        WHOLE: tl.constexpr = min(2 * SHORTEST, 256)
        share = tl.where(length <= WHOLE, WHOLE, share)
    n_splits = tl.cdiv(length, share)
    if split < n_splits:
        dtype: tl.constexpr = qkv.dtype.element_ty
        stored_dtype: tl.constexpr = k_cache.dtype.element_ty
        ROWS: tl.constexpr = BG if BG > 16 else 16  # a tensor core's least
        g = tl.arange(0, ROWS)
        d = tl.arange(0, BD)
        k_cache += cache
        v_cache += cache
        if k_scale is not None:
            k_scale += cache // D
            v_scale += cache // D
        begin = origin + split * share
        end = tl.minimum(begin + share, pos)
        here = 0
        ahead = 0
        newest_slot = pos.to(tl.int64)
        if PAGE:
            newest_slot += _moved(table, pos, pos, PAGE)
        if TOGETHER:
            here = _moved(table, begin, pos, PAGE)
        if LATER:
            ahead = _moved(table, begin + BS, pos, PAGE)
        k, ks = _key_block(k_cache, k_scale, table, here, begin, end, stride_s, D, BS, BD, S, SPREAD)
        if not LATER:
            v, vs = _value_block(v_cache, v_scale, table, here, begin, end, stride_s, D, BS, BD, S, SPREAD)
        half: tl.constexpr = D // 2
        angle = pos.to(tl.int64) * half + tl.where(d < half, d, d - half)
        c = tl.load(cos + angle, mask=d < D, other=0.0)[None, :]
        s = tl.load(sin + angle, mask=d < D, other=0.0)[None, :]
        s = tl.where((d < half)[None, :], -s, s)
        wait(PDL)

        row = qkv + b.to(tl.int64) * ((G + 2) * K * D)
        heads = row + (head * G + tl.minimum(g, G - 1))[:, None] * D
        q = _head_rows(heads, q_norm, c, s, eps, d, D, NORM, ROPE).to(dtype)  # [ROWS, BD]
        # In every row, so that nothing has to be moved between threads.
        new = row + (G * K + head + tl.zeros([ROWS, 1], tl.int32)) * D
        k_new = _head_rows(new, k_norm, c, s, eps, d, D, NORM, ROPE).to(dtype)
        k_new, k_new_scale = _encode(k_new, k_scale, stored_dtype)
        e = _value_dims(BD, S)
        v_new = tl.load(row + ((G + 1) * K + head) * D + e, mask=e < D, other=0.0)
        v_new, v_new_scale = _encode(v_new, v_scale, stored_dtype)
        last = split == n_splits - 1  # this split's slots end with the newest, which begins its softmax
        stored = tl.where(last, D, 0)
        place = newest_slot * stride_s
        tl.store(k_cache + place + g[:, None] * 0 + d[None, :], k_new, mask=(g == 0)[:, None] & (d < stored)[None, :])
        tl.store(v_cache + place + e, v_new, mask=e < stored)
        if k_scale is not None:
            newest_scale = newest_slot * (stride_s // D) + tl.arange(0, 1)
            one = tl.arange(0, 1) < stored
            tl.store(
                k_scale + newest_scale[None, :] + g[:, None] * 0, k_new_scale, mask=(g == 0)[:, None] & one[None, :]
            )
            tl.store(v_scale + newest_scale, v_new_scale, mask=one)
        newest = tl.sum(q.to(tl.float32) * (k_new.to(tl.float32) * k_new_scale), 1) * scale
        newest = tl.where(last, newest, float("-inf"))
        top = newest
        total = tl.where(last, tl.full([ROWS, 8], 1.0, tl.float32), 0.0)
        q = _as_keys(q, ROWS, BD)
        acc = tl.zeros([ROWS, BD], tl.float32)
        if LOOP:
            for start in range(begin, end, BS):
                # The next block is on its way while this one is used. In a paged cache only its keys are: programs are
                # many there, and a processor takes three of them at a time instead of two. Where slots are SPREAD
                # nothing is: twice as many would not fit the registers.
                after = start + BS
                if LATER:
                    v, vs = _value_block(v_cache, v_scale, table, here, start, end, stride_s, D, BS, BD, S, 0)
                    here = ahead
                    ahead = _moved(table, after + BS, pos, PAGE)
                if not SPREAD:
                    k_next, ks_next = _key_block(k_cache, k_scale, table, here, after, end, stride_s, D, BS, BD, S, 0)
                if not PAGE:
                    v_next, vs_next = _value_block(v_cache, v_scale, table, 0, after, end, stride_s, D, BS, BD, S, 0)
                top, total, acc = _attend(q, k, v, ks, vs, start, first, end, scale, top, total, acc, BS, CUT)
                if SPREAD:
                    if after < end:
                        k, ks = _key_block(k_cache, k_scale, table, 0, after, end, stride_s, D, BS, BD, S, SPREAD)
                        v, vs = _value_block(v_cache, v_scale, table, 0, after, end, stride_s, D, BS, BD, S, SPREAD)
                else:
                    k = k_next
                    ks = ks_next
                if not PAGE:
                    v = v_next
                    vs = vs_next
        else:
            top, total, acc = _attend(q, k, v, ks, vs, begin, first, end, scale, top, total, acc, BS, CUT)
        acc += tl.exp2(newest - top)[:, None] * (v_new.to(tl.float32) * v_new_scale)[None, :]
        total = tl.max(total, 1)  # all eight are the same
        ROWS_OUT: tl.constexpr = 8 if BG <= 8 else ROWS
        if BG <= 8:
            acc, top, total = _low(acc), _low(top), _low(total)
        g = tl.arange(0, ROWS_OUT)
        own = (g < G)[:, None] & (d < D)[None, :]
        if n_splits == 1:
            y = _in_order((acc * (1.0 / total)[:, None]).to(out.dtype.element_ty), ROWS_OUT, BD, S)
            tl.store(out + (b * K + head).to(tl.int64) * (G * D) + g[:, None] * D + d[None, :], y, mask=own)
        else:
            group = (b * K + head) * splits
            at = sums + (group + split) * (G * D) + g[:, None] * D + d[None, :]
            tl.store(at, _in_order(acc, ROWS_OUT, BD, S), mask=own)
            at = stats + (group + split) * (G * 2) + g * 2
            tl.store(at, top, mask=g < G)
            tl.store(at + 1, total, mask=g < G)
            tl.debug_barrier()  # every thread's stores come before the count
            done = tl.atomic_add(counters + b * K + head, 1, sem="acq_rel")
            if done == n_splits - 1:
                _combine(out, sums, stats, group, (b * K + head).to(tl.int64), n_splits, G, D, BG, BD)
                tl.store(counters + b * K + head, 0)


@jit
def _low(x):
    """The first eight of sixteen rows."""
    if len(x.shape) == 1:
        low, _ = tl.split(tl.permute(tl.reshape(x, [2, 8]), [1, 0]))
    else:
        low, _ = tl.split(tl.permute(tl.reshape(x, [2, 8, x.shape[1]]), [1, 2, 0]))
    return low


@jit
def _combine(out, sums, stats, group, head, n_splits, G: tl.constexpr, D: tl.constexpr, BG: tl.constexpr,
             BD: tl.constexpr):  # fmt: skip
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
    y = acc * (1.0 / tl.where(g < G, total, 1.0))[:, None]
    tl.store(out + head * (G * D) + g[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=own)
