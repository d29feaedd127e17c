"""cache.py: what a view shares, what attention may read, and what must never leak."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cache import KV_DTYPES, StaticCache

H, K, D, WINDOW = 6, 2, 8, 3


def new_cache(
    *,
    batch: int = 2,
    length: int = 10,
    n_layers: int = 2,
    dtype: torch.dtype = torch.float32,
    kv_dtype: str | None = None,
) -> StaticCache:
    return StaticCache.allocate(
        n_layers=n_layers,
        batch=batch,
        max_seq_len=length,
        n_kv_heads=K,
        head_dim=D,
        dtype=dtype,
        device="cpu",
        kv_dtype=kv_dtype,
    )


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(
    positions: Sequence[Sequence[int]], *, length: int = 10, seed: int = 0
) -> tuple[StaticCache, Tensor, Tensor]:
    """A cache whose rows hold random keys and values at all slots up to each row's last position, and those."""
    cache, B = new_cache(batch=len(positions), length=length), len(positions)
    k, v = noise(2, B, length, K, D, seed=seed)
    for row, row_positions in enumerate(positions):
        live = torch.arange(max(row_positions) + 1)[None]
        one = cache_row(cache, row)
        one.write(k[row : row + 1, : live.shape[1]], v[row : row + 1, : live.shape[1]], live)
    return cache, k, v


def cache_row(cache: StaticCache, row: int):
    layer = cache.layers[0]
    return type(layer)(layer.k[row : row + 1], layer.v[row : row + 1])


def slow_attention(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, window: int | None = None) -> Tensor:
    """Attention [B, T, H, D] of q [B, T, H, D] over slots k, v [B, S, K, D], one head of one token at a time."""
    out = torch.empty_like(q)
    for b, t, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        end = int(input_pos[b, t]) + 1
        begin = 0 if window is None else max(0, end - window)
        keys, values = k[b, begin:end, h // (H // K)], v[b, begin:end, h // (H // K)]
        out[b, t, h] = (keys @ q[b, t, h] / D**0.5).softmax(0) @ values
    return out


def attend(cache: StaticCache, q: Tensor, input_pos: Tensor, window: int | None = None) -> Tensor:
    mask, window_mask = cache.masks(input_pos, window)
    return cache.layers[0].attend(q, mask if window is None else window_mask)


# ---- Memory ---------------------------------------------------------------------------------------------------------


def test_a_new_cache_is_all_zeros_however_memory_was_left():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch then fills memory that nobody set with NaN
    try:
        cache = new_cache()
    finally:
        torch.use_deterministic_algorithms(before)
    assert all((layer.k == 0).all() and (layer.v == 0).all() for layer in cache.layers)


def test_narrow_shares_memory_with_the_whole():
    cache = new_cache(batch=3, length=10)
    view = cache.narrow(4, rows=2)
    assert view.max_seq_len == 4 and view.layers[1].k.shape == (2, 4, K, D)
    view.layers[1].write(noise(2, 1, K, D), noise(2, 1, K, D, seed=1), torch.tensor([[3], [0]]))
    whole = cache.layers[1]
    assert torch.equal(whole.k[0, 3], noise(2, 1, K, D)[0, 0]) and torch.equal(
        whole.v[1, 0], noise(2, 1, K, D, seed=1)[1, 0]
    )
    assert whole.k.count_nonzero() == 2 * K * D
    assert cache.layers[0].k.count_nonzero() == 0


def test_nbytes_counts_the_slots_in_view():
    cache = new_cache(batch=3, length=10, n_layers=4)
    slot = 4 * 2 * K * D * 4  # layers, keys and values, numbers, bytes of each
    assert cache.nbytes == 30 * slot
    assert cache.narrow(7).nbytes == 21 * slot
    assert cache.narrow(7, rows=1).nbytes == 7 * slot
    assert new_cache(batch=3, length=10, n_layers=4, dtype=torch.bfloat16).nbytes == 15 * slot


def test_write_puts_each_row_at_its_own_positions():
    cache = new_cache(batch=2, length=10)
    k, v, at = noise(2, 3, K, D), noise(2, 3, K, D, seed=1), torch.tensor([[0, 1, 2], [9, 4, 6]])
    cache.layers[0].write(k, v, at)
    for row in range(2):
        for t, slot in enumerate(at[row].tolist()):
            assert torch.equal(cache.layers[0].k[row, slot], k[row, t])
            assert torch.equal(cache.layers[0].v[row, slot], v[row, t])
    assert cache.layers[0].k.count_nonzero() == 6 * K * D
    cache.layers[0].write(v[:, :1], k[:, :1], at[:, 1:2])  # over what is there
    assert torch.equal(cache.layers[0].k[1, 4], v[1, 0])


def test_bf16_storage_takes_fp32_and_attends_as_rounded():
    cache = new_cache(dtype=torch.bfloat16)
    k, v, at = noise(2, 4, K, D), noise(2, 4, K, D, seed=1), torch.arange(4).expand(2, -1)
    cache.layers[0].write(k, v, at)
    assert cache.layers[0].k.dtype == torch.bfloat16
    assert torch.equal(cache.layers[0].k[:, :4], k.bfloat16())
    q = noise(2, 1, H, D, seed=2).bfloat16()
    got = attend(cache, q, torch.tensor([[3], [3]]))
    expected = slow_attention(q.float(), k.bfloat16().float(), v.bfloat16().float(), torch.tensor([[3], [3]]))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=2e-2, rtol=2e-2)


