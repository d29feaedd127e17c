"""quant/awq.py: layers that compute the same after folding, scales and ranges against a search on the inputs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model import Block, ModelConfig, Transformer
from quant.awq import ALPHAS, SHARES, best_scales, choose_codes, clip, fold_scales
from quant.calibrate import Inputs, calibrate, output_error
from quant.linears import Codes, Int4Linear, Int8Linear, QuantizedLinear, Recipe
from tests.conftest import TINY, tiny_model
from tests.test_gptq import correlated, hessian_of, logits_of, tokens_like_text

CONFIG = replace(TINY, dim=64, ffn_dim=160, n_heads=8, n_kv_heads=2, head_dim=8)  # down's rows take groups of 32
BIASED = replace(CONFIG, qkv_bias=True, o_bias=True, ffn_bias=True, qk_norm=True, tied_head=True)
HEADS = replace(CONFIG, n_kv_heads=8)
INT4 = Recipe(format="int4", head="int8", method="awq", group_size=32, symmetric=False)
QK_ROWS = 80  # of CONFIG's qkv


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def seen(x: Tensor) -> Inputs:
    return Inputs(hessian_of(x), x.abs().mean(0), x.abs().amax(0))


def empty(N: int, K: int, *, symmetric: bool = False, group: int = 32) -> Int4Linear:
    return Int4Linear(K, N, dtype=torch.float32, group=group, symmetric=symmetric)


def rounded(linear: QuantizedLinear, weight: Tensor) -> Tensor:
    linear.pack_rows(0, weight)
    return linear.dequantize(torch.float32)


def inputs_of(layer: Block, run) -> dict[str, Tensor]:
    """The inputs [n, K] of each linear of a layer while `run` goes on."""
    inputs, hooks = {}, []
    for name in ("attention.qkv", "attention.o", "ffn.gate_up", "ffn.down"):
        hooks.append(
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, 1))
            )
        )
    run()
    for hook in hooks:
        hook.remove()
    return inputs


def outliers(config: ModelConfig, **options) -> Transformer:
    """A model some of whose channels are far larger than others, as those of trained ones are."""
    model = tiny_model(config, **options)
    generator = torch.Generator().manual_seed(5)
    for layer in model.layers:
        for norm in (layer.attention_norm, layer.ffn_norm):
            norm.weight.mul_(torch.randn(config.dim, generator=generator).mul(1.2).exp())
        for linear, rows in ((layer.attention.qkv, config.n_kv_heads * config.head_dim), (layer.ffn.gate_up, 160)):
            linear.weight[-rows:].mul_(torch.randn(rows, 1, generator=generator).mul(1.2).exp())
    return model


def run(model: Transformer, tokens: Tensor, *, recipe: Recipe = INT4, prepare=fold_scales, clips: bool = True) -> None:
    def choose(name: str, linear: QuantizedLinear, weight: Tensor, hessian: Tensor) -> Codes:
        if not clips:
            return linear.quantize(weight)
        return choose_codes(linear, weight, hessian, unclipped=QK_ROWS if name == "attention.qkv" else 0)

    list(calibrate(model, tokens, recipe, choose, prepare=prepare))


# ---- Scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, BIASED, HEADS], ids=["grouped", "biased", "a value head for each query"])
def test_a_layer_computes_the_same_with_scales_folded_in(config: ModelConfig) -> None:
    model, plain = outliers(config), outliers(config)
    tokens = tokens_like_text(4, 24)
    wanted = logits_of(plain, tokens)
    for layer, old in zip(model.layers, plain.layers, strict=True):
        x = inputs_of(layer, lambda: logits_of(model, tokens))
        inputs = {name: seen(x[name]) for name in x}
        linears = {name: empty(*layer.get_submodule(name).weight.shape) for name in x}
        fold_scales(layer, linears, inputs)
        new_x = inputs_of(layer, lambda: logits_of(model, tokens))
        for name in x:  # every linear has scales, and what is known of its inputs is of the new ones
            s = layer.get_submodule(name).weight[0] / old.get_submodule(name).weight[0]
            assert s.max() > 1.2 * s.min()
            now = seen(new_x[name])
            atol = 1e-4 * now.hessian.max().item()
            torch.testing.assert_close(inputs[name].hessian, now.hessian, rtol=1e-3, atol=atol)
            torch.testing.assert_close(inputs[name].mean_abs, now.mean_abs, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(inputs[name].max_abs, now.max_abs, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(logits_of(model, tokens), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_the_power_whose_outputs_are_nearest(symmetric: bool) -> None:
    weight, x = torch.randn(24, 128), correlated(300, 128)
    linear, size = empty(24, 128, symmetric=symmetric), x.abs().mean(0)
    found = best_scales(linear, weight, hessian_of(x), size)

    def error(s: Tensor) -> float:
        return (x @ (rounded(linear, weight * s) / s - weight).T).norm().item()

    errors = [error(size**alpha / (size**alpha).mean()) for alpha in ALPHAS]
    assert error(found) == pytest.approx(min(errors), rel=1e-3)
    assert error(found) < 0.9 * errors[0]  # alpha 0: rounding to nearest
    best = ALPHAS[errors.index(min(errors))]
    torch.testing.assert_close(found / found[0], (size / size[0]) ** best)
    assert found.max() * found.min() == pytest.approx(1.0, rel=1e-4)


def test_inputs_of_one_size_leave_weights_as_they_are() -> None:
    weight, x = torch.randn(8, 64), torch.ones(10, 64)
    assert torch.equal(best_scales(empty(8, 64), weight, hessian_of(x), x.abs().mean(0)), torch.ones(64))


def test_inputs_that_are_always_zero_have_scales_that_are_not() -> None:
    weight, x = torch.randn(24, 64), correlated(300, 64)
    x[:, 7] = 0
    s = best_scales(empty(24, 64), weight, hessian_of(x), x.abs().mean(0))
    assert s.isfinite().all() and 1e-3 < s.min() < 0.8 * s.max()  # and the others still have theirs
    none = torch.zeros(64)
    assert torch.equal(best_scales(empty(24, 64), weight, hessian_of(none[None]), none), torch.ones(64))


def test_linears_of_8_bits_and_what_feeds_them_stay_as_they_are() -> None:
    config = replace(CONFIG, ffn_dim=80)  # which no group divides
    model, plain = tiny_model(config), tiny_model(config)
    tokens, kept = tokens_like_text(4, 16), {}

    def prepare(layer, linears, inputs) -> None:
        fold_scales(layer, linears, inputs)
        kept[len(kept)] = (layer.ffn.down.weight.clone(), layer.ffn.gate_up.weight[80:] * layer.ffn_norm.weight)

    run(model, tokens, prepare=prepare)
    for i, layer in enumerate(plain.layers):
        nearest = Int8Linear(80, 64, dtype=torch.float32)
        assert torch.equal(kept[i][0], layer.ffn.down.weight)
        torch.testing.assert_close(kept[i][1], layer.ffn.gate_up.weight[80:] * layer.ffn_norm.weight)
        nearest.pack_rows(0, layer.ffn.down.weight)
        assert torch.equal(model.layers[i].ffn.down.packed.data, nearest.data)


# ---- Clipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_is_clipped_where_its_part_of_the_output_is_nearest(symmetric: bool) -> None:
    weight, x = torch.randn(6, 64) ** 3, correlated(200, 64)
    linear, one = empty(6, 64, symmetric=symmetric), empty(1, 32, symmetric=symmetric)
    clipped = clip(linear, weight, hessian_of(x))
    for n in range(6):
        for k in (0, 32):
            w, part = weight[n : n + 1, k : k + 32], x[:, k : k + 32]
            limits = [share * w.abs().max() for share in SHARES]
            errors = [(part @ (rounded(one, w.clamp(-limit, limit)) - w).T).norm() for limit in limits]
            best = limits[torch.stack(errors).argmin()]
            torch.testing.assert_close(clipped[n : n + 1, k : k + 32], w.clamp(-best, best))
    assert (clipped != weight).any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_brings_the_outputs_of_rows_with_few_large_weights_nearer(symmetric: bool) -> None:
    weight, x = torch.randn(40, 128) ** 3, correlated(300, 128)
    linear, errors = empty(40, 128, symmetric=symmetric), []
    for codes in (linear.quantize(weight), choose_codes(linear, weight, hessian_of(x))):
        linear.store_rows(0, codes)
        errors.append(output_error(weight, linear.dequantize(torch.float32), hessian_of(x)))
    assert errors[1] < 0.9 * errors[0]


def test_the_first_rows_and_8_bits_keep_their_range() -> None:
    weight, hessian = torch.randn(20, 64) ** 3, hessian_of(correlated(200, 64))
    linear = empty(20, 64)
    nearest, found = linear.quantize(weight), choose_codes(linear, weight, hessian, unclipped=12)
    assert torch.equal(found.scale[:12], nearest.scale[:12])
    assert torch.equal(found.codes[:12], nearest.codes[:12])
    assert (found.scale[12:] <= nearest.scale[12:]).all() and (found.scale[12:] < nearest.scale[12:]).any()
    wide = Int8Linear(64, 20, dtype=torch.float32)
    assert torch.equal(choose_codes(wide, weight, hessian).codes, wide.quantize(weight).codes)


# ---- Whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_logits_are_nearer_than_by_rounding_to_nearest(symmetric: bool) -> None:
    recipe, errors = replace(INT4, symmetric=symmetric), []
    sample, fresh = tokens_like_text(14, 40), tokens_like_text(6, 40)
    wanted = logits_of(outliers(CONFIG), fresh)
    for prepare, clips in ((None, False), (fold_scales, False), (fold_scales, True)):
        model = outliers(CONFIG)
        run(model, sample, recipe=recipe, prepare=prepare, clips=clips)
        errors.append((logits_of(model, fresh) - wanted).square().mean().item())
    assert max(errors[1:]) < 0.85 * errors[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_nearer_in_16_bits_too(dtype: torch.dtype) -> None:
    tokens, errors = tokens_like_text(8, 32), []
    wanted = logits_of(outliers(CONFIG), tokens)
    for prepare in (None, fold_scales):
        model = outliers(CONFIG, dtype=dtype)
        run(model, tokens, prepare=prepare, clips=False)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        errors.append((logits_of(model, tokens).float() - wanted).norm().item())
    assert errors[1] < 0.85 * errors[0]


def test_weights_and_inputs_that_are_not_finite_are_named() -> None:
    model = tiny_model(CONFIG)
    model.layers[1].ffn.down.weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.1\.ffn\.down: a weight is NaN or infinite"):
        run(model, tokens_like_text(2, 8))
    model = tiny_model(CONFIG)
    model.layers[0].ffn_norm.weight[2] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.ffn\.gate_up: the inputs' Hessian has NaN or infinity"):
        run(model, tokens_like_text(2, 8))


def test_a_model_without_4_bits_is_rounded_to_nearest() -> None:
    model, plain = tiny_model(CONFIG), tiny_model(CONFIG)
    run(model, tokens_like_text(2, 8), recipe=Recipe(format="int8", head="int8"))
    assert torch.equal(model.layers[0].ffn_norm.weight, plain.layers[0].ffn_norm.weight)
    nearest = Int8Linear(64, 320, dtype=torch.float32)
    nearest.pack_rows(0, plain.layers[0].ffn.gate_up.weight)
    assert torch.equal(model.layers[0].ffn.gate_up.packed.data, nearest.data)
