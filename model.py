"""The Transformer: one compact decoder for the Llama family of architectures.

Llama 2 / 3.x, Mistral, Qwen2 / 2.5, Qwen3, SmolLM2 and SmolLM3 are the same network with a few switches, all of them
fields of `ModelConfig`. `forward` gets everything it uses as arguments, so one module serves every batch, cache and
thread. This file refuses to know where weights come from, how they are stored, sharded or quantized, and who
schedules the calls: those replace the linears, or hand in another cache.

Shape letters, used in every reshape's comment: B batch rows, T tokens in this call, S cache length, H query heads,
K key/value heads, G query heads per key/value head (H = K * G), D head dim, C model dim, F feed-forward dim,
V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import KVCache, LayerCache


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context; `kind` is "linear" or "llama3"."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a checkpoint says of its architecture. `head_dim` is a field of its own: it need not be dim / n_heads."""

    architecture: str  # the checkpoint's own name, as in "LlamaForCausalLM"
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    no_rope_layers: tuple[int, ...] = ()  # these layers attend without rotary embedding (SmolLM3)
    sliding_window: int | None = None  # a token sees this many latest positions, itself included ...
    sliding_layers: tuple[int, ...] = ()  # ... in these layers
    qkv_bias: bool = False
    o_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim on queries and keys (Qwen3)
    tied_head: bool = False  # the head's matrix is the embedding's


class Step(NamedTuple):
    """What every layer of one forward shares, computed once."""

    cos: Tensor  # [B, T, 1, D/2] fp32
    sin: Tensor  # [B, T, 1, D/2] fp32
    input_pos: Tensor  # [B, T] int64
    mask: Any  # who sees what, in the cache's own words; for layers with full attention
    window_mask: Any  # for sliding-window layers


class Linear(nn.Linear):
    """`nn.Linear` that reads its matrix at memory speed for one row on the CPU.

    ATen's bf16 matrix-vector product reaches about half of a CPU's bandwidth. Written as a multiply and a sum, the
    compiler makes one vectorized, threaded pass over the matrix with fp32 accumulation. Uncompiled, that would write
    the product out, so eager keeps ATen's.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == x.shape[-1]:
            y = (x.reshape(-1).float() * self.weight.float()).sum(-1)
            y = y if self.bias is None else y + self.bias.float()
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root mean square layer norm (Zhang & Sennrich 2019, eq. 4), statistics in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Rotary frequencies in radians per position, fp32 [D/2] (Su et al. 2021, eq. 15), stretched as the config says.

    "llama3" keeps wavelengths under original / high_freq_factor, divides those over original / low_freq_factor by
    `factor`, and interpolates between (Llama 3.1's published rule).
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    freqs = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    turns = scaling.original_max_seq_len * freqs / (2 * math.pi)  # over the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * freqs + (1.0 - keep) * freqs / scaling.factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, heads, D] by its positions, in fp32; dimension i is paired with i + D/2."""
    a, b = x.float().chunk(2, dim=-1)  # 2 x [B, T, heads, D/2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with one fused q/k/v matrix."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.use_rope = layer not in config.no_rope_layers
        self.sliding = config.sliding_window is not None and layer in config.sliding_layers
        self.qkv = Linear(config.dim, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim, bias=config.qkv_bias)
        self.o = Linear(self.n_heads * self.head_dim, config.dim, bias=config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        B, T, _ = x.shape
        H, K, D = self.n_heads, self.n_kv_heads, self.head_dim
        q, k, v = self.qkv(x).view(B, T, H + 2 * K, D).split((H, K, K), dim=2)  # [B, T, H | K | K, D]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.use_rope:
            q, k = apply_rope(q, step.cos, step.sin), apply_rope(k, step.cos, step.sin)
        cache.write(k, v, step.input_pos)
        y = cache.attend(q, step.window_mask if self.sliding else step.mask)  # [B, T, H, D]
        return self.o(y.reshape(B, T, H * D))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6) with one fused gate/up matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.dim, 2 * config.ffn_dim, bias=config.ffn_bias)
        self.down = Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # 2 x [B, T, F]
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        x = x + self.attention(self.attention_norm(x), step, cache)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embed.weight
        # On the CPU even when the module is built on the meta device: nothing in a checkpoint fills it.
        self.register_buffer("rope_freqs", rope_frequencies(config), persistent=False)

    def begin(self, tokens: Tensor, input_pos: Tensor, cache: KVCache) -> tuple[Tensor, Step]:
        """Embeddings [B, T, C] of tokens [B, T], and what the layers share at positions input_pos [B, T]."""
        angle = (input_pos[:, :, None].float() * self.rope_freqs)[:, :, None]  # [B, T, 1, D/2]
        mask, window_mask = cache.masks(input_pos, self.config.sliding_window)
        return self.embed(tokens), Step(angle.cos(), angle.sin(), input_pos, mask, window_mask)

    def hidden(self, tokens: Tensor, input_pos: Tensor, cache: KVCache) -> Tensor:
        """The last layer's output [B, T, C] for tokens [B, T] at positions input_pos [B, T]; writes the cache."""
        x, step = self.begin(tokens, input_pos, cache)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, step, layer_cache)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Logits [..., V] from the last layer's output [..., C]."""
        return self.head(self.norm(x))

    def forward(self, tokens: Tensor, input_pos: Tensor, cache: KVCache) -> Tensor:
        """Logits [B, T, V] for tokens [B, T] at positions input_pos [B, T]; writes the cache."""
        return self.logits(self.hidden(tokens, input_pos, cache))