# ---- Attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("at", [[[0], [9]], [[4], [4]], [[3, 4, 5], [0, 1, 2]], [[7, 8, 9], [7, 8, 9]]])
def test_attention_sees_the_slots_up_to_each_position(at, window):
    cache, k, v = filled(at)
    q, input_pos = noise(2, len(at[0]), H, D, seed=3), torch.tensor(at)
    torch.testing.assert_close(attend(cache, q, input_pos, window), slow_attention(q, k, v, input_pos, window))


@pytest.mark.parametrize("window", [None, WINDOW, 100])
@pytest.mark.parametrize("begin", [0, 4])
def test_tail_attention_equals_masked(begin, window):
    at = [list(range(begin, 10))] * 2
    cache, k, v = filled(at)
    q, input_pos = noise(2, 10 - begin, H, D, seed=3), torch.tensor(at)
    tail = attend(cache.narrow(10, tail=True), q, input_pos, window)
    torch.testing.assert_close(tail, attend(cache, q, input_pos, window))
    torch.testing.assert_close(tail, slow_attention(q, k, v, input_pos, window))


def test_a_whole_prompt_in_tail_view_needs_no_mask():
    cache, at = new_cache(length=10), torch.arange(6).expand(2, -1)
    assert cache.narrow(6, tail=True).masks(at, None) == (None, None)
    assert cache.narrow(6, tail=True).masks(at, 6) == (None, None)  # no shorter than the prompt
    assert cache.narrow(6, tail=True).masks(at, 5)[1] is not None
    assert cache.narrow(6).masks(at, None)[0] is not None


@pytest.mark.parametrize("garbage", [1e4, -1e30])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("at", [[[2], [5]], [[1, 2], [4, 5]]])
def test_slots_past_a_rows_position_never_leak(at, window, garbage):
    cache, k, v = filled(at)
    q, input_pos = noise(2, len(at[0]), H, D, seed=3), torch.tensor(at)
    clean = attend(cache, q, input_pos, window)
    for row, last in enumerate((2, 5)):  # what a rejected draft or a longer answer left behind
        cache.layers[0].k[row, last + 1 :] = garbage
        cache.layers[0].v[row, last + 1 :] = -garbage
    assert torch.equal(attend(cache, q, input_pos, window), clean)
    torch.testing.assert_close(clean, slow_attention(q, k, v, input_pos, window))


def test_slots_outside_the_view_are_not_even_read():
    cache, k, v = filled([[4], [4]])
    for tensor in (cache.layers[0].k, cache.layers[0].v):
        tensor[:, 5:] = torch.nan  # NaN times a weight of zero would show
    q, input_pos = noise(2, 1, H, D, seed=3), torch.tensor([[4], [4]])
    torch.testing.assert_close(attend(cache.narrow(5), q, input_pos), slow_attention(q, k, v, input_pos))


def test_slots_before_the_window_never_leak():
    cache, k, v = filled([[9], [9]])
    q, input_pos = noise(2, 1, H, D, seed=3), torch.tensor([[9], [9]])
    clean = attend(cache, q, input_pos, WINDOW)
    cache.layers[0].k[:, : 10 - WINDOW] = 1e4
    cache.layers[0].v[:, : 10 - WINDOW] = 1e4
    assert torch.equal(attend(cache, q, input_pos, WINDOW), clean)
    torch.testing.assert_close(clean, slow_attention(q, k, v, input_pos, WINDOW))


def test_rows_do_not_see_each_other():
    cache, _, _ = filled([[6], [6]])
    q, input_pos = noise(2, 1, H, D, seed=3), torch.tensor([[6], [6]])
    both = attend(cache, q, input_pos)
    cache.layers[0].k[1], cache.layers[0].v[1] = 1e4, 1e4
    assert torch.equal(attend(cache, q, input_pos)[0], both[0])
    torch.testing.assert_close(attend(cache.narrow(10, rows=1), q[:1], input_pos[:1])[0], both[0])


