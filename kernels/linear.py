"""Matrix times a few activation rows, with what stands around it in a decoder folded in.

A decode step reads every weight once and does little else, so its matrices must stream at memory speed and nothing may
run between them. One function, `linear`, has the RMS norm before the matrix, the SiLU product, bias and residual after
it, and float, int8, fp8 and int4 weights; `argmax` ends a greedy step without writing logits. What runs depends on the
number of rows M:

- M = 1: `_vector_kernel` and, for packed weights, `_packed_kernel`. A program holds a few whole rows of the matrix
  against x, in fp32 on the CUDA cores.
- M = 2 to `tuning.most_rows`: `_tile_kernel`. The rows of x, padded to 8, 16, 32 or 64, are one side of a tensor-core
  product, so that up to 16 rows cost what one costs.
- more: cuBLAS over dequantized weights, and `elementwise` for the rest.

The norm costs no launch: a program reads all of x anyway and sums its squares on the way (y = r * W (g * x) with
r = rsqrt(mean x^2 + eps)). The integer formats are read without conversion instructions, which run at a quarter of
the rate: codes are put into the mantissa of a float, and what that adds is subtracted through the sum of x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import elementwise, language, tuning
from kernels.dequantize import dequantize, dequantize_twin, fp8, shift
from kernels.language import jit, launch_options, tl, triton, wait
from kernels.weight import Weight


def linear(
    x: Tensor,
    weight: Weight,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    glu: bool = False,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y [M, N] = RMSNorm(x [M, K]; norm [K], eps) W^T + bias, then SiLU(gate) * up where `glu`, or + `residual`.

    With `glu` the matrix is gate over up and y is [M, N/2]. Without `norm`, x is taken as it is. `residual` [M, N]
    is overwritten by the result and returned; it does not go with `glu`.
    """
    assert not (glu and residual is not None)
    options = {"norm": norm, "eps": eps, "glu": glu, "residual": residual, "out_dtype": out_dtype}
    if not language.on_gpu(x):
        return linear_twin(x, weight, **options)
    if len(x) <= tuning.most_rows(weight.format):
        return linear_kernel(x, weight, **options)
    if norm is not None:
        x = elementwise.rms_norm(x, norm, eps)
    matrix = dequantize(weight, x.dtype)
    if residual is not None and weight.bias is None:
        return residual.addmm_(x, matrix.t())
    y = F.linear(x, matrix, weight.bias)
    return _finish(elementwise.silu_mul(y) if glu else y, residual, out_dtype)


