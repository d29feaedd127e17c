"""Calibration: what every linear of a model gets to see on sample text, and codes chosen by it, a layer at a time.

Layers are quantized in order, and a layer's linears too: the sequences' activations stop before each linear, which
gives the Hessian of its output's squared error, the linear is quantized, and they go on through what it has become. So
every linear is run once, and sees what all quantized ones before it make (GPTQ's "true sequential"). A `Preparation`
rewrites a layer into another one that computes the same and suffers less from rounding; it has to see all of a layer's
inputs first, and the layer is then run twice. Above the model's memory there are the sequences' activations at one or
two places, one Hessian (a layer's, where it is prepared), and a cache of one layer.

This file refuses to know how codes are chosen: a `Method` gets a matrix and its Hessian.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import StaticCache
from model import Block, Linear, Step, Transformer
from quant.linears import Codes, QuantizedLinear, Recipe


class Inputs(NamedTuple):
    """What is known of the inputs [n, K] of a linear."""

    hessian: Tensor  # fp32 [K, K]: 2/n * sum of x x^T
    mean_abs: Tensor  # fp32 [K]: 1/n * sum of |x|


# The linear's name in its layer, as "attention.qkv", the one to be filled, its weight [N, K] and its inputs' Hessian.
Method = Callable[[str, QuantizedLinear, Tensor, Tensor], Codes]
# The layer, and by the name of each linear what is to take its place, still empty, and its inputs: weights, biases and
# inputs are changed in place, so that they still belong together and the layer's output stays what it was.
Preparation = Callable[[Block, Mapping[str, QuantizedLinear], Mapping[str, Inputs]], None]


class Calibrated(NamedTuple):
    """A layer that now is quantized."""

    layer: int
    errors: dict[str, float]  # by linear, as "attention.qkv": see `output_error`


def sample_tokens(text_ids: Sequence[int], *, samples: int, seq_len: int, seed: int) -> Tensor:
    """Windows of a tokenized text, at random and different places, [samples, seq_len] int64; ValueError if too short.

    They may overlap.
    """
    if samples < 1 or seq_len < 1:
        raise ValueError(f"calibration takes at least 1 sequence of 1 token; got {samples} of {seq_len}")
    places = len(text_ids) - seq_len + 1
    if places < samples:
        raise ValueError(
            f"{samples} sequences of {seq_len} tokens from different places need {seq_len + samples - 1} tokens and "
            f"the text has {len(text_ids)}; give a longer text, or ask for fewer or shorter ones"
        )
    starts = torch.randperm(places, generator=torch.Generator().manual_seed(seed))[:samples]
    return torch.as_tensor(text_ids)[starts[:, None] + torch.arange(seq_len)]


@torch.no_grad()
def calibrate(
    model: Transformer,
    tokens: Tensor,
    recipe: Recipe,
    method: Method,
    *,
    prepare: Preparation | None = None,
    finished: int = 0,
    batch: int = 4,
) -> Iterator[Calibrated]:
    """Quantize `model` in place with what `method` chooses on the sequences tokens [S, T]; yields after each layer.

    `prepare` may rewrite each layer before its codes are chosen. The first `finished` layers are quantized already, by
    an earlier run, and only make the activations of the others, bit for bit as they did then. The head is rounded to
    nearest, after the last layer: the model is whole only when this has run to its end. `batch` sequences go through a
    layer at a time. ValueError for tokens that the model does not take, where a linear cannot be packed, and where the
    method finds NaN or infinity.
    """
    _check(model, tokens, finished)
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    cache = _layer_cache(model, batch=min(batch, len(tokens)), length=tokens.shape[1])
    pieces, steps = [], {}  # [b, T, C] each, and what layers share, by b
    for some in tokens.to(device).split(batch):
        B, T = some.shape
        x, steps[B] = model.begin(some, torch.arange(T, device=device).expand(B, -1), _rows(cache, B))
        pieces.append(x)
    state = _State(pieces, steps, cache)
    for index, layer in enumerate(model.layers):
        if index < finished:
            state.run(layer)
        else:
            yield Calibrated(index, _quantize_layer(layer, f"layers.{index}", state, recipe, method, prepare))
    head = _empty(recipe, "head", model.head, dtype)
    if isinstance(head, QuantizedLinear):
        head.pack_rows(0, model.head.weight)
    model.head = head


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """||X (W - Q)^T|| / ||X W^T|| for weight and quantized [N, K]: how far outputs are off, in their own length.

    Both norms come from hessian [K, K], which is X^T X times some number: tr(D H D^T) is ||X D^T||^2 times that.
    """
    length = squared_outputs(weight.float(), hessian)
    error = squared_outputs(weight.float() - quantized.float(), hessian)
    return (max(error, 0.0) / length) ** 0.5 if length > 0 else 0.0


def squared_outputs(weight: Tensor, hessian: Tensor) -> float:
    """2/n * ||X W^T||^2, summed over all outputs, for weight [N, K] and the n inputs X that hessian [K, K] is of."""
    return float(((weight @ hessian) * weight).sum(dtype=torch.float64))


def _check(model: Transformer, tokens: Tensor, finished: int) -> None:
    config = model.config
    if any(isinstance(module, QuantizedLinear) for layer in model.layers[finished:] for module in layer.modules()):
        raise ValueError("the model is quantized already; calibrate the one that it was made from")
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"calibration takes tokens [sequences, length], at least one; got {list(tokens.shape)}")
    if tokens.shape[1] > config.max_seq_len:
        raise ValueError(
            f"calibration sequences have {tokens.shape[1]} tokens and the model takes {config.max_seq_len}; "
            "take shorter ones"
        )
    if not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        raise ValueError(
            f"the tokens {int(tokens.min())} to {int(tokens.max())} are not all among the {config.vocab_size} that the "
            "model knows; their tokenizer is another model's"
        )


def _layer_cache(model: Transformer, *, batch: int, length: int) -> StaticCache:
    """One layer's cache, which all layers use in turn."""
    return StaticCache.allocate(
        n_layers=1,
        batch=batch,
        max_seq_len=length,
        n_kv_heads=model.config.n_kv_heads,
        head_dim=model.config.head_dim,
        dtype=model.norm.weight.dtype,
        device=model.norm.weight.device,
    )


