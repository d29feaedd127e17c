"""A matrix of int4 times 65 to 512 rows of activations, on Hopper's tensor cores, without widening it in memory.

What counts here is arithmetic: 256 rows of llama-3.1-8b are 3.8 TFLOP. A warp group takes its left side from registers,
so codes are widened there (`dequantize.widen`), while the products of those before them run, and the right side from
shared memory, where copies put the activations some steps ahead. One pass serves all rows of a program.

As in `packed.py` a thread's 16 bytes of codes are what it needs of a left side if the inputs may come in another order;
here it is the activations that are brought into it, by `arrange`, which normalizes them on the way. Matrices with too
few tiles to fill the chip are cut along K as well.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import elementwise, language, tuning
from kernels.dequantize import widen
from kernels.language import along, jit, tl, triton
from kernels.parts import add_parts
from kernels.weight import Weight

MOST_ROWS = 512  # from there on widening a matrix once costs less than it saves


def suits(x: Tensor, weight: Weight) -> bool:
    """Whether `wide_linear` is the way to multiply by a weight."""
    return weight.format == "int4" and language.hopper(x) and x.element_size() == 2 and len(x) <= MOST_ROWS


def arrange(x: Tensor, *, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """RMSNorm(x [M, K]; norm [K], eps), or x, with the inputs in the order of `_wide_kernel`, [M, K up to a block]."""
    M, K = x.shape
    y = x.new_empty(M, triton.cdiv(K, 128) * 128)
    BLOCK = triton.next_power_of_2(y.shape[1])
    _arrange_kernel[(M,)](x, norm, y, eps, K, y.shape[1], BLOCK, num_warps=min(max(BLOCK // 1024, 1), 16))
    return y


def arrange_twin(x: Tensor, *, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """`arrange` in plain torch."""
    if norm is not None:
        x = elementwise.rms_norm_twin(x, norm, eps)
    x = F.pad(x, (0, -x.shape[1] % 128)).unflatten(1, (-1, 4, 4, 2, 2, 2))
    # Input 32 p + 8 t + i is the p-th code of half-word 8 t + i: [M, block, p, i / 4, i / 2 % 2, t, i % 2]
    return x.permute(0, 1, 2, 4, 5, 3, 6).flatten(1)


def wide_linear(
    x: Tensor,
    weight: Weight,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    plan: tuning.WidePlan | None = None,
) -> Tensor:
    """`linear.linear` of a weight of int4 by the kernels here, without `glu`."""
    (M, _), (N, K) = x.shape, weight.shape
    out = residual if residual is not None else x.new_empty(M, N, dtype=out_dtype)
    plan = plan or tuning.wide_plan(M, N, K)
    x = arrange(x.contiguous(), norm=norm, eps=eps)
    parts = out if plan.splits == 1 else x.new_empty(plan.splits, M, N, dtype=torch.float32)
    grid = triton.cdiv(M, plan.BM), triton.cdiv(N, plan.BN), plan.splits
    _wide_kernel[grid](
        x,
        weight.data.view(torch.int16),
        weight.scale,
        weight.zero,
        weight.bias,
        parts,
        N,
        M,
        K=K,
        GROUP=weight.group,
        ADD=residual is not None,
        BM=plan.BM,
        BN=plan.BN,
        S=plan.num_warps,
        PARTS=plan.splits > 1,
        PTX=language.ptx(x),
        num_warps=plan.num_warps,
        num_stages=plan.depth,
    )
    if plan.splits > 1:
        add_parts(parts, out, bias=weight.bias, add=residual is not None)
    return out


@jit
def _arrange_kernel(x, norm, y, eps, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row: column c of the result is input `_input(c)`."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    k = _input(c)
    live = k < K
    h = tl.load(x + row * K + k, mask=live, other=0.0)
    if norm is not None:
        f = h.to(tl.float32)
        f *= tl.rsqrt(tl.sum(f * f) / K + eps)
        h = tl.load(norm + k, mask=live, other=0.0).to(tl.float32) * f.to(h.dtype).to(tl.float32)
    tl.store(y + row * WIDTH + c, h.to(y.dtype.element_ty), mask=c < WIDTH)


@jit
def _input(c):
    """The input in column c of what was arranged: [block, p, i / 4, i / 2 % 2, t, i % 2] with t of 4 threads."""
    i = c // 16 % 2 * 4 + c // 8 % 2 * 2 + c % 2
    return c // 32 * 32 + c // 2 % 4 * 8 + i


@jit
def _left(v, S: tl.constexpr, REP: tl.constexpr, BN: tl.constexpr):
    """Codes [4, 8, S, 2, REP, 8] as a product's left side [BN, 32]."""
    v = tl.reshape(v, [4, 8, S, 2, REP, 2, 2, 2])
    return tl.reshape(tl.permute(v, [4, 2, 3, 1, 5, 6, 0, 7]), [BN, 32])


