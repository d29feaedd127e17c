"""Reads a GGUF file: metadata, model config, and weights under Hugging Face's names.

GGUF is llama.cpp's single-file format: a header of typed key/values, a table of tensors, then their bytes. The header
is parsed here because the `gguf` library's reader keeps several numpy objects per string, which takes seconds for a
vocabulary; the library still gives the type table and the dequantization. Every offset is checked against the file's
length before anything is read, so a file cut short is named instead of crashing. Matrices of 4 bits that our layout
holds exactly are given as their codes, other types as floats. This file knows the format and its conventions (permuted
q/k rows, rope factors stored as a tensor) and nothing of how the weights are multiplied.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from hf_config import our_module
from model import ModelConfig, RopeScaling, rope_frequencies
from quant.foreign import Matrix, Packed, recipe_of
from quant.linears import Recipe, Storage

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
_PERMUTED = ("llama", "smollm3")  # llama.cpp's converter reorders q/k rows for interleaved rotary embedding

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # type id: struct
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]  # rows first, as torch has it; the file stores the reverse
    kind: GGMLQuantizationType
    offset: int  # from the start of the file
    nbytes: int


class _Cursor:
    """Reads little-endian values from a buffer, one after the other; running off its end is a struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.pos = data, 0

    def scalar(self, code: str) -> int | float | bool:
        (value,) = struct.unpack_from("<" + code, self.data, self.pos)
        self.pos += struct.calcsize(code)
        return value

    def take(self, size: int) -> bytes:
        if self.pos + size > len(self.data):
            raise struct.error("past the end")
        self.pos += size
        return self.data[self.pos - size : self.pos]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            return np.frombuffer(self.take(count * struct.calcsize(_SCALARS[item])), "<" + _SCALARS[item]).tolist()
        return [self.value(item) for _ in range(count)]


