"""Vectors in 8 bits: codes and a scale each, x = scale * code. A quantized key/value cache holds them.

The plain version, which needs no Triton; in kernels `scale_of` and `as_codes` of `language.py` take its place.
"""

import torch
from torch import Tensor

LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}


def encode(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [..., D] in `dtype` and scales [...], fp32, of x [..., D]: scale = absmax / the type's largest number.

    A vector of zeros has the scale 0. NaN or infinity becomes a scale that is not finite.
    """
    x, largest = x.float(), LARGEST[dtype]
    scale = x.abs().amax(-1) / largest
    steps = x / torch.where(scale == 0, 1.0, scale)[..., None]
    if not dtype.is_floating_point:
        steps = steps.round()
    return steps.clamp(-largest, largest).to(dtype), scale  # past it, some versions of torch make NaN of fp8


def decode(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The vectors [..., D] that codes [..., D] and scales [...] stand for."""
    return codes.float().mul_(scale[..., None]).to(dtype)
