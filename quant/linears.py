"""Linears whose matrices are stored in 8 or 4 bits, and rounding to nearest, which fills them.

A quantized linear takes the place of a `model.Linear`. It holds codes in the packed layout that the kernels read,
which `quant/README.md` defines, and can give the matrix back; run as it is, it does that and multiplies. This file
refuses to know where weights come from and how a kernel multiplies.

The one idea: rows are independent. A row's codes and scales depend on that row alone, so a fused matrix is packed as
its parts stream in, exactly as it would be whole, and a better method has only to choose other codes: it hands them
to `store_rows`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.codes import encode
from kernels.weight import Weight
from model import Linear, Transformer

GROUPS = (128, 64, 32)  # how many neighbours may share a scale in the 4-bit layout
PIECE = 2**22  # weights rounded at a time: what bounds the memory for it

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


# ---- Rounding to nearest --------------------------------------------------------------------------------------------


class Codes(NamedTuple):
    """A rounded matrix before it is packed."""

    codes: Tensor  # uint8 [N, K]
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
    """weight [N, K] = scale[n] * the float8_e4m3fn that code is, scale = absmax / 448: off by 1/16 of itself at most.

    Weights under 2^-6 of a scale are off by 2^-10 of it at most. NaN or infinity as in `round_int8`.
    """
    codes, scale = encode(weight, torch.float8_e4m3fn)
    return Codes(codes.view(torch.uint8), scale)


def round_int4(weight: Tensor, *, group: int, symmetric: bool, dtype: torch.dtype) -> Codes:
    """weight [N, K] = scale * (code - zero) for each `group` neighbours along K; scale and zero are in `dtype`.

    Symmetric: zero is 8 and scale = absmax / 7. Asymmetric: the 16 codes span the group's values and 0, and zero is
    an integer, so that a weight of 0 stays 0. Off by half a scale at most, and by what rounding the scale to `dtype`
    takes from the ends of the span. NaN or infinity as in `round_int8`.
    """
    N, K = weight.shape
    groups = weight.float().view(N, K // group, group)
    if symmetric:
        scale = (groups.abs().amax(-1) / 7).to(dtype)
        zero = None
        middle = 8.0
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).to(dtype)
        zero = _divide(-low, scale.float()).round().clamp(0, 15).to(dtype)
        middle = zero.float()[..., None]
    steps = _divide(groups, scale.float()[..., None]).round()
    return Codes((steps + middle).clamp(0, 15).to(torch.uint8).view(N, K), scale, zero)


# ---- The linears ----------------------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """A linear layer over a packed matrix [N, K] = [out_features, in_features]; each format is a subclass.

    Comments write W for the words in a row, G for its scales, B for its blocks.
    """

    format: str  # as `kernels.linear.Weight` names it
    layout: Layout
    group = 0
    data: Tensor  # int32 [N, W]
    scale: Tensor  # [N], or [N, G]
    zero: Tensor | None  # [N, G]

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("data", torch.empty(out_features, self.layout.words(in_features), dtype=torch.int32))
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
        here = slice(start, start + len(rows.codes))
        self.data[here] = self.layout.pack(rows.codes)
        self.scale[here] = rows.scale
        if self.zero is not None:
            self.zero[here] = rows.zero

    def dequantize(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """The matrix [N, K], or those rows of it, computed in fp32."""
        codes = self.layout.unpack(self.data[rows], self.in_features).unflatten(1, (-1, self.group or self.in_features))
        scale, zero = (None if t is None else t[rows].view(len(codes), -1, 1) for t in (self.scale, self.zero))
        return self.decode(codes, scale, zero).to(dtype).flatten(1)

    @property
    def packed(self) -> Weight:
        return Weight(self.format, self.data, self.scale, self.zero, self.bias, self.group)

    def forward(self, x: Tensor) -> Tensor:
        # Planes: the first codes of all words, then the second ones, ... Shifting whole rows of words gives the matrix
        # in that order with no shuffling, and bringing x into it costs nothing beside that. h is a word's half.
        layout, N = self.layout, self.out_features
        if self.in_features % layout.block:
            x = F.pad(x, (0, -self.in_features % layout.block))
        x_hpBw = x.unflatten(-1, (-1, layout.per_half, layout.halves // 2, 2)).movedim(-1, -4).transpose(-3, -2)
        shifts = torch.arange(0, 32, layout.bits, dtype=torch.int32, device=x.device).view(-1, 1, 1)
        codes = self.data.view(N, 1, -1, layout.halves // 2) >> shifts & (2**layout.bits - 1)  # [N, h and p, B, w]
        scale, zero = (None if t is None else self._spread(t) for t in (self.scale, self.zero))
        weight = self.decode(codes.view(N, 2, scale.shape[2], -1, *codes.shape[2:]), scale, zero)
        if torch.compiler.is_compiling() and x.device.type == "cpu" and x[..., 0].numel() == 1:
            # As in `model.Linear`: one pass over the matrix. The compiler inlines how an operand comes about and would
            # sort x anew for every row, but what `as_strided` looks at it has to write out.
            x_hpBw = x_hpBw.float().flatten().as_strided((x.numel(),), (1,)).view(weight.shape[1:])
            y = (weight * x_hpBw).flatten(1).sum(1)
            y = y if self.bias is None else y + self.bias.float()
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        return F.linear(x_hpBw.flatten(-4), weight.to(x.dtype).flatten(1), self.bias)

    def _spread(self, scale: Tensor) -> Tensor:
        """A row's scales [N] or [N, G] in the order of the planes: [N, 1, planes with their own, 1, blocks, 1]."""
        if not self.group:
            return scale.view(-1, 1, 1, 1, 1, 1)
        own = self.layout.block // self.group
        if scale.shape[1] % own:
            scale = F.pad(scale, (0, -scale.shape[1] % own))
        return scale.view(len(scale), 1, -1, own, 1, 1).transpose(2, 3).transpose(3, 4)

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