def linear_twin(
    x: Tensor,
    weight: Weight,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    glu: bool = False,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` in plain torch, rounded where an unfused model rounds."""
    if norm is not None:
        x = elementwise.rms_norm_twin(x, norm, eps)
    y = F.linear(x, dequantize_twin(weight, x.dtype), weight.bias)
    return _finish(elementwise.silu_mul_twin(y) if glu else y, residual, out_dtype)


def _finish(y: Tensor, residual: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    if residual is not None:
        return residual.add_(y)
    return y if out_dtype is None else y.to(out_dtype)


def linear_kernel(
    x: Tensor,
    weight: Weight,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    glu: bool = False,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` by the kernels for few rows."""
    N = weight.shape[0] // (2 if glu else 1)
    out = residual if residual is not None else x.new_empty(len(x), N, dtype=out_dtype)
    launch(x, weight, out, norm=norm, eps=eps, mode="glu" if glu else "add" if residual is not None else "store")
    return out


def argmax(x: Tensor, weight: Weight, best: Tensor, *, norm: Tensor, eps: float) -> None:
    """Fold the largest of `linear(x, weight, norm=norm, eps=eps)` and its index into `best` int64 [M].

    `best` holds, for each row, the order-preserving bits of the logit above 2^32 - 1 - index, so its maximum is the
    largest logit at the smallest index; `take_best` reads and resets it.
    """
    if language.on_gpu(x) and len(x) <= tuning.most_rows(weight.format):
        return argmax_kernel(x, weight, best, norm=norm, eps=eps)
    return argmax_twin(x, weight, best, norm=norm, eps=eps)


def argmax_twin(x: Tensor, weight: Weight, best: Tensor, *, norm: Tensor, eps: float) -> None:
    top = linear(x, weight, norm=norm, eps=eps).float().max(-1)
    bits = top.values.view(torch.int32)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    torch.maximum(best, (key << 32) | (0xFFFFFFFF - top.indices), out=best)


def argmax_kernel(x: Tensor, weight: Weight, best: Tensor, *, norm: Tensor, eps: float) -> None:
    launch(x, weight, best, norm=norm, eps=eps, mode="argmax")


NOTHING = -(1 << 63)  # what `best` is before anything was folded in


def take_best(best: Tensor, tokens: Tensor, input_pos: Tensor, last_pos: int) -> None:
    """Write the indices in `best` [M] to tokens [M, 1], move input_pos [M, 1] one on (to last_pos at most), reset."""
    if not language.on_gpu(best):
        return take_best_twin(best, tokens, input_pos, last_pos)
    take_best_kernel(best, tokens, input_pos, last_pos)


def take_best_twin(best: Tensor, tokens: Tensor, input_pos: Tensor, last_pos: int) -> None:
    tokens[:, 0] = 0xFFFFFFFF - (best & 0xFFFFFFFF)
    input_pos.add_(1).clamp_(max=last_pos)
    best.fill_(NOTHING)


def take_best_kernel(best: Tensor, tokens: Tensor, input_pos: Tensor, last_pos: int) -> None:
    BM = triton.next_power_of_2(len(best))
    _take_best_kernel[(1,)](
        best, tokens, input_pos, len(best), last_pos, BM=BM, PDL=language.pdl(best), num_warps=1, **launch_options(best)
    )


def launch(
    x: Tensor,
    weight: Weight,
    out: Tensor,
    *,
    norm: Tensor | None,
    eps: float,
    mode: str,
    plan: tuning.Plan | None = None,
) -> None:
    """Run the kernel for few rows; `mode` is what becomes of the product: "store", "add" to out, "glu" or "argmax"."""
    assert x.is_contiguous() and weight.data.is_contiguous()
    M, K = x.shape
    N = weight.shape[0] // (2 if mode == "glu" else 1)
    if M > 1 and norm is not None and x.dtype == torch.float16:  # g * x before its division by the rms can be too large
        x, norm = elementwise.rms_norm(x, norm, eps), None
    plan = plan or tuning.plan(weight.format, M, N, K, mode, x)
    BK, rows = min(plan.BK, triton.next_power_of_2(K)), plan.BN
    if M > 1:
        kernel, more = _tile_kernel, {"M": M, "BM": max(8, triton.next_power_of_2(M)), "num_stages": plan.depth}
        BK = max(BK, 32)  # a chunk of int4, and more than a tensor core's least
    elif weight.format == "float":
        kernel, more = _vector_kernel, {}
    else:
        kernel, more = _packed_kernel, {"depth": plan.depth, "one": 0x3F800000}
        BK, rows = triton.next_power_of_2(K), plan.BN * plan.depth
    kernel[(triton.cdiv(N, rows),)](
        x,
        weight.data,
        x if weight.scale is None else weight.scale,
        x if weight.zero is None else weight.zero,
        x if weight.bias is None else weight.bias,
        x if norm is None else norm,
        out,
        N,
        eps,
        K=K,
        FORMAT=weight.format,
        GROUP=weight.group,
        ZERO=weight.zero is not None,
        BIAS=weight.bias is not None,
        NORM=norm is not None,
        MODE=mode,
        BN=plan.BN,
        BK=BK,
        PDL=language.pdl(x),
        num_warps=plan.num_warps,
        **more,
        **launch_options(x),
    )


@jit
def _activations(x, norm, offsets, keep, NORM: tl.constexpr):
    """x and g * x at `offsets`, fp32."""
    h = tl.load(x + offsets, mask=keep, other=0.0).to(tl.float32)
    g = h
    if NORM:
        g = h * tl.load(norm + offsets, mask=keep, other=0.0).to(tl.float32)
    return h, g


@jit
def _epilogue(scale, bias, row, FORMAT: tl.constexpr, BIAS: tl.constexpr):
    """The scale and the bias of outputs `row`, fp32, loaded before there is anything to wait for."""
    s = 1.0
    if FORMAT == "int8" or FORMAT == "fp8":
        s = tl.load(scale + row)
    if FORMAT == "fp8":
        s *= 1.152921504606847e18
    b = 0.0
    if BIAS:
        b = tl.load(bias + row).to(tl.float32)
    return s, b


@jit
def _order(y, index):
    """Pack logits and their indices so that the largest integer is the largest logit at the smallest index."""
    bits = y.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (key << 32) | (0xFFFFFFFF - index.to(tl.int64))


@jit
def _vector_kernel(x, w, scale, zero, bias, norm, out, N, eps, K: tl.constexpr, FORMAT: tl.constexpr,
                   GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, MODE: tl.constexpr,
                   BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BN outputs of one row of x [1, K] by a float matrix; MODE: "store", "add" to what out holds, "glu", "argmax"."""
    index = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(index, N - 1).to(tl.int64)  # past the end: read the last row again, store nothing
    GLU: tl.constexpr = MODE == "glu"
    k = tl.arange(0, BK)
    w1 = tl.load(w + row[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
    w2 = w1
    if GLU:
        w2 = tl.load(w + (row + N)[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
    s1, b1 = _epilogue(scale, bias, row, FORMAT, BIAS)
    s2, b2 = _epilogue(scale, bias, row + N if GLU else row, FORMAT, BIAS)
    wait(PDL)
    r = 0.0
    if MODE == "add":
        r = tl.load(out + row).to(tl.float32)  # asked for as soon as it may be, used last
    a1 = tl.zeros([BN, BK], tl.float32)
    a2 = tl.zeros([BN, BK], tl.float32)
    squares = tl.zeros([BK], tl.float32)
    for start in range(0, K, BK):
        h, g = _activations(x, norm, start + k, start + k < K, NORM)
        n1 = w1
        n2 = w2
        if K > BK:  # the next block is on its way while this one is used
            ahead = start + BK + k
            n1 = tl.load(w + row[:, None] * K + ahead[None, :], mask=(ahead < K)[None, :], other=0.0)
            if GLU:
                n2 = tl.load(w + (row + N)[:, None] * K + ahead[None, :], mask=(ahead < K)[None, :], other=0.0)
        if NORM:
            squares += h * h
        a1 += w1.to(tl.float32) * g[None, :]
        if GLU:
            a2 += w2.to(tl.float32) * g[None, :]
        w1 = n1
        w2 = n2
    rms = 1.0
    if NORM:
        rms = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)
    y = tl.sum(a1, 1) * (rms * s1) + b1
    if GLU:
        y = y / (1.0 + tl.exp(-y)) * (tl.sum(a2, 1) * (rms * s2) + b2)
    if MODE == "argmax":
        tl.atomic_max(out, tl.max(tl.where(index < N, _order(y, index), -(1 << 63)), 0))
    else:
        tl.store(out + index, (y + r).to(out.dtype.element_ty), mask=index < N)


@jit
def _words(w, row, chunk, limit, ROW: tl.constexpr):
    """Packed words [C, BN, 4] of rows of ROW words each, zeros from word `limit` on."""
    at = chunk[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    return tl.load(w + (row * ROW)[None, :, None] + at, mask=at < limit, other=0)


@jit
def _group_scales(scale, zero, row, chunk, K: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr):
    """Scales and zeros [C, BN] of int4 chunks."""
    at = row[None, :] * (K // GROUP) + (chunk // (GROUP // 32))[:, None]
    keep = (chunk < K // 32)[:, None]
    s = tl.load(scale + at, mask=keep, other=0.0).to(tl.float32)
    z = s
    if ZERO:
        z = tl.load(zero + at, mask=keep, other=0.0).to(tl.float32)
    return s, z


@jit
def _packed_dot(words, planes, total, bias, s, z, one, FORMAT: tl.constexpr, ZERO: tl.constexpr):
    """Dot products [BN] of packed words [C, BN, 4] with the activations of each plane.

    int8 and int4 codes u go to the top of a float's mantissa, which makes it 1 + u / 256 (or 1 + u / 16) without a
    conversion; `bias` takes the ones off again. `one` is the bits of 1.0, in a register because an instruction has
    room for the mask alone.
    """
    acc = tl.zeros(words.shape, tl.float32)
    for plane in tl.static_range(len(planes)):
        if FORMAT == "fp8":
            acc += fp8(words, plane) * planes[plane]
        elif FORMAT == "int8":
            bits = (shift(words, 15 - 8 * plane) & 0x007F8000) | one
            acc += bits.to(tl.float32, bitcast=True) * planes[plane]
        elif plane % 2 == 0:
            bits = (shift(words, 15 - 4 * plane) & 0x00078000) | one  # 1 + u / 256
            acc += bits.to(tl.float32, bitcast=True) * planes[plane]
        else:  # the same shift as the plane before
            bits = (shift(words, 19 - 4 * plane) & 0x00780000) | one  # 1 + u / 16
            acc += bits.to(tl.float32, bitcast=True) * planes[plane]
    y = tl.sum(acc, 2)  # [C, BN]
    if FORMAT != "fp8":
        y -= bias
    if FORMAT == "int4":
        if ZERO:
            y -= z * total
        y *= s
    return tl.sum(y, 0)


@jit(do_not_specialize=["depth"])
def _packed_kernel(x, w, scale, zero, bias, norm, out, N, eps, one, depth, K: tl.constexpr, FORMAT: tl.constexpr,
                   GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, MODE: tl.constexpr,
                   BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """`depth` times BN outputs of one row of x [1, K] by a packed matrix; MODE as in `_vector_kernel`.

    x is made ready once, in the registers of the threads that multiply by it, and the rows of the matrix stream past.
    """
    PER: tl.constexpr = 16 if FORMAT != "int4" else 32  # weights in a chunk of four words
    ROW: tl.constexpr = K // PER * 4  # words
    C: tl.constexpr = BK // PER
    GLU: tl.constexpr = MODE == "glu"
    chunk = tl.arange(0, C)
    index = tl.program_id(0) * (BN * depth) + tl.arange(0, BN)
    row = tl.minimum(index, N - 1).to(tl.int64)
    w1 = _words(w, row, chunk, ROW, ROW)
    w2 = w1
    if GLU:
        w2 = _words(w, row + N, chunk, ROW, ROW)
    wait(PDL)

    # Three dimensions [C, 1, 4], as the words have: so the threads that load x are those that multiply by it.
    at = chunk[:, None, None] * PER + tl.arange(0, 4)[None, None, :]
    total = tl.zeros(at.shape, tl.float32)
    ones = tl.zeros(at.shape, tl.float32)
    squares = tl.zeros(at.shape, tl.float32)
    planes = ()
    for plane in tl.static_range(PER // 4):
        h, g = _activations(x, norm, at + 4 * plane, at < K, NORM)
        if NORM:
            squares += h * h
        total += g
        if FORMAT == "fp8":
            g *= 1.152921504606847e18  # 2^60: codes come times 2^-120, and the rest is in the scale
        elif FORMAT == "int8" or plane % 2 == 0:
            g *= 256.0
        else:
            g *= 16.0
        ones += g
        planes = planes + (g,)
    rms = 1.0
    if NORM:
        rms = 1.0 / tl.sqrt(tl.sum(squares) / K + eps)
    total = tl.sum(total, 2)  # [C, 1]
    excess = tl.sum(ones, 2)
    if FORMAT == "int8":
        excess += 128.0 * total
    elif FORMAT == "int4" and not ZERO:
        excess += 8.0 * total

    best = tl.full([BN], -(1 << 63), tl.int64)
    for step in range(depth):
        row = tl.minimum(index, N - 1).to(tl.int64)
        ahead = tl.minimum(index + BN, N - 1).to(tl.int64)
        s1 = tl.zeros([C, BN], tl.float32)
        z1, s2, z2 = s1, s1, s1
        if FORMAT == "int4":
            s1, z1 = _group_scales(scale, zero, row, chunk, K, GROUP, ZERO)
            if GLU:
                s2, z2 = _group_scales(scale, zero, row + N, chunk, K, GROUP, ZERO)
        limit = tl.where(step + 1 < depth, ROW, 0)
        n1 = _words(w, ahead, chunk, limit, ROW)  # on their way while the others are used
        n2 = n1
        if GLU:
            n2 = _words(w, ahead + N, chunk, limit, ROW)
        c1, b1 = _epilogue(scale, bias, row, FORMAT, BIAS)
        r = 0.0
        if MODE == "add":
            r = tl.load(out + row).to(tl.float32)
        y = _packed_dot(w1, planes, total, excess, s1, z1, one, FORMAT, ZERO) * (rms * c1) + b1
        if GLU:
            c2, b2 = _epilogue(scale, bias, row + N, FORMAT, BIAS)
            up = _packed_dot(w2, planes, total, excess, s2, z2, one, FORMAT, ZERO) * (rms * c2) + b2
            y = y / (1.0 + tl.exp(-y)) * up
        if MODE == "argmax":
            best = tl.maximum(best, tl.where(index < N, _order(y, index), -(1 << 63)))
        else:
            tl.store(out + index, (y + r).to(out.dtype.element_ty), mask=index < N)
        w1 = n1
        w2 = n2
        index += BN
    if MODE == "argmax":
        tl.atomic_max(out, tl.max(best, 0))


@jit
def _tile(w, scale, zero, row, start, K: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
          BN: tl.constexpr, BK: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Weights [BN, BK] from input `start` on, in `dtype`; int8 and fp8 still without their scale."""
    if FORMAT == "float":
        k = start + tl.arange(0, BK)
        return tl.load(w + row[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
    else:
        PLANES: tl.constexpr = 8 if FORMAT == "int4" else 4
        word = start // PLANES + tl.arange(0, BK // PLANES)
        words = tl.load(w + row[:, None] * (K // PLANES) + word[None, :], mask=(word < K // PLANES)[None, :], other=0)
        # Chunk, plane, word of the chunk: this is the order of the inputs that they belong to.
        words = tl.reshape(words, [BN, BK // PLANES // 4, 1, 4])
        plane = tl.arange(0, PLANES)[None, None, :, None]
        if FORMAT == "fp8":
            bits = ((words << (24 - 8 * plane)) >> 4) & -2014314496  # 0x87F00000, as in `fp8`
            v = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        elif FORMAT == "int8":
            v = (((words >> (8 * plane)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0  # 2^23 + 128
        else:
            v = (((words >> (4 * plane)) & 0xF) | 0x4B000000).to(tl.float32, bitcast=True)  # 2^23 + u
            chunk = start // 32 + tl.arange(0, BK // 32)
            at = row[:, None] * (K // GROUP) + (chunk // (GROUP // 32))[None, :]
            keep = (chunk < K // 32)[None, :]
            s = tl.load(scale + at, mask=keep, other=0.0).to(tl.float32)[:, :, None, None]
            if ZERO:
                v = (v - 8388608.0 - tl.load(zero + at, mask=keep, other=0.0).to(tl.float32)[:, :, None, None]) * s
            else:
                v = (v - (8388608.0 + 8.0)) * s
        return tl.reshape(v.to(dtype), [BN, BK])


@jit(do_not_specialize=["M"])
def _tile_kernel(x, w, scale, zero, bias, norm, out, N, eps, M, K: tl.constexpr, FORMAT: tl.constexpr,
                 GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, MODE: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BN outputs of M rows of x [M, K], as W x^T on the tensor cores; MODE as in `_vector_kernel`."""
    index = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(index, N - 1).to(tl.int64)
    m = tl.arange(0, BM)
    GLU: tl.constexpr = MODE == "glu"
    dtype: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros([BN, BM], tl.float32)
    acc2 = tl.zeros([BN, BM], tl.float32)
    squares = tl.zeros([BK, BM], tl.float32)
    wait(PDL)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        h = tl.load(x + m[None, :] * K + k[:, None], mask=(k < K)[:, None] & (m < M)[None, :], other=0.0)
        if NORM:
            f = h.to(tl.float32)
            squares += f * f
            h = (f * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)[:, None]).to(dtype)
        v = _tile(w, scale, zero, row, start, K, FORMAT, GROUP, ZERO, BN, BK, dtype)
        acc = tl.dot(v, h, acc, input_precision="ieee")
        if GLU:
            v = _tile(w, scale, zero, row + N, start, K, FORMAT, GROUP, ZERO, BN, BK, dtype)
            acc2 = tl.dot(v, h, acc2, input_precision="ieee")
    if NORM:
        rms = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)
        acc *= rms[None, :]
        acc2 *= rms[None, :]
    if FORMAT == "int8" or FORMAT == "fp8":
        acc *= tl.load(scale + row)[:, None]
    if BIAS:
        acc += tl.load(bias + row).to(tl.float32)[:, None]
    keep = (index < N)[:, None] & (m < M)[None, :]
    if MODE == "argmax":
        best = tl.max(tl.where(keep, _order(acc, index[:, None]), -(1 << 63)), 0)
        tl.atomic_max(out + m, best, mask=m < M)
    else:
        at = m[None, :] * N + index[:, None]
        if GLU:
            if FORMAT == "int8" or FORMAT == "fp8":
                acc2 *= tl.load(scale + row + N)[:, None]
            if BIAS:
                acc2 += tl.load(bias + row + N).to(tl.float32)[:, None]
            acc = acc / (1.0 + tl.exp(-acc)) * acc2
        elif MODE == "add":
            acc += tl.load(out + at, mask=keep, other=0.0).to(tl.float32)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=keep)


@jit
def _take_best_kernel(best, tokens, input_pos, M, last_pos, BM: tl.constexpr, PDL: tl.constexpr):
    m = tl.arange(0, BM)
    wait(PDL)
    packed = tl.load(best + m, mask=m < M, other=0)
    tl.store(tokens + m, 0xFFFFFFFF - (packed & 0xFFFFFFFF), mask=m < M)
    tl.store(best + m, tl.full([BM], -(1 << 63), tl.int64), mask=m < M)
    pos = tl.load(input_pos + m, mask=m < M, other=0)
    tl.store(input_pos + m, tl.minimum(pos + 1, last_pos), mask=m < M)
