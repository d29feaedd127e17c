"""Key/value caches behind one protocol.

A cache is a row of layer caches that a forward pass writes and attends over. Attention reads exactly the view of a
cache that it is handed, so its cost follows the live length and never the allocated one. Slots past a row's own
position are masked, so what a padded prompt, a rejected draft or an aborted answer left there is never read before it
is overwritten. The cache does not know tokens, lengths or requests: who holds those decides what to keep.

Here is the cache that has a row for each row of a batch; `paged.py` has the one whose rows are made of blocks.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import hardware
from kernels.codes import decode, encode

KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # what a cache can be stored in beside the model's dtype


def check_kv_dtype(kv_dtype: str | None, device: torch.device) -> None:
    """ValueError where a cache cannot be stored so on this device."""
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise ValueError(f"a cache cannot be stored in {kv_dtype}; there are {', '.join(KV_DTYPES)}")
    if kv_dtype == "fp8" and not hardware.has_fp8(device):
        raise ValueError(f"{hardware.device_name(device)} has no fp8 numbers; take --kv-dtype int8")


class LayerCache(Protocol):
    """One layer's keys and values."""

    def write(self, k: Tensor, v: Tensor, input_pos: Tensor) -> None:
        """Store k, v [B, T, K, D] at positions input_pos [B, T]."""

    def attend(self, q: Tensor, mask: Any) -> Tensor:
        """Attention of q [B, T, H, D] over what is stored, as [B, T, H, D]; `mask` is one of what `masks` returned."""


class KVCache(Protocol):
    """What `Transformer.forward` needs of a cache."""

    layers: Sequence[LayerCache]

    def masks(self, input_pos: Tensor, window: int | None) -> tuple[Any, Any]:
        """Who sees what, for full and for sliding-window layers. The model hands it on to `LayerCache.attend` unseen:
        a static cache has tensors bool [B, 1, T, S], or None where attention is plainly causal, a paged one has lists.
        """


