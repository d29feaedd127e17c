"""Matrices of 8 bits times many rows in digits: the kernels against their twins and against plain torch."""

import pytest
import torch

from kernels import digits, language, linear, tuning
from kernels.tuning import DigitsPlan
from kernels.weight import Weight
from tests.test_kernels import DEVICE, random, random_weight, same

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability()[0] != 9, reason="products of 8 bits are Hopper's"
)

KINDS = ["int8", "fp8", "w8a8"]
CUTS = {"whole": (2, 1), "cut": (1, 2), "parts": (0, 3)}
PLANS = {name: DigitsPlan(16, 64, 4, 2, *cut) for name, cut in CUTS.items()}
M, N, K = 19, 80, 400  # nothing divides them but sixteen, which is as much as a row of bytes and cuBLAS ask for


def weight_of(kind: str, n: int, k: int, **options: object) -> Weight:
    weight = random_weight("fp8" if kind == "fp8" else "int8", n, k, **options)
    return weight._replace(int8_inputs=kind == "w8a8")


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest relative error of a row."""
    got, want = got.double(), want.double()
    return ((got - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-30)).max().item()


def value(x: digits.Digits, rows: int) -> torch.Tensor:
    """The activations that digits stand for, in the order of a packed row."""
    codes, base = x.codes[:rows].float(), 1 if x.codes.is_floating_point() else 256
    steps = codes[:, 0] if codes.shape[1] == 1 else base * codes[:, 0] + codes[:, 1]
    return steps * x.scale[:rows, None]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_split(kind: str) -> None:
    weight, x, norm = weight_of(kind, 16, K), random(5, K), 1 + 0.1 * random(K)
    for options in ({}, {"norm": norm, "eps": 1e-5}):
        got, want = (f(x, weight, **options) for f in (digits.split, digits.split_twin))
        assert got.codes.dtype == want.codes.dtype and got.scale[-1] == want.scale[-1] == 1
        same(got.scale[:5], want.scale[:5], 1e-6)
        step = want.scale[:5, None] * (1 if kind != "fp8" else 2.0**-1)  # the largest digit's last bit, or a tie of fp8
        assert ((value(got, 5) - value(want, 5)).abs() <= 1.01 * step).all()
    ordered = x.unflatten(1, (-1, 2, 8)).transpose(2, 3).flatten(1)
    assert worst(value(digits.split(x, weight), 5), ordered) < {"int8": 1e-4, "fp8": 2.0**-9, "w8a8": 1e-2}[kind]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_digits_of_fp8_hold_all_bits_of_bf16(dtype: torch.dtype) -> None:
    x = random(4, K).to(dtype)
    got = value(digits.split(x, weight_of("fp8", 16, K)), 4)
    ordered = x.float().unflatten(1, (-1, 2, 8)).transpose(2, 3).flatten(1)
    within = 2.0**-15 * x.float().abs().amax(1, keepdim=True)  # the interpreter cuts off bits of subnormal digits
    if dtype == torch.float16:  # has 11
        within = within + 2.0**-8 * ordered.abs()
    assert ((got - ordered).abs() <= within).all()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_digits_linear(kind: str, plan: str) -> None:
    if kind == "fp8" and plan != "whole":
        pytest.skip("cuBLAS cuts it")
    weight, norm = weight_of(kind, N, K, bias=plan != "parts"), 1 + 0.1 * random(K)
    tolerance = {"int8": 1e-4, "fp8": 4e-3, "w8a8": 2e-2}[kind]
    x, residual = random(M, K), random(M, N)
    options = {"norm": norm, "eps": 1e-5}
    want = linear.linear_twin(x, weight, **options, residual=residual.clone())
    got = digits.digits_linear(x, weight, **options, residual=residual, plan=PLANS[plan])
    assert got is residual
    same(got, want, tolerance)
    got = digits.digits_linear(x, weight, glu=True, plan=PLANS[plan])
    same(got, linear.linear_twin(x, weight, glu=True), tolerance)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, where infinity meets zero
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rows_with_an_outlier_and_rows_of_nothing(kind: str) -> None:
    dtype = torch.float16 if kind == "int8" else torch.bfloat16
    weight, x = weight_of(kind, N, K), random(M, K, dtype=dtype)
    x[3, 7], x[4], x[5, 9], x[6] = 1000, 0, torch.inf, torch.nan
    got = digits.digits_linear(x, weight, out_dtype=torch.float32, plan=PLANS["whole"])
    want = linear.linear_twin(x.float(), weight)
    assert not got[4].any() and not got[5:7].isfinite().any()
    keep = torch.arange(M, device=DEVICE).sub(5).abs() > 1
    assert worst(got[keep], want[keep]) < 4e-3  # what rounding to bf16 leaves
    small = digits.digits_linear((1e-7 * x[:3].float()).to(torch.bfloat16), weight, out_dtype=torch.float32)
    assert small.isfinite().all()


def test_every_plan_covers_every_output() -> None:
    for rows in (17, 64, 65, 128, 192, 193, 256, 257, 500, 1024, 8192):
        for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (960, 576), (16, 16)):
            for count in (1, 2):
                plan = tuning.digits_plan(rows, n, k, count)
                columns = -(-n // plan.BN)
                assert count * plan.BM in (128, 256) and plan.BM <= digits.TALLEST
                assert 0 <= plan.whole <= columns and 1 <= plan.splits <= max(1, k // 1024)
                assert (plan.splits == 1) == (plan.whole == columns)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_takes_this_way_where_it_pays(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "on_gpu", lambda x: True)
    monkeypatch.setattr(language, "hopper", lambda x: True)
    monkeypatch.setattr(tuning, "digits_plan", lambda *_: PLANS["cut"])
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    weight, x, norm = weight_of(kind, 32, 64), random(65, 64, dtype=dtype), random(64, dtype=dtype)
    monkeypatch.setattr(linear, "dequantize", lambda *_: pytest.fail("widened"))
    monkeypatch.setattr(linear, "int8_linear", lambda *_: pytest.fail("by torch"))
    monkeypatch.setattr(linear, "linear_kernel", lambda *_, **__: pytest.fail("as few rows"))
    if kind != "w8a8":
        x = x[:17]
    got = linear.linear(x, weight, norm=norm, eps=1e-5, glu=True)
    want = linear.linear_twin(x.float(), weight, norm=norm.float(), eps=1e-5, glu=True)
    assert got.dtype == dtype
    same(got, want, 3e-2 if kind == "w8a8" else 8e-3)  # in bf16 gate and up are rounded before their product
    x = random(65, 64, dtype=dtype)
    assert not digits.suits(x[:16], weight)
    assert digits.suits(x[:17], weight) == digits.suits(x[:64], weight) == (kind != "w8a8")
    assert not digits.suits(x.float(), weight)
    assert not digits.suits(x, Weight("float", weight.scale))
    assert digits.suits(x.expand(16, 65, 64).flatten(0, 1), weight) == (kind == "w8a8")
    odd = weight_of(kind, 24, 64)
    assert digits.suits(x, odd) == (kind != "fp8")
