"""Kernels between a prompt's matrices: the twins are the model's arithmetic, and the kernels agree with the twins.

Kernels run on CUDA where there is one, else under Triton's interpreter, which drops the bits that bfloat16 has no room
for instead of rounding: there, bfloat16 may be one step off at each rounding. float16 pins where values are rounded.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cache import KV_DTYPES, StaticCache
from kernels import codes, elementwise
from model import RMSNorm, apply_rope

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def norm_of(weight: Tensor) -> RMSNorm:
    norm = RMSNorm(len(weight), EPS)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


def agree(kernel: Tensor, twin: Tensor, *, roundings: int = 2) -> None:
    """The same shape and type; values one step of the largest apart at most, and in float16 nearly all the same."""
    assert kernel.dtype == twin.dtype and kernel.shape == twin.shape
    step = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[twin.dtype]
    if twin.dtype == torch.bfloat16 and DEVICE == "cpu":
        step *= roundings
    scale = twin.float().abs().max().item() if twin.numel() else 0.0
    torch.testing.assert_close(kernel.float(), twin.float(), rtol=step, atol=step * scale)
    if twin.dtype == torch.float16:
        assert (kernel != twin).sum() <= max(2, 0.02 * twin.numel())


# ---- Norms -----------------------------------------------------------------------------------------------------------

ROWS = pytest.mark.parametrize(("M", "C"), [(1, 1), (1, 48), (7, 64), (3, 100), (2, 1025), (0, 48)])


@dtypes
def test_the_norms_twin_is_the_models_own_arithmetic(dtype):
    x, weight = random(5, 48, dtype=dtype), random(48, dtype=dtype)
    assert elementwise.rms_norm_twin(x, weight, EPS).equal(norm_of(weight)(x))


@dtypes
@ROWS
def test_rms_norm_agrees_with_its_twin(M, C, dtype):
    x, weight = random(M, C, dtype=dtype), random(C, dtype=dtype)
    agree(elementwise.rms_norm_kernel(x, weight, EPS), elementwise.rms_norm_twin(x, weight, EPS))


@dtypes
def test_a_row_of_zeros_stays_zero_and_eps_counts(dtype):
    weight = random(40, dtype=dtype)
    assert not elementwise.rms_norm_kernel(torch.zeros(2, 40, dtype=dtype, device=DEVICE), weight, EPS).any()
    small = random(2, 40, dtype=dtype) / 512
    agree(elementwise.rms_norm_kernel(small, weight, 0.01), elementwise.rms_norm_twin(small, weight, 0.01))


def test_the_statistics_of_half_precision_rows_do_not_overflow():
    x, weight = random(2, 300, dtype=torch.float16) * 5000, random(300, dtype=torch.float16)
    agree(elementwise.rms_norm_kernel(x, weight, EPS), elementwise.rms_norm_twin(x, weight, EPS))


@pytest.mark.gpu
def test_rows_past_two_to_the_31_elements_are_reached():
    M, C = 2**31 // 4096 + 2, 4096
    x = torch.zeros(M, C, dtype=torch.float16, device=DEVICE)
    x[-2:] = random(2, C, dtype=torch.float16)
    weight = random(C, dtype=torch.float16)
    agree(elementwise.rms_norm_kernel(x, weight, EPS)[-2:], elementwise.rms_norm_twin(x[-2:], weight, EPS))
    agree(elementwise.silu_mul_kernel(x)[-2:], elementwise.silu_mul_twin(x[-2:]))


# ---- SwiGLU ----------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(("M", "F"), [(1, 1), (1, 80), (5, 64), (3, 1025), (2, 2048), (0, 80)])
def test_silu_mul_agrees_with_its_twin(M, F, dtype):
    gate_up = random(M, 2 * F, dtype=dtype) * 3
    agree(elementwise.silu_mul_kernel(gate_up), elementwise.silu_mul_twin(gate_up))


def test_the_twin_of_silu_mul_gates_with_the_first_half():
    gate, up = random(3, 8), random(3, 8)
    assert elementwise.silu_mul_twin(torch.cat((gate, up), dim=1)).equal(F.silu(gate) * up)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # the interpreter's, on its way to 0
def test_silu_mul_takes_gates_of_any_size():
    gate_up = torch.tensor([[-1e4, -90.0, 90.0, 1e4, 2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    assert elementwise.silu_mul_kernel(gate_up).tolist() == [[0.0, 0.0, 180.0, 2e4]]


# ---- Rotary embedding and the cache ----------------------------------------------------------------------------------


class Case:
    """Random arguments of `rope_write`; positions differ from row to row and are in no order."""

    def __init__(
        self, *, B=2, T=3, H=6, K=2, D=8, slots=9, norm=True, use_rope=True, dtype=torch.float32, cache_dtype=None
    ) -> None:
        self.B, self.T, self.H, self.K, self.D = B, T, H, K, D
        self.qkv = random(B * T, (H + 2 * K) * D, dtype=dtype)
        angle = random(B * T, D // 2) * 3
        self.cos, self.sin = angle.cos(), angle.sin()
        self.norms = (random(D, dtype=dtype), random(D, dtype=dtype)) if norm else (None, None)
        self.use_rope = use_rope
        rows = [torch.randperm(slots)[:T] for _ in range(B)]
        self.input_pos = torch.stack(rows).to(DEVICE) if B else torch.zeros(0, T, dtype=torch.int64, device=DEVICE)
        self.whole = StaticCache.allocate(
            n_layers=2, batch=B + 1, max_seq_len=slots + 4, n_kv_heads=K, head_dim=D, dtype=cache_dtype or dtype,
            device=DEVICE,
        )  # fmt: skip
        for layer in self.whole.layers:  # what nothing may change
            layer.k.copy_(random(*layer.k.shape))
            layer.v.copy_(random(*layer.v.shape))
        self.slots = slots

    def run(self, function) -> tuple[Tensor, Tensor]:
        """The queries, and what became of the whole cache, of which `function` got the last rows' first slots."""
        k, v = (torch.stack([getattr(x, name) for x in self.whole.layers]) for name in "kv")  # [2, B + 1, S, K, D]
        cache = torch.stack((k, v), dim=4)  # [2, B + 1, S, K, 2, D]: no stride is that of a plain tensor
        view = cache[1, 1:, : self.slots]
        q = function(
            self.qkv,
            self.cos,
            self.sin,
            n_heads=self.H,
            n_kv_heads=self.K,
            head_dim=self.D,
            q_norm=self.norms[0],
            k_norm=self.norms[1],
            eps=EPS,
            use_rope=self.use_rope,
            k_cache=view[..., 0, :],
            v_cache=view[..., 1, :],
            input_pos=self.input_pos,
        )
        return q, cache


