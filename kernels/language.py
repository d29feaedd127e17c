"""Triton, or what stands in its place where torch came without it, and what every kernel shares.

Without Triton the kernels cannot run, but their twins can.
"""

import functools
import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    constexpr_function, jit = triton.constexpr_function, triton.jit
except ImportError:
    triton = None

    class tl:
        """Stands for `triton.language` in the kernels' annotations."""

        constexpr = None

    def jit(function=None, **options):
        return function or jit

    constexpr_function = jit


__all__ = [
    "along",
    "as_codes",
    "constexpr_function",
    "cuda",
    "held",
    "hopper",
    "jit",
    "launch_options",
    "on_gpu",
    "order",
    "pdl",
    "ptx",
    "scale_of",
    "silu",
    "store",
    "tl",
    "triton",
    "wait",
]


def on_gpu(x: Tensor) -> bool:
    """Whether the kernels run on x; their twins do elsewhere."""
    return x.is_cuda and triton is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """CUDA's compute capability; (0, 0) where there is none, and under the interpreter."""
    if device.type != "cuda" or torch.version.hip is not None or "TRITON_INTERPRET" in os.environ:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def pdl(x: Tensor) -> bool:
    """Whether kernels are launched before the one before them ends (programmatic dependent launch, Hopper and up)."""
    return _capability(x.device) >= (9, 0)


def hopper(x: Tensor) -> bool:
    """Whether tensor cores are Hopper's, which take one side of a product from registers while others run."""
    return _capability(x.device)[0] == 9


def cuda(x: Tensor) -> bool:
    """Whether kernels may use CUDA's own instructions."""
    return _capability(x.device) > (0, 0)


def ptx(x: Tensor) -> bool:
    """Whether kernels over activations x may have pairs of bf16 handled by CUDA's own instructions."""
    return x.dtype == torch.bfloat16 and _capability(x.device) >= (8, 0)


def launch_options(x: Tensor) -> dict:
    """The launch's option for programmatic dependent launch, which the interpreter does not know."""
    return {"launch_pdl": True} if pdl(x) else {}


@jit
def wait(PDL: tl.constexpr):
    """Where a kernel may run beside the one before it: let the next one in, then wait for what that one wrote."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@jit
def along(dim: tl.constexpr, size: tl.constexpr, rank: tl.constexpr):
    """0 .. size along one of the dimensions of a tensor of `rank` dimensions."""
    i = tl.arange(0, size)
    for d in tl.static_range(rank):
        if d != dim:
            i = tl.expand_dims(i, d)
    return i


@jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@jit
def scale_of(largest, dtype: tl.constexpr):
    """The scale of vectors whose largest number is `largest`, in codes of `dtype`: as `codes.encode`."""
    return tl.div_rn(largest, 127.0 if dtype == tl.int8 else 448.0)


@jit
def as_codes(x, scale, dtype: tl.constexpr):
    """Codes of x, fp32: as `codes.encode`."""
    MOST: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    x = tl.div_rn(x, tl.where(scale == 0, 1.0, scale))
    if dtype == tl.int8:
        x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23, whose neighbours are integers: rounds as torch does
    return tl.minimum(tl.maximum(x, -MOST), MOST).to(dtype)


@jit
def order(y, index):
    """Pack logits and their indices so that the largest integer is the largest logit at the smallest index."""
    bits = y.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (key << 32) | (0xFFFFFFFF - index.to(tl.int64))


@jit
def held(out, index, N, M, BM: tl.constexpr):
    """What out [M, N] holds for outputs `index`, fp32 [n, BM]: the residual that a product is added to."""
    m = tl.arange(0, BM)
    keep = (index < N)[:, None] & (m < M)[None, :]
    return tl.load(out + m[None, :] * N + index[:, None], mask=keep, other=0.0).to(tl.float32)


@jit
def store(out, y, index, N, M, MODE: tl.constexpr, BM: tl.constexpr):
    """Outputs `index` of M rows, y [n, BM], into out [M, N]; with MODE "argmax" into `best`, out [M]."""
    m = tl.arange(0, BM)
    keep = (index < N)[:, None] & (m < M)[None, :]
    if MODE == "argmax":
        best = tl.max(tl.where(keep, order(y, index[:, None]), -(1 << 63)), 0)
        tl.atomic_max(out + m, best, mask=m < M)
    else:
        tl.store(out + m[None, :] * N + index[:, None], y.to(out.dtype.element_ty), mask=keep)