@jit
def _group(scale, zero, index, words, p: tl.constexpr, S: tl.constexpr, REP: tl.constexpr, BN: tl.constexpr,
           PTX: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """The p-th nibbles as weights [BN, 32] with the scales and zeros at `index` [BN]."""
    v = _left(widen(words, p, "int4", PTX, dtype), S, REP, BN)
    OFFSET: tl.constexpr = 128.0 if PTX else 0.0  # of codes of 4 bits, as `widen` gives them
    s = tl.load(scale + index).to(dtype)[:, None]
    if zero is None:
        v = (v - (OFFSET + 8.0)).to(dtype)
    else:
        v = ((v - OFFSET).to(dtype) - tl.load(zero + index).to(dtype)[:, None]).to(dtype)
    return v * s


@jit(do_not_specialize=["M"])
def _wide_kernel(x, w, scale, zero, bias, out, N, M, K: tl.constexpr, GROUP: tl.constexpr, ADD: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr,
                PTX: tl.constexpr):  # fmt: skip
    """BN outputs of BM rows of arranged x by a matrix of int4, `w` its half-words; S is the number of warps.

    With PARTS it is the sum over a part of the inputs, to be finished; else bias is added, and with ADD what out holds.
    """
    BK: tl.constexpr = 128
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    ROW: tl.constexpr = BLOCKS * 32  # half-words
    REP: tl.constexpr = BN // (16 * S)
    SCALES: tl.constexpr = K // GROUP  # of a row
    dtype: tl.constexpr = x.dtype.element_ty
    base = tl.program_id(1) * BN
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    begin, end = 0, BLOCKS
    if PARTS:
        each = tl.cdiv(BLOCKS, tl.num_programs(2))
        begin = part * each
        end = tl.minimum(begin + each, BLOCKS)
    index = base + tl.arange(0, BN)
    row = tl.minimum(index, N - 1)  # past the end: the last row again
    r = base + along(4, REP, 6) * (16 * S) + along(2, S, 6) * 16 + along(3, 2, 6) * 8 + along(1, 8, 6)
    half = along(0, 4, 6) * 8 + along(5, 8, 6)
    codes = w + tl.minimum(r, N - 1).to(tl.int64) * ROW + half
    rows = x + tl.minimum(m, M - 1)[:, None] * (BLOCKS * BK) + tl.arange(0, BK)[None, :]
    acc = tl.zeros([BN, BM], tl.float32)
    for block in range(begin, end):
        words = tl.load(codes + block * 32)
        side = tl.load(rows + block * BK)
        at = row * SCALES
        first = block * (128 // GROUP)
        LAST: tl.constexpr = SCALES - 1  # a row may end inside of a block: the activations there are zeros
        a = _group(scale, zero, at + tl.minimum(first, LAST), words, 0, S, REP, BN, PTX, dtype)
        b = _group(scale, zero, at + tl.minimum(first + 32 // GROUP, LAST), words, 1, S, REP, BN, PTX, dtype)
        c = _group(scale, zero, at + tl.minimum(first + 64 // GROUP, LAST), words, 2, S, REP, BN, PTX, dtype)
        d = _group(scale, zero, at + tl.minimum(first + 96 // GROUP, LAST), words, 3, S, REP, BN, PTX, dtype)
        left = tl.join(tl.join(a, c), tl.join(b, d))  # [BN, 32, p / 2, p % 2]
        left = tl.reshape(tl.permute(left, [0, 2, 3, 1]), [BN, BK])
        acc = tl.dot(left, tl.trans(side), acc, input_precision="ieee")
    keep = (index < N)[:, None] & (m < M)[None, :]
    at = m[None, :].to(tl.int64) * N + index[:, None]
    if PARTS:
        tl.store(out + part.to(tl.int64) * M * N + at, acc, mask=keep)
    else:
        if bias is not None:
            acc += tl.load(bias + row).to(tl.float32)[:, None]
        if ADD:
            acc += tl.load(out + at, mask=keep, other=0.0).to(tl.float32)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=keep)