def _rows(cache: StaticCache, rows: int) -> StaticCache:
    return cache.narrow(cache.max_seq_len, rows=rows, tail=True)


@dataclass
class _State:
    """The sequences' activations between two layers."""

    pieces: list[Tensor]  # [b, T, C] each
    steps: Mapping[int, Step]  # by b
    cache: StaticCache

    def run(self, layer: Block, before: Callable[[str, list[Tensor]], None] = lambda name, inputs: None) -> None:
        """Put the activations through `layer`, whose quantized linears multiply as plain ones of their values.

        `before(name, inputs)` is called when the inputs [b, T, K] of the linear of that name are known and before it
        runs; it may put another one in its place.
        """
        attention, ffn, dtype = layer.attention, layer.ffn, self.pieces[0].dtype
        h = [layer.attention_norm(piece) for piece in self.pieces]
        before("attention.qkv", h)
        with _plain(attention, "qkv", dtype), _left_out(attention, "o"):
            for i, piece in enumerate(h):
                B = len(piece)
                h[i] = attention(piece, self.steps[B], _rows(self.cache, B).layers[0])
        before("attention.o", h)
        self._add(attention, "o", h)
        h = [layer.ffn_norm(piece) for piece in self.pieces]
        before("ffn.gate_up", h)
        with _plain(ffn, "gate_up", dtype), _left_out(ffn, "down"):
            for i, piece in enumerate(h):
                h[i] = ffn(piece)
        before("ffn.down", h)
        self._add(ffn, "down", h)

    def _add(self, module: nn.Module, name: str, inputs: list[Tensor]) -> None:
        """What the linear makes of its inputs, onto the activations."""
        with _plain(module, name, self.pieces[0].dtype):
            for i, piece in enumerate(inputs):
                self.pieces[i] = self.pieces[i] + getattr(module, name)(piece)


