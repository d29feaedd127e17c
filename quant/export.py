"""Quantized linears in GPTQ's files, which transformers, vLLM and GPTQModel load: what `foreign.py` reads, written.

The codes are ours, unchanged. Such a file has one width and one group size for all, so groups that are larger than the
smallest repeat their scale; scales take fp16. What it cannot hold is refused by its name, from the recipe alone, so
that it can be before any work.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hf_config import hf_modules
from quant.linears import BYTES, GROUPED, NIBBLES, Storage

FORMATS = ("gptq",)


class Scheme(NamedTuple):
    """How a model's linears are exported."""

    bits: int
    group_size: int  # -1: one scale a row
    symmetric: bool
    storages: Mapping[str, Storage]  # by a checkpoint's module

    @property
    def config(self) -> dict:
        """`quantization_config` of a config.json, and the whole quantize_config.json."""
        raw = {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": False,
            "true_sequential": True,
            "lm_head": False,
            # Zeros minus 1 have no place for a zero of 0, and GPTQModel takes asymmetric ones only as they are.
            "checkpoint_format": "gptq" if self.symmetric else "gptq_v2",
            "pack_dtype": "int32",
        }
        left = [name for name, storage in self.storages.items() if storage.format == "float" and name != "lm_head"]
        return raw | ({"dynamic": {f"-:^{re.escape(name)}$": {} for name in left}} if left else {})

    def tensors(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors in our layout, all those of a linear among them, as GPTQ's."""
        exported = {}
        for name, tensor in rows.items():
            module, _, kind = name.rpartition(".")
            if kind == "data":
                packed = self._pack(self.storages[module], tensor, rows[f"{module}.scale"], rows.get(f"{module}.zero"))
                exported |= {f"{module}.{kind}": each for kind, each in packed.items()}
            elif kind not in ("scale", "zero"):
                exported[name] = tensor
        return exported

    def _pack(self, storage: Storage, data: Tensor, scale: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
        """What `foreign._gptq` reads, for data int32 [N, W], scale [N] or [N, G], and zero [N, G]."""
        grouped = storage.format in GROUPED
        scale = scale if grouped else scale[:, None]  # [N, G]
        K = scale.shape[1] * storage.group if grouped else data.shape[1] * 4
        codes = NIBBLES.unpack(data, K) if grouped else BYTES.unpack(data, K) ^ 128  # [N, K]
        zero = torch.full_like(scale, 2 ** (self.bits - 1)) if zero is None else zero
        size = self.group_size if grouped else K
        repeats = K // size // scale.shape[1]
        scales, zeros = (t.repeat_interleave(repeats, 1).t().contiguous() for t in (scale, zero))  # [G, N]
        qzeros = _pack_words(zeros.to(torch.uint8), self.bits)
        if self.symmetric:
            qzeros = qzeros - (0x11111111 if self.bits == 4 else 0x01010101)
        return {
            "qweight": _pack_words(codes, self.bits).t().contiguous(),  # [K / P, N]
            "qzeros": qzeros,  # [G, N / P]
            "scales": scales.to(torch.float16),
            "g_idx": torch.arange(K, dtype=torch.int32) // size,
        }


def gptq_scheme(storages: Mapping[str, Storage], rows: Mapping[str, int], *, symmetric: bool) -> Scheme:
    """How linears that are stored so, with so many rows, are exported; ValueError for what GPTQ's files cannot hold.

    Both are by the name of a checkpoint's module.
    """
    kept = {name: storage for name, storage in storages.items() if storage.format != "float"}
    first, usual = next((name, storage) for name, storage in kept.items())
    for name, storage in kept.items():
        if name == "lm_head" or storage.format not in (*GROUPED, "int8"):
            what = "quantized head" if name == "lm_head" else storage.format
            raise ValueError(f"GPTQ's files hold no {what}: leave out {name}, as --exclude does")
        if (storage.format in GROUPED) != (usual.format in GROUPED):
            raise ValueError(
                f"GPTQ's files have one width, but {first} has {usual.format} and {name} {storage.format}; "
                "exclude one of them"
            )
        if rows[name] % 8:
            raise ValueError(f"GPTQ's files pack 8 rows in a word, and {name} has {rows[name]}; exclude it")
    if usual.format not in GROUPED:
        return Scheme(8, -1, True, storages)
    return Scheme(4, min(storage.group for storage in kept.values()), symmetric, storages)


def by_module(storages: Mapping[str, Storage]) -> dict[str, Storage]:
    """Storages by our names of linears, by the names of a checkpoint's modules."""
    return {part: storage for name, storage in storages.items() for part in hf_modules(name)}


def _pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [R, n] -> int32 [R, n * bits / 32], the first code in the lowest bits of a word."""
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return codes.flatten().view(torch.int32).view(len(codes), -1)
