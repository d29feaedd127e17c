"""A float matrix times 2 to 256 rows of activations, on Hopper's tensor cores, with what stands around it folded in.

Up to some 100 rows a step still is the reading of its weights, but cuBLAS pays for every launch: nothing runs while one
kernel ends and the next begins, and norm, SiLU product and the sum of a product's parts are launches of their own. Here
launches let the next one in at once, a gate and its value are neighbours in a program's tile, and a matrix that adds to
the residual stream leaves its sum in parts, for what has to read whole rows anyway to add them up: the next norm.

This file knows no models. `tuning.rows_plan` says for which matrices and rows it is faster than cuBLAS.
"""

import torch
from torch import Tensor

from kernels import language, tuning
from kernels.language import jit, launch_options, silu, tl, triton, wait
from kernels.parts import add_parts
from kernels.weight import Weight


class Stream:
    """The residual stream x [M, C], to which parts of a product may have yet to be added: the next norm does it."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.parts, self.bias = x, None, None

    def add(self, parts: Tensor, bias: Tensor | None) -> None:
        """Leave parts [splits, M, C] and bias [C] to be added."""
        assert self.parts is None, "the parts before have not been added yet"
        self.parts, self.bias = parts, bias

    def whole(self) -> Tensor:
        """x with nothing left to be added."""
        if self.parts is not None:
            add_parts(self.parts, self.x, bias=self.bias, add=True)
            self.parts = self.bias = None
        return self.x

    def normed(self, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
        """What the next matrix takes: RMSNorm(x; norm) if there were parts to add, else x and the norm to apply."""
        if self.parts is None or norm is None:
            return self.whole(), norm
        y = add_and_normalize(self.parts, self.bias, self.x, norm, eps)
        self.parts = self.bias = None
        return y, None


def plan_of(x: Tensor, weight: Weight, *, glu: bool, add: bool) -> tuning.RowsPlan | None:
    """How `rows_linear` multiplies by a matrix; None if another way is to be taken."""
    if weight.format != "float" or not language.hopper(x) or x.element_size() != 2:
        return None
    return tuning.rows_plan(len(x), *weight.shape, glu=glu, add=add)


def rows_linear(
    x: Tensor,
    weight: Weight,
    plan: tuning.RowsPlan,
    *,
    glu: bool = False,
    residual: Tensor | Stream | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear.linear` without `norm`. Where `residual` is a stream the parts are left in it."""
    if residual is None and plan.splits == 1:
        return product(x, weight, plan, glu=glu, dtype=out_dtype)
    assert not glu, "parts are of what gate and up are before their product"
    parts = product(x, weight, plan, parts=True)
    if residual is not None:
        return leave(parts, weight.bias, residual)
    out = x.new_empty(parts.shape[1:], dtype=out_dtype)
    add_parts(parts, out, bias=weight.bias)
    return out


def leave(parts: Tensor, bias: Tensor | None, residual: Tensor | Stream) -> Tensor:
    """Add parts [splits, M, N] and bias to `residual` [M, N], or leave it to a stream to do so later."""
    if isinstance(residual, Stream):
        residual.add(parts, bias)
        return residual.x
    add_parts(parts, residual, bias=bias, add=True)
    return residual


