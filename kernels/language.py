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


__all__ = ["constexpr_function", "jit", "launch_options", "on_gpu", "order", "pdl", "ptx", "tl", "triton", "wait"]


def on_gpu(x: Tensor) -> bool:
    """Whether the kernels run on x; their twins do elsewhere."""
    return x.is_cuda and triton is not None


@functools.cache
def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def pdl(x: Tensor) -> bool:
    """Whether kernels are launched before the one before them ends (programmatic dependent launch, Hopper and up)."""
    return _hopper(x.device) and "TRITON_INTERPRET" not in os.environ


def ptx(x: Tensor) -> bool:
    """Whether kernels over activations x may have pairs of bf16 handled by CUDA's own instructions."""
    cuda = x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return cuda and x.dtype == torch.bfloat16 and "TRITON_INTERPRET" not in os.environ


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
def order(y, index):
    """Pack logits and their indices so that the largest integer is the largest logit at the smallest index."""
    bits = y.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (key << 32) | (0xFFFFFFFF - index.to(tl.int64))