class Int8Linear(_ByteLinear):
    """Integers of 8 bits with one scale a row."""

    format = "int8"

    def quantize(self, weight: Tensor) -> Codes:
        return round_int8(weight)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return (codes.float() - 128) * scale


class Fp8Linear(_ByteLinear):
    """Floats of 8 bits (e4m3) with one scale a row."""

    format = "fp8"

    def quantize(self, weight: Tensor) -> Codes:
        return round_fp8(weight)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        # Sign, exponent and mantissa moved to where fp32 has them, subnormals included; the exponents' biases differ
        # by 120. Unlike a cast of torch's, this compiles to vector instructions.
        codes = codes.to(torch.int32)
        bits = (codes & 128) << 24 | (codes & 127) << 20
        return bits.view(torch.float32) * 2.0**120 * scale


class Int4Linear(QuantizedLinear):
    """Integers of 4 bits; `group` neighbours along K share a scale and, where not `symmetric`, a zero."""

    format = "int4"
    layout = NIBBLES

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        group: int = 128,
        symmetric: bool = True,
    ) -> None:
        if group not in GROUPS:
            raise ValueError(f"a group has {', '.join(map(str, GROUPS))} weights; got {group}")
        if in_features % group:
            raise ValueError(
                f"a row has {in_features} weights, which groups of {group} do not divide; use smaller ones"
            )
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.group = group
        self.register_buffer("scale", torch.empty(out_features, in_features // group, dtype=dtype))
        if not symmetric:
            self.zero = torch.empty(out_features, in_features // group, dtype=dtype)

    def quantize(self, weight: Tensor) -> Codes:
        return round_int4(weight, group=self.group, symmetric=self.zero is None, dtype=self.scale.dtype)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return (codes.float() - (8.0 if zero is None else zero.float())) * scale.float()


# ---- Which linears --------------------------------------------------------------------------------------------------


class Storage(NamedTuple):
    """How one linear is stored."""

    format: str  # "int8" | "int4" | "fp8", or "float": in the model's dtype
    group: int = 0  # 4 bits only


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model's linears are stored. Embedding, norms and biases stay in the model's dtype."""

    format: str  # "int8" | "int4" | "fp8": the linears of every layer
    head: str  # the head, which decides the next token and gains little from 4 bits
    method: str = "rtn"  # what chose the codes; the layout does not depend on it
    group_size: int = 128  # 4 bits: how many neighbours share a scale, at most
    symmetric: bool = True  # 4 bits: without zeros of their own
    exceptions: Mapping[str, Storage] = field(default_factory=dict)  # by linear; what a checkpoint found to be so

    def __str__(self) -> str:
        """In a word, as figures and messages name it: "int8", "int4", "int4-g64-asymmetric", "gptq-int4"."""
        words = [self.format] if self.method == "rtn" else [self.method, self.format]
        if self.format == "int4":
            words += [f"g{self.group_size}"] if self.group_size != 128 else []
            words += [] if self.symmetric else ["asymmetric"]
        return "-".join(words)

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
        format = self.head if name == "head" else self.format
        if format != "int4":
            return Storage(format)
        group = next((size for size in GROUPS if size <= self.group_size and K % size == 0), None)
        return Storage("int8") if group is None else Storage("int4", group)

    def linear(self, name: str, linear: Linear, dtype: torch.dtype) -> QuantizedLinear | Linear:
        """What takes the place of the model's `linear` called `name`; ValueError where it cannot be packed."""
        K, N, bias = linear.in_features, linear.out_features, linear.bias is not None
        format, group = self.storage(name, K)
        if format == "float":
            return linear
        if format == "int4":
            return Int4Linear(K, N, bias=bias, dtype=dtype, group=group, symmetric=self.symmetric)
        return (Fp8Linear if format == "fp8" else Int8Linear)(K, N, bias=bias, dtype=dtype)


RECIPES = {
    "int8": Recipe(format="int8", head="int8"),
    "int4": Recipe(format="int4", head="int8"),
    "fp8": Recipe(format="fp8", head="fp8"),
}


def quantize_model(model: Transformer, recipe: Recipe, *, dtype: torch.dtype) -> None:
    """Replace the linears of a meta-device model by empty quantized ones, whose model's dtype is `dtype`.

    A linear that the recipe has as "float" stays. A tied head that does not becomes a matrix of its own, beside the
    embedding.
    """
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    with torch.device("meta"):
        for name, linear in linears:
            model.set_submodule(name, recipe.linear(name, linear, dtype))
