"""A matrix of int4 times 17 to 512 rows of activations, on Hopper's tensor cores, without widening it in memory.

With more than some 100 rows arithmetic counts: 256 rows of llama-3.1-8b are 3.8 TFLOP. A warp group takes its left side
from registers, so codes are widened there (`dequantize.widen`), and the right side from shared memory, where copies put
the activations some steps ahead. One pass serves all rows of a program. Warps wait for their products, whose registers
are needed for the next codes; others, of the same program or of another on the processor, multiply meanwhile.

As in `packed.py` a thread's 16 bytes of codes are what it needs of a left side if the inputs may come in another order;
here it is the activations that are brought into it, by `arrange`, which normalizes them on the way. Matrices with too
few tiles to fill the chip are cut along K as well.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import elementwise, language, tuning
from kernels.dequantize import widen
from kernels.language import jit, launch_options, tl, triton, wait
from kernels.parts import add_parts
from kernels.weight import Weight

LEAST_ROWS = 17  # of fewer a layer takes less time by `packed.shared_kernel` (README.md)
MOST_ROWS = 512  # from there on widening a matrix once costs less than it saves (as this kernel was at first)


def suits(x: Tensor, weight: Weight) -> bool:
    """Whether `wide_linear` is the way to multiply by a weight."""
    if weight.format != "int4" or x.element_size() != 2 or not language.hopper(x):
        return False
    return LEAST_ROWS <= len(x) <= MOST_ROWS


def arrange(x: Tensor, *, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """RMSNorm(x [M, K]; norm [K], eps), or x, with the inputs in the order of `_wide_kernel`, [M, K up to a block]."""
    M, K = x.shape
    y = x.new_empty(M, triton.cdiv(K, 128) * 128)
    BLOCK = triton.next_power_of_2(y.shape[1])
    if norm is None:  # nothing is summed over a row, which then need not be one program's
        BLOCK = min(BLOCK, 2048)
    options = {"PDL": language.pdl(x), "num_warps": min(max(BLOCK // 1024, 1), 16), **launch_options(x)}
    _arrange_kernel[(M, triton.cdiv(y.shape[1], BLOCK))](x, norm, y, eps, K, y.shape[1], BLOCK, **options)
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
    first = 1 << (plan.BM.bit_length() - 1)  # tiles have a power of two of rows: 160 are one of 128 and one of 32
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
        BM=first,
        REST=plan.BM - first,
        BN=plan.BN,
        S=plan.num_warps,
        PARTS=plan.splits > 1,
        PTX=language.ptx(x),
        CUDA=language.cuda(x),
        PDL=language.pdl(x),
        num_warps=plan.num_warps,
        num_stages=plan.depth,
        **launch_options(x),
    )
    if plan.splits > 1:
        add_parts(parts, out, bias=weight.bias, add=residual is not None)
    return out


@jit
def _arrange_kernel(x, norm, y, eps, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    """BLOCK columns of a row, with a norm all: column c of the result is input `_input(c)`."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = _input(c)
    live = k < K
    wait(PDL)
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
def _steps(scale, at, block, GROUP: tl.constexpr, LAST: tl.constexpr):
    """Scales or zeros of a block's groups in the rows at `at` [BN], a tensor for each."""
    steps = ()
    for group in tl.static_range(128 // GROUP):
        # A row may end inside of a block: the activations there are zeros.
        steps = steps + (tl.load(scale + at + tl.minimum(block * (128 // GROUP) + group, LAST)),)
    return steps


@jit
def _group(words, scales, zeros, p: tl.constexpr, S: tl.constexpr, REP: tl.constexpr, BN: tl.constexpr,
           ZERO: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """The p-th nibbles as weights [BN, 32] with their group's scale and zero."""
    v = _left(widen(words, p, "int4", PTX, dtype), S, REP, BN)
    OFFSET: tl.constexpr = 128.0 if PTX else 0.0  # of codes of 4 bits, as `widen` gives them
    if ZERO:
        v = ((v - OFFSET).to(dtype) - zeros[32 * p // GROUP].to(dtype)[:, None]).to(dtype)
    else:
        v = (v - (OFFSET + 8.0)).to(dtype)
    return v * scales[32 * p // GROUP].to(dtype)[:, None]


@jit
def _settled(acc, CUDA: tl.constexpr):
    """acc, of which the loop makes use, so that Triton waits for the product. Else a turn's last one is left under way
    until the next turn's is issued: by then codes were widened into registers that it may still have read.
    """
    if CUDA:
        return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return acc


@jit(do_not_specialize=["M"])
def _wide_kernel(x, w, scale, zero, bias, out, N, M, K: tl.constexpr, GROUP: tl.constexpr, ADD: tl.constexpr,
                BM: tl.constexpr, REST: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr,
                PTX: tl.constexpr, CUDA: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BN outputs of BM + REST rows of arranged x by a matrix of int4, `w` its half-words; S is the number of warps.

    With PARTS it is the sum over a part of the inputs, to be finished; else bias is added, and with ADD what out holds.
    """
    BK: tl.constexpr = 128
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    ROW: tl.constexpr = BLOCKS * 32  # half-words
    REP: tl.constexpr = BN // (16 * S)
    SCALES: tl.constexpr = K // GROUP  # of a row
    LAST: tl.constexpr = SCALES - 1
    ZERO: tl.constexpr = zero is not None
    dtype: tl.constexpr = x.dtype.element_ty
    base = tl.program_id(1) * BN
    m = tl.program_id(0) * (BM + REST) + tl.arange(0, BM)
    part = tl.program_id(2)
    begin, end = 0, BLOCKS
    if PARTS:
        each = tl.cdiv(BLOCKS, tl.num_programs(2))
        begin = part * each
        end = tl.minimum(begin + each, BLOCKS)
    i = tl.arange(0, BN)
    index = base + i
    row = tl.minimum(index, N - 1)  # past the end: the last row again
    # Rows in an order that gives a thread, by the layout that Triton takes for copies, what it needs of the left side.
    tile = base + i // (16 * S) * (16 * S) + i // 8 % S * 16 + i // (8 * S) % 2 * 8 + i % 8
    codes = w + tl.minimum(tile, N - 1)[:, None].to(tl.int64) * ROW + tl.arange(0, 32)[None, :]
    k = tl.arange(0, 64)[None, :]
    # Rows past the end are others again: all the same one, they would make one place of the L2 cache wait for all.
    rows = x + (m % M)[:, None] * (BLOCKS * BK) + k
    acc = tl.zeros([BN, BM], tl.float32)
    if REST:
        m2 = tl.program_id(0) * (BM + REST) + BM + tl.arange(0, REST)
        rows2 = x + (m2 % M)[:, None] * (BLOCKS * BK) + k
        acc2 = tl.zeros([BN, REST], tl.float32)
    at = row * SCALES
    # Triton does not copy so little ahead: scales are asked for a block before they are needed.
    scales, zeros = _steps(scale, at, begin, GROUP, LAST), ()
    if ZERO:
        zeros = _steps(zero, at, begin, GROUP, LAST)
    wait(PDL)
    for block in range(begin, end):
        words = tl.reshape(tl.load(codes + block * 32), [REP, 2, S, 8, 4, 8])
        words = tl.permute(words, [4, 3, 2, 1, 0, 5])  # [t 4, r 8, S, 2, REP, 8 half-words]
        next_scales, next_zeros = _steps(scale, at, block + 1, GROUP, LAST), ()
        if ZERO:
            next_zeros = _steps(zero, at, block + 1, GROUP, LAST)
        for half in tl.static_range(2):
            a = _group(words, scales, zeros, 2 * half, S, REP, BN, ZERO, GROUP, PTX, dtype)
            b = _group(words, scales, zeros, 2 * half + 1, S, REP, BN, ZERO, GROUP, PTX, dtype)
            left = tl.reshape(tl.permute(tl.join(a, b), [0, 2, 1]), [BN, 64])
            side = tl.load(rows + block * BK + half * 64)
            acc = _settled(tl.dot(left, tl.trans(side), acc, input_precision="ieee"), CUDA)
            if REST:
                side = tl.load(rows2 + block * BK + half * 64)
                acc2 = _settled(tl.dot(left, tl.trans(side), acc2, input_precision="ieee"), CUDA)
        scales, zeros = next_scales, next_zeros
    _finish(acc, bias, out, index, row, m, N, M, part, ADD, PARTS)
    if REST:
        _finish(acc2, bias, out, index, row, m2, N, M, part, ADD, PARTS)


@jit
def _finish(acc, bias, out, index, row, m, N, M, part, ADD: tl.constexpr, PARTS: tl.constexpr):
    """Store acc [BN, BM] at outputs `index` of rows m."""
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
