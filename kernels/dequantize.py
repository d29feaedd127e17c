"""Packed codes as numbers: in a kernel's registers, and a whole matrix widened for a large product."""

import torch
from torch import Tensor

from kernels.language import jit, on_gpu, tl, triton
from kernels.weight import PER_WORD, Weight


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] in `dtype`."""
    if weight.format == "float" or not on_gpu(weight.data):
        return dequantize_twin(weight, dtype)
    return dequantize_kernel(weight, dtype)


def dequantize_twin(weight: Weight, dtype: torch.dtype) -> Tensor:
    N, K = weight.shape
    if weight.format == "float":
        return weight.data.to(dtype)
    bits = 32 // PER_WORD[weight.format]
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=weight.data.device)
    codes = (weight.data.view(N, -1, 1, 4) >> shifts[:, None]) & ((1 << bits) - 1)  # [N, chunk, byte, word]
    codes = codes.reshape(N, K)
    if weight.format == "int8":
        return ((codes - 128).float() * weight.scale[:, None]).to(dtype)
    if weight.format == "fp8":
        return (codes.to(torch.uint8).view(torch.float8_e4m3fn).float() * weight.scale[:, None]).to(dtype)
    zero = 8.0 if weight.zero is None else weight.zero.float()[:, :, None]
    groups = codes.view(N, -1, weight.group).float() - zero
    return (groups * weight.scale.float()[:, :, None]).to(dtype).view(N, K)


def dequantize_kernel(weight: Weight, dtype: torch.dtype) -> Tensor:
    N, K = weight.shape
    out = torch.empty(N, K, dtype=dtype, device=weight.data.device)
    grid = (N, triton.cdiv(K, 2048))
    _dequantize_kernel[grid](
        weight.data,
        weight.scale,
        weight.scale if weight.zero is None else weight.zero,
        out,
        K=K,
        FORMAT=weight.format,
        GROUP=weight.group,
        ZERO=weight.zero is not None,
        WORDS=2048 // PER_WORD[weight.format],
        num_warps=4,
    )
    return out


@jit
def shift(words, left: tl.constexpr):
    """Shift to the left, or, by a negative count, to the right without the sign."""
    if left >= 0:
        return words << left
    else:
        return (words >> -left) & ((1 << (32 + left)) - 1)


@jit
def fp8(words, plane: tl.constexpr):
    """A byte of e4m3 as fp32 times 2^-120: sign, exponent and mantissa moved into place, subnormals included."""
    bits = (words << (24 - 8 * plane)) >> 4  # an arithmetic shift keeps the sign's bit
    return (bits & -2014314496).to(tl.float32, bitcast=True)  # 0x87F00000


@jit
def _code(words, plane: tl.constexpr, FORMAT: tl.constexpr):
    """The weights of one plane of packed words, fp32: exact codes without scale, int4 still with its zero."""
    if FORMAT == "int8":
        bits = (shift(words, -8 * plane) & 0xFF) | 0x4B000000  # 2^23 + u
        return bits.to(tl.float32, bitcast=True) - (8388608.0 + 128.0)
    elif FORMAT == "int4":
        bits = (shift(words, -4 * plane) & 0xF) | 0x4B000000
        return bits.to(tl.float32, bitcast=True) - 8388608.0
    else:
        return fp8(words, plane) * 1.329227995784916e36  # 2^120


@jit
def _dequantize_kernel(w, scale, zero, out, K: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
                       ZERO: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """WORDS packed words of one row, widened."""
    PER: tl.constexpr = 8 if FORMAT == "int4" else 4
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    words = tl.load(w + row * (K // PER) + word, mask=word < K // PER, other=0)
    if FORMAT != "int4":
        s = tl.load(scale + row)
    for plane in tl.static_range(PER):
        k = word // 4 * (4 * PER) + word % 4 + 4 * plane
        v = _code(words, plane, FORMAT)
        if FORMAT == "int4":
            at = row * (K // GROUP) + k // GROUP
            s = tl.load(scale + at, mask=k < K, other=0.0).to(tl.float32)
            if ZERO:
                v -= tl.load(zero + at, mask=k < K, other=0.0).to(tl.float32)
            else:
                v -= 8.0
        tl.store(out + row * K + k, (v * s).to(out.dtype.element_ty), mask=k < K)
