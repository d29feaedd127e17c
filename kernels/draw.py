"""Drawing a token of each row by the Gumbel-max trick: the argmax of logits plus Gumbel noise is a draw from their
softmax.

The randomness is a hash of (seed, position, token): a row draws the same tokens alone, in any batch, compiled or not,
on any device, and no generator state has to live inside a CUDA graph. Written in torch that is some twenty passes over
the logits; the kernel makes one, and so does the twin where it is compiled.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import language
from kernels.language import jit, tl, triton

_CHUNK = 1024  # columns of one program, and of the first level of the twin's argmax
_UINT32 = 0xFFFFFFFF


def draw(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Tokens [B] drawn from the softmax of logits [B, V], fp32; the likeliest where temperature [B, 1] is 0.

    seed and position are int64 [B, 1]; the first are not negative, the second below 2^32.
    """
    kernel = language.on_gpu(logits) and not torch.compiler.is_compiling()
    return (draw_kernel if kernel else draw_twin)(logits, temperature, seed, position)


def draw_twin(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    gumbel = -torch.log(-torch.log(uniform(seed, position, logits.shape[-1])))
    return argmax_in_chunks(torch.where(temperature == 0.0, logits, logits + gumbel))


def argmax_in_chunks(x: Tensor) -> Tensor:
    """Where each row of x [B, V] is largest, [B]. In two levels: compiled, one over a row would run on one core."""
    chunks = F.pad(x, (0, -x.shape[-1] % _CHUNK), value=-math.inf).unflatten(-1, (-1, _CHUNK))  # [B, any, _CHUNK]
    best, column = chunks.max(-1)  # 2 x [B, V / _CHUNK]
    chunk = best.argmax(-1, keepdim=True)  # [B, 1]
    return (chunk * _CHUNK + column.gather(-1, chunk))[:, 0]


def uniform(seed: Tensor, position: Tensor, n: int) -> Tensor:
    """Noise in the open interval (0, 1), fp32 [B, n], a pure function of seed [B, 1], position [B, 1] and column."""
    row = _hash(_hash(_hash(seed & _UINT32) ^ (seed >> 32)) ^ position)  # [B, 1]
    column = torch.arange(n, device=seed.device)
    bits = _hash(_hash(row ^ column) + row & _UINT32) >> 9  # 23 bits: with the half below, fp32 holds them exactly
    return (bits.float() + 0.5) * 2.0**-23


def _hash(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer on int64 tensors of 32-bit values: the product wraps, but its low half is right."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _UINT32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _UINT32
    return x ^ (x >> 16)


def draw_kernel(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    B, V = logits.shape
    chunks = triton.cdiv(V, _CHUNK)
    best = logits.new_empty(B, chunks)
    token = torch.empty(B, chunks, dtype=torch.int64, device=logits.device)
    logits, columns = logits.contiguous(), (x.contiguous() for x in (temperature, seed, position))
    if B:
        _draw_kernel[(chunks, B)](logits, *columns, best, token, V, chunks, CHUNK=_CHUNK)
    return token.gather(1, best.argmax(1, keepdim=True))[:, 0]


@jit
def _hash_kernel(x):
    """`_hash` on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@jit
def _draw_kernel(logits, temperature, seed, position, best, token, V, chunks, CHUNK: tl.constexpr):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * V + column, mask=column < V, other=float("-inf"))
    if tl.load(temperature + row) != 0.0:
        # A vector, though all the same: the interpreter would warn of a scalar that wraps.
        seeds = tl.load(seed + row + tl.zeros([CHUNK], tl.int64))
        low, high = seeds.to(tl.uint32), (seeds >> 32).to(tl.uint32)
        key = _hash_kernel(_hash_kernel(_hash_kernel(low) ^ high) ^ tl.load(position + row).to(tl.uint32))
        bits = _hash_kernel(_hash_kernel(key ^ column.to(tl.uint32)) + key) >> 9
        x -= tl.log(-tl.log((bits.to(tl.float32) + 0.5) * 2.0**-23))
    at = tl.argmax(x, axis=0)
    tl.store(best + row * chunks + chunk, tl.max(x, axis=0))
    tl.store(token + row * chunks + chunk, chunk * CHUNK + at)