class GGUFFile:
    """An open GGUF file: `metadata` and `infos` are read at once, tensors one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file: it does not start with 'GGUF'; download it again")
            # Copy-on-write, so that torch may view the pages; nothing here writes to them.
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.metadata: dict[str, object] = {}
        self.infos: dict[str, TensorInfo] = {}
        try:
            self._read_header(_Cursor(self._data))
        except struct.error:
            raise ValueError(f"{path} is cut short: its header ends early; download it again") from None
        except KeyError as error:
            raise ValueError(
                f"{path} is damaged: unknown value type {error} in its header; download it again"
            ) from None

    def _read_header(self, cursor: _Cursor) -> None:
        cursor.take(4)  # the magic
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise ValueError(
                f"{self.path} has GGUF version {version}; little-endian versions 2 and 3 are read: convert it again"
            )
        n_tensors, n_values = cursor.scalar("Q"), cursor.scalar("Q")
        for _ in range(n_values):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        entries = []
        for _ in range(n_tensors):
            name = cursor.string()
            shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
            entries.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
        alignment = int(self.metadata.get("general.alignment", 32)) or 32
        start = -(-cursor.pos // alignment) * alignment
        for name, shape, kind, offset in entries:
            self.infos[name] = self._info(name, shape, kind, start + offset)

    def _info(self, name: str, shape: tuple[int, ...], kind_id: int, offset: int) -> TensorInfo:
        supported = (*_FLOATS, *_QUANTIZED)
        if kind_id not in set(GGMLQuantizationType):
            raise ValueError(f"{self.path}: {name} has the unknown type {kind_id}; supported: {', '.join(supported)}")
        kind = GGMLQuantizationType(kind_id)
        if kind.name not in supported:
            raise ValueError(f"{self.path}: {name} is stored as {kind.name}; supported: {', '.join(supported)}")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        n = 1
        for size in shape:
            n *= size
        if not shape or shape[-1] % block:
            raise ValueError(f"{self.path}: {name} {list(shape)} does not divide into {kind.name} blocks of {block}")
        nbytes = n // block * block_bytes
        if offset + nbytes > len(self._data):
            raise ValueError(
                f"{self.path} is cut short: {name} ends at byte {offset + nbytes:,} of {len(self._data):,}; "
                "download it again"
            )
        return TensorInfo(shape, kind, offset, nbytes)

    def _bytes(self, name: str) -> np.ndarray:
        info = self.infos[name]
        return np.frombuffer(self._data, np.uint8, info.nbytes, info.offset)

    def blocks(self, name: str) -> Tensor:
        """A quantized matrix [N, K] as it is stored, uint8 [N, blocks in a row, bytes]."""
        info = self.infos[name]
        return torch.from_numpy(self._bytes(name)).view(info.shape[0], -1, GGML_QUANT_SIZES[info.kind][1])

    def read(self, name: str) -> Tensor:
        """The tensor, dequantized to fp32 if it is quantized and in its own type if not."""
        info, raw = self.infos[name], self._bytes(name)
        if info.kind.name in _FLOATS:
            return torch.from_numpy(raw).view(_FLOATS[info.kind.name]).view(info.shape)
        # The library's `dequantize` goes 16 rows at a time; thousands of blocks at once are several times faster.
        quant = getattr(quants, info.kind.name)
        blocks = raw.reshape(-1, quant.type_size)
        out = np.empty((len(blocks), quant.block_size), np.float32)
        for i in range(0, len(blocks), 4096):
            out[i : i + 4096] = quant.dequantize_blocks(blocks[i : i + 4096])
        return torch.from_numpy(out).view(info.shape)


def model_config(file: GGUFFile) -> ModelConfig:
    arch = str(file.metadata.get("general.architecture"))
    if arch not in _ARCHITECTURES:
        raise ValueError(f"{file.path} has architecture {arch!r}; supported in GGUF: {', '.join(_ARCHITECTURES)}")

    def number(key: str, default: float | None = None, *, least: float = 1) -> float:
        value = file.metadata.get(f"{arch}.{key}", default)
        values = value if isinstance(value, list) else [value]  # some keys may have one value per layer
        if not values or value is None:
            raise ValueError(f"{file.path} has no {arch}.{key} in its metadata; convert the model again")
        if any(other != values[0] for other in values):
            raise ValueError(f"{file.path}: {arch}.{key} differs between layers, {value}; that is not supported")
        if not isinstance(values[0], int | float) or not values[0] >= least:
            raise ValueError(f"{file.path}: {arch}.{key} is {values[0]!r}; it must be a number of at least {least}")
        return values[0]

    def size(key: str, default: int | None = None, *, least: int = 1) -> int:
        return int(number(key, default, least=least))

    if file.metadata.get("split.count", 1) > 1:
        raise ValueError(f"{file.path} is one part of a split GGUF; merge the parts with llama-gguf-split --merge")
    if experts := size("expert_count", 0, least=0):
        raise ValueError(f"{file.path} is a mixture of {experts} experts; only dense models are supported")
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in file.infos:
            raise ValueError(f"{file.path} has no tensor {name}: it is not a whole language model")

    dim, n_layers, n_heads = size("embedding_length"), size("block_count"), size("attention.head_count")
    head_dim = size("attention.key_length", dim // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if size(key, head_dim) != head_dim:
            raise ValueError(f"{file.path}: {arch}.{key} {size(key)} must equal the head dim {head_dim}")
    window = size("attention.sliding_window", 0, least=0) or None
    # A Mistral model is a "llama" in GGUF; the window is the only thing that tells them apart.
    architecture = "MistralForCausalLM" if arch == "llama" and window else _ARCHITECTURES[arch]
    config = ModelConfig(
        architecture=architecture,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=size("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        ffn_dim=size("feed_forward_length"),
        vocab_size=file.infos["token_embd.weight"].shape[0],
        max_seq_len=size("context_length"),
        norm_eps=number("attention.layer_norm_rms_epsilon", least=0),
        rope_theta=number("rope.freq_base", 10000.0),
        no_rope_layers=tuple(range(3, n_layers, 4)) if arch == "smollm3" else (),
        sliding_window=window,
        sliding_layers=tuple(range(n_layers)) if window else (),
        qkv_bias="blk.0.attn_q.bias" in file.infos,
        o_bias="blk.0.attn_output.bias" in file.infos,
        ffn_bias="blk.0.ffn_gate.bias" in file.infos,
        qk_norm="blk.0.attn_q_norm.weight" in file.infos,
        tied_head="output.weight" not in file.infos,
    )
    kind = file.metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"{file.path} has rope scaling {kind!r}; supported: none, linear, llama3")
    if kind == "linear":
        scaling = RopeScaling(kind="linear", factor=number("rope.scaling.factor"))
        config = replace(config, rope_scaling=scaling)
    return _with_llama3_scaling(file, config)


def _with_llama3_scaling(file: GGUFFile, config: ModelConfig) -> ModelConfig:
    """Llama 3.1's rope scaling is stored as what divides each frequency: find the rule that gives these numbers."""
    if "rope_freqs.weight" not in file.infos:
        return config
    factors = file.read("rope_freqs.weight").float()  # [D/2]
    scaling = RopeScaling(kind="llama3", factor=float(factors.max()))
    scaled = replace(config, rope_scaling=scaling)
    expected = rope_frequencies(replace(config, rope_scaling=None)) / rope_frequencies(scaled)
    if config.rope_scaling or factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
        raise ValueError(f"{file.path}: rope_freqs.weight is not Llama 3's scaling from 8192 tokens; not supported")
    return scaled


