"""Linears whose matrices are stored in 8 or 4 bits, and rounding to nearest, which fills them.

A quantized linear takes the place of a `model.Linear`. It holds codes in the packed layout that the kernels read,
which `quant/README.md` defines, and can give the matrix back; run as it is, it does that and multiplies. A CPU's
operators read another order of the same codes: there it brings them into that, once and in place. This file refuses to
know where weights come from and how a kernel multiplies.

The one idea: rows are independent. A row's codes and scales depend on that row alone, so a fused matrix is packed as
its parts stream in, exactly as it would be whole, and a better method has only to choose other codes: it hands them
to `store_rows`.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.codes import LARGEST, encode
from kernels.int8 import int8_linear, quantize_rows
from kernels.weight import Weight, most_rows
from model import Linear, Transformer

GROUPS = (128, 64, 32)  # how many neighbours may share a scale in the 4-bit layout
PIECE = 2**22  # weights rounded at a time: what bounds the memory for it
SLICE = 2**20  # weights of a matrix dequantized at a time to multiply by on the CPU: what its caches hold
SHARES = tuple(1 - i / 40 for i in range(20))  # of a group's span: what a search for the best one tries
CACHED = 2**18  # weights that a CPU's caches hold while a search goes over them again and again
OCTAVE = tuple(2 ** (i / 8) for i in range(8))  # times the least scale of a row of floats: what its search tries

# ---- The packed layouts ---------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How codes of one width lie in a row: block by block of neighbours along K, half-words of 16 bits in each."""

    bits: int
    halves: int  # in a block

    @property
    def per_half(self) -> int:
        return 16 // self.bits

    @property
    def block(self) -> int:
        """Neighbours in a block."""
        return self.halves * self.per_half

    def words(self, K: int) -> int:
        """32-bit words in a row of K codes, which ends with a whole block."""
        return -(-K // self.block) * self.halves // 2

    def pack(self, codes: Tensor) -> Tensor:
        """Codes [N, K], uint8, as int32 [N, words]: code p of half-word i in a block is its code p * halves + i."""
        N, K = codes.shape
        codes = F.pad(codes, (0, -K % self.block)).view(N, -1, self.per_half, self.halves)
        if self.bits == 4:
            codes = codes[:, :, 0::2] | codes[:, :, 1::2] << 4
        return codes.transpose(2, 3).reshape(N, -1).view(torch.int32)  # bytes in the order [N, block, half-word, byte]

    def unpack(self, data: Tensor, K: int) -> Tensor:
        """The inverse of `pack`: int32 [N, words] -> uint8 [N, K]."""
        N = len(data)
        codes = data.view(torch.uint8).view(N, -1, self.halves, 2).transpose(2, 3)  # [N, block, byte, half-word]
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=3)
        return codes.reshape(N, -1)[:, :K]


BYTES = Layout(bits=8, halves=8)  # 16 neighbours
NIBBLES = Layout(bits=4, halves=32)  # 128 neighbours


