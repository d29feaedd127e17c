"""A packed matrix times 1 to 64 rows of activations, on the tensor cores.

Codes of 8 and 4 bits are read at full speed only if each costs about one instruction. A tensor core takes pairs of bf16
in 32-bit registers, so two codes are widened at once by moving them into the mantissas of two bf16
(`dequantize.widen`), and multiplying and adding cost next to nothing.

Operands without a move: the packed layout (`quant/README.md`) gives a thread in one load of 16 bytes what an operand
wants from it. An operand of mma.m16n8k16 has lane 4 r + t hold, of row r, the inputs 2t, 2t + 1, 2t + 8 and 2t + 9 of
sixteen. A sum does not mind its order, so these four, twice, may be any eight inputs if the other operand agrees: here
they are one code out of each of the eight half-words that lane t loaded. Tensors are shaped [t 4, r 8, warp, ..., 8
half-words], which Triton spreads over lanes, warps and registers in this order.

Columns without waste: the least product has eight columns. Where there are fewer rows of activations, columns hold
those of several blocks of inputs. A block's product is then right in its own columns, and only these are kept.

A program computes some whole rows, or a part of their inputs. Its warps share the inputs, and their sums are added at
the end.

From 8 rows of activations on these are most of what passes through the caches, and there are too few registers to have
enough of everything on the way. `shared_kernel` copies words and activations into shared memory some steps ahead, where
warps that have other rows of the matrix use the same activations. The 64-byte blocks of a step are neighbours in their
row: DRAM opens a page for each, if they are not.
"""

from kernels.dequantize import widen
from kernels.language import along, held, jit, silu, store, tl, triton, wait


@jit
def _row(t, low, high, last, N, GLU: tl.constexpr):
    """Rows of the t-th tile of sixteen, from the program's first on: `low` counts eight, `high` two times these.

    With GLU they are eight of the gate and the same of up. Past the end it is the last row again.
    """
    if GLU:
        return tl.minimum(t * 8 + low, last) + high * N
    else:
        return tl.minimum(t * 16 + high * 8 + low, last)


@jit
def _words(w, row, step, ROW: tl.constexpr, EACH: tl.constexpr, NB: tl.constexpr, S: tl.constexpr,
           RAGGED: tl.constexpr):  # fmt: skip
    """Half-words [4, 8, S, 2, NB, 8] of 16 rows: the NB blocks of a step, of the EACH that a warp has of each row."""
    mine = step * NB + along(4, NB, 6)
    at = (along(2, S, 6) * EACH + mine) * 32 + along(0, 4, 6) * 8
    words = w + row * ROW + at + along(5, 8, 6)
    if RAGGED:
        return tl.load(words, mask=(mine < EACH) & (at < ROW), other=0)
    return tl.load(words)


