"""Calibration: what every linear of a model gets to see on sample text, and codes chosen by it, a layer at a time.

Layers are quantized in order, and a layer's linears too: the sequences' activations stop before each linear, which
gives the Hessian of its output's squared error, the linear is quantized, and they go on through what it has become. So
every linear is run once, and sees what all quantized ones before it make (GPTQ's "true sequential"). A `Preparation`
rewrites a layer into another one that computes the same and suffers less from rounding; it has to see all of a layer's
inputs first, and the layer is then run twice.

Or the activations of the unquantized model are kept beside: a linear then takes, before it is rounded, the weights
that come nearest to that model's outputs on the inputs that it really gets. What the linears before it have spoilt is
so made good, as far as a linear can: the idea of asymmetric calibration (Li et al. 2025, "GPTAQ: Efficient
Finetuning-Free Quantization for Asymmetric Calibration", arXiv 2504.02692), here in closed form, and with the drift of
the residual stream among what is made good.

Above the model's memory there are the sequences' activations at one to five places, one Hessian (a layer's, where it is
prepared), and a cache of one layer. This file refuses to know how codes are chosen: a `Method` gets a matrix and its
Hessian.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import StaticCache
from model import Block, Linear, Step, Transformer
from quant.linears import Codes, QuantizedLinear, Recipe

FOR_EACH_INPUT = (2, 10)  # tokens: with less a linear does not aim at anything, with more it does so wholly
COLUMNS = 512  # of a Hessian at a time, and of those the rows to the diagonal: the rest is their mirror image


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
    aim: float | None = None,
    finished: Sequence[Callable[[Block], object]] = (),
    batch: int = 4,
) -> Iterator[Calibrated]:
    """Quantize `model` in place with what `method` chooses on the sequences tokens [S, T]; yields after each layer.

    `prepare` may rewrite each layer before its codes are chosen. Or else `aim` has linears aim at the unquantized
    model's outputs, by a ridge regression with so many mean diagonals of the Hessian, as far as there are enough tokens
    for one.

    `finished` are the first layers' results from an earlier run: each is called with its layer, whose linears are empty
    quantized ones, to fill it. The layers after are then, bit for bit, as if there had been one run. The head is
    rounded to nearest, after the last layer: the model is whole only when this has run to its end. `batch` sequences go
    through a layer at a time. ValueError for tokens that the model does not take, where a linear cannot be packed, and
    where the method finds NaN or infinity.
    """
    _check(model, tokens)
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    cache = _layer_cache(model, batch=min(batch, len(tokens)), length=tokens.shape[1])
    pieces, steps = [], {}  # [b, T, C] each, and what layers share, by b
    for some in tokens.to(device).split(batch):
        B, T = some.shape
        x, steps[B] = model.begin(some, torch.arange(T, device=device).expand(B, -1), _rows(cache, B))
        pieces.append(x)
    stream = _Stream(pieces, steps, cache)
    plain = None if aim is None else _Stream(list(pieces), steps, cache)
    for index, layer in enumerate(model.layers):
        path = f"layers.{index}"
        wanted = None if plain is None else _Wanted.run(plain, layer)
        if index < len(finished):
            for name in _linears(layer):
                layer.set_submodule(name, _empty(recipe, f"{path}.{name}", layer.get_submodule(name), dtype))
            finished[index](layer)
            stream.run(layer)
        elif prepare is None:
            yield Calibrated(index, _quantize_in_order(layer, path, stream, wanted, aim, recipe, method))
        else:
            yield Calibrated(index, _quantize_prepared(layer, path, stream, prepare, recipe, method))
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


# ---- Activations -----------------------------------------------------------------------------------------------------


class _Stream(NamedTuple):
    """The sequences' activations between two layers, of which `run` makes those after the second."""

    pieces: list[Tensor]  # [b, T, C] each
    steps: Mapping[int, Step]  # by b
    cache: StaticCache

    def run(self, layer: Block, before: Callable[[str, list[Tensor]], None] = lambda name, inputs: None) -> None:
        """Put the activations through `layer`, whose quantized linears multiply as plain ones of their values.

        `before(name, inputs)` is called when the inputs [b, T, K] of the linear of that name are known and before it
        runs; it may put another one in its place. What o and down make has then not yet been added to `pieces`.
        """
        attention, ffn, dtype = layer.attention, layer.ffn, self.pieces[0].dtype
        h = [layer.attention_norm(piece) for piece in self.pieces]
        before("attention.qkv", h)
        with _unpacked(attention, "qkv", dtype), _instead(attention, "o", nn.Identity()):
            for i, piece in enumerate(h):
                B = len(piece)
                h[i] = attention(piece, self.steps[B], _rows(self.cache, B).layers[0])
        before("attention.o", h)
        self._add(attention, "o", h)
        h = [layer.ffn_norm(piece) for piece in self.pieces]
        before("ffn.gate_up", h)
        with _unpacked(ffn, "gate_up", dtype), _instead(ffn, "down", nn.Identity()):
            for i, piece in enumerate(h):
                h[i] = ffn(piece)
        before("ffn.down", h)
        self._add(ffn, "down", h)

    def _add(self, module: nn.Module, name: str, inputs: list[Tensor]) -> None:
        """What the linear makes of its inputs, onto the activations."""
        with _unpacked(module, name, self.pieces[0].dtype):
            for i, piece in enumerate(inputs):
                self.pieces[i] = self.pieces[i] + getattr(module, name)(piece)