class RowBlocks(NamedTuple):
    """The order in which `_weight_int4pack_mm_for_cpu` reads nibbles: for blocks of rows, column by column.

    A byte holds row i and row i + rows / 2 of a block, the first in its low bits; in a last block that is not whole,
    row 2i and row 2i + 1.
    """

    rows: int  # in a block

    def pack(self, codes: Tensor) -> Tensor:
        """Codes uint8 [N, K] as uint8 [N * K / 2]; the number of rows is even."""
        N, K = codes.shape
        whole = N - N % self.rows
        blocks = codes[:whole].view(-1, 2, self.rows // 2, K)
        rest = codes[whole:].view(-1, 2, K)
        parts = (blocks[:, 0] | blocks[:, 1] << 4).transpose(1, 2), (rest[:, 0] | rest[:, 1] << 4).t()
        return torch.cat([part.flatten() for part in parts])

    def unpack(self, data: Tensor, K: int) -> Tensor:
        """The inverse of `pack`: uint8 [N * K / 2] -> uint8 [N, K]."""
        N = 2 * len(data) // K
        whole = N - N % self.rows
        blocks = data[: whole * K // 2].view(-1, K, self.rows // 2)
        rest = data[whole * K // 2 :].view(K, -1)
        blocks = torch.stack((blocks & 15, blocks >> 4), 1).transpose(2, 3).reshape(whole, K)
        return torch.cat((blocks, torch.stack((rest & 15, rest >> 4), 2).flatten(1).t()))


@functools.cache
def cpu_nibbles() -> RowBlocks | None:
    """The order that this CPU's operator has, which depends on its vectors; None if it is not one that is known."""
    codes = torch.arange(80 * 32).remainder(13).to(torch.uint8).view(80, 32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 2).flatten()
    return next((order for order in map(RowBlocks, (64, 32)) if torch.equal(order.pack(codes), packed)), None)


# ---- Rounding to nearest --------------------------------------------------------------------------------------------


class Codes(NamedTuple):
    """A rounded matrix before it is packed."""

    codes: Tensor  # uint8 [N, K]; of integers of 8 bits, 128 more than they mean
    scale: Tensor  # fp32 [N], or [N, K/group] for 4 bits
    zero: Tensor | None = None  # [N, K/group], 4 bits only: the code that means 0


def _divide(weight: Tensor, scale: Tensor) -> Tensor:
    """weight / scale, where a scale of zero belongs to weights that are all zero."""
    return weight / torch.where(scale == 0, 1.0, scale)


def round_int8(weight: Tensor) -> Codes:
    """weight [N, K] = scale[n] * (code - 128), scale = absmax / 127; off by half a scale at most.

    NaN or infinity in a row becomes a scale that is not finite.
    """
    codes, scale = encode(weight, torch.int8)
    return Codes(codes.view(torch.uint8) ^ 128, scale)


def round_fp8(weight: Tensor) -> Codes:
    """weight [N, K] = scale[n] * the float8_e4m3fn that code is: off by 1/16 of itself at most.

    Weights under 2^-6 of a scale are off by 2^-10 of it at most. NaN or infinity as in `round_int8`.
    """
    most = weight.numel() if weight.is_cuda else CACHED
    scale = torch.cat([fp8_scale(rows) for rows in weight.split(max(1, most // weight.shape[1]))])
    return Codes(nearest_fp8(weight.float(), scale[:, None]).view(torch.uint8), scale)


def fp8_scale(weight: Tensor) -> Tensor:
    """Scales [N], fp32, for weight [N, K]: absmax / 448 times the one of OCTAVE that leaves the smallest squared error.

    What a scale does to the error depends on where between two powers of 2 it puts the row's weights: twice the scale
    gives the same codes but for their exponents. Of the smallest weights, too, 3 bits are taken to be kept. It is the
    same on any device: CUDA divides by a number in another way than a CPU, so that nothing here does.
    """
    smallest = weight.float().abs().amax(1) * (1 / LARGEST[torch.float8_e4m3fn])
    best, least = smallest, torch.full_like(smallest, float("inf"), dtype=torch.float64)
    steps = _divide(weight.float(), smallest[:, None])
    for factor in OCTAVE:
        x = steps * (1 / factor)
        large = x * (2**20 + 1)
        off = (large - (large - x)).sub_(x)  # fp32 has 20 bits more, which the large number pushes out, to nearest
        # So exact a sum that its order, which depends on the device, decides nothing.
        error = off.square_().sum(1, dtype=torch.float64).mul_(factor**2)
        best = torch.where(error < least, smallest * factor, best)
        least = torch.minimum(error, least)
    return best


def nearest_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """The float8_e4m3fn nearest to weight / scale, both fp32."""
    largest = LARGEST[torch.float8_e4m3fn]  # past it, some versions of torch make NaN
    return _divide(weight, scale).clamp_(-largest, largest).to(torch.float8_e4m3fn)


def round_int4(
    weight: Tensor, *, group: int, symmetric: bool, dtype: torch.dtype, bits: int = 4, clip: bool = False
) -> Codes:
    """weight [N, K] = scale * (code - zero) for each `group` neighbours along K; scale and zero are in `dtype`.

    4 bits: as `grid` says, off by half a scale at most where nothing is clipped, and by what rounding the scale to
    `dtype` takes from the ends of the span. 3 bits lie in the layout of 4. NaN or infinity as in `round_int8`.
    """
    scale, zero = grid(weight, group=group, symmetric=symmetric, dtype=dtype, bits=bits, clip=clip)
    return Codes(_round(weight.float().unflatten(1, (-1, group)), scale, zero, bits).flatten(1), scale, zero)


def code_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """The lowest and the highest code that `bits` have in the 4-bit layout, whose symmetric codes lie around 8."""
    return (8 - 2 ** (bits - 1), 7 + 2 ** (bits - 1)) if symmetric else (0, 2**bits - 1)


def grid(
    weight: Tensor, *, group: int, symmetric: bool, dtype: torch.dtype, bits: int = 4, clip: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Scales [N, K/group] of weight [N, K], and zeros where not symmetric, both in `dtype`.

    Symmetric: zero is 8 and scale = absmax / 7, or / 3 with 3 bits. Asymmetric: the 16 or 8 codes span the group's
    values and 0, and zero is an integer, so that a weight of 0 stays 0. With `clip`, the span is the one of SHARES that
    leaves the smallest squared error.
    """
    groups = weight.float().unflatten(1, (-1, group))  # [N, G, group]
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if not clip:
        return _span(low, high, symmetric, dtype, bits)
    least = torch.full_like(low, float("inf"))
    best = _span(low, high, symmetric, dtype, bits)  # where no error is finite
    for share in SHARES:
        scale, zero = _span(share * low, share * high, symmetric, dtype, bits)
        steps = _round(groups, scale, zero, bits).float() - (8.0 if zero is None else zero.float()[..., None])
        error = (steps * scale.float()[..., None] - groups).square().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(None if a is None else torch.where(better, a, b) for a, b in zip((scale, zero), best, strict=True))
    return best


def _span(low: Tensor, high: Tensor, symmetric: bool, dtype: torch.dtype, bits: int) -> tuple[Tensor, Tensor | None]:
    """The scale and the zero whose codes reach from low to high."""
    if symmetric:
        return (torch.maximum(-low, high) / (2 ** (bits - 1) - 1)).to(dtype), None
    scale = ((high - low) / (2**bits - 1)).to(dtype)
    return scale, _divide(-low, scale.float()).round().clamp(0, 2**bits - 1).to(dtype)


def _round(groups: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The codes nearest to groups [N, G, group], uint8."""
    steps = _divide(groups, scale.float()[..., None]).round()
    middle = 8.0 if zero is None else zero.float()[..., None]
    return (steps + middle).clamp(*code_range(bits, symmetric=zero is None)).to(torch.uint8)


def _materialized(x: Tensor) -> Tensor:
    """`x`, contiguous, in memory: Inductor would else compute what makes it anew for each row of the matrix."""
    return x.as_strided(x.shape, x.stride())


# ---- The linears ----------------------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """A linear layer over a packed matrix [N, K] = [out_features, in_features]; each format is a subclass.

    On a CPU the first product `settle`s it: the codes then lie in `native`, as the operators there read them, in the
    memory that `data` had. What is stored and saved is `data` all the same.

    Comments write W for the words in a row, G for its scales, B for its blocks.
    """

    format: str  # as a recipe's `Storage` names it
    layout: Layout
    group = 0
    few = 0  # rows up to which a CPU's operator over codes is faster than dequantizing them
    data: Tensor | None  # int32 [N, W]
    native: Tensor | None  # the same codes in a CPU's order
    scale: Tensor  # [N], or [N, G]
    zero: Tensor | None  # [N, G]

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("data", torch.empty(out_features, self.layout.words(in_features), dtype=torch.int32))
        self.register_buffer("native", None, persistent=False)
        self.register_buffer("zero", None)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False)

    def quantize(self, weight: Tensor) -> Codes:
        """Rows [n, K], rounded to nearest."""
        raise NotImplementedError

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The weights that `codes` stand for, fp32; scale and zero are shaped to fit them."""
        raise NotImplementedError

    def pack_rows(self, start: int, weight: Tensor) -> None:
        """Round rows [n, K] to nearest and store them as rows start .. start + n."""
        for rows in weight.split(max(1, PIECE // self.in_features)):
            self.store_rows(start, self.quantize(rows))
            start += len(rows)

    def store_rows(self, start: int, rows: Codes) -> None:
        """Store n rows of codes, however they were chosen, as rows start .. start + n."""
        self._unsettle()
        here = slice(start, start + len(rows.codes))
        self.data[here] = self.layout.pack(rows.codes)
        self.scale[here] = rows.scale
        if self.zero is not None:
            self.zero[here] = rows.zero

    def dequantize(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """The matrix [N, K], or those rows of it, computed in fp32."""
        codes = self._codes(rows).unflatten(1, (-1, self.group or self.in_features))
        scale, zero = (None if t is None else t[rows].reshape(len(codes), -1, 1) for t in (self.scale, self.zero))
        return self.decode(codes, scale, zero).to(dtype).flatten(1)

    @property
    def storage(self) -> "Storage":
        """How recipes call it."""
        return Storage(self.format)

    @property
    def packed(self) -> Weight:
        """What the kernels read, in this linear's memory: not to be kept where the CPU then multiplies by it."""
        return Weight(self.format, self._data(), self.scale.contiguous(), self.zero, self.bias, self.group)

    @property
    def nbytes(self) -> int:
        """Of all that a product reads, bias aside."""
        codes = self.data if self.native is None else self.native
        return codes.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.linear(x, self.dequantize(x.dtype), self.bias)
        rows = x.reshape(-1, self.in_features)
        if not torch.compiler.is_compiling():
            self.settle(len(rows))
        y = self.multiply(rows)
        if y is None:
            y = self._multiply_dequantized(rows)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _multiply_dequantized(self, x: Tensor) -> Tensor:
        """x [M, K] times the matrix, [M, N], dequantized in slices of rows."""
        step = max(64, SLICE // self.in_features // 64 * 64)
        if self.out_features <= step or torch.compiler.is_compiling():
            return self._multiply_slice(x, slice(None))
        y = x.new_empty(len(x), self.out_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, min(start + step, self.out_features))
            y[:, rows] = self._multiply_slice(x, rows)
        return y

    def _multiply_slice(self, x: Tensor, rows: slice) -> Tensor:
        return F.linear(x, self.dequantize(x.dtype, rows))

    # ---- In a CPU's order

    def has_operator(self, dtype: torch.dtype) -> bool:
        """Whether `multiply` calls an operator over codes for inputs of a dtype, in `few` rows or less."""
        return False

    def multiply(self, x: Tensor) -> Tensor | None:
        """x [M, K] times the matrix, [M, N] in fp32 or x's dtype; None where dequantizing it is faster or all there is.

        Compiled for one row it is a product and a sum, as in `model.Linear`: one pass over the codes.
        """
        raise NotImplementedError

    def settle(self, rows: int = 1) -> None:
        """Bring the codes into the order in which this CPU multiplies inputs of that many rows, if there is one."""
        raise NotImplementedError

    def _settle(self, native: Callable[[Tensor], Tensor], shape: tuple[int, ...], step: int) -> None:
        """Turn `data` into `native`, made of some rows' codes at a time, in place: rows never grow."""
        flat = self.data.view(torch.uint8).flatten()
        start = 0
        for first in range(0, self.out_features, step):
            some = native(self._codes(slice(first, first + step))).flatten()
            flat[start : start + len(some)] = some
            start += len(some)
        self.native, self.data = flat[:start].view(shape), None

    def _unsettle(self) -> None:
        self.data, self.native = self._data(), None

    def _codes(self, rows: slice) -> Tensor:
        """As they are packed, uint8 [n, K]."""
        return self.layout.unpack(self.data[rows], self.in_features) if self.native is None else self._native(rows)

    def _native(self, rows: slice) -> Tensor:
        """`native` as codes, uint8 [n, K]."""
        raise NotImplementedError

    def _data(self) -> Tensor:
        return self.data if self.native is None else self.layout.pack(self._native(slice(None)))

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "data"] = self._data()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = self.scale.contiguous()  # may be a view of `steps`

    def _load_from_state_dict(self, *args: object) -> None:
        self._unsettle()
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        kind = f"{self.format}, group={self.group}, symmetric={self.zero is None}" if self.group else self.format
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"


class _ByteLinear(QuantizedLinear):
    """A byte a weight and a scale a row."""

    layout = BYTES

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, dtype: torch.dtype) -> None:
        if in_features % 16:
            raise ValueError(
                f"8-bit weights come in chunks of 16 and a row has {in_features}; leave this linear as it is"
            )
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32))

    def settle(self, rows: int = 1) -> None:
        if self.native is None:
            self._settle(lambda codes: codes, (self.out_features, self.in_features), max(1, PIECE // self.in_features))
            self.native = self.native.view(torch.int8)

    def _native(self, rows: slice) -> Tensor:
        return self.native[rows].view(torch.uint8)


class Int8Linear(_ByteLinear):
    """Integers of 8 bits with one scale a row."""

    format = "int8"
    few = 16
    ones: Tensor | None  # [N], beside `native`: scales for an operator that would round ours

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.register_buffer("ones", None, persistent=False)

    def settle(self, rows: int = 1) -> None:
        super().settle(rows)
        if self.ones is None:  # a tensor that is held, because a compiler would not take one in the making
            self.ones = torch.ones(self.out_features, dtype=torch.bfloat16)

    def quantize(self, weight: Tensor) -> Codes:
        return round_int8(weight)

    def store_rows(self, start: int, rows: Codes) -> None:
        super().store_rows(start, rows._replace(codes=rows.codes ^ 128))  # as two's complement

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return codes.view(torch.int8).float().mul_(scale)

    def has_operator(self, dtype: torch.dtype) -> bool:
        return self.native is not None and dtype == torch.bfloat16

    def multiply(self, x: Tensor) -> Tensor | None:
        if self.native is None:
            return None
        if torch.compiler.is_compiling() and x.shape[0] == 1:  # no `len`, which would have to be a number
            return ((self.native.float() * _materialized(x.float())).sum(-1) * self.scale)[None]
        if self.has_operator(x.dtype) and x.shape[0] <= self.few:
            return torch._weight_int8pack_mm(_materialized(x.contiguous()), self.native, self.ones) * self.scale
        return None

    def _multiply_slice(self, x: Tensor, rows: slice) -> Tensor:
        if self.native is None or x.dtype == torch.float16:  # whose range products without the scale may leave
            return super()._multiply_slice(x, rows)
        return F.linear(x, self.native[rows].to(x.dtype)) * self.scale[rows]


class W8A8Linear(Int8Linear):
    """Int8Linear whose inputs are rounded to 8 bits as well, each row by its own largest: a product of integers.

    On CUDA a few rows stay as they are, as in the kernels that read a matrix for them: its bytes are what counts then.
    """

    format = "w8a8"

    @property
    def packed(self) -> Weight:
        return super().packed._replace(format="int8", int8_inputs=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" or (x.is_cuda and x[..., 0].numel() <= most_rows("int8")):
            return super().forward(x)
        return int8_linear(x.reshape(-1, self.in_features), self.packed).view(*x.shape[:-1], -1)

    def has_operator(self, dtype: torch.dtype) -> bool:
        return self.native is not None

    def multiply(self, x: Tensor) -> Tensor:
        codes = self._codes(slice(None)).view(torch.int8) if self.native is None else self.native
        steps, scale = quantize_rows(x)
        return (torch._int_mm(steps, codes.t()) * scale).mul_(self.scale)


_FP8_BITS = 0x87F00000 - 2**32  # of an fp32, as int32: its sign and what e4m3's seven other bits become


class Fp8Linear(_ByteLinear):
    """Floats of 8 bits (e4m3) with one scale a row."""

    format = "fp8"

    def quantize(self, weight: Tensor) -> Codes:
        return round_fp8(weight)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self._bits(codes.view(torch.int8)).mul_(2.0**120).mul_(scale)

    @staticmethod
    def _bits(codes: Tensor) -> Tensor:
        """2^-120 of what `codes`, int8, mean: fp32 from sign, exponent and mantissa, moved to where it has them.

        The exponents' biases differ by 120, subnormals included. torch's own cast is 30 times slower.
        """
        return (codes.to(torch.int32).bitwise_left_shift_(20).bitwise_and_(_FP8_BITS)).view(torch.float32)

    def multiply(self, x: Tensor) -> Tensor | None:
        if self.native is None or not torch.compiler.is_compiling() or len(x) > 1:
            return None
        # A part of 2^120 and the rest below, so that nothing leaves fp32's range.
        x = _materialized(x.float() * 2.0**64)
        return ((self._bits(self.native) * x).sum(-1) * 2.0**56 * self.scale)[None]


class Int4Linear(QuantizedLinear):
    """Integers of 4 bits; `group` neighbours along K share a scale and, where not `symmetric`, a zero.

    With 3 `bits` they take 8 values only, and as much memory. `clip` is for rounding to nearest, as in `grid`.
    """

    format = "int4"
    layout = NIBBLES
    few = 128

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        group: int = 128,
        symmetric: bool = True,
        bits: int = 4,
        clip: bool = False,
    ) -> None:
        if group not in GROUPS:
            raise ValueError(f"a group has {', '.join(map(str, GROUPS))} weights; got {group}")
        if in_features % group:
            raise ValueError(
                f"a row has {in_features} weights, which groups of {group} do not divide; use smaller ones"
            )
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.group, self.bits, self.clip = group, bits, clip
        self.register_buffer("scale", torch.empty(out_features, in_features // group, dtype=dtype))
        self.register_buffer("steps", None, persistent=False)  # [G, N, 2], beside `native`: scale, what code 8 means
        if not symmetric:
            self.zero = torch.empty(out_features, in_features // group, dtype=dtype)

    def quantize(self, weight: Tensor) -> Codes:
        return round_int4(weight, **self.rounding)

    @property
    def rounding(self) -> dict:
        """What `grid` and `round_int4` need to know."""
        symmetric, dtype = self.zero is None, self.scale.dtype
        return {"group": self.group, "symmetric": symmetric, "dtype": dtype, "bits": self.bits, "clip": self.clip}

    @property
    def storage(self) -> "Storage":
        return Storage(f"int{self.bits}", self.group)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return codes.float().sub_(8.0 if zero is None else zero.float()).mul_(scale.float())

    def settle(self, rows: int = 1) -> None:
        order = cpu_nibbles() if self.scale.dtype == torch.bfloat16 and self.out_features % 16 == 0 else None
        if self.native is not None or order is None or rows > self.few:
            return
        step = max(1, PIECE // self.in_features // order.rows) * order.rows
        self._settle(order.pack, (self.out_features, self.in_features // 2), step)
        scale = self.scale.float()
        least = torch.zeros_like(scale) if self.zero is None else (8 - self.zero.float()) * scale
        self.steps = torch.stack((scale, least), -1).transpose(0, 1).contiguous().to(self.scale.dtype)
        self.scale = self.steps[..., 0].t()

    def _native(self, rows: slice) -> Tensor:
        order, (first, end, _) = cpu_nibbles(), rows.indices(self.out_features)
        start = first // order.rows * order.rows
        end = min(-(-end // order.rows) * order.rows, self.out_features)
        codes = order.unpack(self.native[start:end].flatten(), self.in_features)
        return codes[first - start :][: rows.indices(self.out_features)[1] - first]

    def has_operator(self, dtype: torch.dtype) -> bool:
        return self.native is not None and dtype == self.steps.dtype

    def multiply(self, x: Tensor) -> Tensor | None:
        if self.native is not None:
            if x.shape[0] > self.few or not self.has_operator(x.dtype):
                return None
            return torch._weight_int4pack_mm_for_cpu(x.contiguous(), self.native, self.group, self.steps)
        if torch.compiler.is_compiling() and len(x) == 1:
            return self._multiply_one(x[0])[None]
        return None

    def _multiply_one(self, x: Tensor) -> Tensor:
        """x [K] times the packed matrix, fp32 [N].

        Nibble p of half-word h in word w of block B belongs to k = 128 B + 32 p + 2 w + h.
        """
        pad, own = -self.in_features % 128, 128 // self.group
        x = F.pad(x.float(), (0, pad)).view(-1, 4, 16, 2).permute(1, 3, 0, 2)
        x = _materialized(x.contiguous())  # [p, h, B, w]
        words = self.data.view(self.out_features, -1, 16)  # [N, B, w]
        scale, zero = (
            None if t is None else F.pad(t.float(), (0, pad // self.group)).unflatten(1, (-1, own, 1))
            for t in (self.scale, self.zero)
        )
        y = torch.zeros(())
        for p in range(4):
            g = p * own // 4
            middle = 8.0 if zero is None else zero[:, :, g]
            codes = [(words >> (4 * p + 16 * h) & 15).float() - middle for h in (0, 1)]
            y = y + (codes[0] * x[p, 0] + codes[1] * x[p, 1]) * scale[:, :, g]
        return y.sum((1, 2))


# ---- Which linears --------------------------------------------------------------------------------------------------


FORMATS = ("int8", "w8a8", "int4", "int3", "fp8", "float")  # "float": in the model's dtype
GROUPED = ("int4", "int3")  # the latter in the layout of the former


class Storage(NamedTuple):
    """How one linear is stored."""

    format: str  # one of FORMATS
    group: int = 0  # of GROUPED formats


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model's linears are stored. Embedding, norms and biases stay in the model's dtype."""

    format: str  # one of FORMATS: the linears of every layer
    head: str  # the head, which decides the next token: of 8 bits the finer, and 4 gain little
    method: str = "rtn"  # what chose the codes; the layout does not depend on it
    group_size: int = 128  # 3 and 4 bits: how many neighbours share a scale, at most
    symmetric: bool = True  # 3 and 4 bits: without zeros of their own
    clip: bool = False  # 3 and 4 bits: spans were searched for, as in `grid`; the layout does not depend on it
    exceptions: Mapping[str, Storage] = field(default_factory=dict)  # by linear: how it is stored, whatever the rest is

    def __str__(self) -> str:
        """In a word, as figures and messages name it: "int8", "int4", "int4-g64-asymmetric", "gptq-int4"."""
        words = [self.format] if self.method == "rtn" else [self.method, self.format]
        if self.format in GROUPED:
            words += [f"g{self.group_size}"] if self.group_size != 128 else []
            words += [] if self.symmetric else ["asymmetric"]
        return "-".join([*words, *["clip"][: self.clip]])

    def storage(self, name: str, K: int) -> Storage:
        """How the linear called `name` is stored, whose rows have K weights; ValueError where they cannot be packed.

        A row that 4-bit groups of the wanted size do not divide gets smaller ones, and 8 bits where none do.
        """
        if name in self.exceptions:
            return self.exceptions[name]
        if K % 16:
            raise ValueError(
                f"{name} has rows of {K} weights, and only multiples of 16 can be quantized; load the model without"
            )
        return fit(Storage(self.head if name == "head" else self.format, self.group_size), K)

    def linear(self, name: str, linear: Linear, dtype: torch.dtype) -> QuantizedLinear | Linear:
        """What takes the place of the model's `linear` called `name`; ValueError where it cannot be packed."""
        K, N, bias = linear.in_features, linear.out_features, linear.bias is not None
        format, group = self.storage(name, K)
        if format == "float":
            return linear
        if format in GROUPED:
            options = {"symmetric": self.symmetric, "bits": int(format[-1]), "clip": self.clip}
            return Int4Linear(K, N, bias=bias, dtype=dtype, group=group, **options)
        return {"int8": Int8Linear, "w8a8": W8A8Linear, "fp8": Fp8Linear}[format](K, N, bias=bias, dtype=dtype)


def fit(storage: Storage, K: int) -> Storage:
    """`storage` for rows of K weights, a multiple of 16: in groups that divide them, and 8 bits where none does."""
    if storage.format not in GROUPED:
        return Storage(storage.format)
    group = next((size for size in GROUPS if size <= storage.group and K % size == 0), None)
    return Storage("int8") if group is None else Storage(storage.format, group)


RECIPES = {
    "int8": Recipe(format="int8", head="int8"),
    "int4": Recipe(format="int4", head="int8"),
    "fp8": Recipe(format="fp8", head="int8"),
}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a decode step reads: each once, but the embedding, of which it reads a row."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    del weights["embed.weight"]  # where that is the head as well, it stays in the list by its other name
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(part.nbytes for part in (*weights.values(), *linears))


def settle_model(model: Transformer) -> None:
    """Bring the codes of all linears into this CPU's order; interrupted, it leaves a model that is of no use."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.settle()


def quantize_model(model: Transformer, recipe: Recipe, *, dtype: torch.dtype) -> None:
    """Replace the linears of a meta-device model by empty quantized ones, whose model's dtype is `dtype`.

    A linear that the recipe has as "float" stays. A tied head that does not becomes a matrix of its own, beside the
    embedding.
    """
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    with torch.device("meta"):
        for name, linear in linears:
            model.set_submodule(name, recipe.linear(name, linear, dtype))