def check(case: Case) -> None:
    (q, cache), (q_twin, cache_twin) = (
        case.run(elementwise.rope_write_kernel),
        case.run(elementwise.rope_write_twin),
    )
    agree(q, q_twin, roundings=4)
    agree(cache, cache_twin, roundings=4)
    rows = torch.arange(case.B, device=DEVICE)[:, None]  # [B, 1]
    untouched = torch.ones(cache.shape[:3], dtype=torch.bool, device=DEVICE)
    untouched[1, 1 + rows, case.input_pos] = False
    assert cache[untouched].equal(cache_twin[untouched])
    assert cache[..., 1, :].equal(cache_twin[..., 1, :])  # values are stored as they are


@dtypes
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("use_rope", [False, True])
def test_rope_write_agrees_with_its_twin(norm, use_rope, dtype):
    check(Case(norm=norm, use_rope=use_rope, dtype=dtype))


@pytest.mark.parametrize("D", [2, 6, 64, 80, 128])
def test_a_head_may_have_any_even_size(D):
    check(Case(D=D, dtype=torch.float16))


@pytest.mark.parametrize(("H", "K"), [(1, 1), (9, 3), (5, 5), (40, 8), (36, 34)])
def test_any_number_of_heads_is_covered(H, K):
    check(Case(H=H, K=K, D=64, T=2))


@pytest.mark.parametrize(("B", "T"), [(1, 1), (5, 1), (1, 6), (0, 3), (3, 0)])
def test_any_number_of_rows_and_tokens_is_covered(B, T):
    check(Case(B=B, T=T))


def test_positions_may_be_one_row_expanded():
    case = Case(B=3, T=4)
    case.input_pos = case.input_pos[:1].expand(3, -1)
    check(case)


def test_a_narrowed_cache_is_written_where_it_is_and_nowhere_else():
    case = Case(B=2, T=3, dtype=torch.float16)
    before = [(x.k.clone(), x.v.clone()) for x in case.whole.layers]
    view = case.whole.narrow(case.slots, rows=2).layers[1]
    q = elementwise.rope_write_kernel(
        case.qkv, case.cos, case.sin, n_heads=6, n_kv_heads=2, head_dim=8, q_norm=None, k_norm=None, eps=EPS,
        use_rope=False, k_cache=view.k, v_cache=view.v, input_pos=case.input_pos,
    )  # fmt: skip
    heads = case.qkv.view(2, 3, 10, 8)  # [B, T, H + 2K, D]
    for row in range(2):
        before[1][0][row, case.input_pos[row]] = heads[row, :, 6:8]
        before[1][1][row, case.input_pos[row]] = heads[row, :, 8:]
    assert q.equal(heads[:, :, :6].reshape(6, 6, 8))
    for layer, (k, v) in zip(case.whole.layers, before, strict=True):
        assert layer.k.equal(k) and layer.v.equal(v)


