"""Products that come in parts, added up: sums over pieces of the inputs, or over the digits of activations."""

from torch import Tensor

from kernels import language
from kernels.language import jit, launch_options, silu, tl, triton, wait


def add_parts(
    parts: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None,
    scales: tuple[Tensor, Tensor] | None = None,
    add: bool = False,
    glu: bool = False,
    first: int = 0,
) -> None:
    """The columns of out [M, N] from `first` on: parts [P, M, N - first] summed, times scales [M] and [N] where there
    are, plus bias [N], and with `add` plus what out holds. With `glu` parts and bias are gate and up side by side, and
    out takes SiLU(gate) * up. `parts` may have any strides but a last one of 1.
    """
    (M, N), BLOCK = out.shape, 1024
    row, column = (None, None) if scales is None else scales
    _add_parts_kernel[(M, triton.cdiv(N - first, BLOCK))](
        parts,
        row,
        column,
        bias,
        out,
        N,
        first,
        *parts.stride()[:2],
        len(parts),
        ADD=add,
        GLU=glu,
        BLOCK=BLOCK,
        PDL=language.pdl(out),
        num_warps=4,
        **launch_options(out),
    )


@jit
def _sum(parts, stride, count, row, column, bias, n, keep):
    """The sum at n of `count` parts, `stride` apart, with scales and bias."""
    y = tl.load(parts + n, mask=keep, other=0.0).to(tl.float32)
    for part in range(1, count):
        y += tl.load(parts + part * stride + n, mask=keep, other=0.0).to(tl.float32)
    if row is not None:
        y *= tl.load(row) * tl.load(column + n, mask=keep, other=0.0)
    if bias is not None:
        y += tl.load(bias + n, mask=keep, other=0.0).to(tl.float32)
    return y


@jit(do_not_specialize=["count"])
def _add_parts_kernel(parts, row, column, bias, out, N, first, stride, width, count, ADD: tl.constexpr,
                      GLU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BLOCK columns of a row: of parts with strides `stride`, and of their rows `width`."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = first + n < N
    wait(PDL)
    parts += m * width
    if row is not None:
        row += m
        column += first
    if bias is not None:
        bias += first
    y = _sum(parts, stride, count, row, column, bias, n, keep)
    if GLU:
        y = silu(y) * _sum(parts, stride, count, row, column, bias, N + n, keep)
    at = out + m * N + first + n
    if ADD:
        y += tl.load(at, mask=keep, other=0.0).to(tl.float32)
    tl.store(at, y.to(out.dtype.element_ty), mask=keep)
