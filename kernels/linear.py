"""Matrix times a few activation rows, with what stands around it in a decoder folded in.

A decode step reads every weight once and does little else, so its matrices must stream at memory speed and nothing may
run between them. One function, `linear`, has the RMS norm before the matrix, the SiLU product, bias and residual after
it, and float, int8, fp8 and int4 weights; `argmax` ends a greedy step without writing logits. What runs depends on the
number of rows M:

- M = 1, float weights: `_vector_kernel`. A program holds a few whole rows of the matrix against x, in fp32 on the
  CUDA cores.
- M = 2 to 256, float weights of 16 bits, on Hopper: `rows.rows_linear`, where it is faster.
- M = 2 to `most_rows`, other float weights: `_tile_kernel`. The rows of x, padded to 16, are one side of a tensor-core
  product, so that 16 rows cost what one costs.
- M = 1 to 7, packed weights: `packed.packed_kernel`.
- M = 17 to 1024, int8 and fp8, on Hopper: `digits.digits_linear`; any number over `most_rows` where the inputs are to
  be int8 too.
- M = 17 to 512, int4, on Hopper: `wide.wide_linear`.
- M = 8 to `most_rows`, other packed weights, and a head that ends in `argmax`: `packed.shared_kernel`.
- more: cuBLAS over dequantized weights, or torch's product of integers where the inputs are to be int8 too, and
  `elementwise` for the rest.

For one row, and for tiles but in fp16, the norm costs no launch: a program reads all of x anyway and sums its squares
on the way (y = r * W (g * x) with r = rsqrt(mean x^2 + eps)).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import digits, elementwise, language, rows, tuning, wide
from kernels.dequantize import dequantize, dequantize_twin
from kernels.int8 import int8_linear
from kernels.language import held, jit, launch_options, order, silu, store, tl, triton, wait
from kernels.packed import packed_kernel, shared_kernel
from kernels.rows import Stream
from kernels.weight import Weight, block_of, most_rows


def linear(
    x: Tensor | Stream,
    weight: Weight,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    glu: bool = False,
    residual: Tensor | Stream | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y [M, N] = RMSNorm(x [M, K]; norm [K], eps) W^T + bias, then SiLU(gate) * up where `glu`, or + `residual`.

    With `glu` the matrix is gate over up and y is [M, N/2]. Without `norm`, x is taken as it is. `residual` [M, N]
    is overwritten by the result and returned; it does not go with `glu`. Where it is a stream, the product may be kept
    in it as parts yet to be added: what is returned is not complete before `Stream.whole()`.
    """
    assert not (glu and residual is not None)
    if isinstance(x, Stream):
        x, norm = x.normed(norm, eps)
    plan = rows.plan_of(x, weight, glu=glu, add=residual is not None)
    if plan is not None:
        x = x if norm is None else elementwise.rms_norm(x, norm, eps)
        return rows.rows_linear(x, weight, plan, glu=glu, residual=residual, out_dtype=out_dtype)
    stream, residual = residual, residual.x if isinstance(residual, Stream) else residual
    options = {"norm": norm, "eps": eps, "glu": glu, "residual": residual, "out_dtype": out_dtype}
    if not language.on_gpu(x):
        return linear_twin(x, weight, **options)
    if digits.suits(x, weight):
        return digits.digits_linear(x, weight, **options)
    if wide.suits(x, weight):
        y = wide.wide_linear(x, weight, norm=norm, eps=eps, residual=residual, out_dtype=None if glu else out_dtype)
        return _finish(elementwise.silu_mul(y), None, out_dtype) if glu else y
    if len(x) <= most_rows(weight.format):
        return linear_kernel(x, weight, **options | {"residual": stream})
    if norm is not None:
        x = elementwise.rms_norm(x, norm, eps)
    if weight.int8_inputs:
        y = int8_linear(x, weight)
        return _finish(elementwise.silu_mul(y) if glu else y, residual, out_dtype)
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
    residual: Tensor | Stream | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` by the kernels for few rows."""
    (M, K), N = x.shape, weight.shape[0] // (2 if glu else 1)
    mode = "glu" if glu else "add" if residual is not None else "store"
    plan = tuning.plan(weight.format, M, N, K, mode, x)
    if plan.splits > 1:
        parts = x.new_empty(plan.splits, M, N, dtype=torch.float32)
        launch(x, weight._replace(bias=None), parts, norm=norm, eps=eps, mode="parts", plan=plan)
        return rows.leave(parts, weight.bias, residual)
    out = residual.x if isinstance(residual, Stream) else residual
    if out is None:
        out = x.new_empty(M, N, dtype=out_dtype)
    launch(x, weight, out, norm=norm, eps=eps, mode=mode, plan=plan)
    return out


def argmax(x: Tensor, weight: Weight, best: Tensor, *, norm: Tensor, eps: float) -> None:
    """Fold the largest of `linear(x, weight, norm=norm, eps=eps)` and its index into `best` int64 [M].

    `best` holds, for each row, the order-preserving bits of the logit above 2^32 - 1 - index, so its maximum is the
    largest logit at the smallest index; `take_best` reads and resets it.
    """
    if language.on_gpu(x) and len(x) <= most_rows(weight.format):
        return argmax_kernel(x, weight, best, norm=norm, eps=eps)
    _fold(linear(x, weight, norm=norm, eps=eps), best)


def argmax_twin(x: Tensor, weight: Weight, best: Tensor, *, norm: Tensor, eps: float) -> None:
    """`argmax` in plain torch."""
    _fold(linear_twin(x, weight, norm=norm, eps=eps), best)


def _fold(logits: Tensor, best: Tensor) -> None:
    """The largest of logits [M, V] into `best` [M], in plain torch."""
    top = logits.float().max(-1)
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
    """Run the kernel for few rows; `mode` is what becomes of the product: "store", "add" to out, "glu" or "argmax", or
    "parts" where the plan has some, which out [parts, M, N] takes.
    """
    assert x.is_contiguous() and weight.data.is_contiguous()
    assert mode != "parts" or plan.across, "only shared_kernel leaves parts"
    M, K = x.shape
    N = weight.shape[0] // (2 if mode == "glu" else 1)
    # Not in the kernel: g * x before its division by the rms can be too large for fp16, and the squares of many rows
    # would take the programs of a packed matrix longer than a launch.
    packed, half = weight.format != "float", x.dtype == torch.float16
    if norm is not None and ((packed and half) or (M > 1 and (packed or half))):
        x, norm = elementwise.rms_norm(x, norm, eps), None
    plan = plan or tuning.plan(weight.format, M, N, K, mode, x)
    BK = min(plan.BK, triton.next_power_of_2(K))
    BM = triton.next_power_of_2(M)
    options = {
        "bias": x if weight.bias is None else weight.bias,
        "out": out,
        "N": N,
        "K": K,
        "BIAS": weight.bias is not None,
        "MODE": mode,
        "BN": plan.BN,
        "PDL": language.pdl(x),
        "num_warps": plan.num_warps,
        **launch_options(x),
    }
    norms = {"norm": x if norm is None else norm, "NORM": norm is not None, "eps": eps}
    grid = (triton.cdiv(N, plan.BN),)
    if packed:
        options |= {
            "scale": weight.scale,
            "zero": weight.scale if weight.zero is None else weight.zero,
            "M": M,
            "FORMAT": weight.format,
            "GROUP": weight.group,
            "ZERO": weight.zero is not None,
            "S": plan.num_warps,
            "PTX": language.ptx(x),
        }
        words = weight.data.view(torch.int16)
        if plan.across:
            U = plan.BK // (plan.across * block_of(weight.format))
            grid = (*grid, plan.splits if mode == "parts" else 1)
            shared_kernel[grid](x, words, BM=max(BM, 8), SK=plan.across, U=U, num_stages=plan.depth, **options)
        else:  # loads go to registers, a step ahead
            packed_kernel[grid](x, words, BM=BM, AHEAD=plan.depth, num_stages=1, **norms, **options)
    elif M == 1:
        _vector_kernel[grid](x, weight.data, BK=BK, **norms, **options)
    else:
        BK = max(BK, 16)  # a tensor core's least
        _tile_kernel[grid](x, weight.data, M=M, BM=max(BM, 16), BK=BK, num_stages=plan.depth, **norms, **options)


@jit
def _activations(x, norm, offsets, keep, NORM: tl.constexpr):
    """x and g * x at `offsets`, fp32."""
    h = tl.load(x + offsets, mask=keep, other=0.0).to(tl.float32)
    g = h
    if NORM:
        g = h * tl.load(norm + offsets, mask=keep, other=0.0).to(tl.float32)
    return h, g


@jit
def _vector_kernel(x, w, bias, norm, out, N, eps, K: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
                   MODE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BN outputs of one row of x [1, K] by a float matrix; MODE: "store", "add" to what out holds, "glu", "argmax"."""
    index = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(index, N - 1).to(tl.int64)  # past the end: read the last row again, store nothing
    GLU: tl.constexpr = MODE == "glu"
    k = tl.arange(0, BK)
    w1 = tl.load(w + row[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
    w2 = w1
    if GLU:
        w2 = tl.load(w + (row + N)[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
    b1 = 0.0
    b2 = 0.0
    if BIAS:
        b1 = tl.load(bias + row).to(tl.float32)
        if GLU:
            b2 = tl.load(bias + row + N).to(tl.float32)
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
    y = tl.sum(a1, 1) * rms + b1
    if GLU:
        y = silu(y) * (tl.sum(a2, 1) * rms + b2)
    if MODE == "argmax":
        tl.atomic_max(out, tl.max(tl.where(index < N, order(y, index), -(1 << 63)), 0))
    else:
        tl.store(out + index, (y + r).to(out.dtype.element_ty), mask=index < N)


@jit
def _tile(w, row, k, K: tl.constexpr):
    return tl.load(w + row[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)


@jit(do_not_specialize=["M"])
def _tile_kernel(x, w, bias, norm, out, N, eps, M, K: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
                 MODE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
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
    residual = 0.0
    if MODE == "add":
        residual = held(out, index, N, M, BM)  # asked for as soon as it may be
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        h = tl.load(x + m[None, :] * K + k[:, None], mask=(k < K)[:, None] & (m < M)[None, :], other=0.0)
        if NORM:
            f = h.to(tl.float32)
            squares += f * f
            h = (f * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)[:, None]).to(dtype)
        acc = tl.dot(_tile(w, row, k, K), h, acc, input_precision="ieee")
        if GLU:
            acc2 = tl.dot(_tile(w, row + N, k, K), h, acc2, input_precision="ieee")
    if NORM:
        rms = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)
        acc *= rms[None, :]
        acc2 *= rms[None, :]
    if BIAS:
        acc += tl.load(bias + row).to(tl.float32)[:, None]
    if GLU:
        if BIAS:
            acc2 += tl.load(bias + row + N).to(tl.float32)[:, None]
        acc = silu(acc) * acc2
    store(out, acc + residual, index, N, M, MODE, BM)


@jit
def _take_best_kernel(best, tokens, input_pos, M, last_pos, BM: tl.constexpr, PDL: tl.constexpr):
    m = tl.arange(0, BM)
    wait(PDL)
    packed = tl.load(best + m, mask=m < M, other=0)
    tl.store(tokens + m, 0xFFFFFFFF - (packed & 0xFFFFFFFF), mask=m < M)
    tl.store(best + m, tl.full([BM], -(1 << 63), tl.int64), mask=m < M)
    pos = tl.load(input_pos + m, mask=m < M, other=0)
    tl.store(input_pos + m, tl.minimum(pos + 1, last_pos), mask=m < M)
