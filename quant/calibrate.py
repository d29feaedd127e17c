"""Calibration: what every linear of a model gets to see on sample text, and codes chosen by it, a layer at a time.

Layers are quantized in order. The sequences' activations before a layer, which layers already quantized have made, go
through it twice: once as it is, to gather for each linear the Hessian of its output's squared error, and once
quantized, to give the activations before the next one. The four Hessians of a layer come from the same pass (GPTQ's
order without "true sequential"). Above the model's memory there are the sequences' activations at one place, one
layer's Hessians, and a cache of one layer.

This file refuses to know how codes are chosen: a `Method` gets a matrix and its Hessian. A `Preparation` may first
rewrite the layer into another one that computes the same and suffers less from rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cache import StaticCache
from model import Block, Linear, Step, Transformer
from quant.linears import Codes, QuantizedLinear, Recipe


class Inputs(NamedTuple):
    """What is known of the inputs [n, K] of a linear."""

    hessian: Tensor  # fp32 [K, K]: 2/n * sum of x x^T
    mean_abs: Tensor  # fp32 [K]: 1/n * sum of |x|
    max_abs: Tensor  # fp32 [K]: the largest |x|


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
    batch: int = 4,
) -> Iterator[Calibrated]:
    """Quantize `model` in place with what `method` chooses on the sequences tokens [S, T]; yields after each layer.

    `prepare` may rewrite each layer before its codes are chosen. The head is rounded to nearest, after the last layer:
    the model is whole only when this has run to its end. `batch` sequences go through a layer at a time. ValueError for
    tokens that the model does not take, where a linear cannot be packed, and where the method finds NaN or infinity.
    """
    _check(model, tokens)
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    cache = _layer_cache(model, batch=min(batch, len(tokens)), length=tokens.shape[1])
    activations, steps = [], {}  # [b, T, C] each, and what layers share, by b
    for some in tokens.to(device).split(batch):
        B, T = some.shape
        x, steps[B] = model.begin(some, torch.arange(T, device=device).expand(B, -1), _rows(cache, B))
        activations.append(x)
    run = partial(_run, activations=activations, steps=steps, cache=cache)
    for index, layer in enumerate(model.layers):
        inputs = _inputs(layer, lambda layer=layer: run(layer, keep=False), tokens.numel())
        errors = _quantize_layer(layer, f"layers.{index}", inputs, recipe, method, prepare)
        del inputs  # not while the next layer's are gathered
        run(layer, keep=True)
        yield Calibrated(index, errors)
    head = _empty(recipe, "head", model.head, dtype)
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


def _check(model: Transformer, tokens: Tensor) -> None:
    config = model.config
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
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


def _run(layer: Block, *, activations: list[Tensor], steps: dict[int, Step], cache: StaticCache, keep: bool) -> None:
    """Put all activations through a layer; `keep` what comes out in their place."""
    for i, x in enumerate(activations):
        y = layer(x, steps[len(x)], _rows(cache, len(x)).layers[0])
        if keep:
            activations[i] = y


def _inputs(layer: Block, run: Callable[[], None], tokens: int) -> dict[str, Inputs]:
    """The n = `tokens` inputs that each linear gets in `run`, by its name."""
    inputs: dict[str, Inputs] = {}

    def add(linear: nn.Module, args: tuple[Tensor], *, name: str) -> None:
        x = args[0].flatten(0, 1).float()  # [B * T, K]
        inputs[name].hessian.addmm_(x.t(), x, alpha=2 / tokens)
        inputs[name].mean_abs.add_(x.abs().sum(0), alpha=1 / tokens)
        torch.maximum(inputs[name].max_abs, x.abs().amax(0), out=inputs[name].max_abs)

    hooks = []
    for name, linear in layer.named_modules():
        if isinstance(linear, Linear):
            K, device = linear.in_features, linear.weight.device
            inputs[name] = Inputs(*(torch.zeros(shape, device=device) for shape in ((K, K), K, K)))
            hooks.append(linear.register_forward_pre_hook(partial(add, name=name)))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _quantize_layer(
    layer: Block,
    path: str,
    inputs: Mapping[str, Inputs],
    recipe: Recipe,
    method: Method,
    prepare: Preparation | None,
) -> dict[str, float]:
    """Replace the layer's linears by quantized ones; gives each one's `output_error`."""
    dtype, errors = layer.ffn_norm.weight.dtype, {}
    linears = {name: _empty(recipe, f"{path}.{name}", layer.get_submodule(name), dtype) for name in inputs}
    if prepare is not None:
        try:
            prepare(layer, linears, inputs)
        except ValueError as error:
            raise ValueError(f"{path}.{error}") from None
    for name, new in linears.items():
        old, hessian = layer.get_submodule(name), inputs[name].hessian
        try:
            new.store_rows(0, method(name, new, old.weight, hessian))
        except ValueError as error:
            raise ValueError(f"{path}.{name}: {error}") from None
        if old.bias is not None:
            new.bias.data.copy_(old.bias)
        errors[name] = output_error(old.weight, new.dequantize(torch.float32), hessian)
        layer.set_submodule(name, new)
    return errors


def _empty(recipe: Recipe, name: str, linear: Linear, dtype: torch.dtype) -> QuantizedLinear:
    """What is to take the place of `linear`, with no matrix and no bias yet."""
    with torch.device(linear.weight.device):
        return recipe.linear(name, linear, dtype)