class _Wanted(NamedTuple):
    """The unquantized model's activations [b, T, C] around a layer."""

    before: list[Tensor]
    between: list[Tensor]  # attention and feed-forward
    after: list[Tensor]

    @classmethod
    def run(cls, plain: _Stream, layer: Block) -> "_Wanted":
        """Put the unquantized model's activations through a layer that is not quantized yet."""
        before, between = list(plain.pieces), []
        plain.run(layer, lambda name, _: between.extend(plain.pieces if name == "ffn.gate_up" else ()))
        return cls(before, between, list(plain.pieces))

    def drift(self, layer: Block, name: str, inputs: list[Tensor], pieces: list[Tensor], hessian: Tensor) -> Tensor:
        """2/n * the sum of d x^T, [N, K], over inputs x of a linear: d is what its output lacks of the wanted one.

        Where the output is added to the residual stream, which is in `pieces`, d has what that lacks, too.
        """
        linear = layer.get_submodule(name)
        weight = linear.weight.float()
        if name in ("attention.o", "ffn.down"):
            sums = self.between if name == "attention.o" else self.after
            outputs = (
                wanted.float() - piece.float() - (0.0 if linear.bias is None else linear.bias.float())
                for wanted, piece in zip(sums, pieces, strict=True)
            )
            return _products(outputs, inputs) - weight @ hessian
        norm, sums = (layer.attention_norm, self.before) if name == "attention.qkv" else (layer.ffn_norm, self.between)
        lacking = (norm(wanted).float() - x.float() for wanted, x in zip(sums, inputs, strict=True))
        return weight @ _products(lacking, inputs)


def _share(tokens: int, K: int) -> float:
    """How much of what a regression on so few tokens finds is to be believed, for a linear of K inputs."""
    least, enough = FOR_EACH_INPUT
    return min(1.0, max(0.0, (tokens / K - least) / (enough - least)))


def _aimed(weight: Tensor, drift: Tensor, hessian: Tensor, ridge: float) -> Tensor:
    """The weights [N, K] whose outputs come nearest to the wanted ones: W + D (H + r I)^-1, fp32."""
    device = "cpu" if hessian.device.type == "mps" else hessian.device  # MPS has no fp64
    h = hessian.to(device, torch.float64)
    mean = h.diagonal().mean()
    h.diagonal().add_(ridge * mean if mean > 0 else 1.0)
    factor, info = torch.linalg.cholesky_ex(h)
    if info:
        raise ValueError("the inputs' Hessian is not positive definite; calibrate in float32 or on other text")
    change = torch.cholesky_solve(drift.to(device, torch.float64).t(), factor).t()
    return weight.float() + change.to(weight.device, torch.float32)


@contextlib.contextmanager
def _instead(module: nn.Module, name: str, other: nn.Module) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, other)
    try:
        yield
    finally:
        setattr(module, name, own)


def _unpacked(module: nn.Module, name: str, dtype: torch.dtype) -> contextlib.AbstractContextManager:
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


# ---- Sums over inputs ------------------------------------------------------------------------------------------------


def _inputs(pieces: list[Tensor]) -> Inputs:
    """What is known of the inputs [b, T, K] of a linear."""
    n, sizes = sum(piece[..., 0].numel() for piece in pieces), (piece.float().abs().flatten(0, 1) for piece in pieces)
    sums, largest = zip(*((size.sum(0), size.amax(0)) for size in sizes), strict=True)
    return Inputs(_hessian(pieces), sum(sums) / n, torch.stack(largest).amax(0))


