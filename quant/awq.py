"""AWQ: inputs that are large get finer steps, by scales that the operation before a linear undoes; then clipping.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (arXiv 2306.00978);
equations are numbered as there. `fold_scales` rewrites a layer so that it computes the same and rounds better, and
`choose_codes` rounds a matrix to nearest after limiting each group's range. This file refuses to know where inputs come
from, and how codes are packed.

The one idea: W x = (W diag(s)) (diag(1/s) x), and rounding sees only the first factor. An input that matters takes a
larger s, and with it more of its group's steps. What a rounding error D does to the outputs needs no second look at
the inputs: ||D X||^2 is tr(D H D^T), and for a group alone the same with H's block on the diagonal.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from model import Block
from quant.calibrate import Inputs, squared_outputs
from quant.folding import check_finite, fold, share_heads
from quant.linears import Codes, Int4Linear, QuantizedLinear

ALPHAS = tuple(i / 20 for i in range(20))  # eq. 5's grid; 0 leaves the weights as they are
SHARES = tuple(1 - i / 20 for i in range(10))  # of a group's largest weight: where it may be clipped
LEAST = 1e-4  # of the mean magnitude: what an input counts at least, so that none is divided by 0


@torch.no_grad()
def fold_scales(layer: Block, linears: Mapping[str, QuantizedLinear], inputs: Mapping[str, Inputs]) -> None:
    """Scale the inputs of the layer's 4-bit linears and undo it before them; as `calibrate.Preparation` wants it.

    Query heads that share a value head share its scales. `linears` are written over. ValueError where a weight or an
    input is not finite.
    """
    check_finite(layer, inputs)
    means = {name: seen.mean_abs for name, seen in inputs.items()}
    means["attention.o"] = share_heads(layer, means["attention.o"], torch.mean)
    scales = {}
    for name, mean_abs in means.items():
        weight, hessian = layer.get_submodule(name).weight, inputs[name].hessian
        scales[name] = best_scales(linears[name], weight, hessian, mean_abs)
    fold(layer, inputs, scales)


def best_scales(linear: QuantizedLinear, weight: Tensor, hessian: Tensor, mean_abs: Tensor) -> Tensor:
    """s = mean_abs^alpha [K], fp32, with the alpha of ALPHAS whose outputs are nearest (eq. 4 and 5).

    weight [N, K] is rounded as `linear`, which is written over, rounds it. s is normalized to lie around 1; linears of
    8 bits gain nothing and have ones.
    """
    if not isinstance(linear, Int4Linear):
        return torch.ones_like(mean_abs)
    weight = weight.float()
    size = mean_abs / mean_abs.mean().clamp(min=torch.finfo(torch.float32).tiny)
    least, best = float("inf"), torch.ones_like(mean_abs)
    for alpha in ALPHAS:
        s = size.clamp(min=LEAST) ** alpha
        s = s / (s.max() * s.min()).sqrt()
        linear.pack_rows(0, weight * s)
        error = squared_outputs(linear.dequantize(torch.float32) / s - weight, hessian)
        if error < least:
            least, best = error, s
    return best


def choose_codes(linear: QuantizedLinear, weight: Tensor, hessian: Tensor, *, unclipped: int = 0) -> Codes:
    """weight [N, K] rounded to nearest for `linear`, each group clipped to where its part of the output is nearest.

    The first `unclipped` rows keep their range, and so do linears of 8 bits. Queries and keys should: what matters of
    them is a product of two, which clipping hurts more than their own error says.
    """
    weight = weight.float()
    if isinstance(linear, Int4Linear):
        weight = torch.cat((weight[:unclipped], clip(linear, weight[unclipped:], hessian)))
    return linear.quantize(weight)


def clip(linear: Int4Linear, weight: Tensor, hessian: Tensor) -> Tensor:
    """weight [n, K], each group within the share of SHARES of its largest magnitude that leaves the smallest error.

    `linear` says how they are rounded, and its first rows are written over.
    """
    groups = weight.unflatten(1, (-1, linear.group))  # [n, G, group]
    blocks = hessian.unflatten(1, (-1, linear.group)).unflatten(0, (-1, linear.group))  # [G, group, G, group]
    blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [G, group, group]
    largest = groups.abs().amax(-1, keepdim=True)  # [n, G, 1]
    least, best = torch.full_like(largest, float("inf")), largest
    for share in SHARES:
        limit = share * largest
        linear.pack_rows(0, groups.clamp(-limit, limit).flatten(1))
        rounded = linear.dequantize(torch.float32, slice(len(weight))).view_as(groups)
        d = (rounded - groups).transpose(0, 1)  # [G, n, group]
        error = ((d @ blocks) * d).sum(-1).t()[..., None]  # [n, G, 1]
        best = torch.where(error < least, limit, best)
        least = torch.minimum(error, least)
    return groups.clamp(-best, best).flatten(1)
