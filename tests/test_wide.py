"""Matrices of int4 times many rows, without widening them in memory: the kernels against the twin."""

import pytest
import torch

from kernels import language, linear, tuning, wide
from kernels.tuning import WidePlan
from tests.test_kernels import DEVICE, FORMATS, random, random_weight, same

pytest.importorskip("triton")

INT4 = [f for f in FORMATS if f.startswith("int4")]
# On a GPU a left side from registers needs whole warp groups.
PLANS = {
    "whole": WidePlan(16, 64, 4, 2, 1),
    "parts": WidePlan(16, 128, 4, 2, 3),
    "two blocks of rows": WidePlan(24, 64, 4, 2, 1),
    "two blocks of rows, parts": WidePlan(48, 128, 8, 2, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [640, 192])
def test_inputs_are_arranged(K: int, dtype: torch.dtype) -> None:
    x = random(3, K, dtype=dtype)
    assert torch.equal(wide.arrange(x), wide.arrange_twin(x))
    norm = 1 + 0.1 * random(K, dtype=dtype)
    got, want = (f(x, norm=norm, eps=1e-5) for f in (wide.arrange, wide.arrange_twin))
    same(got, want, 1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("format", INT4)
def test_wide_linear(format: str, plan: str) -> None:
    # Rows and outputs that no tile divides, and inputs that end inside of a block.
    M, N, K = 53, 70, 640 if "128" in format else 192
    weight, norm = random_weight(format, N, K, bias=plan == "whole"), 1 + 0.1 * random(K)
    x, residual = random(M, K), random(M, N)
    options = {"norm": norm, "eps": 1e-5}
    want = linear.linear_twin(x, weight, **options, residual=residual.clone())
    got = wide.wide_linear(x, weight, **options, residual=residual, plan=PLANS[plan])
    assert got is residual
    same(got, want, 3e-5)


@pytest.mark.parametrize("format", ["int4 g128", "int4 g64 asymmetric"])
def test_wide_linear_in_half_precision(format: str) -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cannot multiply bf16 matrices
    weight, x = random_weight(format, 64, 256, dtype=dtype, bias=True), random(20, 256, dtype=dtype)
    got = wide.wide_linear(x, weight, out_dtype=torch.float32, plan=PLANS["whole"])
    assert got.dtype == torch.float32
    exact = weight._replace(bias=weight.bias.float())
    same(got, linear.linear_twin(x.float(), exact), 1e-2)


@pytest.mark.parametrize("M", [17, 32, 33, 64, 65, 96, 97, 128, 129, 160, 161, 192, 193, 256, 512])
@pytest.mark.parametrize(("N", "K"), [(6144, 4096), (28672, 4096), (4096, 14336), (896, 4864), (64, 192)])
def test_the_rules_plans_cover_a_product_and_waste_little(M: int, N: int, K: int) -> None:
    plan = tuning.wide_plan(M, N, K)
    first = 1 << (plan.BM.bit_length() - 1)
    rest = plan.BM - first
    assert rest == 0 or (rest & (rest - 1) == 0 and rest >= 16)
    tiles = -(-M // plan.BM)
    assert (tiles - 1) * plan.BM < M and tiles * plan.BM - M < max(32, M)
    blocks = -(-K // 128)
    assert (plan.splits - 1) * -(-blocks // plan.splits) < blocks  # no part is empty


def test_a_matrix_takes_this_way_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "on_gpu", lambda x: True)
    monkeypatch.setattr(language, "hopper", lambda x: True)
    monkeypatch.setattr(tuning, "wide_plan", lambda *_: PLANS["whole"])
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    weight = random_weight("int4 g64 asymmetric", 32, 64, dtype=dtype)
    x, norm = random(513, 64, dtype=dtype), random(64, dtype=dtype)
    for another in ("dequantize", "linear_kernel"):
        monkeypatch.setattr(linear, another, lambda *_, **__: pytest.fail("another way was taken"))
    for M in (17, 65):
        got = linear.linear(x[:M], weight, norm=norm, eps=1e-5, glu=True)
        same(got, linear.linear_twin(x[:M].float(), weight, norm=norm.float(), eps=1e-5, glu=True), 2e-2)
    assert [wide.suits(x[:M], weight) for M in (16, 17, 512, 513)] == [False, True, True, False]
    assert not wide.suits(x[:65].float(), weight)
    assert not wide.suits(x[:65], random_weight("int8", 32, 64))
