"""Checkpoints that other libraries quantized, in GPTQ's, AWQ's and compressed-tensors' files, for our own layout.

Two things are made of them: a `Recipe`, from the names, shapes and zero points of what is stored, and a stream in which
a matrix comes as one `Packed`, whatever tensors it is stored in. No code is ever rounded again. A matrix that our
layout cannot hold (inputs that are grouped by a permutation, 8 bits with several scales a row) becomes floats, which
the user is told. What changes the weights' meaning and is not known is refused by its name.

The one idea: the stored tensors say how each linear is quantized, not the config's lists of what to ignore. A decoder
is a function of tensors; given some without data, it says what a matrix will be.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hf_config import our_module
from quant.linears import GROUPS, Codes, QuantizedLinear, Recipe, Storage

log = logging.getLogger("tachyon")

# Small tensors whose values decide on the layout, by the last part of their names; shapes are enough of the others.
DECISIVE = ("qzeros", "g_idx", "weight_zero_point", "weight_g_idx", "weight_shape")

_REMEDY = "choose another checkpoint, or quantize the unquantized one with quantize.py"


class Matrix(NamedTuple):
    """A quantized matrix [N, K] as it was stored: weight = scale * (code - zero), or scale * e4m3(code)."""

    format: str  # "int4" | "int8" | "fp8"
    codes: Tensor  # uint8 [N, K]
    scale: Tensor  # [N, G]
    zero: Tensor | None = None  # [N, G], uint8 or, between codes, fp32; None: the middle code
    group_of: Tensor | None = None  # int [K]: whose scale an input has; None: K / G neighbours share one

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes.shape)

    @property
    def middle(self) -> int:
        return 8 if self.format == "int4" else 128

    @property
    def centred(self) -> bool:
        """Whether the middle code always means 0."""
        return self.zero is None or bool((self.zero == self.middle).all())

    def storage(self) -> Storage:
        """How our layout holds this matrix; "float" where it cannot. ValueError for scales that do not fit K."""
        K, G = self.codes.shape[1], self.scale.shape[1]
        if K % G:
            if self.group_of is None:
                raise ValueError(f"{G} scales do not divide a row of {K} weights")
            return Storage("float")
        if self.format != "int4":
            return Storage(self.format if G == 1 and self.centred and K % 16 == 0 else "float")
        neighbours = G == 1 or self.group_of is None or torch.equal(self.group_of.long(), torch.arange(K) // (K // G))
        group = next((size for size in GROUPS if (K // G) % size == 0), 0)  # larger groups repeat their scales
        return Storage("int4", group) if neighbours and group else Storage("float")

    def pack(self, linear: QuantizedLinear) -> Codes:
        """What `linear`, as the recipe has it, stores for these rows."""
        if not linear.group:
            return Codes(self.codes, self.scale[:, 0])
        repeats = self.codes.shape[1] // linear.group // self.scale.shape[1]
        zero = None
        if linear.zero is not None:
            zero = torch.full_like(self.scale, self.middle) if self.zero is None else self.zero
            zero = zero.repeat_interleave(repeats, 1)
        return Codes(self.codes, self.scale.repeat_interleave(repeats, 1), zero)

    def dequantize(self) -> Tensor:
        """The matrix itself, fp32 [N, K]."""
        K, G = self.codes.shape[1], self.scale.shape[1]
        group_of = self.group_of
        if group_of is None or G == 1:
            group_of = torch.arange(K, device=self.codes.device) // (K // G)
        if self.format == "fp8":
            values = self.codes.view(torch.float8_e4m3fn).float()
        else:
            values = self.codes.float()
            values -= self.middle if self.zero is None else self.zero.float()[:, group_of]
        return values.mul_(self.scale.float()[:, group_of])


# ---- Decoders --------------------------------------------------------------------------------------------------------
# Each takes a matrix's tensors, by the last part of their names, on any device and also without data. On the meta
# device only operations are used that do not make torch import its compiler, which takes seconds.

Decoder = Callable[[Mapping[str, Tensor]], Matrix]


def _take(tensors: Mapping[str, Tensor], required: Mapping[str, tuple], optional: Iterable[str] = ()) -> list[Tensor]:
    """The required tensors, in order; ValueError for one that is missing or of another type, and for unknown ones."""
    for kind, dtypes in required.items():
        if kind not in tensors:
            raise ValueError(f"{kind} is missing")
        if tensors[kind].dtype not in dtypes:
            raise ValueError(f"{kind} is stored as {tensors[kind].dtype}, which is not read; {_REMEDY}")
    if unknown := sorted(tensors.keys() - required.keys() - set(optional)):
        raise ValueError(f"{', '.join(unknown)} would be left over; {_REMEDY}")
    return [tensors[kind] for kind in required]


_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_INT32 = (torch.int32,)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [R, W] -> uint8 [R, W, 32 / bits], the lowest bits of a word first."""
    if words.is_meta:
        return words.new_empty((*words.shape, 32 // bits), dtype=torch.uint8)
    bytes = words.contiguous().view(torch.uint8).unflatten(1, (-1, 4))
    return bytes if bits == 8 else torch.stack((bytes & 15, bytes >> 4), -1).flatten(2)


def _gptq(tensors: Mapping[str, Tensor], *, less_one: bool) -> Matrix:
    """Codes packed along K, int32 [K / P, N]; zeros packed along N, [G, N / P]; scales [G, N]; g_idx [K].

    `less_one`: the zeros are stored minus 1. That is taken from whole words, as GPTQModel and what it wrote has it, so
    that a zero of 0 borrows from the next.
    """
    required = {"qweight": _INT32, "qzeros": _INT32, "scales": _FLOATS}
    qweight, qzeros, scales = _take(tensors, required, optional=("g_idx",))
    bits = _bits(32 * qzeros.shape[1], scales.shape[1])
    if less_one:
        qzeros = qzeros + (0x11111111 if bits == 4 else 0x01010101)
    codes = _unpack(qweight.t(), bits).flatten(1)  # [N, K / P, P] -> [N, K]
    zero = _unpack(qzeros, bits).flatten(1).t()
    return Matrix(f"int{bits}", codes, scales.t(), zero, tensors.get("g_idx"))


_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble of a word that holds output 0, 1, ... of eight


def _awq(tensors: Mapping[str, Tensor]) -> Matrix:
    """Codes packed along N, int32 [K, N / 8], and zeros likewise, [G, N / 8]; scales [G, N]."""
    qweight, qzeros, scales = _take(tensors, {"qweight": _INT32, "qzeros": _INT32, "scales": _FLOATS})
    _bits(32 * qzeros.shape[1], scales.shape[1], (4,))

    def outputs(words: Tensor) -> Tensor:
        return _unpack(words, 4)[..., _AWQ_PLACES].flatten(1).t()  # [N, K] or [N, G]

    return Matrix("int4", outputs(qweight).contiguous(), scales.t(), outputs(qzeros))


def _compressed(tensors: Mapping[str, Tensor]) -> Matrix:
    """Codes packed along K, int32 [N, K / P], or int8 or e4m3 ones [N, K]; scales [N, G], or one for all.

    Integers are signed: 0 is stored where packed as the middle code. Zeros, [N, G], are int8 or packed along N.
    """
    optional = ("weight_zero_point", "weight_g_idx")
    if "weight" in tensors:
        weight, scale = _take(tensors, {"weight": (torch.int8, torch.float8_e4m3fn), "weight_scale": _FLOATS}, optional)
        bits, format = 8, "int8" if weight.dtype == torch.int8 else "fp8"
        codes = weight.view(torch.uint8)
        if format == "int8" and not codes.is_meta:
            codes = codes ^ 128  # two's complement to the distance from the least
    else:
        required = {"weight_packed": _INT32, "weight_scale": _FLOATS, "weight_shape": (torch.int64, torch.int32)}
        packed, scale, shape = _take(tensors, required, optional)
        bits = _bits(32 * packed.shape[1], int(shape[1]))
        format, codes = f"int{bits}", _unpack(packed, bits).flatten(1)
    N = len(codes)
    scale = scale.expand(N, 1) if scale.numel() == 1 else scale.view(N, -1)
    zero, group_of = (tensors.get(kind) for kind in optional)
    if zero is not None and zero.dtype == torch.int32:
        zero = _unpack(zero.t(), bits).flatten(1)[:, :N].t()
    elif zero is not None and format != "fp8":
        zero = zero.to(torch.int16).add(2 ** (bits - 1)).to(torch.uint8).expand(N, -1)
    else:
        zero = None
    if group_of is not None and (group_of < 0).any():  # was never filled
        group_of = None
    return Matrix(format, codes, scale, zero, group_of)


def _bits(stored: int, values: int, known: tuple[int, ...] = (4, 8)) -> int:
    bits = stored / values
    if bits not in known:
        raise ValueError(f"weights have {bits:g} bits; those of {' or '.join(map(str, known))} are read; {_REMEDY}")
    return int(bits)


# ---- What a config says ----------------------------------------------------------------------------------------------


class _Scheme(NamedTuple):
    scale: str  # the tensor that every quantized matrix has, by the last part of its name
    decode: Decoder


def _expect(raw: Mapping, key: str, *known: object) -> None:
    if raw.get(key) not in known:
        values = " or ".join(repr(value) for value in known if value is not None)
        raise ValueError(f"{key} is {raw.get(key)!r}, and only {values} is read; {_REMEDY}")


def _read_gptq(raw: Mapping) -> _Scheme:
    _expect(raw, "bits", None, 4, 8)
    _expect(raw, "checkpoint_format", None, "gptq", "gptq_v2")
    _expect(raw, "is_marlin_format", None, False)
    return _Scheme("scales", partial(_gptq, less_one=raw.get("checkpoint_format") != "gptq_v2"))


def _read_awq(raw: Mapping) -> _Scheme:
    _expect(raw, "bits", None, 4)
    _expect({"version": str(raw.get("version", "gemm")).lower()}, "version", "gemm")
    return _Scheme("scales", _awq)


def _read_compressed(raw: Mapping) -> _Scheme:
    """Inputs that are to be quantized as they come stay as they are; scales fixed for them beforehand are refused."""
    formats = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    _expect(raw, "format", *formats, "mixed-precision")
    for key in ("kv_cache_scheme", "transform_config"):
        if raw.get(key):
            raise ValueError(f"it has a {key}, which is not read; {_REMEDY}")
    sparsity = raw.get("sparsity_config") or {}
    _expect(sparsity, "format", None, "dense")
    for name, group in (raw.get("config_groups") or {}).items():
        if not isinstance(group, dict):
            raise ValueError(f"config_groups.{name} is {group!r}, which is not read; {_REMEDY}")
        _expect(group, "format", None, *formats)
        weights = group.get("weights") or {}
        _expect(weights, "num_bits", None, 4, 8)
        _expect(weights, "strategy", None, "tensor", "channel", "group")
        for kind in ("input_activations", "output_activations"):
            if group.get(kind) and group[kind].get("dynamic") is not True:
                raise ValueError(f"{kind} of config_groups.{name} are quantized with fixed scales; {_REMEDY}")
    return _Scheme("weight_scale", _compressed)


_READERS: dict[str, Callable[[Mapping], _Scheme]] = {
    "gptq": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed,
}
METHODS = tuple(_READERS)  # values of `quant_method`


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """A matrix's tensors, still as they are stored."""

    decode: Decoder
    tensors: Mapping[str, Tensor]

    def matrix(self, device: torch.device) -> Matrix:
        return self.decode({kind: tensor.to(device) for kind, tensor in self.tensors.items()})


@dataclass(frozen=True)
class Foreign:
    """How another library quantized a checkpoint."""

    recipe: Recipe
    kinds: Mapping[str, frozenset[str]]  # a quantized module's name -> the tensors of its matrix
    decode: Decoder

    def gather(self, stored: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor | Packed]]:
        """The stored tensors, with those of a quantized matrix as one `Packed`, by the name of its weight."""
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in stored:
            module, _, kind = name.rpartition(".")
            if kind not in self.kinds.get(module, ()):
                yield name, tensor
                continue
            tensors = waiting.setdefault(module, {})
            tensors[kind] = tensor
            if tensors.keys() == self.kinds[module]:
                yield f"{module}.weight", Packed(self.decode, waiting.pop(module))


def read_foreign(raw: Mapping, file: Path, stored: Mapping[str, Tensor]) -> Foreign:
    """What `quantization_config`, of a method in METHODS, and the `stored` tensors say; `file` is for messages.

    Of those only `DECISIVE` ones need data, the others may be on the meta device. ValueError for what is not read.
    """
    method = raw["quant_method"]
    try:
        scheme = _READERS[method](raw)
    except ValueError as error:
        raise ValueError(f"{file}: {method}: {error}") from None
    tensors: dict[str, dict[str, Tensor]] = {}
    plain: list[str] = []
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if f"{module}.{scheme.scale}" in stored and kind != "bias":
            tensors.setdefault(module, {})[kind] = tensor
        elif kind == "weight":
            plain.append(module)
    storages, symmetric = {module: Storage("float") for module in plain}, True
    for module, some in tensors.items():
        try:
            matrix = scheme.decode(some)
            storages[module] = matrix.storage()
        except ValueError as error:
            raise ValueError(f"{file.parent}: {module}: {error}") from None
        symmetric = symmetric and (storages[module].format != "int4" or matrix.centred)
    recipe = recipe_of(method, storages, symmetric=symmetric)
    _tell(file.parent, recipe, tensors)
    return Foreign(recipe, {module: frozenset(some) for module, some in tensors.items()}, scheme.decode)


def recipe_of(method: str, storages: Mapping[str, Storage], *, symmetric: bool) -> Recipe:
    """Modules of a checkpoint and how each is to be stored, as a recipe that has all linears as exceptions."""
    parts: dict[str, list[Storage]] = {}
    for module, storage in storages.items():
        ours = our_module(module) or ""
        if ours.rpartition(".")[2] in ("qkv", "o", "gate_up", "down", "head"):
            parts.setdefault(ours, []).append(storage)
    linears = {name: _together(some) for name, some in parts.items()}
    usual, _ = Counter(storage for name, storage in linears.items() if name != "head").most_common(1)[0]
    head = linears.setdefault("head", Storage("float"))  # not stored: the embedding's
    return Recipe(
        format=usual.format,
        head=head.format,
        method=method,
        group_size=usual.group or 128,
        symmetric=symmetric,
        exceptions=linears,
    )


def _together(parts: Iterable[Storage]) -> Storage:
    """How parts of one fused matrix are stored: alike, in the smallest groups, or as floats."""
    formats = {storage.format for storage in parts}
    return Storage(formats.pop(), min(storage.group for storage in parts)) if len(formats) == 1 else Storage("float")


def _tell(directory: Path, recipe: Recipe, quantized: Iterable[str]) -> None:
    floats = [module for module in quantized if recipe.exceptions.get(our_module(module), recipe).format == "float"]
    if floats:
        log.warning(
            "%s: %d matrices become floats, %s among them: the layouts here have no act order, no 8 bits in groups or "
            "with zeros, no groups that 32 does not divide, and one format for matrices that are fused",
            directory,
            len(floats),
            floats[0],
        )