def recipe(file: GGUFFile, config: ModelConfig) -> Recipe | None:
    """How the file's linears are stored, in types that our layouts hold exactly; None if none is.

    A tied head is the embedding's matrix, kept twice where that is quantized: as codes, and widened to look rows up.
    """
    storages, kinds = {}, set()
    for name, info in file.infos.items():
        module, _, suffix = _hf_name(name).rpartition(".")
        if name == "token_embd.weight" and config.tied_head:
            module = "lm_head"
        if suffix == "weight" and len(info.shape) == 2 and our_module(module) != "embed":
            kept = info.kind.name in _KEPT
            storages[module] = Storage("int4", 32) if kept else Storage("float")
            kinds |= {info.kind.name} if kept else set()
    found = recipe_of("gguf", storages, symmetric="Q4_1" not in kinds) if kinds else None
    return found if found and any(storage.format != "float" for storage in found.exceptions.values()) else None


def tensors(file: GGUFFile, config: ModelConfig, *, keep: bool) -> Iterator[tuple[str, Tensor | Packed]]:
    """Every weight under Hugging Face's name, one at a time; a name with no counterpart keeps its own.

    `keep`: a matrix of a type in `_KEPT` comes as its codes.
    """
    permuted = file.metadata["general.architecture"] in _PERMUTED
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    for name, info in file.infos.items():
        if name == "rope_freqs.weight":  # part of the config
            continue
        part = name.split(".")[-2]
        decode = _KEPT.get(info.kind.name) if keep and len(info.shape) == 2 else None
        tensor = file.read(name) if decode is None else file.blocks(name)
        if permuted and part in heads and tensor.shape[0] == heads[part] * config.head_dim:
            tensor = _unpermute(tensor, heads[part])
        yield _hf_name(name), tensor if decode is None else Packed(decode, {"blocks": tensor})


def _hf_name(name: str) -> str:
    *layer, part, suffix = name.split(".")  # "blk", "0", "attn_q", "weight"
    prefix = f"model.layers.{layer[1]}." if len(layer) == 2 else ""
    return f"{prefix}{_NAMES[part]}.{suffix}" if part in _NAMES else name


def _q4_0(tensors: Mapping[str, Tensor]) -> Matrix:
    """Blocks of 32 weights d * (q - 8): d in fp16, then the q of weight i and i + 16 in byte i."""
    blocks = tensors["blocks"]
    return Matrix("int4", _nibbles(blocks[..., 2:]).flatten(1), _halves(blocks[..., :2])[..., 0])


def _q4_1(tensors: Mapping[str, Tensor]) -> Matrix:
    """Blocks of 32 weights d * q + m: d and m in fp16, then the q as in Q4_0. Zeros are -m / d, between codes.

    A block with steps so small that fp16 cannot hold its zero is m wherever fp16 could tell: it is taken as a constant.
    """
    blocks = tensors["blocks"]
    (scale, least), codes = _halves(blocks[..., :4]).unbind(-1), _nibbles(blocks[..., 4:])
    zero = -least / scale
    constant = ~(zero.abs() <= 65504)  # also where d is 0
    codes = codes.masked_fill(constant[..., None], 0).flatten(1)
    return Matrix("int4", codes, torch.where(constant, least + 7.5 * scale, scale), zero.masked_fill(constant, -1))


_KEPT = {"Q4_0": _q4_0, "Q4_1": _q4_1}  # types that are `int4` in groups of 32


def _halves(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16).float()


def _nibbles(data: Tensor) -> Tensor:
    return torch.cat((data & 15, data >> 4), -1)


def _unpermute(tensor: Tensor, n_heads: int) -> Tensor:
    """Undo the converter's split of each head's rows: pairs (2i, 2i + 1) become (i, i + D/2)."""
    rows = tensor.unflatten(0, (n_heads, -1, 2))  # [heads, D/2, 2, ...]
    return rows.transpose(1, 2).reshape(tensor.shape)
