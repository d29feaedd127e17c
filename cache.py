"""Key/value caches behind one protocol.

A cache is a row of layer caches that a forward pass writes and attends over, plus `narrow`, which gives a view of the
first slots: attention reads exactly the view it is handed, so its cost follows the live length and never the
allocated one. Slots past a row's own position are masked, so what a padded prompt, a rejected draft or an aborted
answer left there is never read before it is overwritten. The cache does not know tokens, lengths or requests: who
holds those decides what to keep.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerCache(Protocol):
    """One layer's keys and values."""

    def write(self, k: Tensor, v: Tensor, input_pos: Tensor) -> None:
        """Store k, v [B, T, K, D] at positions input_pos [B, T]."""

    def attend(self, q: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of q [B, T, H, D] over what is stored, as [B, T, H, D]."""


class KVCache(Protocol):
    """What `Transformer.forward` needs of a cache."""

    layers: Sequence[LayerCache]

    def masks(self, input_pos: Tensor, window: int | None) -> tuple[Tensor | None, Tensor | None]:
        """The masks for full and for sliding-window layers, as `LayerCache.attend` takes them."""


class StaticLayer:
    """Keys and values [B, S, K, D] of one layer."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def write(self, k: Tensor, v: Tensor, input_pos: Tensor) -> None:
        rows = torch.arange(k.shape[0], device=k.device)[:, None]  # [B, 1]
        self.k[rows, input_pos] = k.to(self.k.dtype)
        self.v[rows, input_pos] = v.to(self.v.dtype)

    def attend(self, q: Tensor, mask: Tensor | None) -> Tensor:
        B, T, H, D = q.shape
        S, K = self.k.shape[1], self.k.shape[2]
        k, v = self.k.transpose(1, 2), self.v.transpose(1, 2)  # [B, K, S, D]
        if T == 1 and mask is not None and torch.compiler.is_compiling() and q.device.type == "cpu":
            return self._attend_one(q, mask)
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

    def _attend_one(self, q: Tensor, mask: Tensor) -> Tensor:
        """`attend` for one token in plain arithmetic, which the compiler fuses with what is around it on the CPU."""
        B, _, H, D = q.shape
        K = self.k.shape[2]
        q_BKGD = q.view(B, K, H // K, D).float() * D**-0.5
        scores = (q_BKGD[:, None] * self.k[:, :, :, None].float()).sum(-1)  # [B, S, K, G]
        scores = scores.masked_fill(~mask.view(B, -1, 1, 1), float("-inf"))
        y = (scores.softmax(1)[..., None] * self.v[:, :, :, None].float()).sum(1)  # [B, K, G, D]
        return y.to(q.dtype).view(B, 1, H, D)


class StaticCache:
    """One block of memory for every layer: `batch` rows of `max_seq_len` slots.

    `tail` says that a forward's T tokens fill the last T slots of this view, the same in every row, as a prompt's
    chunks do: attention is then plainly causal and takes the flash path, without a mask.
    """

    def __init__(self, layers: Sequence[StaticLayer], *, tail: bool = False) -> None:
        self.layers = layers
        self.tail = tail

    @classmethod
    def allocate(
        cls,
        *,
        n_layers: int,
        batch: int,
        max_seq_len: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "StaticCache":
        # Zeros, not empty: a masked slot still meets the softmax's zero weight, and 0 * NaN is NaN.
        k, v = torch.zeros(2, n_layers, batch, max_seq_len, n_kv_heads, head_dim, dtype=dtype, device=device)
        return cls([StaticLayer(k[i], v[i]) for i in range(n_layers)])

    @property
    def max_seq_len(self) -> int:
        return self.layers[0].k.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the slots in this view."""
        return sum(2 * layer.k.numel() * layer.k.element_size() for layer in self.layers)

    def narrow(self, length: int, *, rows: int | None = None, tail: bool = False) -> "StaticCache":
        """A view of the first `length` slots of the first `rows` rows, sharing memory."""
        return StaticCache([StaticLayer(x.k[:rows, :length], x.v[:rows, :length]) for x in self.layers], tail=tail)

    def masks(self, input_pos: Tensor, window: int | None) -> tuple[Tensor | None, Tensor | None]:
        T, S, k = input_pos.shape[1], self.max_seq_len, self.layers[0].k
        flash = k.device.type == "cuda" and k.dtype in (torch.bfloat16, torch.float16)
        causal = self.tail and (T == S or flash)  # no mask needed
        if causal and (window is None or window >= S):
            return None, None
        slot = torch.arange(S, device=input_pos.device)
        pos = input_pos[:, None, :, None]  # [B, 1, T, 1]
        mask = slot <= pos  # [B, 1, T, S]
        window_mask = mask if window is None else mask & (slot > pos - window)
        return (None if causal else mask), window_mask
