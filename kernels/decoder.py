"""A Transformer run through the kernels: what `Generator` and the serving engine's `Runner` step on CUDA.

`Decoder` takes the modules of a `model.Transformer` as they are, weights included, and computes the same function in
fewer launches. One token a row takes five a layer:

    norm + q/k/v | norms, rotary embedding, cache write, attention | output projection + residual
    norm + gate/up + SiLU product | down projection + residual

On Hopper several rows take two more, where the projections' parts are added up and normalized (`rows.py`).

Longer inputs run the same matrices by cuBLAS or by the kernels for many rows (`linear.py` chooses) and the cache's own
attention, with the elementwise work between them fused. Over a view of a paged cache tokens of many sequences come in
one row: those with one token each take the same launch as above, and prompts a kernel of their own. Nothing is compiled
but the kernels, which Triton keeps on disk, and nothing depends on a prompt's length.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cache import StaticCache, StaticLayer
from kernels import attention, elementwise, linear, prompt_attention, rows, tuning
from kernels.attention import Heads, Pages
from kernels.weight import Weight, most_rows
from model import Block, Transformer
from paged import PagedLayer, PagedView


class Decoder:
    """Runs `model` over up to `batch_size` rows of caches of `max_seq_len` slots, or as many decoding sequences."""

    def __init__(self, model: Transformer, *, max_seq_len: int, batch_size: int) -> None:
        self.model, self.max_seq_len = model, max_seq_len
        device = model.embed.weight.device
        angle = torch.arange(max_seq_len, device=device)[:, None].float() * model.rope_freqs  # [S, D/2]
        self.cos, self.sin = angle.cos(), angle.sin()
        self.layers = [_Layer(layer, model) for layer in model.layers]
        self.head = weight_of(model.head)
        self.best = torch.full((batch_size,), linear.NOTHING, dtype=torch.int64, device=device)
        self.scratch = attention.Scratch(batch=batch_size, heads=self.layers[0].heads, device=device)

    def bucket(self, length: int) -> int:
        """The cache length to show to a step: kernels end where the cache is live, but plan by what they are shown."""
        return next((slots for slots in tuning.CONTEXTS if length <= slots < self.max_seq_len), self.max_seq_len)

    def paged_buckets(self, rows: int, block_size: int) -> tuple[int, ...]:
        """As `bucket`, the numbers of slots to show to steps of so many rows over a paged cache, short of all."""
        heads, x = self.layers[0].heads, self.model.embed.weight
        return tuning.CONTEXTS if tuning.spreads(heads.n_kv_heads, heads.head_dim, rows, x, block_size) else ()

    def hidden(self, tokens: Tensor, input_pos: Tensor, cache: StaticCache | PagedView) -> Tensor:
        """The last layer's output [B, T, C] for tokens [B, T] at positions input_pos [B, T]; writes the cache."""
        B, T = tokens.shape
        input_pos = input_pos.contiguous()  # before the embedding, which everything after it waits for
        # [B * T, C]. For 2 to 16 tokens torch's embedding is a single program, which at 16 takes 8 us instead of 2.
        x = self.model.embed(tokens)[0] if B * T == 1 else self.model.embed.weight[tokens.reshape(-1)]
        if isinstance(cache, PagedView):
            attend = self._paged_attention(input_pos, cache)
        else:
            attend = self._attend_one if T == 1 else self._prompt_attention(input_pos, cache)
        stream = rows.Stream(x)
        for layer, kv in zip(self.layers, cache.layers, strict=True):
            qkv = linear.linear(stream, layer.qkv, norm=layer.attention_norm, eps=layer.eps)
            linear.linear(attend(qkv, input_pos, layer.heads, kv), layer.o, residual=stream)
            h = linear.linear(stream, layer.gate_up, norm=layer.ffn_norm, eps=layer.eps, glu=True)
            linear.linear(h, layer.down, residual=stream)
        return stream.whole().view(B, T, -1)

    def _attend_one(self, qkv: Tensor, input_pos: Tensor, heads: Heads, kv: StaticLayer) -> Tensor:
        scales = {"k_scale": kv.k_scale, "v_scale": kv.v_scale}
        return attention.decode_attention(qkv, self.cos, self.sin, input_pos, kv.k, kv.v, heads, self.scratch, **scales)

    def _prompt_attention(self, input_pos: Tensor, cache: StaticCache) -> Callable[..., Tensor]:
        """What takes the place of `_attend_one` for T tokens a row, with what its layers share computed once."""
        B, T = input_pos.shape
        mask, window_mask = cache.masks(input_pos, self.model.config.sliding_window)
        self.best.fill_(linear.NOTHING)  # should a step before this have been broken off
        cos, sin = self.cos[input_pos.reshape(-1)], self.sin[input_pos.reshape(-1)]  # [B * T, D/2]

        def attend(qkv: Tensor, input_pos: Tensor, heads: Heads, kv: StaticLayer) -> Tensor:
            stored = {"k_cache": kv.k, "v_cache": kv.v, "k_scale": kv.k_scale, "v_scale": kv.v_scale}
            q = elementwise.rope_write(qkv, cos, sin, input_pos=input_pos, **heads.rope_options, **stored)
            y = kv.attend(q.view(B, T, heads.n_heads, heads.head_dim), window_mask if heads.window else mask)
            return y.reshape(B * T, -1)

        return attend

    def _paged_attention(self, input_pos: Tensor, view: PagedView) -> Callable[..., Tensor]:
        """What takes the place of `_attend_one` for tokens [1, T] of the sequences of a paged cache's view."""
        batch, T, n = view.batch, input_pos.shape[1], view.batch.decodes
        decodes, prompts = (Pages(batch.tables, rows) for rows in (batch.rows[:n], batch.rows[n:]))
        pos = input_pos[0, n:]
        if n < T:
            starts, page = batch.starts - n, view.layers[0].k.shape[1]
            owners = Pages(batch.tables, prompts.rows.repeat_interleave(starts.diff(), output_size=T - n))
            blocks, offsets = attention.slots_of(owners, pos[:, None], page)
            slots = (blocks * page + offsets).view(1, T - n)  # counted over all blocks
            cos, sin = self.cos[pos], self.sin[pos]  # [T - n, D/2]

        def attend(qkv: Tensor, input_pos: Tensor, heads: Heads, kv: PagedLayer) -> Tensor:
            y = qkv.new_empty(T, heads.n_heads * heads.head_dim)
            scales = {"k_scale": kv.k_scale, "v_scale": kv.v_scale}
            if n:
                rope, at = (self.cos, self.sin), input_pos.view(T, 1)[:n]
                options = scales | {"pages": decodes, "out": y[:n]}
                attention.decode_attention(qkv[:n], *rope, at, kv.k, kv.v, heads, self.scratch, **options)
            if n < T:
                stored = {"k_cache": kv.k, "v_cache": kv.v} | scales
                flat = {name: None if x is None else x.flatten(0, 1)[None] for name, x in stored.items()}
                q = elementwise.rope_write(qkv[n:], cos, sin, input_pos=slots, **heads.rope_options, **flat)
                prompt_attention.prompt_attention(q, pos, starts, kv.k, kv.v, heads, prompts, **scales, out=y[n:])
            return y

        return attend

    def logits(self, x: Tensor) -> Tensor:
        """Logits [..., V] from the last layer's output [..., C]; fp32 for few rows, where that costs nothing."""
        norm, rows = self.model.norm, x.reshape(-1, x.shape[-1]).contiguous()
        few = len(rows) <= most_rows(self.head.format)
        dtype = torch.float32 if few else None
        y = linear.linear(rows, self.head, norm=norm.weight, eps=norm.eps, out_dtype=dtype)
        return y.view(*x.shape[:-1], -1)

    def greedy(self, x: Tensor, tokens: Tensor, input_pos: Tensor, last_pos: int) -> None:
        """End a step: from x [B, 1, C], the most likely tokens [B, 1] and the positions [B, 1] that they go to.

        No position goes past `last_pos`: a finished row in a batch that goes on stays inside the cache.
        """
        best, norm = self.best[: len(x)], self.model.norm
        linear.argmax(x.reshape(len(x), -1).contiguous(), self.head, best, norm=norm.weight, eps=norm.eps)
        linear.take_best(best, tokens, input_pos, last_pos)


