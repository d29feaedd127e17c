"""Float matrices times many rows: the kernels against the twin, and the residual stream that sums parts late."""

import pytest
import torch

from kernels import elementwise, language, linear, rows, tuning
from kernels.decoder import Decoder
from kernels.rows import Stream
from kernels.tuning import RowsPlan
from tests.conftest import TINY, new_cache, tiny_model
from tests.test_kernels import CONFIGS, DEVICE, random, random_weight, same

pytest.importorskip("triton")

PLAN, MANY = RowsPlan(16, 32, 16, 4, 2), RowsPlan(64, 32, 16, 4, 2)  # weights are a product's left side, or x is
M, N, K = 19, 70, 96  # rows and outputs that no tile divides


@pytest.mark.parametrize("plan", [PLAN, MANY])
@pytest.mark.parametrize("mode", ["store", "glu", "add"])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_linear(mode: str, bias: bool, plan: RowsPlan) -> None:
    weight, x, residual = random_weight("float", N, K, bias=bias), random(M, K), random(M, N)
    options = {"glu": mode == "glu", "residual": residual if mode == "add" else None}
    want = linear.linear_twin(x, weight, **options | {"residual": residual.clone() if mode == "add" else None})
    for splits in (1,) if mode == "glu" else (3, 4):  # four of six blocks: the last part has none
        options["residual"] = residual.clone() if mode == "add" else None
        got = rows.rows_linear(x, weight, plan._replace(splits=splits), **options)
        assert mode != "add" or got is options["residual"]
        same(got, want, 3e-6)


def test_rows_linear_in_half_precision() -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cannot multiply bf16 matrices
    weight, x = random_weight("float", 128, 128, dtype=dtype, bias=True), random(70, 128, dtype=dtype)
    exact = weight._replace(data=weight.data.float(), bias=weight.bias.float())
    for BM in (16, 32, 64):
        plan = RowsPlan(BM, 64, 64, 4, 3)
        got = rows.rows_linear(x, weight, plan, out_dtype=torch.float32)
        assert got.dtype == torch.float32
        same(got, linear.linear_twin(x.float(), exact), 1e-3 if dtype == torch.float16 else 3e-3)
        same(rows.rows_linear(x, weight, plan, glu=True), linear.linear_twin(x.float(), exact, glu=True), 5e-3)


def test_a_stream_adds_parts_once_and_where_the_next_norm_is() -> None:
    weight, x, norm = random_weight("float", N, K, bias=True), random(M, K), 1 + 0.1 * random(N)
    residual = random(M, N)
    want = linear.linear_twin(x, weight, residual=residual.clone())
    stream = Stream(residual)
    assert stream.normed(norm, 1e-5) == (residual, norm)  # nothing to add: the norm is left to the product
    rows.rows_linear(x, weight, PLAN._replace(splits=2), residual=stream)
    y, left = stream.normed(norm, 1e-5)
    assert left is None
    same(y, elementwise.rms_norm_twin(want, norm, 1e-5), 3e-6)
    same(stream.whole(), want, 3e-6)
    assert stream.whole() is residual


@pytest.mark.parametrize("taken", [("qkv", "o", "gate_up", "down"), ("o", "gate_up"), ("down",)])
def test_decoder_gives_the_models_logits(monkeypatch: pytest.MonkeyPatch, taken: tuple[str, ...]) -> None:
    model = tiny_model(CONFIGS["biases"], device=DEVICE)
    decoder = Decoder(model, max_seq_len=32, batch_size=2)
    here = [getattr(layer, name).data for layer in decoder.layers for name in taken]

    def plan_of(x: torch.Tensor, weight: rows.Weight, *, glu: bool, add: bool) -> RowsPlan | None:
        if any(weight.data is data for data in here):
            return PLAN._replace(splits=2 if add else 1)

    monkeypatch.setattr(rows, "plan_of", plan_of)
    monkeypatch.setattr(language, "on_gpu", lambda x: True)  # the kernels, by the interpreter if need be
    ours, theirs = (new_cache(model, batch=2, length=32) for _ in range(2))
    tokens = torch.randint(TINY.vocab_size, (2, 6), device=DEVICE)
    with torch.no_grad():
        for begin, end in ((0, 5), (5, 6)):
            pos = torch.arange(begin, end, device=DEVICE).expand(2, -1)
            x = decoder.hidden(tokens[:, begin:end], pos, ours.narrow(end if begin == 0 else 32, tail=begin == 0))
            want = model(tokens[:, begin:end], pos, theirs.narrow(end if begin == 0 else 32, tail=begin == 0))
            same(decoder.logits(x), want, 1e-4)


@pytest.mark.parametrize("K", [576, 1024, 1152, 14336])
@pytest.mark.parametrize("N", [576, 4096, 28672])
@pytest.mark.parametrize("M", [2, 16, 17, 32, 33, 64, 65, 128, 129, 256])
def test_plans_fit_the_matrix(M: int, N: int, K: int) -> None:
    for glu, add in ((False, False), (True, False), (False, True)):
        plan = tuning.rows_plan(M, N, K, glu=glu, add=add)
        if plan is not None:
            blocks, splits = K // plan.BK, plan.splits
            assert K % plan.BK == 0 and (add or splits == 1)
            assert (splits - 1) * -(-blocks // splits) < blocks  # no part is empty
            assert plan.depth * (plan.BM + plan.BN) * plan.BK * 2 <= 227 * 1024
    for rows_, inputs in ((1, K), (257, K), (M, K + 8)):
        assert tuning.rows_plan(rows_, N, inputs, glu=False, add=False) is None


def test_a_matrix_takes_this_way_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random_weight("float", 576, 576, dtype=torch.float16), random(20, 576, dtype=torch.float16)
    monkeypatch.setattr(language, "hopper", lambda x: True)
    assert rows.plan_of(x, weight, glu=False, add=True)
    assert rows.plan_of(x.float(), weight, glu=False, add=True) is None
    assert rows.plan_of(x, weight._replace(format="int8"), glu=False, add=True) is None
    monkeypatch.setattr(language, "hopper", lambda x: False)
    assert rows.plan_of(x, weight, glu=False, add=True) is None