# ---- Codes ----------------------------------------------------------------------------------------------------------


def stored(layer) -> tuple[Tensor, Tensor]:
    """Keys and values [B, S, K, D] that a quantized layer's codes and scales stand for."""
    return layer.k.float() * layer.k_scale[..., None], layer.v.float() * layer.v_scale[..., None]


def test_int8_is_off_by_half_a_step_and_fp8_by_a_sixteenth():
    k, v, at = noise(2, 10, K, D) * 100, noise(2, 10, K, D, seed=1) * 1e-3, torch.arange(10).expand(2, -1)
    for kv_dtype in KV_DTYPES:
        layer = new_cache(kv_dtype=kv_dtype).layers[0]
        layer.write(k, v, at)
        for x, back in zip((k, v), stored(layer), strict=True):
            largest = x.abs().amax(-1, keepdim=True)  # of each head of each token
            bound = largest / 254 if kv_dtype == "int8" else x.abs() / 16 + largest / 448 * 2**-10
            assert ((back - x).abs() <= bound * 1.0001).all()
            torch.testing.assert_close(back.abs().amax(-1, keepdim=True), largest)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_vector_of_zeros_stays_zeros(kv_dtype):
    layer = new_cache(kv_dtype=kv_dtype).layers[0]
    layer.write(noise(2, 1, K, D), noise(2, 1, K, D), torch.tensor([[3], [3]]))
    k = noise(2, 1, K, D)
    k[0, 0, 1] = 0.0
    layer.write(k, k, torch.tensor([[3], [3]]))  # over what is there
    for x, scale in ((layer.k, layer.k_scale), (layer.v, layer.v_scale)):
        assert scale[0, 3, 1] == 0 and not x[0, 3, 1].float().any()
        assert scale[0, 3, 0] > 0


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_codes_take_a_byte_and_their_scale_four(kv_dtype):
    cache = new_cache(batch=3, length=10, n_layers=4, dtype=torch.bfloat16, kv_dtype=kv_dtype)
    slot = 4 * 2 * K * (D + 4)
    assert cache.nbytes == 30 * slot
    view = cache.narrow(7, rows=2)
    assert view.nbytes == 14 * slot
    view.layers[2].write(noise(2, 1, K, D), noise(2, 1, K, D), torch.tensor([[6], [0]]))
    assert [x.float().count_nonzero().item() > 0 for x in cache.layers[2].tensors] == [True] * 4
    assert (cache.layers[2].k_scale[0, 6] > 0).all() and cache.layers[2].v_scale.count_nonzero() == 2 * K
    assert view.layers[0].dtype == cache.layers[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("at", [[[0], [9]], [[3, 4, 5], [0, 1, 2]]])
def test_attention_over_codes_is_attention_over_what_they_stand_for(at, window, kv_dtype):
    cache, input_pos = new_cache(kv_dtype=kv_dtype), torch.tensor(at)
    cache.layers[0].write(noise(2, 10, K, D), noise(2, 10, K, D, seed=1), torch.arange(10).expand(2, -1))
    q = noise(2, len(at[0]), H, D, seed=3)
    want = slow_attention(q, *stored(cache.layers[0]), input_pos, window)
    torch.testing.assert_close(attend(cache, q, input_pos, window), want)
    mask = cache.masks(input_pos, window)[0 if window is None else 1]
    if len(at[0]) == 1:  # what a CPU compiles
        torch.testing.assert_close(cache.layers[0]._attend_one(q, mask), want)
    for x in cache.layers[0].tensors:  # past every row's position
        x[0, max(at[0]) + 1 :], x[1, max(at[1]) + 1 :] = 100.0, 100.0
    torch.testing.assert_close(attend(cache, q, input_pos, window), want)
    if len(at[0]) == 1:
        torch.testing.assert_close(cache.layers[0]._attend_one(q, mask), want)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_codes_of_a_prompts_chunks_need_no_other_mask(kv_dtype):
    cache, at = new_cache(kv_dtype=kv_dtype), torch.arange(4, 10).expand(2, -1)
    cache.layers[0].write(noise(2, 10, K, D), noise(2, 10, K, D, seed=1), torch.arange(10).expand(2, -1))
    q = noise(2, 6, H, D, seed=3)
    assert torch.equal(attend(cache.narrow(10, tail=True), q, at), attend(cache, q, at))