def masks_of(input_pos: Tensor, length: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Which of `length` slots tokens at input_pos [B, T] see, bool [B, 1, T, S]: `window` ones up to their own."""
    slot = torch.arange(length, device=input_pos.device)
    pos = input_pos[:, None, :, None]  # [B, 1, T, 1]
    mask = slot <= pos
    return mask, mask if window is None else mask & (slot > pos - window)


class StaticLayer:
    """Keys and values [B, S, K, D] of one layer."""

    k_scale = v_scale = None  # a quantized layer has them

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v
        self.dtype = k.dtype  # what keys and values are read as

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored, as `layer_of` takes it."""
        return self.k, self.v

    def narrow(self, length: int, rows: int | None) -> "StaticLayer":
        return StaticLayer(self.k[:rows, :length], self.v[:rows, :length])

    def write(self, k: Tensor, v: Tensor, input_pos: Tensor) -> None:
        self.put(torch.arange(k.shape[0], device=k.device)[:, None], input_pos, k, v)

    def put(self, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [..., K, D] in these slots of these rows, int64 [...]."""
        self.k[rows, slots] = k.to(self.k.dtype)
        self.v[rows, slots] = v.to(self.v.dtype)

    def attend(self, q: Tensor, mask: Tensor | None) -> Tensor:
        B, T, H, D = q.shape
        S, K = self.k.shape[1], self.k.shape[2]
        if T == 1 and mask is not None and torch.compiler.is_compiling() and q.device.type == "cpu":
            return self._attend_one(q, mask)
        k, v = (x.transpose(1, 2) for x in self._read(self.dtype))  # [B, K, S, D]
        if T == 1 and mask is not None:
            # A decoding token's G heads per key head become G rows of one head: keys are read once, unrepeated.
            y = F.scaled_dot_product_attention(q.view(B, K, H // K, D), k, v, attn_mask=mask)
            return y.reshape(B, 1, H, D)
        q = q.transpose(1, 2)  # [B, H, T, D]
        if mask is None and T != S:
            # By its own name, because SDPA's `is_causal` aligns the first query with the first key; this, the last.
            y = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)[0]
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return y.transpose(1, 2)  # [B, T, H, D]

    def _read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, K, D]."""
        return self.k.to(dtype), self.v.to(dtype)

    def _attend_one(self, q: Tensor, mask: Tensor) -> Tensor:
        """`attend` for one token in plain arithmetic, which the compiler fuses with what is around it on the CPU."""
        B, _, H, D = q.shape
        K, (k, v) = self.k.shape[2], self._read(torch.float32)
        q_BKGD = q.view(B, K, H // K, D).float() * D**-0.5
        scores = (q_BKGD[:, None] * k[:, :, :, None]).sum(-1)  # [B, S, K, G]
        scores = scores.masked_fill(~mask.view(B, -1, 1, 1), float("-inf"))
        y = (scores.softmax(1)[..., None] * v[:, :, :, None]).sum(1)  # [B, K, G, D]
        return y.to(q.dtype).view(B, 1, H, D)


class QuantizedLayer(StaticLayer):
    """Keys and values as codes of 8 bits [B, S, K, D], with a scale for each head of each token, fp32 [B, S, K].

    One decoding token reads them inside of its attention, by the kernels or compiled on the CPU, where dequantized keys
    and values are never in memory. Longer inputs, and eager, dequantize the view they attend over, a layer at a time.
    """

    def __init__(self, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__(k, v)
        self.k_scale, self.v_scale, self.dtype = k_scale, v_scale, dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k, self.v, self.k_scale, self.v_scale

    def narrow(self, length: int, rows: int | None) -> "QuantizedLayer":
        return QuantizedLayer(*(x[:rows, :length] for x in self.tensors), self.dtype)

    def put(self, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.k[rows, slots], self.k_scale[rows, slots] = encode(k, self.k.dtype)
        self.v[rows, slots], self.v_scale[rows, slots] = encode(v, self.v.dtype)

    def _read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return decode(self.k, self.k_scale, dtype), decode(self.v, self.v_scale, dtype)


def layer_of(tensors: Sequence[Tensor], dtype: torch.dtype) -> StaticLayer:
    """The layer that stores `tensors` and is read as `dtype`."""
    return StaticLayer(*tensors) if len(tensors) == 2 else QuantizedLayer(*tensors, dtype)


def layers_of(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[StaticLayer]:
    """The layers that tensors [n_layers, ...] store."""
    return [layer_of(layer, dtype) for layer in zip(*tensors, strict=True)]


def new_storage(
    *,
    n_layers: int,
    batch: int,
    max_seq_len: int,
    n_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    kv_dtype: str | None = None,
) -> list[Tensor]:
    """Memory for the keys and values of every layer, in the model's `dtype` or in one of `KV_DTYPES`."""
    shape = 2, n_layers, batch, max_seq_len, n_kv_heads, head_dim
    # Zeros, not empty: a masked slot still meets the softmax's zero weight, and 0 * NaN is NaN.
    tensors = [*torch.zeros(shape, dtype=dtype if kv_dtype is None else KV_DTYPES[kv_dtype], device=device)]
    if kv_dtype is not None:
        tensors += torch.zeros(shape[:-1], device=device)  # the scales
    return tensors


class StaticCache:
    """One block of memory for every layer: `batch` rows of `max_seq_len` slots.

    `tail` says that a forward's T tokens fill the last T slots of this view, the same in every row, as a prompt's
    chunks do: attention is then plainly causal and takes the flash path, without a mask.
    """

    def __init__(self, layers: Sequence[StaticLayer], *, tail: bool = False) -> None:
        self.layers = layers
        self.tail = tail

    @classmethod
    def allocate(cls, *, dtype: torch.dtype, **storage: Any) -> "StaticCache":
        """A cache for a model in `dtype`; `new_storage` says what else it takes."""
        return cls(layers_of(new_storage(dtype=dtype, **storage), dtype))

    @property
    def max_seq_len(self) -> int:
        return self.layers[0].k.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the slots in this view."""
        return sum(x.nbytes for layer in self.layers for x in layer.tensors)

    def narrow(self, length: int, *, rows: int | None = None, tail: bool = False) -> "StaticCache":
        """A view of the first `length` slots of the first `rows` rows, sharing memory."""
        return StaticCache([layer.narrow(length, rows) for layer in self.layers], tail=tail)

    def masks(self, input_pos: Tensor, window: int | None) -> tuple[Tensor | None, Tensor | None]:
        T, S, dtype = input_pos.shape[1], self.max_seq_len, self.layers[0].dtype
        flash = input_pos.device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
        causal = self.tail and (T == S or flash)  # no mask needed
        if causal and (window is None or window >= S):
            return None, None
        mask, window_mask = masks_of(input_pos, S, window)
        return (None if causal else mask), window_mask
