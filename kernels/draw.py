"""Draws a token for each row of logits, in one pass over them.

The Gumbel-max trick of `sampling.sample` for rows that have a temperature and nothing else: no penalties, no filters.
The noise is the same hash of (seed, position, token), so a row draws the same token by either. A program takes a piece
of one row and leaves its best; the best of those is the token.
"""

import torch
from torch import Tensor

from kernels import language
from kernels.language import jit, order, tl, triton
from sampling import argmax_in_chunks, uniform

PIECE = 4096  # logits that a program looks at


def draw(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Tokens int64 [B] from logits [B, V]; temperature fp32, seed int64 and position int64 are [B].

    A row at temperature 0 takes its largest logit.
    """
    return (draw_kernel if language.on_gpu(logits) else draw_twin)(logits, temperature, seed, position)


def draw_twin(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """`draw` in plain torch."""
    logits, temperature = logits.float(), temperature[:, None]
    noise = uniform(seed[:, None], position[:, None], logits.shape[-1])
    warm = logits / torch.where(temperature == 0.0, 1.0, temperature) - torch.log(-torch.log(noise))
    return argmax_in_chunks(torch.where(temperature == 0.0, logits, warm))


def draw_kernel(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """`draw` by the kernel."""
    assert logits.stride(1) == 1
    B, V = logits.shape
    best = torch.empty(B, triton.cdiv(V, PIECE), dtype=torch.int64, device=logits.device)
    _draw_kernel[(best.shape[1], B)](
        logits, temperature, seed, position, best, V, logits.stride(0), PIECE=PIECE, num_warps=8
    )
    return 0xFFFFFFFF - (best.amax(1) & 0xFFFFFFFF)


@jit
def _hash(x):
    """MurmurHash3's finalizer on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@jit
def _draw_kernel(logits, temperature, seed, position, best, V, stride, PIECE: tl.constexpr):
    piece, row = tl.program_id(0), tl.program_id(1)
    index = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(logits + row.to(tl.int64) * stride + index, mask=index < V, other=float("-inf")).to(tl.float32)
    t = tl.load(temperature + row)
    if t > 0.0:
        s = tl.load(seed + row)
        at = tl.load(position + row).to(tl.uint32)
        own = _hash(_hash(_hash(s.to(tl.uint32)) ^ (s >> 32).to(tl.uint32)) ^ at)
        bits = _hash(_hash(own ^ index.to(tl.uint32)) + own) >> 9
        u = (bits.to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
        x = tl.where(index < V, x / t - tl.log(-tl.log(u)), float("-inf"))
    top = tl.max(x, 0)
    first = tl.min(tl.where(x == top, index, V - 1), 0)  # a number of 64 bits for each logit would take longer
    tl.store(best + row * tl.num_programs(0) + piece, order(top, first))
