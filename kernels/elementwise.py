"""What lies between matrices that do not take it in: norms, SwiGLU, rotary embedding and the cache's write.

A long input leaves its matrices to cuBLAS and its attention to flash attention. What is left computes next to nothing
and costs its memory traffic: three functions, each one launch that reads its inputs once and writes its results once.
This file knows shapes and strides, and neither models nor caches: the caller hands it views.

The one idea: round where eager rounds. Arithmetic is fp32, and whatever the model's own operations would have stored
is rounded to the storage type at that point, so that prompts run by these kernels and by plain torch agree.

Every function runs its `_kernel` on CUDA where Triton is installed, and its `_twin`, of the same signature, elsewhere.
Nothing is tuned at start-up: block sizes follow from the shapes by rule. The model's sizes are compile-time constants
and the number of tokens is only the grid, so a new prompt length compiles nothing. M is rows of tokens (B * T).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import language
from kernels.codes import encode
from kernels.language import as_codes, jit, scale_of, silu, tl, triton, wait

_TILE = 2048  # elements in a program's tile: with 4 warps, two 16-byte bf16 loads a thread


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm (Zhang & Sennrich 2019, eq. 4) of contiguous rows x [M, C] with weight [C] -> [M, C].

    As `model.RMSNorm`: statistics in fp32, and the normalized row is rounded to x's type before the weight.
    """
    return (rms_norm_kernel if language.on_gpu(x) else rms_norm_twin)(x, weight, eps)


