"""SmoothQuant: inputs lose their outliers to the weights, so that both round to 8 bits.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (arXiv
2211.10438); equations are numbered as there. This file refuses to know how a layer undoes scales (`folding.py`) and
how inputs are rounded when the model runs (`kernels/int8.py`).

The one idea: Y = (X diag(s)^-1) (diag(s) W) (eq. 3). A row of X shares one scale, which its largest channel sets, while
weights are small everywhere: what a channel loses by s_j, the weights that meet it can take.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from model import Block
from quant.calibrate import Inputs
from quant.folding import check_finite, fold, share_heads
from quant.linears import QuantizedLinear, W8A8Linear

ALPHA = 0.5  # what the paper takes for most models
LEAST = 1e-5  # of the largest channel: what an input and a weight count at least, so that none is divided by 0


@torch.no_grad()
def fold_scales(
    layer: Block, linears: Mapping[str, QuantizedLinear], inputs: Mapping[str, Inputs], *, alpha: float
) -> None:
    """Smooth the inputs of the layer's W8A8 linears; as `calibrate.Preparation` wants it, once alpha is given.

    Query heads that share a value head share its scales. ValueError where a weight or an input is not finite.
    """
    check_finite(layer, inputs)
    for names in (("attention.o", "ffn.down"), ("attention.qkv", "ffn.gate_up")):  # the former change the latter's rows
        scales = {}
        for name in names:
            if isinstance(linears[name], W8A8Linear):
                x, w = inputs[name].max_abs, layer.get_submodule(name).weight.float().abs().amax(0)
                if name == "attention.o":
                    x, w = (share_heads(layer, t, torch.amax) for t in (x, w))
                scales[name] = smoothing_scales(x, w, alpha)
        fold(layer, inputs, scales)


def smoothing_scales(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """s = x^alpha / w^(1 - alpha) for the largest magnitudes x and w [K] of each input and of its weights (eq. 4).

    s is normalized to lie around 1, which neither rounding sees.
    """
    x, w = (t.clamp(min=LEAST * float(t.max()) or 1.0) for t in (x, w))
    s = x**alpha / w ** (1 - alpha)
    return s / (s.max() * s.min()).sqrt()