@jit
def _vectors(x, M, step, p: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, EACH: tl.constexpr, NB: tl.constexpr,
             BM: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """What of rows x [M, K] meets the p-th codes in each column: [4, 8, S, columns / 8, 8].

    Columns are BM rows, or where there are less than eight, these for one block after another.
    """
    if BM < 8:
        column = along(1, 8, 5)
        m = column % BM
        mine = step * NB + column // BM
        keep = (m < M) & (column // BM < NB) & (mine < EACH)
    else:
        m = along(3, BM // 8, 5) * 8 + along(1, 8, 5)
        mine = step
        keep = m < M
    block = along(2, S, 5) * EACH + mine
    if FORMAT == "int4":
        k = block * 128 + 32 * p + along(0, 4, 5) * 8 + along(4, 8, 5)
    else:
        k = block * 64 + 8 * p + along(0, 4, 5) * 16 + along(4, 8, 5)
    return tl.load(x + m * K + k, mask=keep & (k < K), other=0.0)


@jit
def _scales(scale, t: tl.constexpr, last, N, step, g: tl.constexpr, SCALES: tl.constexpr, PER: tl.constexpr,
            EACH: tl.constexpr, NB: tl.constexpr, BM: tl.constexpr, S: tl.constexpr, GLU: tl.constexpr):  # fmt: skip
    """Scales or zeros of a tile's rows for the g-th group of each column's block, fp32: [S, 16, 8 columns or 1]."""
    if NB == 1:
        r = tl.arange(0, 16)
        row = _row(t, r % 8, r // 8, last, N, GLU)
        group = (tl.arange(0, S) * EACH + step) * (4 // PER) + g
        v = tl.load(scale + row[None, :] * SCALES + group[:, None], mask=(group < SCALES)[:, None], other=0.0)
        return v.to(tl.float32)[:, :, None]
    else:  # as a product's result lies: lane 4 r + t has columns 2t and 2t + 1 of rows r and r + 8
        row = _row(t, along(1, 8, 5), along(3, 2, 5), last, N, GLU)
        block = along(2, S, 5) * EACH + step * NB + (along(0, 4, 5) * 2 + along(4, 2, 5)) // BM
        group = block * (4 // PER) + g
        v = tl.load(scale + row * SCALES + group, mask=group < SCALES, other=0.0)
        return tl.reshape(tl.permute(v, [2, 3, 1, 0, 4]), [S, 16, 8]).to(tl.float32)


@jit
def _left(v, S: tl.constexpr, NB: tl.constexpr):
    """Codes [4, 8, S, 2, NB, 8] as a product's left side [NB S, 16, 32]."""
    v = tl.reshape(v, [4, 8, S, 2, NB, 2, 2, 2])
    return tl.reshape(tl.permute(v, [4, 2, 3, 1, 5, 6, 0, 7]), [NB * S, 16, 32])


@jit
def _right(v, S: tl.constexpr, COLUMNS: tl.constexpr):
    """Activations [4, 8, S, COLUMNS / 8, 8] as a product's right side [S, 32, COLUMNS]."""
    v = tl.reshape(v, [4, 8, S, COLUMNS // 8, 2, 2, 2])
    return tl.reshape(tl.permute(v, [2, 4, 5, 0, 6, 3, 1]), [S, 32, COLUMNS])


@jit
def _repeat(v, S: tl.constexpr, NB: tl.constexpr, COLUMNS: tl.constexpr):
    """[S, 32, COLUMNS] for each of NB blocks: [NB S, 32, COLUMNS]."""
    return tl.reshape(tl.broadcast_to(v[None], [NB, S, 32, COLUMNS]), [NB * S, 32, COLUMNS])


@jit
def _own(part, S: tl.constexpr, NB: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr):
    """Of products [NB S, 16, COLUMNS] each block's own columns: [S, 16, COLUMNS]."""
    if NB == 1:
        return part
    else:
        own = (tl.arange(0, COLUMNS) // BM)[None, :] == tl.arange(0, NB)[:, None]
        part = tl.reshape(part, [NB, S, 16, COLUMNS])
        return tl.sum(tl.where(own[:, None, None, :], part, 0.0), 0)


@jit
def packed_kernel(x, w, scale, zero, bias, norm, out, N, M, eps, K: tl.constexpr, FORMAT: tl.constexpr,
                  GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, MODE: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, AHEAD: tl.constexpr, PTX: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """BN outputs of M rows of x [M, K] by a packed matrix, `w` its half-words; MODE as in `linear`'s kernels.

    S is the number of warps, AHEAD how many blocks of a row each takes at a time, at most. NORM is for M = 1.
    """
    GLU: tl.constexpr = MODE == "glu"
    TILES: tl.constexpr = BN // 8 if GLU else BN // 16  # of 16 rows; with "glu" eight of the gate and eight of up
    Q: tl.constexpr = 4 if FORMAT == "int4" else 2  # codes in a half-word
    COLUMNS: tl.constexpr = BM if BM > 8 else 8
    BLOCKS: tl.constexpr = (K + 32 * Q - 1) // (32 * Q)  # of 64 bytes, in a row; the last of bytes may be cut short
    EACH: tl.constexpr = (BLOCKS + S - 1) // S  # of a warp
    NB: tl.constexpr = min(min(COLUMNS // BM, AHEAD), triton.next_power_of_2(EACH))  # at a time
    STEPS: tl.constexpr = (EACH + NB - 1) // NB
    SCALES: tl.constexpr = K // GROUP if FORMAT == "int4" else 1  # of a row
    PER: tl.constexpr = GROUP // 32 if FORMAT == "int4" else Q  # products with the same scale
    OFFSET: tl.constexpr = 128.0 if PTX else 0.0  # of codes of 4 bits, as `widen` gives them
    RAGGED: tl.constexpr = S * STEPS * NB != BLOCKS
    ROW: tl.constexpr = BLOCKS * 32 if FORMAT == "int4" else K // 2  # half-words
    ENDS: tl.constexpr = (1 if FORMAT != "int4" else 0) + (1 if BIAS else 0)  # of a tile: scales, biases
    dtype: tl.constexpr = x.dtype.element_ty

    # What no kernel before this one writes is asked for before the wait. Loads come back in order: those of a step go
    # before the next step's words.
    base = tl.program_id(0).to(tl.int64) * BN
    last = (N - 1 - base).to(tl.int32)
    w += base * ROW
    scale += base * SCALES
    zero += base * SCALES
    words, sums = (), ()
    for t in tl.static_range(TILES):
        row = _row(t, along(1, 8, 6), along(3, 2, 6), last, N, GLU)
        words = words + (_words(w, row, 0, ROW, EACH, NB, S, RAGGED),)
        sums = sums + (tl.zeros([S, 16, COLUMNS], tl.float32),)
    ends = ()
    for t in tl.static_range(TILES):
        r = tl.arange(0, 16)
        end_row = _row(t, r % 8, r // 8, last, N, GLU)
        if FORMAT != "int4":
            ends = ends + (tl.load(scale + end_row)[:, None],)
        if BIAS:
            ends = ends + (tl.load(bias + base + end_row).to(tl.float32)[:, None],)
    wait(PDL)
    residuals = ()
    if MODE == "add":
        for t in tl.static_range(TILES):
            residuals = residuals + (held(out, base + t * 16 + tl.arange(0, 16), N, M, BM),)

    squares = tl.zeros([4, 8, S, COLUMNS // 8, 8], tl.float32)
    for step in range(STEPS):
        sides = ()
        for p in tl.static_range(Q):
            v = _vectors(x, M, step, p, K, FORMAT, EACH, NB, BM, S)
            if NORM:
                h = v.to(tl.float32)
                squares += h * h
                v *= _vectors(norm, 1, step, p, K, FORMAT, EACH, NB, BM, S)
            sides = sides + (_right(v, S, COLUMNS),)
        scales, zeros = (), ()
        if FORMAT == "int4":
            for t in tl.static_range(TILES):
                for g in tl.static_range(4 // PER):
                    scales = scales + (_scales(scale, t, last, N, step, g, SCALES, PER, EACH, NB, BM, S, GLU),)
                    if ZERO:
                        zeros = zeros + (_scales(zero, t, last, N, step, g, SCALES, PER, EACH, NB, BM, S, GLU),)
        ahead = words
        if STEPS > 1:
            ahead = ()
            for t in tl.static_range(TILES):
                row = _row(t, along(1, 8, 6), along(3, 2, 6), last, N, GLU)
                ahead = ahead + (_words(w, row, step + 1, ROW, EACH, NB, S, True),)
        for g in tl.static_range(Q // PER):
            if FORMAT == "int4":  # in every row the sums of the activations, which take the zeros off
                total = tl.zeros([S, 16, COLUMNS], tl.float32)
                for p in tl.static_range(PER):
                    total = tl.dot(tl.full([S, 16, 32], 1.0, dtype), sides[g * PER + p], total, input_precision="ieee")
            added = ()
            for t in tl.static_range(TILES):
                part = tl.zeros([NB * S, 16, COLUMNS], tl.float32)
                for p in tl.static_range(PER):
                    codes = _left(widen(words[t], g * PER + p, FORMAT, PTX, dtype), S, NB)
                    side = _repeat(sides[g * PER + p], S, NB, COLUMNS)
                    part = tl.dot(codes, side, part, input_precision="ieee")
                part = _own(part, S, NB, BM, COLUMNS)
                if FORMAT == "int4":
                    if ZERO:
                        part -= (zeros[t * (4 // PER) + g] + OFFSET) * total
                    else:
                        part -= (OFFSET + 8.0) * total
                    part *= scales[t * (4 // PER) + g]
                added = added + (sums[t] + part,)
            sums = added
        words = ahead

    rms = 1.0
    if NORM:
        rms = 1.0 / tl.sqrt(tl.sum(squares) / K + eps)
    for t in tl.static_range(TILES):
        y = sums[t]
        if BM < 8:
            y = tl.sum(tl.reshape(y, [S, 16, 8 // BM, BM]), 2)
        y = tl.sum(y, 0) * rms  # [16, BM]
        if FORMAT != "int4":
            y *= ends[t * ENDS]
        if BIAS:
            y += ends[t * ENDS + ENDS - 1]
        if GLU:
            gate, up = tl.split(tl.permute(tl.reshape(y, [2, 8, BM]), [1, 2, 0]))
            y = silu(gate) * up
            store(out, y, base + t * 8 + tl.arange(0, 8), N, M, MODE, BM)
        else:
            if MODE == "add":
                y += residuals[t]
            store(out, y, base + t * 16 + tl.arange(0, 16), N, M, MODE, BM)


@jit
def _group_scales(scale, t: tl.constexpr, last, N, step, SCALES: tl.constexpr, PER: tl.constexpr, U: tl.constexpr,
                  SK: tl.constexpr, SN: tl.constexpr, GLU: tl.constexpr):  # fmt: skip
    """Of `shared_kernel`'s t-th tile the scales or zeros in a step, for each group of a block: [SN SK, 16, 1]."""
    b = tl.arange(0, SN * SK)[:, None]
    r = tl.arange(0, 16)[None, :]
    row = _row(t * SN + b // SK, r % 8, r // 8, last, N, GLU)
    v = ()
    for g in tl.static_range(4 // PER * U):
        group = (step * SK + b % SK) * U * (4 // PER) + g
        v = v + (tl.load(scale + row * SCALES + group, mask=group < SCALES, other=0.0)[:, :, None],)
    return v


@jit
def _shared_words(w, t: tl.constexpr, u: tl.constexpr, last, N, step, ROW: tl.constexpr, U: tl.constexpr,
                  SK: tl.constexpr, SN: tl.constexpr, GLU: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """Half-words [4, 8, SK, 2, SN, 8] of the t-th tile of each warp: on the way [SK, SN, 2, 8] blocks of 64 bytes."""
    r = tl.arange(0, SK * SN * 16)[:, None]
    row = _row(t * SN + r // 16 % SN, r % 8, r // 8 % 2, last, N, GLU)
    at = ((step * SK + r // (16 * SN)) * U + u) * 32 + tl.arange(0, 32)[None, :]
    if RAGGED:
        v = tl.load(w + row * ROW + at, mask=at < ROW, other=0)
    else:
        v = tl.load(w + row * ROW + at)
    return tl.permute(tl.reshape(v, [SK, SN, 2, 8, 4, 8]), [4, 3, 0, 2, 1, 5])


@jit
def _shared_vectors(x, M, step, u: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, U: tl.constexpr,
                    BM: tl.constexpr, SK: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """What of rows x [M, K] meets each code of a half-word, a tensor [4, 8, SK, BM / 8, 8] for each. Past the last row
    it is that one again.
    """
    Q: tl.constexpr = 4 if FORMAT == "int4" else 2
    r = tl.arange(0, Q * SK * BM)[:, None]
    block = (step * SK + r // BM % SK) * U + u
    k = (block * Q + r // (BM * SK)) * 32 + tl.arange(0, 32)[None, :]
    at = tl.minimum(r % BM, M - 1) * K + k
    if RAGGED:
        v = tl.load(x + at, mask=k < K, other=0.0)
    else:
        v = tl.load(x + at)
    if Q == 4:
        v = tl.permute(tl.reshape(v, [2, 2, SK, BM // 8, 8, 4, 8]), [5, 4, 2, 3, 6, 1, 0])
        even, odd = tl.split(v)  # p / 2 = 0 and 1
        a, b = tl.split(even)
        c, d = tl.split(odd)
        sides = (a, b, c, d)
    else:
        v = tl.permute(tl.reshape(v, [2, SK, BM // 8, 8, 2, 2, 8]), [0, 4, 3, 1, 2, 6, 5])  # [t / 2, t % 2, ..., p]
        sides = tl.split(tl.reshape(v, [4, 8, SK, BM // 8, 8, 2]))
    return sides


@jit(do_not_specialize=["M"])
def shared_kernel(x, w, scale, zero, bias, out, N, M, K: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
                  ZERO: tl.constexpr, BIAS: tl.constexpr, MODE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  S: tl.constexpr, SK: tl.constexpr, U: tl.constexpr, PTX: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """`packed_kernel` for 8 rows of x and up, by way of shared memory.

    Of the S warps SK share the inputs, U blocks each in a step, and S / SK the rows of the matrix. With MODE "parts"
    programs share the inputs too, and `out` [parts, M, N] is for another kernel to add up.
    """
    GLU: tl.constexpr = MODE == "glu"
    SN: tl.constexpr = S // SK
    PART: tl.constexpr = 8 * SN if GLU else 16 * SN  # outputs of the warps' tiles of sixteen rows
    TILES: tl.constexpr = BN // PART
    Q: tl.constexpr = 4 if FORMAT == "int4" else 2
    BLOCKS: tl.constexpr = (K + 32 * Q - 1) // (32 * Q)
    STEPS: tl.constexpr = (BLOCKS + SK * U - 1) // (SK * U)
    SCALES: tl.constexpr = K // GROUP if FORMAT == "int4" else 1
    PER: tl.constexpr = GROUP // 32 if FORMAT == "int4" else Q
    GROUPS: tl.constexpr = 4 // PER * U
    OFFSET: tl.constexpr = 128.0 if PTX else 0.0
    RAGGED: tl.constexpr = STEPS * SK * U * 32 * Q != K
    ROW: tl.constexpr = BLOCKS * 32 if FORMAT == "int4" else K // 2
    ENDS: tl.constexpr = (1 if FORMAT != "int4" else 0) + (1 if BIAS else 0)
    dtype: tl.constexpr = x.dtype.element_ty

    base = tl.program_id(0).to(tl.int64) * BN
    last = (N - 1 - base).to(tl.int32)
    w += base * ROW
    scale += base * SCALES
    zero += base * SCALES
    first, end = 0, STEPS
    if MODE == "parts":
        each = tl.cdiv(STEPS, tl.num_programs(1))
        first = tl.program_id(1) * each
        end = tl.minimum(first + each, STEPS)
        out += tl.program_id(1).to(tl.int64) * M * N
    sums, scales, zeros, ends, residuals = (), (), (), (), ()
    for t in tl.static_range(TILES):
        sums = sums + (tl.zeros([S, 16, BM], tl.float32),)
        if FORMAT == "int4":
            scales = scales + _group_scales(scale, t, last, N, first, SCALES, PER, U, SK, SN, GLU)
            if ZERO:
                zeros = zeros + _group_scales(zero, t, last, N, first, SCALES, PER, U, SK, SN, GLU)
        r = tl.arange(0, 16 * SN)
        row = _row(t * SN + r // 16, r % 8, r // 8 % 2, last, N, GLU)
        if FORMAT != "int4":
            ends = ends + (tl.load(scale + row)[:, None],)
        if BIAS:
            ends = ends + (tl.load(bias + base + row).to(tl.float32)[:, None],)
    wait(PDL)
    if MODE == "add":
        for t in tl.static_range(TILES):
            residuals = residuals + (held(out, base + t * PART + tl.arange(0, PART), N, M, BM),)

    for step in range(first, end):
        words, sides, next_scales, next_zeros = (), (), (), ()
        for u in tl.static_range(U):
            for t in tl.static_range(TILES):
                words = words + (_shared_words(w, t, u, last, N, step, ROW, U, SK, SN, GLU, RAGGED),)
        for u in tl.static_range(U):
            sides = sides + _shared_vectors(x, M, step, u, K, FORMAT, U, BM, SK, RAGGED)
        if FORMAT == "int4":
            for t in tl.static_range(TILES):
                next_scales += _group_scales(scale, t, last, N, step + 1, SCALES, PER, U, SK, SN, GLU)
                if ZERO:
                    next_zeros += _group_scales(zero, t, last, N, step + 1, SCALES, PER, U, SK, SN, GLU)
        for g in tl.static_range(Q // PER * U):
            right = ()
            for p in tl.static_range(PER):
                right = right + (_repeat(_right(sides[g * PER + p], SK, BM), SK, SN, BM),)
            if FORMAT == "int4":
                total = tl.zeros([S, 16, BM], tl.float32)
                for p in tl.static_range(PER):
                    total = tl.dot(tl.full([S, 16, 32], 1.0, dtype), right[p], total, input_precision="ieee")
            added = ()
            for t in tl.static_range(TILES):
                part = tl.zeros([S, 16, BM], tl.float32) if FORMAT == "int4" else sums[t]
                for p in tl.static_range(PER):
                    code = widen(words[g * PER // Q * TILES + t], (g * PER + p) % Q, FORMAT, PTX, dtype)
                    part = tl.dot(_left(code, SK, SN), right[p], part, input_precision="ieee")
                if FORMAT == "int4":
                    if ZERO:
                        part -= (zeros[t * GROUPS + g].to(tl.float32) + OFFSET) * total
                    else:
                        part -= (OFFSET + 8.0) * total
                    part = sums[t] + part * scales[t * GROUPS + g].to(tl.float32)
                added = added + (part,)
            sums = added
        scales, zeros = next_scales, next_zeros

    for t in tl.static_range(TILES):
        y = tl.reshape(tl.sum(tl.reshape(sums[t], [SN, SK, 16, BM]), 1), [SN * 16, BM])
        if FORMAT != "int4":
            y *= ends[t * ENDS]
        if BIAS:
            y += ends[t * ENDS + ENDS - 1]
        if GLU:
            gate, up = tl.split(tl.permute(tl.reshape(y, [SN, 2, 8, BM]), [0, 2, 3, 1]))
            y = tl.reshape(silu(gate) * up, [PART, BM])
        if MODE == "add":
            y += residuals[t]
        store(out, y, base + t * PART + tl.arange(0, PART), N, M, MODE, BM)