def rms_norm_twin(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def rms_norm_kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    M, C = _rows(x)
    y = torch.empty_like(x)
    if M:
        options = _row_meta(C) | language.launch_options(x)
        _rms_norm_kernel[(M,)](x, weight, y, eps, C, PDL=language.pdl(x), **options)
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's product silu(gate) * up of contiguous [gate | up] [M, 2F] -> [M, F]; silu is rounded before it."""
    return (silu_mul_kernel if language.on_gpu(gate_up) else silu_mul_twin)(gate_up)


def silu_mul_twin(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)  # 2 x [M, F]
    return F.silu(gate) * up


def silu_mul_kernel(gate_up: Tensor) -> Tensor:
    M, width = _rows(gate_up)
    y = gate_up.new_empty(M, width // 2)
    block = min(_TILE // 2, triton.next_power_of_2(width // 2))  # of gate, and as much of up
    if M:
        grid, options = (M * triton.cdiv(width // 2, block),), language.launch_options(y)
        _silu_mul_kernel[grid](gate_up, y, width // 2, block, PDL=language.pdl(y), num_warps=4, **options)
    return y


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    use_rope: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    input_pos: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Everything between the q/k/v matrix and attention: queries [M, H, D], and keys and values put in the cache.

    qkv [M, (H + 2K) * D] is contiguous and its rows are those of input_pos [B, T] int64 in order. Queries and keys get
    an RMS norm per head where a weight [D] is given, then (`use_rope`) the rotary embedding of `model.apply_rope`
    (Su et al. 2021, eq. 34, dimension i paired with i + D/2) by cos and sin [M, D/2] fp32, whose rows may have any
    stride. Keys and values of row (b, t) go to slot input_pos[b, t] of row b of k_cache and v_cache [B, S, K, D],
    which may be views with any strides but a last one of 1. A position must lie inside the cache (the kernel does not
    look), and a row must not have one twice. Caches of codes come with their scales [B, S, K], fp32 (`codes.encode`),
    whose strides are those of the codes, divided by D.
    """
    return (rope_write_kernel if language.on_gpu(qkv) else rope_write_twin)(
        qkv,
        cos,
        sin,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
        use_rope=use_rope,
        k_cache=k_cache,
        v_cache=v_cache,
        input_pos=input_pos,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def rope_write_twin(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    use_rope: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    input_pos: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    (B, T), H, K, D = input_pos.shape, n_heads, n_kv_heads, head_dim
    q, k, v = qkv.view(B * T, H + 2 * K, D).split((H, K, K), dim=1)  # [M, H | K | K, D]
    if q_norm is not None:
        q = rms_norm_twin(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm_twin(k, k_norm, eps)
    if use_rope:
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    rows = torch.arange(B, device=qkv.device)[:, None]  # [B, 1]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        x = x.view(B, T, K, D)
        if scale is None:
            cache[rows, input_pos] = x.to(cache.dtype)
        else:
            cache[rows, input_pos], scale[rows, input_pos] = encode(x, cache.dtype)
    return q.contiguous()  # [M, H, D]


def rope_write_kernel(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    use_rope: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    input_pos: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    (B, T), (M, _) = input_pos.shape, _rows(qkv)
    assert qkv.shape == (B * T, (n_heads + 2 * n_kv_heads) * head_dim), (qkv.shape, input_pos.shape)
    for cache, scale in ((k_cache, k_scale), (v_cache, v_scale)):
        assert scale is None or scale.stride() == tuple(s // head_dim for s in cache.stride()[:3])
    assert cos.stride(-1) == sin.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
    q = qkv.new_empty(M, n_heads, head_dim)
    half = triton.next_power_of_2(head_dim // 2)
    heads = max(1, min(_TILE // (2 * half), triton.next_power_of_2(max(n_heads, n_kv_heads))))  # in a program
    if M:
        _rope_write_kernel[(T, triton.cdiv(n_heads, heads) + triton.cdiv(n_kv_heads, heads), B)](
            qkv,
            cos,
            sin,
            q_norm,
            k_norm,
            q,
            k_cache,
            v_cache,
            k_scale,
            v_scale,
            input_pos.contiguous(),  # its strides would change with T, and with them the kernel's specialization
            eps,
            cos.stride(0),
            sin.stride(0),
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            n_heads,
            n_kv_heads,
            head_dim,
            heads,
            half,
            use_rope,
            num_warps=4,
        )
    return q


def _rows(x: Tensor) -> tuple[int, int]:
    assert x.ndim == 2 and x.is_contiguous(), (x.shape, x.stride())
    return x.shape


def _row_meta(C: int) -> dict[str, int]:
    """A program a row: 32 elements a thread, so that four 16-byte bf16 loads are in flight, up to 16 warps."""
    block = triton.next_power_of_2(C)
    return {"BLOCK": block, "num_warps": min(max(block // 1024, 1), 16)}


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [M, heads, D] by cos and sin [M, D/2], in fp32."""
    cos, sin = cos[:, None], sin[:, None]  # [M, 1, D/2]
    a, b = x.float().chunk(2, dim=-1)  # 2 x [M, heads, D/2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# ---- The kernels -----------------------------------------------------------------------------------------------------
# Row offsets are int64: a prompt's rows times C pass 2^31. `.to(dtype).to(tl.float32)` rounds as a store would.


@jit
def _rms_norm_kernel(x, weight, y, eps, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program a row."""
    dtype = x.dtype.element_ty
    cols = tl.arange(0, BLOCK)
    live = cols < C
    at = tl.program_id(0).to(tl.int64) * C + cols
    w = tl.load(weight + cols, live, other=0.0).to(tl.float32)
    wait(PDL)
    h = tl.load(x + at, live, other=0.0).to(tl.float32)
    h *= tl.rsqrt(tl.sum(h * h) / C + eps)
    tl.store(y + at, w * h.to(dtype).to(tl.float32), live)


@jit
def _silu_mul_kernel(gate_up, y, F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program a block of a row's F columns, consecutive programs along the row."""
    dtype = gate_up.dtype.element_ty
    blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = cols < F
    wait(PDL)
    gate = tl.load(gate_up + row * (2 * F) + cols, live, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * F) + F + cols, live, other=0.0).to(tl.float32)
    product = silu(gate).to(dtype).to(tl.float32) * up
    tl.store(y + row * F + cols, product, live)


@jit
def _norm_rotate(
    a, b, weight, cos, sin, dtype: tl.constexpr, eps, cols, D: tl.constexpr, USE_ROPE: tl.constexpr
):  # fmt: skip
    """Norm and rotary embedding of heads whose halves are a and b [heads, D/2] fp32, as values of `dtype`."""
    if weight is not None:
        r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]  # [heads, 1]
        live = cols < D // 2
        w_a = tl.load(weight + cols, live, other=0.0).to(tl.float32)[None]
        w_b = tl.load(weight + D // 2 + cols, live, other=0.0).to(tl.float32)[None]
        a = (w_a * (a * r).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        b = (w_b * (b * r).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    if USE_ROPE:
        a, b = a * cos - b * sin, b * cos + a * sin
    return a.to(dtype), b.to(dtype)


@jit
def _store_heads(cache, scale, at, cols, live, a, b, D: tl.constexpr):
    """Put heads whose halves are a and b [heads, D/2] in a cache at offsets `at` [heads, 1], as codes if it has scales.

    Scales lie as the codes do, one for D of them.
    """
    dtype: tl.constexpr = cache.dtype.element_ty
    if scale is not None:
        a, b = a.to(tl.float32), b.to(tl.float32)
        s = scale_of(tl.maximum(tl.max(tl.abs(a), 1, keep_dims=True), tl.max(tl.abs(b), 1, keep_dims=True)), dtype)
        a, b = as_codes(a, s, dtype), as_codes(b, s, dtype)
        tl.store(scale + at // D + cols[None] * 0, s, live & (cols == 0)[None])
    tl.store(cache + at + cols[None], a, live)
    tl.store(cache + at + cols[None] + D // 2, b, live)


@jit
def _rope_write_kernel(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    input_pos,
    eps,
    cos_row,
    sin_row,
    k_batch,
    k_slot,
    k_head,
    v_batch,
    v_slot,
    v_head,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    USE_ROPE: tl.constexpr,
):
    """Program (t, group, b) has HEADS heads of one row: the first groups of its queries, the rest of keys and values.

    HALF is D/2 padded to a power of two. The two halves of a head are two tiles, so that a pair to rotate is in the
    same place of both.
    """
    dtype = qkv.dtype.element_ty
    batch = tl.program_id(2).to(tl.int64)
    row = batch * tl.num_programs(0) + tl.program_id(0)  # of M
    group = tl.program_id(1)
    cols = tl.arange(0, HALF)
    cos_values = tl.zeros((1, HALF), tl.float32)
    sin_values = tl.zeros((1, HALF), tl.float32)
    if USE_ROPE:
        cos_values = tl.load(cos + row * cos_row + cols, cols < D // 2, other=0.0)[None]
        sin_values = tl.load(sin + row * sin_row + cols, cols < D // 2, other=0.0)[None]
    source = qkv + row * ((H + 2 * K) * D)
    q_groups: tl.constexpr = (H + HEADS - 1) // HEADS
    if group < q_groups:
        heads = (group * HEADS + tl.arange(0, HEADS))[:, None]
        live = (heads < H) & (cols < D // 2)[None]
        at = heads * D + cols[None]
        a = tl.load(source + at, live, other=0.0).to(tl.float32)
        b = tl.load(source + at + D // 2, live, other=0.0).to(tl.float32)
        a, b = _norm_rotate(a, b, q_norm, cos_values, sin_values, dtype, eps, cols, D, USE_ROPE)
        tl.store(q + row * (H * D) + at, a, live)
        tl.store(q + row * (H * D) + at + D // 2, b, live)
    else:
        heads = ((group - q_groups) * HEADS + tl.arange(0, HEADS))[:, None]
        live = (heads < K) & (cols < D // 2)[None]
        at = heads * D + cols[None]
        slot = tl.load(input_pos + row)
        v_at = batch * v_batch + slot * v_slot + heads * v_head
        a = tl.load(source + (H + K) * D + at, live, other=0.0)
        b = tl.load(source + (H + K) * D + at + D // 2, live, other=0.0)
        _store_heads(v_cache, v_scale, v_at, cols, live, a, b, D)
        a = tl.load(source + H * D + at, live, other=0.0).to(tl.float32)
        b = tl.load(source + H * D + at + D // 2, live, other=0.0).to(tl.float32)
        a, b = _norm_rotate(a, b, k_norm, cos_values, sin_values, dtype, eps, cols, D, USE_ROPE)
        k_at = batch * k_batch + slot * k_slot + heads * k_head
        _store_heads(k_cache, k_scale, k_at, cols, live, a, b, D)
