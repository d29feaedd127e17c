"""int8 times int8: a product whose inputs are rounded as well as the matrix (W8A8).

Each row of the inputs gets the scale of its own largest magnitude when it comes (per token, dynamic). The product then
is one of integers, which CPUs and GPUs compute at twice the rate of 16-bit floats or more, and the scales of the input
row and of the matrix row come off its result. The order of a sum of integers is free: inputs take the order in which
codes lie in a row of words, so that codes are not moved.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.codes import encode
from kernels.weight import Weight


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] = scale[m] * steps, steps int8 [M, K] in -127..127 and scale = absmax / 127 of its row, fp32 [M, 1]."""
    steps, scale = encode(x, torch.int8)
    return steps, scale[:, None]


def int8_linear(x: Tensor, weight: Weight) -> Tensor:
    """y [M, N] = x [M, K] W^T + bias in x's dtype, with x rounded by `quantize_rows`; the weight's format is int8."""
    steps, scale = quantize_rows(x)
    steps = steps.unflatten(1, (-1, 2, 8)).transpose(2, 3).flatten(1)  # byte p of half-word i is k = 8 p + i of 16
    y = (_product(steps, weight.data.view(torch.int8)) * scale).mul_(weight.scale)
    return (y if weight.bias is None else y + weight.bias.float()).to(x.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] b^T [K, N], of int8, as int32 [M, N]."""
    if a.device.type == "mps":  # has no product of integers; floats are as exact as int32 is afterwards
        return a.float() @ b.float().t()
    M, N = len(a), len(b)
    if a.is_cuda:
        a, b = pad(a, b)
    return torch._int_mm(a, b.t())[:M, :N]


def pad(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a [M, K] and b [N, K] with rows of zeros, up to what torch's product on CUDA takes: M > 16, N in eights."""
    rows, outputs = max(0, 17 - len(a)), -len(b) % 8
    return F.pad(a, (0, 0, 0, rows)) if rows else a, F.pad(b, (0, 0, 0, outputs)) if outputs else b  # F.pad copies
