"""Packed codes as numbers: in a kernel's registers, and a whole matrix widened for a large product."""

import torch
from torch import Tensor

from kernels.language import constexpr_function, jit, on_gpu, tl, triton
from kernels.weight import Weight


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] in `dtype`."""
    if weight.format == "float" or not on_gpu(weight.data):
        return dequantize_twin(weight, dtype)
    return dequantize_kernel(weight, dtype)


def dequantize_twin(weight: Weight, dtype: torch.dtype) -> Tensor:
    N, K = weight.shape
    if weight.format == "float":
        return weight.data.to(dtype)
    bits, words = (4, 16) if weight.format == "int4" else (8, 4)  # of a code, and in a block
    halves = weight.data.view(torch.int16).view(N, -1, 1, 2 * words)
    shifts = torch.arange(0, 16, bits, dtype=torch.int16, device=halves.device)
    codes = ((halves >> shifts[:, None]) & ((1 << bits) - 1)).reshape(N, -1)[:, :K]  # from [N, block, p, half-word]
    if weight.format == "int8":
        return (codes.to(torch.int8).float() * weight.scale[:, None]).to(dtype)
    if weight.format == "fp8":
        return (codes.to(torch.uint8).view(torch.float8_e4m3fn).float() * weight.scale[:, None]).to(dtype)
    zero = 8.0 if weight.zero is None else weight.zero.float()[:, :, None]
    groups = codes.reshape(N, -1, weight.group).float() - zero
    return (groups * weight.scale.float()[:, :, None]).to(dtype).view(N, K)


def dequantize_kernel(weight: Weight, dtype: torch.dtype) -> Tensor:
    N, K = weight.shape
    out = torch.empty(N, K, dtype=dtype, device=weight.data.device)
    halves = weight.data.view(torch.int16)
    _dequantize_kernel[(N, triton.cdiv(halves.shape[1], 512))](
        halves,
        weight.scale,
        weight.scale if weight.zero is None else weight.zero,
        out,
        ROW=halves.shape[1],
        K=K,
        FORMAT=weight.format,
        GROUP=weight.group,
        ZERO=weight.zero is not None,
        BLOCK=512,
        num_warps=4,
    )
    return out


def _ptx(*lines: str) -> str:
    """Instructions over one register that holds two half-words: $1 goes in, $0 comes out, a to c are free."""
    return "{ .reg .b32 a, b, c; " + " ".join(lines) + " }"


# 0x4300 is 128 in bf16, and the last bit of its mantissa is worth 1. Table 0xEA is (x & y) | z.
PTX_CODE = {
    "int4": [_ptx(f"shr.u32 a, $1, {4 * p};", "lop3.b32 $0, a, 0x000F000F, 0x43004300, 0xEA;") for p in range(4)],
    "int8": [
        _ptx(
            f"shr.u32 a, $1, {8 * p};",
            "lop3.b32 b, a, 0x007F007F, 0x43004300, 0xEA;",  # 128 + the low seven bits
            "lop3.b32 c, a, 0x00800080, 0xC300C300, 0xEA;",  # -256 with the eighth bit, -128 without
            "mov.b32 a, 0x3F803F80;",  # b * 1 + c: not every GPU adds bf16
            "fma.rn.bf16x2 $0, b, a, c;",
        )
        for p in range(2)
    ],
    "fp8": [
        _ptx(
            f"shl.b32 a, $1, {8 - 8 * p};",  # the byte on top of its half
            "shr.u32 b, a, 4;",
            "and.b32 b, b, 0x07F007F0;",  # exponent and mantissa where bf16 has them
            "lop3.b32 b, a, 0x80008000, b, 0xEA;",
            "mov.b32 a, 0x7B807B80;",  # times 2^120, by which the exponents' biases differ
            "mov.b32 c, 0x80008000;",
            "fma.rn.bf16x2 $0, b, a, c;",
        )
        for p in range(2)
    ],
}


@constexpr_function
def ptx_code(FORMAT: str, p: int) -> str:
    return PTX_CODE[FORMAT][p]


@jit
def widen(halves, p: tl.constexpr, FORMAT: tl.constexpr, PTX: tl.constexpr, dtype: tl.constexpr):
    """The p-th code of each half-word as a number, exactly, without its scale.

    With PTX, which is for bf16 and CUDA, codes of 4 bits come with 128 added. Zeros of int4 are still in it.
    """
    if PTX:
        code: tl.constexpr = ptx_code(FORMAT, p)
        return tl.inline_asm_elementwise(code, "=r,r", [halves], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return _code(halves, p, FORMAT).to(dtype)


@jit
def _code(halves, p: tl.constexpr, FORMAT: tl.constexpr):
    """`widen` in fp32 and without PTX."""
    if FORMAT == "int4":
        return ((halves >> (4 * p)) & 0xF).to(tl.float32)
    u = (halves.to(tl.int32) >> (8 * p)) & 0xFF
    if FORMAT == "int8":
        return ((u ^ 0x80) - 128).to(tl.float32)
    # Sign, exponent and mantissa where fp32 has them, subnormals included; the exponents' biases differ by 120.
    bits = ((u & 0x80) << 24) | ((u & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@jit
def _dequantize_kernel(w, scale, zero, out, ROW: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr,
                       GROUP: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """BLOCK half-words of one row, widened."""
    Q: tl.constexpr = 4 if FORMAT == "int4" else 2
    RUN: tl.constexpr = 32 if FORMAT == "int4" else 8  # half-words whose p-th codes are neighbours
    row = tl.program_id(0).to(tl.int64)
    half = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    halves = tl.load(w + row * ROW + half, mask=half < ROW, other=0)
    if FORMAT != "int4":
        s = tl.load(scale + row)
    for p in tl.static_range(Q):
        k = half // RUN * (Q * RUN) + p * RUN + half % RUN
        v = _code(halves, p, FORMAT)
        if FORMAT == "int4":
            at = row * (K // GROUP) + k // GROUP
            s = tl.load(scale + at, mask=k < K, other=0.0).to(tl.float32)
            if ZERO:
                v -= tl.load(zero + at, mask=k < K, other=0.0).to(tl.float32)
            else:
                v -= 8.0
        tl.store(out + row * K + k, (v * s).to(out.dtype.element_ty), mask=k < K)
