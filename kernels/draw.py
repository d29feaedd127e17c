"""Draws a token for each row of logits, in one pass over them.

The Gumbel-max trick of `sampling.sample` for rows that have a temperature and nothing else: no penalties, no filters.
The noise is the same hash of (seed, position, token), so a row draws the same token by either. A program takes a piece
of one row and leaves its best; the best of those is the token. What a row is drawn by is read where it lies, so a graph
can hold the draws of whichever rows there are.
"""

import torch
from torch import Tensor

from kernels import language
from kernels.language import jit, launch_options, order, tl, triton, wait
from sampling import argmax_in_chunks, uniform

PIECE = 4096  # logits that a program looks at


def draw(
    logits: Tensor, rows: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Tokens int64 [B], in `out` if given, from logits [B, V], to go to position int64 [B].

    Row i has the rows[i]-th temperature, fp32, and seed, int64. At temperature 0 it takes its largest logit.
    """
    out = torch.empty_like(position) if out is None else out
    (draw_kernel if language.on_gpu(logits) else draw_twin)(logits, rows, temperature, seed, position, out)
    return out


def draw_twin(logits: Tensor, rows: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, out: Tensor) -> None:
    """`draw` in plain torch."""
    logits, temperature, seed = logits.float(), temperature[rows, None], seed[rows, None]
    noise = uniform(seed, position[:, None], logits.shape[-1])
    warm = logits * torch.where(temperature == 0.0, 1.0, temperature).reciprocal() - torch.log(-torch.log(noise))
    out.copy_(argmax_in_chunks(torch.where(temperature == 0.0, logits, warm)))


def draw_kernel(logits: Tensor, rows: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, out: Tensor) -> None:
    """`draw` by the kernels."""
    assert logits.stride(1) == 1 and all(x.is_contiguous() for x in (rows, temperature, seed, position, out))
    B, V = logits.shape
    best = torch.empty(B, triton.cdiv(V, PIECE), dtype=torch.int64, device=logits.device)
    options = {"PDL": language.pdl(logits), **launch_options(logits)}
    grid, tensors, ptx = (best.shape[1], B), (logits, rows, temperature, seed, position, best), language.cuda(logits)
    _draw_kernel[grid](*tensors, V, logits.stride(0), PIECE=PIECE, PTX=ptx, num_warps=8, **options)
    _pick_kernel[(B,)](best, out, best.shape[1], PIECES=triton.next_power_of_2(best.shape[1]), num_warps=1, **options)


@jit
def _hash(x):
    """MurmurHash3's finalizer on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@jit
def _log(x, PTX: tl.constexpr):
    """The natural logarithm: off by 2e-7 where x is 0.5 to 2, else by as much of itself."""
    if PTX:
        code: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
        y = tl.inline_asm_elementwise(code, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y * 0.6931471805599453


@jit
def _draw_kernel(logits, rows, temperature, seed, position, best, V, stride, PIECE: tl.constexpr, PTX: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """The best of a piece of a row's logits, as `order` packs it."""
    piece, row = tl.program_id(0), tl.program_id(1)
    index = piece * PIECE + tl.arange(0, PIECE)
    wait(PDL)
    slot = tl.load(rows + row)
    x = tl.load(logits + row.to(tl.int64) * stride + index, mask=index < V, other=float("-inf")).to(tl.float32)
    t = tl.load(temperature + slot)
    if t > 0.0:
        s = tl.load(seed + slot)
        at = tl.load(position + row).to(tl.uint32)
        own = _hash(_hash(_hash(s.to(tl.uint32)) ^ (s >> 32).to(tl.uint32)) ^ at)
        bits = _hash(own + index.to(tl.uint32) * (_hash(own + 1) | 1))
        # 1 - u, of 23 bits as u is. Of u near 1, which wins, a fast logarithm would be wrong, but a series is short.
        v = ((~bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
        few = v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * 0.25)))
        e = tl.where(v < 0.03125, few, -_log(1.0 - v, PTX))
        x = tl.where(index < V, x * tl.div_rn(1.0, t) - _log(e, PTX), float("-inf"))
    top = tl.max(x, 0)
    first = tl.min(tl.where(x == top, index, V - 1), 0)  # a number of 64 bits for each logit would take longer
    tl.store(best + row * tl.num_programs(0) + piece, order(top, first))


@jit
def _pick_kernel(best, out, n, PIECES: tl.constexpr, PDL: tl.constexpr):
    """The token of the best of a row's n pieces."""
    row, piece = tl.program_id(0), tl.arange(0, PIECES)
    wait(PDL)
    packed = tl.load(best + row * n + piece, mask=piece < n, other=-(1 << 63))
    tl.store(out + row, 0xFFFFFFFF - (tl.max(packed, 0) & 0xFFFFFFFF))