@contextlib.contextmanager
def _instead(module: nn.Module, name: str, other: nn.Module) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, other)
    try:
        yield
    finally:
        setattr(module, name, own)


def _left_out(module: nn.Module, name: str) -> contextlib.AbstractContextManager:
    """`module` without its last linear: it gives that one's inputs."""
    return _instead(module, name, nn.Identity())


def _plain(module: nn.Module, name: str, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """`module` with a quantized linear's matrix unpacked once, rather than for every piece."""
    linear = getattr(module, name)
    if not isinstance(linear, QuantizedLinear):
        return contextlib.nullcontext()
    return _instead(module, name, _Unpacked(linear, dtype))


class _Unpacked(nn.Module):
    """A quantized linear as a plain one of its values."""

    def __init__(self, linear: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", linear.dequantize(dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _inputs(pieces: list[Tensor]) -> Inputs:
    """What is known of the inputs [b, T, K] of a linear."""
    K, n = pieces[0].shape[-1], sum(piece[..., 0].numel() for piece in pieces)
    inputs = Inputs(pieces[0].new_zeros(K, K, dtype=torch.float32), pieces[0].new_zeros(K, dtype=torch.float32))
    with _exact_products(pieces[0]):
        for piece in pieces:
            x = piece.flatten(0, 1)  # [b * T, K]
            if x.is_cuda and x.dtype != torch.float32:
                inputs.hessian.add_(torch.mm(x.t(), x, out_dtype=torch.float32), alpha=2 / n)
            else:
                x = x.float()
                inputs.hessian.addmm_(x.t(), x, alpha=2 / n)
            inputs.mean_abs.add_(x.abs().sum(0, dtype=torch.float32), alpha=1 / n)
    return inputs


@contextlib.contextmanager
def _exact_products(x: Tensor) -> Iterator[None]:
    """While fp32 products on the CPU may take their operands as bf16: half the time, and the same where x is bf16."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if x.dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _quantize_layer(
    layer: Block, path: str, state: _State, recipe: Recipe, method: Method, prepare: Preparation | None
) -> dict[str, float]:
    """Replace the layer's linears by quantized ones; gives each one's `output_error`."""
    dtype, errors = layer.ffn_norm.weight.dtype, {}

    def empty(name: str) -> Linear | QuantizedLinear:
        return _empty(recipe, f"{path}.{name}", layer.get_submodule(name), dtype)

    def fill(name: str, new: Linear | QuantizedLinear, inputs: Inputs) -> None:
        old = layer.get_submodule(name)
        if not isinstance(new, QuantizedLinear):
            return
        try:
            new.store_rows(0, method(name, new, old.weight, inputs.hessian))
        except ValueError as error:
            raise ValueError(f"{path}.{name}: {error}") from None
        if old.bias is not None:
            new.bias.data.copy_(old.bias)
        errors[name] = output_error(old.weight, new.dequantize(torch.float32), inputs.hessian)
        layer.set_submodule(name, new)

    if prepare is None:
        state.run(layer, lambda name, pieces: fill(name, empty(name), _inputs(pieces)))
        return errors
    seen: dict[str, Inputs] = {}
    unchanged = list(state.pieces)
    state.run(layer, lambda name, pieces: seen.update({name: _inputs(pieces)}))
    state.pieces = unchanged
    linears = {name: empty(name) for name in seen}
    try:
        prepare(layer, linears, seen)
    except ValueError as error:
        raise ValueError(f"{path}.{error}") from None
    for name, new in linears.items():
        fill(name, new, seen[name])
    del seen
    state.run(layer)
    return errors


def _empty(recipe: Recipe, name: str, linear: Linear, dtype: torch.dtype) -> Linear | QuantizedLinear:
    """What is to take the place of `linear`, with no matrix and no bias yet; itself where it stays as it is."""
    with torch.device(linear.weight.device):
        return recipe.linear(name, linear, dtype)
