"""A matrix of 8 bits times many rows of activations, by the tensor cores' own products of 8 bits, on Hopper.

These run at twice the rate of bf16's and take a matrix's codes as they lie in memory. A row of activations goes in as
two digits of 8 bits, x = scale * (256 * high + low) of int8 or scale * (high + low) of e4m3. So a product costs what
one of bf16 costs, and nothing is rounded but x, to 2^-16 of its row's largest number (e4m3: to the 8 significant bits
that bf16 has, down to 2^-16 of it). Inputs that are to be int8 themselves (W8A8) are one digit.

`split` makes the digits, normalizes on the way, and puts them in the order of the packed codes. For int8 both digits
are columns of one product in `_digits_kernel`. For fp8 they are rows of one of cuBLAS: tensor cores add products of
e4m3 up in 14 bits, and it moves these sums to fp32 in time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import elementwise, language, tuning
from kernels.language import jit, launch_options, tl, triton, wait
from kernels.parts import add_parts
from kernels.weight import Weight, most_rows

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

LEAST_ROWS = 17  # of fewer a step takes less time by `packed.shared_kernel` (README.md)
MOST_ROWS = 1024  # from there on widening a matrix once costs less
TALLEST = 256  # rows of activations in a tile, at most
BK = 128  # inputs in a block: as many bytes of a row as shared memory is swizzled in


class Digits(NamedTuple):
    """Activations x [M, K] = scale * (256 * high + low), or of e4m3 scale * (high + low)."""

    codes: Tensor  # [M and more, 2, K] (high, low), or [.., 1, K], int8 or e4m3, in the order of a packed row
    scale: Tensor  # fp32 [M and more]; the last is 1, at an address that cuBLAS takes a scale from


def suits(x: Tensor, weight: Weight) -> bool:
    """Whether `digits_linear` is the way to multiply by a weight."""
    least = most_rows("int8") + 1 if weight.int8_inputs else LEAST_ROWS  # inputs of so few rows are not to be rounded
    if not language.hopper(x) or x.element_size() != 2 or len(x) < least:
        return False
    if weight.format == "fp8":
        return len(x) <= MOST_ROWS and weight.shape[0] % 16 == 0  # as cuBLAS has it
    return weight.format == "int8" and (weight.int8_inputs or len(x) <= MOST_ROWS)


def split(x: Tensor, weight: Weight, *, norm: Tensor | None = None, eps: float = 0.0) -> Digits:
    """RMSNorm(x [M, K]; norm [K], eps), or x, in digits for a product with `weight`."""
    M, K = x.shape
    digits = _empty(x, weight)
    D, BLOCK = digits.codes.shape[1], triton.next_power_of_2(K)
    _split_kernel[(M,)](
        x,
        norm,
        *digits,
        len(digits.codes),
        eps,
        K=K,
        D=D,
        FLOAT=weight.format == "fp8",
        BLOCK=BLOCK,
        PDL=language.pdl(x),
        num_warps=min(max(BLOCK // 512, 1), 16),
        **launch_options(x),
    )
    return digits


def _empty(x: Tensor, weight: Weight) -> Digits:
    M, K = x.shape
    dtype = torch.float8_e4m3fn if weight.format == "fp8" else torch.int8
    rows = -(-M // TALLEST) * TALLEST  # whole tiles: where copies passed the end, 80 rows took longer than 128
    codes = torch.empty(rows, 1 if weight.int8_inputs else 2, K, dtype=dtype, device=x.device)
    return Digits(codes, torch.empty(rows + 1, dtype=torch.float32, device=x.device))


def split_twin(x: Tensor, weight: Weight, *, norm: Tensor | None = None, eps: float = 0.0) -> Digits:
    """`split` in plain torch."""
    x = (x if norm is None else elementwise.rms_norm_twin(x, norm, eps)).float()
    most = x.abs().amax(1, keepdim=True).clamp(min=2.0**-100)
    digits = _empty(x, weight)
    if weight.format == "fp8":
        scale = torch.exp2(most.log2().floor() - 7)
        high = (x / scale).to(torch.float8_e4m3fn)
        both = [high, (x / scale - high.float()).to(torch.float8_e4m3fn)]
    else:
        largest = 127 if weight.int8_inputs else 127 * 256
        scale = most / largest
        steps = (x * (largest / most)).round().int()
        high = steps + 128 >> 8
        both = [steps] if weight.int8_inputs else [high, steps - 256 * high]
    for i, digit in enumerate(both):
        # Byte p of half-word j is k = 8 p + j of 16.
        digits.codes[: len(x), i] = digit.unflatten(1, (-1, 2, 8)).transpose(2, 3).flatten(1).to(digits.codes.dtype)
    digits.scale[: len(x)], digits.scale[-1] = scale[:, 0], 1.0
    return digits


def digits_linear(
    x: Tensor,
    weight: Weight,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    glu: bool = False,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    plan: tuning.DigitsPlan | None = None,
) -> Tensor:
    """`linear.linear` of a weight of 8 bits by the kernels here."""
    M, N = len(x), weight.shape[0]
    digits = split(x.contiguous(), weight, norm=norm, eps=eps)
    if weight.format == "fp8":
        out = residual if residual is not None else x.new_empty(M, N // 2 if glu else N, dtype=out_dtype)
        parts = _scaled_mm(digits, weight, M).view(-1, 2, N)[:M].transpose(0, 1)
        scales = digits.scale, weight.scale
        add_parts(parts, out, bias=weight.bias, scales=scales, add=residual is not None, glu=glu)
        return out
    out = residual if residual is not None else x.new_empty(M, N, dtype=None if glu else out_dtype)
    _multiply(digits, weight, out, residual is not None, plan)
    return elementwise.silu_mul(out).to(out_dtype or x.dtype) if glu else out


def _scaled_mm(digits: Digits, weight: Weight, M: int) -> Tensor:
    """M rows of two digits, and up to seven more, by a matrix of e4m3 without its scale, bf16 [2 M and more, N]."""
    one, matrix = digits.scale[-1:], weight.data.view(torch.float8_e4m3fn)
    rows = digits.codes[: triton.cdiv(M, 8) * 8].flatten(0, 1)  # in sixteens
    return torch._scaled_mm(rows, matrix.t(), one, one, out_dtype=torch.bfloat16)


def _multiply(digits: Digits, weight: Weight, out: Tensor, add: bool, plan: tuning.DigitsPlan | None) -> None:
    """Digits by a matrix of int8, with bias, into out [M, N], or with `add` added to it."""
    (M, N), (_, D, K) = out.shape, digits.codes.shape
    plan = plan or tuning.digits_plan(M, N, K, D)
    tiles, columns = triton.cdiv(M, plan.BM), triton.cdiv(N, plan.BN)
    whole = min(plan.whole, columns)
    rest = max(N - whole * plan.BN, 0)  # outputs that are left to be added up from parts
    parts = out.new_empty(plan.splits, M, rest, dtype=torch.float32) if rest else digits.scale  # which is not written
    _digits_kernel[(tiles * (whole + (columns - whole) * plan.splits),)](
        TensorDescriptor.from_tensor(weight.data.view(torch.int8), [plan.BN, BK]),
        TensorDescriptor.from_tensor(digits.codes.flatten(0, 1), [D * plan.BM, BK]),
        digits.scale,
        weight.scale,
        weight.bias,
        out,
        parts,
        N,
        M,
        K,
        whole,
        plan.splits,
        D=D,
        ADD=add,
        BM=plan.BM,
        BN=plan.BN,
        BK=BK,
        PDL=language.pdl(out),
        num_warps=plan.num_warps,
        num_stages=plan.depth,
        **launch_options(out),
    )
    if rest:
        add_parts(parts, out, bias=weight.bias, add=add, first=N - rest)


@jit
def _split_kernel(x, norm, codes, scale, last, eps, K: tl.constexpr, D: tl.constexpr, FLOAT: tl.constexpr,
                  BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One row's D digits, of e4m3 if FLOAT."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    live = k < K
    g = 1.0
    if norm is not None:
        g = tl.load(norm + k, mask=live, other=0.0).to(tl.float32)
    wait(PDL)
    h = tl.load(x + row * K + k, mask=live, other=0.0).to(tl.float32)
    if norm is not None:
        h = h * tl.rsqrt(tl.sum(h * h) / K + eps) * g
    # Compared as integers, by which NaN is the largest; 2^-100 at least, so that no quotient overflows.
    most = tl.maximum(tl.max(h.to(tl.int32, bitcast=True) & 0x7FFFFFFF), 0x0D800000)
    at = codes + row * D * K + k
    if FLOAT:
        s = (most & 0x7F800000).to(tl.float32, bitcast=True) * 0.0078125  # a power of two: a division is exact
        h *= 1.0 / s
        high = _e4m3(h)
        tl.store(at, _arrange(high, BLOCK).to(codes.dtype.element_ty), mask=live)
        tl.store(at + K, _arrange(_e4m3(h - high), BLOCK).to(codes.dtype.element_ty), mask=live)
    else:
        LARGEST: tl.constexpr = 127.0 if D == 1 else 32512.0
        most = most.to(tl.float32, bitcast=True)
        s = most / LARGEST
        steps = ((h * (LARGEST / most) + 12582912.0) - 12582912.0).to(tl.int32)  # 1.5 * 2^23: rounds as torch does
        if D == 1:
            tl.store(at, _arrange(steps, BLOCK).to(tl.int8), mask=live)
        else:
            high = (steps + 128) >> 8
            tl.store(at, _arrange(high, BLOCK).to(tl.int8), mask=live)
            tl.store(at + K, _arrange(steps - (high << 8), BLOCK).to(tl.int8), mask=live)
    tl.store(scale + row, s)
    if row == 0:
        tl.store(scale + last, 1.0)


@jit
def _e4m3(h):
    """h rounded to four significant bits, which e4m3 has."""
    return ((h.to(tl.int32, bitcast=True) + 0x80000) & -0x100000).to(tl.float32, bitcast=True)


@jit
def _arrange(v, BLOCK: tl.constexpr):
    """The order of a packed row: byte p of half-word j is k = 8 p + j of 16."""
    return tl.reshape(tl.permute(tl.reshape(v, [BLOCK // 16, 2, 8]), [0, 2, 1]), [BLOCK])


@jit(do_not_specialize=["M", "whole", "splits"])
def _digits_kernel(w, x, steps, scale, bias, out, parts, N, M, K, whole, splits, D: tl.constexpr, ADD: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BN outputs of BM rows of D digits each, by a matrix of int8; `w` and `x` describe both tensors.

    Columns of tiles from the `whole`th on are cut along K, and a program adds up one of `splits` parts.
    """
    tiles = tl.cdiv(M, BM)
    column = tl.program_id(0) // tiles
    begin, end = 0, tl.cdiv(K, BK)
    part = 0
    cut = column >= whole
    if cut:
        each = tl.cdiv(end, splits)
        part = (column - whole) % splits
        column = whole + (column - whole) // splits
        begin = part * each
        end = tl.minimum(begin + each, end)
    first = tl.program_id(0) % tiles * BM
    n = column * BN + tl.arange(0, BN)
    m = first + tl.arange(0, BM)
    row = tl.minimum(n, N - 1)
    wait(PDL)
    acc = tl.zeros([BN, D * BM], tl.int32)
    for block in range(begin, end):
        left = w.load([column * BN, block * BK])
        right = x.load([D * first, block * BK])
        acc = tl.dot(left, tl.trans(right), acc, out_dtype=tl.int32)
    if D == 1:
        y = acc.to(tl.float32)
    else:
        high, low = tl.split(tl.reshape(acc, [BN, BM, 2]))
        y = high.to(tl.float32) * 256.0 + low.to(tl.float32)
    y *= tl.load(scale + row)[:, None] * tl.load(steps + tl.minimum(m, M - 1))[None, :]
    keep = (n < N)[:, None] & (m < M)[None, :]
    if cut:
        rest = N - whole * BN
        at = (part * M + m[None, :]).to(tl.int64) * rest + (n - whole * BN)[:, None]
        tl.store(parts + at, y, mask=keep)
    else:
        at = m[None, :].to(tl.int64) * N + n[:, None]
        if bias is not None:
            y += tl.load(bias + row).to(tl.float32)[:, None]
        if ADD:
            y += tl.load(out + at, mask=keep, other=0.0).to(tl.float32)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=keep)
