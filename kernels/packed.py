"""A packed matrix times 1 to 64 rows of activations, on the tensor cores.

Codes of 8 and 4 bits are read at full speed only if widening one costs about one instruction. A tensor core takes pairs
of bf16 in 32-bit registers, so two codes are widened at once by moving them into the mantissas of two bf16
(`dequantize.widen`), and multiplying and adding cost next to nothing: even a single row of activations, padded to the
eight that a tensor core's least product has, is cheaper this way than on the other cores.

The one idea: the packed layout (`quant/README.md`) gives a thread in one load of 16 bytes what a tensor core's operand
wants from it, so no code moves between threads. An operand of mma.m16n8k16 has lane 4 r + t hold, of row r, the inputs
2t, 2t + 1, 2t + 8 and 2t + 9 of sixteen. Sums do not mind an order, so the four, twice, may be any eight inputs if the
other operand agrees: here they are one code out of each of the eight half-words that lane t loaded. Tensors are shaped
[t 4, r 8, warp, tile, half-word 8], which Triton spreads over lanes, warps and registers in this order.

A program computes some whole rows. Its warps share the inputs, and their sums are added at the end.
"""

from kernels.dequantize import widen
from kernels.language import jit, order, tl, triton, wait


@jit
def _at(dim: tl.constexpr, size: tl.constexpr):
    """0 .. size along one of the five dimensions."""
    i = tl.arange(0, size)
    for d in tl.static_range(5):
        if d != dim:
            i = tl.expand_dims(i, d)
    return i


@jit
def _words(w, rows, j, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr, S: tl.constexpr):
    """Half-words [4, 8, S, R, 8] of the j-th of the spans that a warp takes of a row."""
    chunk = (j * S + _at(2, S)) * 4 + _at(0, 4)
    at = rows * (CHUNKS * 8) + chunk * 8 + _at(4, 8)
    if BLOCKS * S * 4 == CHUNKS:
        return tl.load(w + at)
    return tl.load(w + at, mask=chunk < CHUNKS, other=0)


@jit
def _codes(words, p: tl.constexpr, FORMAT: tl.constexpr, PTX: tl.constexpr, dtype: tl.constexpr, S: tl.constexpr,
           R: tl.constexpr):  # fmt: skip
    """The p-th codes of half-words [4, 8, S, R, 8] as a product's left side [S, 8 R, 32]."""
    v = tl.reshape(widen(words, p, FORMAT, PTX, dtype), [4, 8, S, R, 2, 2, 2])
    return tl.reshape(tl.permute(v, [2, 3, 1, 4, 5, 0, 6]), [S, R * 8, 32])