def _hessian(pieces: list[Tensor]) -> Tensor:
    """2/n * the sum of x x^T over n tokens, fp32 [K, K], for x [b, T, K]."""
    K, n = pieces[0].shape[-1], sum(piece[..., 0].numel() for piece in pieces)
    upper = torch.zeros(K, K, device=pieces[0].device)
    for piece in pieces:
        for begin in range(0, K, COLUMNS):
            end = min(begin + COLUMNS, K)
            upper[:end, begin:end] += _product(piece[..., :end], piece[..., begin:end])
    upper = upper.mul_(2 / n).triu_()
    return upper + upper.triu(1).t()


def _products(a: Iterable[Tensor], b: list[Tensor]) -> Tensor:
    """2/n * the sum of a_t b_t^T over n tokens, fp32 [N, K], for a [b, T, N] and b [b, T, K]."""
    total = sum(_product(x, y) for x, y in zip(a, b, strict=True))
    return total * (2 / sum(piece[..., 0].numel() for piece in b))


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x^T y, fp32 [N, K], for x [b, T, N] and y [b, T, K].

    Where y is bfloat16, both are multiplied as such: twice as fast, and for an x that is bfloat16 too, exact.
    """
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    if y.is_cuda and y.dtype == torch.bfloat16:
        return torch.mm(x.to(y.dtype).t(), y, out_dtype=torch.float32)
    with _as_bfloat16(y.dtype == torch.bfloat16):
        return x.float().t() @ y.float()


@contextlib.contextmanager
def _as_bfloat16(wanted: bool) -> Iterator[None]:
    """While fp32 products on the CPU may round their operands to bfloat16."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if wanted:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


# ---- Layers ----------------------------------------------------------------------------------------------------------


def _linears(layer: Block) -> list[str]:
    return [name for name, module in layer.named_modules() if isinstance(module, Linear)]


def _empty(recipe: Recipe, name: str, linear: Linear, dtype: torch.dtype) -> Linear | QuantizedLinear:
    """What is to take the place of `linear`, with no matrix and no bias yet; itself where it stays as it is."""
    with torch.device(linear.weight.device):
        return recipe.linear(name, linear, dtype)


def _quantize_in_order(
    layer: Block,
    path: str,
    stream: _Stream,
    wanted: _Wanted | None,
    aim: float | None,
    recipe: Recipe,
    method: Method,
) -> dict[str, float]:
    """Replace the layer's linears by quantized ones, each on the outputs of those before; gives `output_error`s."""
    errors: dict[str, float] = {}

    def quantize(name: str, pieces: list[Tensor]) -> None:
        linear = layer.get_submodule(name)
        new = _empty(recipe, f"{path}.{name}", linear, layer.ffn_norm.weight.dtype)
        if not isinstance(new, QuantizedLinear):
            return
        weight, hessian = linear.weight, _hessian(pieces)
        share = _share(sum(piece[..., 0].numel() for piece in pieces), linear.in_features)
        if wanted is not None and share and hessian.isfinite().all():
            drift = wanted.drift(layer, name, pieces, stream.pieces, hessian)
            weight = _aimed(weight, share * drift, hessian, aim)
        errors[name] = _fill(layer, path, name, new, weight, hessian, method)

    stream.run(layer, quantize)
    return errors


def _quantize_prepared(
    layer: Block, path: str, stream: _Stream, prepare: Preparation, recipe: Recipe, method: Method
) -> dict[str, float]:
    """The same after `prepare`, with all inputs as the layer's unquantized linears make them."""
    seen: dict[str, Inputs] = {}
    before = list(stream.pieces)
    stream.run(layer, lambda name, pieces: seen.update({name: _inputs(pieces)}))
    stream.pieces[:] = before
    dtype = layer.ffn_norm.weight.dtype
    linears = {name: _empty(recipe, f"{path}.{name}", layer.get_submodule(name), dtype) for name in seen}
    try:
        prepare(layer, linears, seen)
    except ValueError as error:
        raise ValueError(f"{path}.{error}") from None
    errors = {
        name: _fill(layer, path, name, new, layer.get_submodule(name).weight, seen[name].hessian, method)
        for name, new in linears.items()
        if isinstance(new, QuantizedLinear)
    }
    stream.run(layer)
    return errors


def _fill(
    layer: Block, path: str, name: str, new: QuantizedLinear, weight: Tensor, hessian: Tensor, method: Method
) -> float:
    """Put `new` with the codes for `weight` in the place of a linear; gives its `output_error`."""
    bias = layer.get_submodule(name).bias
    try:
        new.store_rows(0, method(name, new, weight, hessian))
    except ValueError as error:
        raise ValueError(f"{path}.{name}: {error}") from None
    if bias is not None:
        new.bias.data.copy_(bias)
    layer.set_submodule(name, new)
    return output_error(weight, new.dequantize(torch.float32), hessian)
