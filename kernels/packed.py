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
    """Half-words [4, 8, S, 2, 8] of 16 rows: the j-th of the BLOCKS that a warp takes of each."""
    chunk = (j * S + _at(2, S)) * 4 + _at(0, 4)
    at = rows * (CHUNKS * 8) + chunk * 8 + _at(4, 8)
    if BLOCKS * S * 4 == CHUNKS:
        return tl.load(w + at)
    return tl.load(w + at, mask=chunk < CHUNKS, other=0)


@jit
def _vectors(x, m, M, j, p: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, S: tl.constexpr):
    """What of rows x [M, K] meets the p-th codes of the j-th block: [4, 8, S, BM / 8, 8], zeros from row M on."""
    if FORMAT == "int4":
        k = (j * S + _at(2, S)) * 128 + 32 * p + _at(0, 4) * 8 + _at(4, 8)
    else:
        k = (j * S + _at(2, S)) * 64 + 8 * p + _at(0, 4) * 16 + _at(4, 8)
    return tl.load(x + m * K + k, mask=(m < M) & (k < K), other=0.0)


@jit
def _scales(scale, tile, j, g: tl.constexpr, SCALES: tl.constexpr, PER: tl.constexpr, S: tl.constexpr):
    """Scales or zeros [S, 16] of a tile's rows and the g-th of the groups in the j-th block."""
    group = (j * S + tl.arange(0, S)) * (4 // PER) + g
    at = tile[None, :] * SCALES + group[:, None]
    return tl.load(scale + at, mask=(group < SCALES)[:, None], other=0.0)


@jit
def _left(v, S: tl.constexpr):
    """Codes [4, 8, S, 2, 8] as a product's left side [S, 16, 32]."""
    v = tl.reshape(v, [4, 8, S, 2, 2, 2, 2])
    return tl.reshape(tl.permute(v, [2, 3, 1, 4, 5, 0, 6]), [S, 16, 32])


@jit
def _right(v, S: tl.constexpr, BM: tl.constexpr):
    """Activations [4, 8, S, BM / 8, 8] as a product's right side [S, 32, BM]."""
    v = tl.reshape(v, [4, 8, S, BM // 8, 2, 2, 2])
    return tl.reshape(tl.permute(v, [2, 4, 5, 0, 6, 3, 1]), [S, 32, BM])


@jit
def packed_kernel(x, w, scale, zero, bias, norm, out, N, M, eps, K: tl.constexpr, FORMAT: tl.constexpr,
                  GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, MODE: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, AHEAD: tl.constexpr, PTX: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """BN outputs of M rows of x [M, K] by a packed matrix, `w` its half-words; MODE as in `linear`'s kernels.

    S is the number of warps, AHEAD how many loads of each row they have under way. NORM is for M = 1.
    """
    GLU: tl.constexpr = MODE == "glu"
    TILES: tl.constexpr = BN // 8 if GLU else BN // 16  # of 16 rows; with "glu" eight of the gate and eight of up
    EACH: tl.constexpr = BN // TILES  # outputs of a tile
    Q: tl.constexpr = 4 if FORMAT == "int4" else 2  # codes in a half-word
    CHUNKS: tl.constexpr = (K + 127) // 128 * 4 if FORMAT == "int4" else K // 16  # 16 bytes each, in a row
    BLOCKS: tl.constexpr = (CHUNKS + 4 * S - 1) // (4 * S)  # loads of a thread for a row
    SCALES: tl.constexpr = K // GROUP if FORMAT == "int4" else 1  # of a row
    PER: tl.constexpr = GROUP // 32 if FORMAT == "int4" else Q  # products with the same scale
    OFFSET: tl.constexpr = 128.0 if PTX else 0.0  # of codes of 4 bits, as `widen` gives them
    dtype: tl.constexpr = x.dtype.element_ty

    # Everything that no kernel before this one writes is asked for before the wait, and all else a block ahead.
    first = tl.program_id(0).to(tl.int64) * BN
    last = (N - 1 - first).to(tl.int32)
    w += first * (CHUNKS * 8)
    scale += first * SCALES
    zero += first * SCALES
    r = tl.arange(0, 16)
    tiles, rows, words = (), (), ()
    for t in tl.static_range(TILES):
        if GLU:
            tiles = tiles + (tl.minimum(t * EACH + r % 8, last) + r // 8 * N,)
            rows = rows + (tl.minimum(t * EACH + _at(1, 8), last) + _at(3, 2) * N,)
        else:
            tiles = tiles + (tl.minimum(t * EACH + r, last),)
            rows = rows + (tl.minimum(t * EACH + _at(3, 2) * 8 + _at(1, 8), last),)
    for j in tl.static_range(min(AHEAD, BLOCKS)):
        for t in tl.static_range(TILES):
            words = words + (_words(w, rows[t], j, BLOCKS, CHUNKS, S),)
    m = _at(3, BM // 8) * 8 + _at(1, 8)
    xs, norms, scales, zeros = (), (), (), ()
    if NORM:
        for p in tl.static_range(Q):
            norms = norms + (_vectors(norm, m * 0, 1, 0, p, K, FORMAT, S),)
    wait(PDL)
    for p in tl.static_range(Q):
        xs = xs + (_vectors(x, m, M, 0, p, K, FORMAT, S),)
    rms = 1.0
    if NORM:
        k = tl.arange(0, triton.next_power_of_2(K))
        h = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        rms = 1.0 / tl.sqrt(tl.sum(h * h, 0) / K + eps)

    sums = ()
    for t in tl.static_range(TILES):
        sums = sums + (tl.zeros([S, 16, BM], tl.float32),)
    ones = tl.full([S, 16, 32], 1.0, dtype)
    for j in tl.static_range(BLOCKS):
        for t in tl.static_range(TILES):
            if j + AHEAD < BLOCKS:
                words = words + (_words(w, rows[t], j + AHEAD, BLOCKS, CHUNKS, S),)
            if FORMAT == "int4":
                for g in tl.static_range(4 // PER):
                    scales = scales + (_scales(scale, tiles[t], j, g, SCALES, PER, S),)
                    if ZERO:
                        zeros = zeros + (_scales(zero, tiles[t], j, g, SCALES, PER, S),)
        if j + 1 < BLOCKS:
            for p in tl.static_range(Q):
                xs = xs + (_vectors(x, m, M, j + 1, p, K, FORMAT, S),)
                if NORM:
                    norms = norms + (_vectors(norm, m * 0, 1, j + 1, p, K, FORMAT, S),)
        sides = ()
        for p in tl.static_range(Q):
            if NORM:
                sides = sides + (_right(xs[j * Q + p] * norms[j * Q + p], S, BM),)
            else:
                sides = sides + (_right(xs[j * Q + p], S, BM),)
        for g in tl.static_range(Q // PER):
            if FORMAT == "int4":  # in every row the sum of the activations, which takes the zeros off
                total = tl.zeros([S, 16, BM], tl.float32)
                for p in tl.static_range(PER):
                    total = tl.dot(ones, sides[g * PER + p], total, input_precision="ieee")
            added = ()
            for t in tl.static_range(TILES):
                part = sums[t]
                if FORMAT == "int4":
                    part = tl.zeros([S, 16, BM], tl.float32)
                for p in tl.static_range(PER):
                    codes = _left(widen(words[j * TILES + t], g * PER + p, FORMAT, PTX, dtype), S)
                    part = tl.dot(codes, sides[g * PER + p], part, input_precision="ieee")
                if FORMAT == "int4":
                    if ZERO:
                        part -= (zeros[(j * TILES + t) * (4 // PER) + g].to(tl.float32) + OFFSET)[:, :, None] * total
                    else:
                        part -= (OFFSET + 8.0) * total
                    part = sums[t] + part * scales[(j * TILES + t) * (4 // PER) + g].to(tl.float32)[:, :, None]
                added = added + (part,)
            sums = added

    for t in tl.static_range(TILES):
        y = tl.sum(sums[t], 0) * rms  # [16, BM]
        if FORMAT != "int4":
            y *= tl.load(scale + tiles[t])[:, None]
        if BIAS:
            y += tl.load(bias + first + tiles[t]).to(tl.float32)[:, None]
        if GLU:
            gate, up = tl.split(tl.permute(tl.reshape(y, [2, 8, BM]), [1, 2, 0]))
            y = gate / (1.0 + tl.exp(-gate)) * up
        index = first + t * EACH + tl.arange(0, EACH)
        _store(out, y, index, N, M, MODE, BM)


@jit
def _store(out, y, index, N, M, MODE: tl.constexpr, BM: tl.constexpr):
    """Outputs `index` of the first M columns of y [n, BM]."""
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