@jit
def _activations(x, norm, M, j, p: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, NORM: tl.constexpr,
                 S: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """The activations that meet the p-th codes, as a product's right side [S, 32, BM]; BM rows, zeros from M on."""
    m = _at(3, BM // 8) * 8 + _at(1, 8)
    if FORMAT == "int4":
        k = (j * S + _at(2, S)) * 128 + 32 * p + _at(0, 4) * 8 + _at(4, 8)
    else:
        k = (j * S + _at(2, S)) * 64 + 8 * p + _at(0, 4) * 16 + _at(4, 8)
    v = tl.load(x + m * K + k, mask=(m < M) & (k < K), other=0.0)
    if NORM:
        k += m * 0  # of the same shape, so of the same threads
        v = v * tl.load(norm + k, mask=k < K, other=0.0)
    v = tl.reshape(v, [4, 8, S, BM // 8, 2, 2, 2])
    return tl.reshape(tl.permute(v, [2, 4, 5, 0, 6, 3, 1]), [S, 32, BM])


@jit
def packed_kernel(x, w, scale, zero, bias, norm, out, N, M, eps, K: tl.constexpr, FORMAT: tl.constexpr,
                  GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, MODE: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, AHEAD: tl.constexpr, PTX: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """BN outputs of M rows of x [M, K] by a packed matrix, `w` its half-words; MODE as in `linear`'s kernels.

    S is the number of warps, AHEAD how many loads of a row they have under way. NORM is for M = 1.
    """
    GLU: tl.constexpr = MODE == "glu"
    R: tl.constexpr = BN // 4 if GLU else BN // 8  # eights of rows: with "glu" one of the gate, one of up, and so on
    Q: tl.constexpr = 4 if FORMAT == "int4" else 2  # codes in a half-word
    CHUNKS: tl.constexpr = (K + 127) // 128 * 4 if FORMAT == "int4" else K // 16  # 16 bytes each, in a row
    BLOCKS: tl.constexpr = (CHUNKS + 4 * S - 1) // (4 * S)  # loads of a thread for a row
    SCALES: tl.constexpr = K // GROUP if FORMAT == "int4" else 1  # of a row
    PER: tl.constexpr = GROUP // 32 if FORMAT == "int4" else Q  # products with the same scale
    OFFSET: tl.constexpr = 128.0 if PTX else 0.0  # of codes of 4 bits, as `widen` gives them
    dtype: tl.constexpr = x.dtype.element_ty

    first = tl.program_id(0).to(tl.int64) * BN
    last = (N - 1 - first).to(tl.int32)
    tile = tl.arange(0, R * 8)
    if GLU:
        rows = tl.minimum(_at(3, R) // 2 * 8 + _at(1, 8), last) + _at(3, R) % 2 * N
        tile_rows = tl.minimum(tile // 16 * 8 + tile % 8, last) + tile // 8 % 2 * N
    else:
        rows = tl.minimum(_at(3, R) * 8 + _at(1, 8), last)
        tile_rows = tl.minimum(tile, last)
    w += first * (CHUNKS * 8)
    words = ()
    for j in tl.static_range(min(AHEAD, BLOCKS)):
        words = words + (_words(w, rows, j, BLOCKS, CHUNKS, S),)
    wait(PDL)

    rms = 1.0
    if NORM:
        k = tl.arange(0, triton.next_power_of_2(K))
        h = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        rms = 1.0 / tl.sqrt(tl.sum(h * h, 0) / K + eps)
    acc = tl.zeros([S, R * 8, BM], tl.float32)
    for j in tl.static_range(BLOCKS):
        if j + AHEAD < BLOCKS:
            words = words + (_words(w, rows, j + AHEAD, BLOCKS, CHUNKS, S),)
        for g in tl.static_range(Q // PER):
            part = tl.zeros([S, R * 8, BM], tl.float32)
            total = part
            for p in tl.static_range(PER):
                a = _activations(x, norm, M, j, g * PER + p, K, FORMAT, NORM, S, BM)
                part = tl.dot(_codes(words[j], g * PER + p, FORMAT, PTX, dtype, S, R), a, part, input_precision="ieee")
                if FORMAT == "int4":  # in every row the sum of the activations, which takes the zeros off
                    total = tl.dot(tl.full([S, R * 8, 32], 1.0, dtype), a, total, input_precision="ieee")
            if FORMAT == "int4":
                group = (j * S + tl.arange(0, S)) * (4 // PER) + g
                at = (first + tile_rows[None, :]) * SCALES + group[:, None]
                keep = (group < SCALES)[:, None]
                z = tl.full([S, R * 8], 8.0, tl.float32)
                if ZERO:
                    z = tl.load(zero + at, mask=keep, other=0.0).to(tl.float32)
                part -= (z + OFFSET)[:, :, None] * total
                part *= tl.load(scale + at, mask=keep, other=0.0).to(tl.float32)[:, :, None]
            acc += part

    y = tl.sum(acc, 0) * rms  # [8 R, BM]
    if FORMAT != "int4":
        y *= tl.load(scale + first + tile_rows)[:, None]
    if BIAS:
        y += tl.load(bias + first + tile_rows).to(tl.float32)[:, None]
    if GLU:
        y = tl.permute(tl.reshape(y, [R // 2, 2, 8, BM]), [0, 2, 3, 1])
        gate, up = tl.split(tl.reshape(y, [BN, BM, 2]))
        y = gate / (1.0 + tl.exp(-gate)) * up
    index = first + tl.arange(0, BN)
    m = tl.arange(0, BM)
    keep = (index < N)[:, None] & (m < M)[None, :]
    if MODE == "argmax":
        best = tl.max(tl.where(keep, order(y, index[:, None]), -(1 << 63)), 0)
        tl.atomic_max(out + m, best, mask=m < M)
    else:
        at = m[None, :] * N + index[:, None]
        if MODE == "add":
            y += tl.load(out + at, mask=keep, other=0.0).to(tl.float32)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=keep)