def product(
    x: Tensor,
    weight: Weight,
    plan: tuning.RowsPlan,
    *,
    glu: bool = False,
    parts: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [M, K] W^T + bias [M, N], or with `glu` SiLU(gate) * up [M, N/2]; with `parts` fp32 [splits, M, N], no bias."""
    (M, K), halves = x.shape, 2 if glu else 1
    N = weight.shape[0] // halves
    assert x.is_contiguous() and weight.data.is_contiguous() and K % plan.BK == 0
    out = x.new_empty(plan.splits, M, N, dtype=torch.float32) if parts else x.new_empty(M, N, dtype=dtype)
    grid = triton.cdiv(M, plan.BM), triton.cdiv(N * halves, plan.BN), plan.splits
    _product_kernel[grid](
        x,
        weight.data,
        None if parts else weight.bias,
        out,
        N,
        K,
        M,
        GLU=glu,
        PARTS=parts,
        BM=plan.BM,
        BN=plan.BN,
        BK=plan.BK,
        AHEAD=plan.ahead,
        PDL=language.pdl(x),
        num_warps=plan.num_warps,
        num_stages=plan.depth,
        **launch_options(x),
    )
    return out


def add_and_normalize(parts: Tensor, bias: Tensor | None, x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Add parts [splits, M, N] and bias to x, as `add_parts`, and return its RMSNorm."""
    splits, M, N = parts.shape
    y, BLOCK = torch.empty_like(x), triton.next_power_of_2(N)
    _normalize_kernel[(M,)](
        parts,
        bias,
        norm,
        x,
        y,
        N,
        M,
        eps,
        SPLITS=splits,
        BLOCK=BLOCK,
        PDL=language.pdl(x),
        num_warps=16 if BLOCK >= 4096 else max(BLOCK // 512, 1),
        **launch_options(x),
    )
    return y


@jit(do_not_specialize=["M"])
def _product_kernel(x, w, bias, out, N, K, M, GLU: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr,
                    BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BM rows of x [M, K] by BN rows of w, with GLU those of gate and up in turns; N is the outputs' number.

    A product's left side has 64 rows or more. Where x has fewer, the weights are that side, so that x takes no more of
    shared memory than it needs: it has room for more weights under way.
    """
    HALVES: tl.constexpr = 2 if GLU else 1
    i = tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.minimum(i // HALVES, N - 1).to(tl.int64)  # past the end: the last row again, stored nowhere
    if GLU:
        row += (i % 2) * N.to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    part = tl.program_id(2)
    each = tl.cdiv(tl.cdiv(K, BK), tl.num_programs(2)) * BK
    begin = part * each
    end = tl.minimum(begin + each, K)
    if PDL and AHEAD > 0:
        _ask_for(w + row * K + begin, tl.maximum(tl.minimum(AHEAD, end - begin), 0))
    rows = x + m[:, None].to(tl.int64) * K + k[None, :]
    weights = w + row[:, None] * K + k[None, :]
    live = (m < M)[:, None]
    FEW: tl.constexpr = BM < 64
    acc = tl.zeros([BN, BM] if FEW else [BM, BN], tl.float32)
    wait(PDL)
    for start in range(begin, end, BK):
        a = tl.load(rows + start, mask=live, other=0.0)
        b = tl.load(weights + start)
        if FEW:
            acc = tl.dot(b, tl.trans(a), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if FEW:
        acc = tl.trans(acc)
    if bias is not None:
        acc += tl.load(bias + row).to(tl.float32)[None, :]
    n = tl.program_id(1) * (BN // HALVES) + tl.arange(0, BN // HALVES)
    if GLU:
        gate, up = tl.split(tl.reshape(acc, [BM, BN // 2, 2]))
        acc = silu(gate) * up
    at = m[:, None].to(tl.int64) * N + n[None, :]
    if PARTS:
        at += part.to(tl.int64) * M * N
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=live & (n < N)[None, :])


@jit
def _ask_for(rows, inputs):
    """Ask for that many inputs, of 16 bits and a multiple of 32, at `rows` into the L2 cache."""
    quarter = inputs // 4
    at = rows[:, None] + (tl.arange(0, 4) * quarter)[None, :]
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [at.to(tl.int64), quarter * 2],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@jit(do_not_specialize=["M"])
def _normalize_kernel(parts, bias, norm, x, y, N, M, eps, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    """Adds parts, bias and what x holds of one row, keeps the sum in x, and its RMSNorm in y."""
    n = tl.arange(0, BLOCK)
    live = n < N
    at = tl.program_id(0).to(tl.int64) * N + n
    total = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        total += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    g = tl.load(norm + n, mask=live, other=0.0).to(tl.float32)
    wait(PDL)
    total += tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    for part in tl.static_range(SPLITS):
        total += tl.load(parts + at + part * (M.to(tl.int64) * N), mask=live, other=0.0)
    dtype: tl.constexpr = x.dtype.element_ty
    total = total.to(dtype)
    tl.store(x + at, total, mask=live)
    h = total.to(tl.float32)
    h *= tl.rsqrt(tl.sum(h * h) / N + eps)
    tl.store(y + at, g * h.to(dtype).to(tl.float32), mask=live)
