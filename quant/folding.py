"""Scales on the inputs of a layer's linears, undone by the operation before each: the layer computes the same.

W x = (W diag(s)) (diag(1/s) x). What s should be is a method's business, as is what it gains: rounding sees only the
two factors.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from model import Block
from quant.calibrate import Inputs


@torch.no_grad()
def fold(layer: Block, inputs: Mapping[str, Inputs], scales: Mapping[str, Tensor]) -> None:
    """Multiply the columns of each linear in `scales` by its s [K], and undo it before.

    The norms undo it for q/k/v and gate/up, v's rows for o, up's rows for down. Scales of o have to be what
    `share_heads` gives. What is known of the scaled inputs follows.
    """
    for name, s in scales.items():
        layer.get_submodule(name).weight.mul_(s)
        inputs[name].hessian.div_(s[:, None] * s)
        inputs[name].mean_abs.div_(s)
        inputs[name].max_abs.div_(s)
    attention, ffn = layer.attention, layer.ffn
    K, D = attention.n_kv_heads, attention.head_dim
    for name, norm in (("attention.qkv", layer.attention_norm), ("ffn.gate_up", layer.ffn_norm)):
        if name in scales:
            norm.weight.div_(scales[name])
    for name, linear in (("attention.o", attention.qkv), ("ffn.down", ffn.gate_up)):
        if name not in scales:
            continue
        s = scales[name]
        if name == "attention.o":
            s = s.view(K, -1, D)[:, 0].flatten()  # [H * D] -> [K, G, D] -> [K * D]
        linear.weight[-len(s) :].div_(s[:, None])
        if linear.bias is not None:
            linear.bias[-len(s) :].div_(s)


def share_heads(layer: Block, values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """values [H * D] of o's inputs, as `reduce` makes one of those whose query heads share a value head."""
    attention = layer.attention
    K, D = attention.n_kv_heads, attention.head_dim
    grouped = values.view(K, -1, D)  # [K, G, D]
    return reduce(grouped, dim=1, keepdim=True).expand_as(grouped).flatten()


def check_finite(layer: Block, inputs: Mapping[str, Inputs]) -> None:
    """ValueError where a weight or an input of these linears is not finite."""
    for name, seen in inputs.items():
        if not layer.get_submodule(name).weight.isfinite().all():
            raise ValueError(f"{name}: a weight is NaN or infinite; take another dtype or another checkpoint")
        if not seen.hessian.isfinite().all():
            raise ValueError(f"{name}: the inputs' Hessian has NaN or infinity; calibrate in bfloat16 or float32")
