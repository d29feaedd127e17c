"""GPTQ: codes chosen one input at a time, each one's rounding error made up for by the inputs still to come.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323); equations and steps below are numbered as there. A matrix [N, K] and the Hessian of its output's
squared error, H = 2 X X^T [K, K], go in, codes come out. This file refuses to know models, where H comes from, and how
codes are packed.

The one idea: all rows share H, so what an input's rounding error should do to the other inputs' weights is one row of
one triangular matrix, computed once.
"""

import torch
from torch import Tensor

from quant.linears import (
    GROUPS,
    Codes,
    Fp8Linear,
    Int4Linear,
    QuantizedLinear,
    code_range,
    fp8_scale,
    grid,
    nearest_fp8,
)

AIM = 0.01  # for `calibrate`: the ridge of the regression that makes good what linears before have spoilt
MOST_DAMPING = 1.0  # in mean diagonals of H: with as much added, rounding errors hardly move to other inputs


def choose_codes(
    linear: QuantizedLinear, weight: Tensor, hessian: Tensor, *, act_order: bool = True, damping: float = 0.01
) -> Codes:
    """`gptq` for the layout of `linear`, which is to hold weight [N, K]; as `calibrate.Method` wants it.

    ValueError as `gptq`.
    """
    if isinstance(linear, Int4Linear):
        options = linear.rounding
    else:
        options = {"bits": 8, "group": 0, "symmetric": True, "dtype": torch.float32}
        options["floats"] = isinstance(linear, Fp8Linear)
    return gptq(weight, hessian, **options, act_order=act_order, damping=damping)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    dtype: torch.dtype,
    floats: bool = False,
    clip: bool = False,
    act_order: bool = True,
    damping: float = 0.01,
    block: int = 128,
) -> Codes:
    """Codes for weight [N, K] that keep its outputs, given hessian [K, K] = 2/n * sum of x x^T over its inputs x.

    The scales and zeros are those of rounding to nearest, in `dtype`, taken before any weight moves: `group` of the
    row's K for 3 and 4 bits (32, 64 or 128), one a row for 8 (group 0, symmetric, fp32), which are integers or
    `floats` (e4m3). With `act_order` the inputs of the largest diagonal go first; scales that are fixed beforehand let
    that be without any trace in the layout.

    3 bits live in the 4-bit layout, and `clip` is as in `linears.grid`.

    `damping`, in mean diagonals, is added to H's diagonal; where H is still not positive definite, ten times as much,
    up to MOST_DAMPING. An input that was always zero is rounded to nearest. ValueError for NaN or infinity, and for an
    H that is no such sum. Work is fp32, H's factor fp64; `block` inputs at a time leave the others as they are.
    """
    K = weight.shape[1]
    _check(weight, hessian, bits=bits, group=group, symmetric=symmetric, floats=floats, damping=damping, block=block)
    if bits == 8:
        scale, zero = (fp8_scale(weight) if floats else weight.float().abs().amax(1) / 127)[:, None], None
    else:
        scale, zero = grid(weight, bits=bits, group=group, symmetric=symmetric, dtype=dtype, clip=clip)
    scale_GN, zero_GN = scale.t().contiguous(), None if zero is None else zero.t().contiguous()
    w_KN = weight.float().t().contiguous()  # an input's weights are neighbours: each step reads and writes whole rows
    order = torch.arange(K, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        w_KN, hessian = w_KN[order], hessian[order][:, order]
    factor = _inverse_factor(hessian, damping).to(weight.device)
    groups = order // (group or K)  # [K]: whose scale each step uses
    middle, (low, high) = (128, (0, 255)) if bits == 8 else (8, code_range(bits, symmetric=symmetric))
    codes = torch.empty_like(w_KN, dtype=torch.uint8)
    for begin in range(0, K, block):
        end = min(begin + block, K)
        w, u = w_KN[begin:end], factor[begin:end]  # [b, N], [b, K]
        errors = torch.empty_like(w)
        step = scale_GN[groups[begin:end]].float()  # [b, N]
        divisor = torch.where(step == 0, 1.0, step)
        offset = torch.full_like(step, middle) if zero is None else zero_GN[groups[begin:end]].float()
        diagonal = u[:, begin:end].diagonal().tolist()
        for j in range(end - begin):
            if floats:
                code = nearest_fp8(w[j], step[j])  # [N]
                codes[begin + j], steps = code.view(torch.uint8), code.float()
            else:
                code = (w[j] / divisor[j]).round_().add_(offset[j]).clamp_(low, high)
                codes[begin + j], steps = code, code - offset[j]
            errors[j] = (w[j] - steps * step[j]) / diagonal[j]
            # Eq. 2: the error times a row of the inverse of what is left of H, which a row of the factor stands for.
            w[j + 1 :].addr_(u[j, begin + j + 1 : end], errors[j], alpha=-1)
        w_KN[end:].addmm_(u[:, end:].t(), errors, alpha=-1)  # eq. 4, for the whole block at once
    result = torch.empty_like(codes)
    result[order] = codes
    return Codes(result.t().contiguous(), scale if group else scale[:, 0], zero)


def _check(
    weight: Tensor, hessian: Tensor, *, bits: int, group: int, symmetric: bool, floats: bool, damping: float, block: int
) -> None:
    K = weight.shape[1]
    if bits not in (3, 4, 8):
        raise ValueError(f"GPTQ makes codes of 3, 4 or 8 bits; got {bits}")
    if bits == 8 and (group or not symmetric):
        raise ValueError(f"8 bits have one symmetric scale a row; got group {group}, symmetric {symmetric}")
    if floats and bits != 8:
        raise ValueError(f"floats have 8 bits; got {bits}")
    if bits < 8 and (group not in GROUPS or K % group):
        raise ValueError(f"{bits} bits need groups of {', '.join(map(str, GROUPS))} that divide {K}; got {group}")
    if not 0 < damping <= MOST_DAMPING:
        raise ValueError(f"damping must be above 0 and at most {MOST_DAMPING} mean diagonals; got {damping}")
    if block < 1:
        raise ValueError(f"a block has at least 1 input; got {block}")
    if hessian.shape != (K, K):
        raise ValueError(f"weights of {K} inputs need a Hessian [{K}, {K}]; got {list(hessian.shape)}")
    if not weight.isfinite().all():
        raise ValueError("a weight is NaN or infinite; take another dtype or another checkpoint")
    if not hessian.isfinite().all():
        raise ValueError("the inputs' Hessian has NaN or infinity; calibrate in bfloat16 or float32")


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U [K, K], fp32, with U^T U the inverse of the damped Hessian ("step 3" in the paper).

    Its row j over its diagonal is row j of the inverse of H[j:, j:], over that one's diagonal. Not by way of the
    inverse: H = R R^T with R upper, the Cholesky factor seen from the other corner, gives U = R^-1 at once.
    """
    h = hessian.to("cpu" if hessian.device.type == "mps" else hessian.device, torch.float64)  # MPS has no fp64
    live = h.diagonal()[h.diagonal() != 0]  # damping is all that the others have, and makes them independent
    mean = float(live.mean()) if len(live) else 1.0
    if mean <= 0:
        raise ValueError(f"the Hessian's diagonal has the mean {mean}; it must be a sum of x x^T over inputs x")
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    share = damping
    while True:
        lower, info = torch.linalg.cholesky_ex((h + share * mean * eye).flip(0, 1))
        if not info:
            break
        if share >= MOST_DAMPING:
            raise ValueError(
                f"the Hessian is not positive definite with {share:g} of its mean diagonal added; it must be a sum of "
                "x x^T over inputs x: calibrate in float32 or on other text"
            )
        share = min(10 * share, MOST_DAMPING)
    return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).float()