@pytest.mark.parametrize("function", [elementwise.rope_write_kernel, elementwise.rope_write_twin])
def test_cos_and_sin_may_be_rows_of_something_wider(function):
    case = Case()
    q, cache = case.run(function)
    both = torch.cat((case.cos, case.sin), dim=1)  # [M, D]
    case.cos, case.sin = both[:, :4], both[:, 4:]
    again, cache_again = case.run(function)
    assert again.equal(q) and cache_again.equal(cache)
    case.cos, case.sin = case.cos[:1].expand(6, -1), case.sin[:1].expand(6, -1)  # all rows at one position
    agree(case.run(function)[0], case.run(elementwise.rope_write_twin)[0])


def test_the_cache_may_have_another_type():
    check(Case(dtype=torch.float32, cache_dtype=torch.float16))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("D", "dtype"), [(8, torch.float32), (80, torch.bfloat16)])
@pytest.mark.usefixtures("rounded_fp8")
def test_a_cache_of_codes_gets_codes_and_scales(D, dtype, kv_dtype):
    case, caches, queries = Case(D=D, dtype=dtype), [], []
    case.qkv.view(6, 10, D)[0, 6:] = 0.0  # a key and a value of zeros
    for function in (elementwise.rope_write_kernel, elementwise.rope_write_twin):
        cache = StaticCache.allocate(
            n_layers=2, batch=3, max_seq_len=13, n_kv_heads=2, head_dim=D, dtype=dtype, device=DEVICE,
            kv_dtype=kv_dtype,
        )  # fmt: skip
        view = cache.narrow(case.slots, rows=2).layers[1]
        q = function(
            case.qkv, case.cos, case.sin, n_heads=6, n_kv_heads=2, head_dim=D, q_norm=case.norms[0],
            k_norm=case.norms[1], eps=EPS, use_rope=True, k_cache=view.k, v_cache=view.v, input_pos=case.input_pos,
            k_scale=view.k_scale, v_scale=view.v_scale,
        )  # fmt: skip
        caches.append(cache)
        queries.append(q)
    agree(*queries, roundings=4)
    (first, ours), (_, twins) = (cache.layers for cache in caches)
    assert not any(x.float().any() for x in first.tensors)
    assert [x.count_nonzero().item() for x in (twins.k_scale, twins.v_scale)] == [10, 10]
    assert torch.equal(ours.k_scale == 0, twins.k_scale == 0)
    torch.testing.assert_close(ours.v_scale, twins.v_scale)
    assert torch.equal(ours.v.float(), twins.v.float())
    # A key that is rounded another way may have the next code.
    k, k_twin = (codes.decode(x.k, x.k_scale, torch.float32) for x in (ours, twins))
    assert (k - k_twin).norm() < 0.05 * k_twin.norm()


@dtypes
def test_the_twin_of_rope_write_is_what_the_models_attention_does(dtype):
    case = Case(dtype=dtype)
    B, T, H, K, D = case.B, case.T, case.H, case.K, case.D
    q, k, v = case.qkv.view(B, T, H + 2 * K, D).split((H, K, K), dim=2)
    cos, sin = (x.view(B, T, 1, D // 2) for x in (case.cos, case.sin))
    q, k = apply_rope(norm_of(case.norms[0])(q), cos, sin), apply_rope(norm_of(case.norms[1])(k), cos, sin)
    result, cache = case.run(elementwise.rope_write_twin)
    layer = case.whole.narrow(case.slots, rows=B).layers[0]
    layer.write(k, v, case.input_pos)
    rows = torch.arange(B, device=DEVICE)[:, None]  # [B, 1]
    assert result.equal(q.reshape(B * T, H, D))
    assert cache[1, 1:][rows, case.input_pos].equal(
        torch.stack((layer.k[rows, case.input_pos], layer.v[rows, case.input_pos]), dim=3)
    )


# ---- Dispatch --------------------------------------------------------------------------------------------------------


def test_cpu_tensors_get_the_twins():
    x, weight = torch.randn(2, 8), torch.randn(8)
    assert elementwise.rms_norm(x, weight, EPS).equal(elementwise.rms_norm_twin(x, weight, EPS))
    assert elementwise.silu_mul(x).equal(elementwise.silu_mul_twin(x))


def test_rope_write_passes_all_its_arguments_on():
    case = Case()
    expected, expected_cache = case.run(elementwise.rope_write_twin)
    q, cache = case.run(elementwise.rope_write)
    agree(q, expected)
    agree(cache, expected_cache)