class _Layer:
    """A block's weights, as the kernels take them."""

    def __init__(self, layer: Block, model: Transformer) -> None:
        attend, ffn = layer.attention, layer.ffn
        self.attention_norm, self.ffn_norm = layer.attention_norm.weight, layer.ffn_norm.weight
        self.eps = layer.attention_norm.eps
        self.qkv, self.o = weight_of(attend.qkv), weight_of(attend.o)
        self.gate_up, self.down = weight_of(ffn.gate_up), weight_of(ffn.down)
        self.heads = Heads(
            n_heads=attend.n_heads,
            n_kv_heads=attend.n_kv_heads,
            head_dim=attend.head_dim,
            q_norm=None if attend.q_norm is None else attend.q_norm.weight,
            k_norm=None if attend.k_norm is None else attend.k_norm.weight,
            eps=self.eps,
            use_rope=attend.use_rope,
            window=model.config.sliding_window if attend.sliding else 0,
        )


def weight_of(module: nn.Module) -> Weight:
    """A linear's matrix as the kernels take it: a quantized one brings its own."""
    if isinstance(module, nn.Linear):
        return Weight("float", module.weight, bias=module.bias)
    return module.packed


def matrices(decoder: Decoder) -> Sequence[Weight]:
    """Every matrix of a step, in the order it is read."""
    layers = [w for layer in decoder.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return [*layers, decoder.head]
