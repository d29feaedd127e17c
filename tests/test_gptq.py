"""quant/gptq.py and quant/calibrate.py: codes against a slow reading of the paper, and layers quantized in order."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model import Block, Linear, Transformer
from quant.calibrate import COLUMNS, Calibrated, Inputs, _inputs, _share, calibrate, output_error, sample_tokens
from quant.gptq import choose_codes, gptq
from quant.linears import (
    Codes,
    Fp8Linear,
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    Recipe,
    round_fp8,
    round_int4,
    round_int8,
)
from tests.conftest import TINY, new_cache, tiny_model

CONFIG = replace(TINY, dim=64, ffn_dim=160, n_heads=8, n_kv_heads=2, head_dim=8)  # down's rows take groups of 32
FP8 = {"bits": 8, "floats": True, "group": 0, "symmetric": True, "dtype": torch.float32}
INT4 = Recipe(format="int4", head="int8", method="gptq", group_size=64, symmetric=False)


def correlated(tokens: int, K: int) -> Tensor:
    """Inputs [tokens, K] of very different sizes that mostly lie in a few directions."""
    few = torch.randn(tokens, max(1, K // 8)) @ torch.randn(max(1, K // 8), K)
    return (few + 0.3 * torch.randn(tokens, K)) * torch.logspace(-1, 1, K)[torch.randperm(K)]


def hessian_of(x: Tensor) -> Tensor:
    return 2 / len(x) * x.T @ x


def decoded(codes: Codes, *, group: int, middle: float = 8.0) -> Tensor:
    """The weights [N, K] that codes stand for, fp32."""
    N, K = codes.codes.shape
    zero = middle if codes.zero is None else codes.zero.float()[..., None]
    steps = codes.codes.view(N, -1, group or K).float() - zero
    return (steps * codes.scale.float().view(N, -1, 1)).view(N, K)


def slow_gptq(weight: Tensor, hessian: Tensor, grid: Codes, *, group: int, low: int, high: int, act_order: bool):
    """Optimal Brain Quantization in a fixed order: eq. 2 after each input, eq. 3 for what is left of H; fp64."""
    K = weight.shape[1]
    w, damped = weight.double(), hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(K)
    order = sorted(range(K), key=lambda k: -hessian[k, k].item()) if act_order else range(K)
    inverse = damped.inverse()
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for q in order:
        scale = grid.scale[:, q // group].double()
        zero = 8.0 if grid.zero is None else grid.zero[:, q // group].double()
        code = (w[:, q] / scale).round().add(zero).clamp(low, high)
        codes[:, q] = code
        error = (w[:, q] - (code - zero) * scale) / inverse[q, q]
        w = w - error[:, None] * inverse[q]
        inverse = inverse - inverse[:, q : q + 1] * inverse[q : q + 1] / inverse[q, q]
    return codes


def assert_same_but_for_ties(found: Tensor, wanted: Tensor) -> None:
    """The two work in other precisions: a weight may lie between two codes, and changes what follows in its row."""
    assert (found != wanted).any(-1).sum() <= 1


# ---- The codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "dtype"), [(32, torch.bfloat16), (128, torch.float32)])
def test_codes_are_those_of_the_paper_without_blocks(
    act_order: bool, symmetric: bool, group: int, dtype: torch.dtype
) -> None:
    weight, hessian = torch.randn(20, 256), hessian_of(correlated(400, 256))
    grid = round_int4(weight, group=group, symmetric=symmetric, dtype=dtype)
    slow = slow_gptq(weight, hessian, grid, group=group, low=0, high=15, act_order=act_order)
    options = {"bits": 4, "group": group, "symmetric": symmetric, "dtype": dtype, "act_order": act_order}
    for block in (1, 48, 128, 1000):
        found = gptq(weight, hessian, **options, block=block)
        assert_same_but_for_ties(found.codes, slow)
        assert torch.equal(found.scale, grid.scale)
        assert (found.zero is None) if symmetric else torch.equal(found.zero, grid.zero)
    assert (slow != grid.codes).any()


def test_codes_of_floats_are_those_of_the_paper_too() -> None:
    weight, hessian = torch.randn(20, 96), hessian_of(correlated(300, 96))
    nearest = round_fp8(weight)

    def round_column(w: Tensor) -> Tensor:
        return (w / nearest.scale).clamp(-448, 448).float().to(torch.float8_e4m3fn)

    w, codes, scale = weight.double(), torch.zeros(weight.shape, dtype=torch.uint8), nearest.scale.double()
    inverse = (hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(96)).inverse()
    for q in hessian.diagonal().argsort(descending=True).tolist():
        code = round_column(w[:, q])
        codes[:, q] = code.view(torch.uint8)
        w = w - ((w[:, q] - code.double() * scale) / inverse[q, q])[:, None] * inverse[q]
        inverse = inverse - inverse[:, q : q + 1] * inverse[q : q + 1] / inverse[q, q]
    found = gptq(weight, hessian, **FP8)
    assert_same_but_for_ties(found.codes, codes)
    assert torch.equal(found.scale, nearest.scale)
    errors = []
    for chosen in (found, nearest):
        linear = Fp8Linear(96, 20, dtype=torch.float32)
        linear.store_rows(0, chosen)
        errors.append(output_error(weight, linear.dequantize(torch.float32), hessian))
    assert errors[0] < 0.7 * errors[1]
    assert (gptq(weight, torch.eye(96), **FP8).codes != nearest.codes).sum() <= 1  # a tie


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_are_nearer_than_by_rounding_to_nearest(bits: int, symmetric: bool) -> None:
    group, middle = (0, 128.0) if bits == 8 else (32, 8.0)
    weight, hessian = torch.randn(24, 128), hessian_of(correlated(300, 128))
    options = {"bits": bits, "group": group, "symmetric": symmetric or bits == 8, "dtype": torch.bfloat16}
    chosen = gptq(weight, hessian, **options)
    nearest = gptq(weight, torch.eye(128), **options)  # inputs that have nothing to do with each other
    errors = [output_error(weight, decoded(c, group=group, middle=middle), hessian) for c in (chosen, nearest)]
    assert errors[0] < 0.7 * errors[1]


def test_unrelated_inputs_are_rounded_to_nearest() -> None:
    weight, hessian = torch.randn(9, 96), torch.diag(torch.rand(96) + 0.1)
    for symmetric in (True, False):
        nearest = round_int4(weight, group=32, symmetric=symmetric, dtype=torch.float16)
        found = gptq(weight, hessian, bits=4, group=32, symmetric=symmetric, dtype=torch.float16)
        assert (found.codes.int() - nearest.codes.int()).abs().max() <= 1
        assert ((found.codes != nearest.codes).sum()) <= 1  # a tie
        assert torch.equal(found.scale, nearest.scale)
    found, nearest = gptq(weight, hessian, bits=8, group=0, symmetric=True, dtype=torch.float16), round_int8(weight)
    assert (found.codes != nearest.codes).sum() <= 1
    assert torch.equal(found.scale, nearest.scale)


@pytest.mark.parametrize(("symmetric", "codes"), [(True, range(4, 12)), (False, range(8))])
def test_3_bits_are_8_codes_of_the_4_bit_layout(symmetric: bool, codes: range) -> None:
    weight, hessian = torch.randn(16, 128), hessian_of(correlated(200, 128))
    found = gptq(weight, hessian, bits=3, group=64, symmetric=symmetric, dtype=torch.float32)
    used = set(found.codes.unique().tolist())
    assert set(codes[1:]) <= used <= set(codes)  # the lowest symmetric one is for weights that others' errors moved
    linear = Int4Linear(128, 16, dtype=torch.float32, group=64, symmetric=symmetric)
    linear.store_rows(0, found)
    assert torch.equal(linear.dequantize(torch.float32), decoded(found, group=64))
    assert output_error(weight, linear.dequantize(torch.float32), hessian) < 0.2


def test_inputs_that_are_always_zero_are_rounded_to_nearest_and_move_nothing() -> None:
    x, weight = correlated(300, 64), torch.randn(12, 64)
    dead = torch.randperm(64)[:10]
    x[:, dead] = 0
    options = {"bits": 4, "group": 32, "symmetric": True, "dtype": torch.float32}
    found = gptq(weight, hessian_of(x), **options).codes
    nearest = round_int4(weight, group=32, symmetric=True, dtype=torch.float32).codes
    assert (found[:, dead] != nearest[:, dead]).sum() <= 1
    other = weight.clone()
    other[:, dead] *= 0.5 + 0.4 * torch.rand(10)
    large = weight.view(12, 2, 32).abs().argmax(-1) + torch.tensor([0, 32])
    keep = torch.isin(large, dead).logical_not().all(-1)  # rows whose scales do not come from a dead input
    live = torch.ones(64, dtype=torch.bool)
    live[dead] = False
    assert torch.equal(gptq(other, hessian_of(x), **options).codes[keep][:, live], found[keep][:, live])
    assert torch.equal(gptq(weight, torch.zeros(64, 64), **options).codes, nearest)


def test_rows_and_groups_of_zeros_stay_zeros() -> None:
    weight, hessian = torch.randn(4, 64), hessian_of(correlated(100, 64))
    weight[1], weight[2, :32] = 0, 0
    for symmetric in (True, False):
        options = {"bits": 4, "group": 32, "symmetric": symmetric, "dtype": torch.bfloat16}
        chosen = gptq(weight, hessian, **options, act_order=False)
        found = decoded(chosen, group=32)
        assert not found[1].any()
        assert not found[2, :32].any()
        assert output_error(weight[2:3], found[2:3], hessian) < 0.2  # and the rest of such a row is as good as ever


def test_fewer_tokens_than_inputs_are_enough() -> None:
    weight, x = torch.randn(8, 128), correlated(5, 128)
    options = {"bits": 4, "group": 64, "symmetric": False, "dtype": torch.float32}
    found = decoded(gptq(weight, hessian_of(x), **options), group=64)
    nearest = decoded(round_int4(weight, group=64, symmetric=False, dtype=torch.float32), group=64)
    assert output_error(weight, found, hessian_of(x)) < output_error(weight, nearest, hessian_of(x))


def test_damping_rises_until_the_hessian_is_positive_definite() -> None:
    weight, hessian = torch.randn(8, 64), hessian_of(correlated(300, 64))
    options = {"bits": 4, "group": 32, "symmetric": True, "dtype": torch.float32}
    mean = hessian.diagonal().mean()
    slightly = hessian - (torch.linalg.eigvalsh(hessian)[0] + 0.05 * mean) * torch.eye(64)
    slightly += torch.eye(64) * (mean - slightly.diagonal().mean())  # the mean diagonal stays, so shares do
    slightly -= torch.eye(64) * (torch.linalg.eigvalsh(slightly)[0] + 0.05 * mean)
    raised = gptq(weight, slightly, **options, damping=0.1).codes
    assert torch.equal(gptq(weight, slightly, **options, damping=0.01).codes, raised)
    indefinite = hessian.clone()
    indefinite[0, 1] = indefinite[1, 0] = 100 * hessian.diagonal().max()
    with pytest.raises(ValueError, match=r"not positive definite with 1 of its mean diagonal"):
        gptq(weight, indefinite, **options)
    with pytest.raises(ValueError, match="diagonal has the mean -"):
        gptq(weight, -hessian, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "3, 4 or 8 bits; got 5"),
        ({"bits": 8}, "one symmetric scale a row; got group 32"),
        ({"group": 16}, "groups of 128, 64, 32 that divide 64; got 16"),
        ({"group": 128}, "divide 64; got 128"),
        ({"damping": 0.0}, "damping must be above 0 and at most 1.0 mean diagonals; got 0.0"),
        ({"damping": float("nan")}, "damping must be"),
        ({"block": 0}, "at least 1 input; got 0"),
        ({"hessian": torch.eye(32)}, r"\[64, 64\]; got \[32, 32\]"),
        ({"hessian": torch.full((64, 64), torch.inf)}, "Hessian has NaN or infinity"),
        ({"weight": torch.full((4, 64), torch.nan)}, "a weight is NaN or infinite"),
    ],
)
def test_what_cannot_be_is_refused(change: dict, message: str) -> None:
    wanted = {"weight": torch.randn(4, 64), "hessian": torch.eye(64), "bits": 4, "group": 32, "symmetric": True}
    with pytest.raises(ValueError, match=message):
        gptq(**wanted | {"dtype": torch.float32} | change)


def test_the_layout_decides_bits_groups_and_zeros() -> None:
    weight, hessian = torch.randn(6, 64), hessian_of(correlated(200, 64))
    options = {"group": 32, "symmetric": False, "dtype": torch.bfloat16}
    for bits, clip in ((4, False), (3, False), (4, True)):
        linear = Int4Linear(64, 6, **options, bits=bits, clip=clip)
        found = choose_codes(linear, weight, hessian)
        for a, b in zip(found, gptq(weight, hessian, bits=bits, clip=clip, **options), strict=True):
            assert torch.equal(a, b)
        linear.store_rows(0, found)
        assert linear.storage == (f"int{bits}", 32)
    int8 = Int8Linear(64, 6, dtype=torch.bfloat16)
    found = choose_codes(int8, weight, hessian)
    assert torch.equal(found.codes, gptq(weight, hessian, bits=8, group=0, symmetric=True, dtype=torch.bfloat16).codes)
    assert (found.scale.dtype, found.scale.shape) == (torch.float32, (6,))
    fp8 = Fp8Linear(64, 6, dtype=torch.bfloat16)
    found = choose_codes(fp8, weight, hessian)
    assert torch.equal(found.codes, gptq(weight, hessian, **FP8).codes)
    assert torch.equal(found.scale, fp8.quantize(weight).scale)


# ---- Calibration ----------------------------------------------------------------------------------------------------


def to_nearest(linear: QuantizedLinear, weight: Tensor, hessian: Tensor) -> Codes:
    return linear.quantize(weight)


def tokens_like_text(sequences: int, length: int) -> Tensor:
    """Few tokens are frequent, so that inputs lie in some directions more than in others."""
    return (torch.rand(sequences, length) ** 4 * CONFIG.vocab_size).long()


def logits_of(model: Transformer, tokens: Tensor) -> Tensor:
    B, T = tokens.shape
    with torch.no_grad():
        return model(tokens, torch.arange(T).expand(B, -1), new_cache(model, batch=B, length=T))


def run(model: Transformer, tokens: Tensor, method=choose_codes, recipe: Recipe = INT4, **options) -> list[Calibrated]:
    return list(calibrate(model, tokens, recipe, lambda name, *args: method(*args), **options))


@pytest.mark.parametrize("symmetric", [True, False])
def test_logits_are_nearer_than_by_rounding_to_nearest(symmetric: bool) -> None:
    recipe = replace(INT4, symmetric=symmetric)
    sample, fresh = tokens_like_text(14, 40), tokens_like_text(6, 40)
    wanted, errors = logits_of(tiny_model(CONFIG), fresh), []
    for method in (choose_codes, to_nearest):
        model = tiny_model(CONFIG)
        run(model, sample, method, recipe)
        errors.append((logits_of(model, fresh) - wanted).square().mean().item())
    assert errors[0] < 0.8 * errors[1]


@torch.no_grad()
def test_hessians_and_sizes_are_of_inputs_that_quantized_layers_made() -> None:
    """The plain way: the whole model, all layers before quantized, and a hook on each linear of this one."""
    tokens, seen, sizes = tokens_like_text(5, 12), [], []

    def method(linear: QuantizedLinear, weight: Tensor, hessian: Tensor) -> Codes:
        seen.append(hessian.clone())
        return linear.quantize(weight)

    def prepare(layer: Block, linears: dict[str, QuantizedLinear], inputs: dict[str, Inputs]) -> None:
        sizes.extend((each.mean_abs, each.max_abs) for each in inputs.values())

    half = tiny_model(CONFIG)
    finished = tiny_model(CONFIG)
    run(finished, tokens, method, batch=2, prepare=prepare)
    half.layers[0] = finished.layers[0]
    inputs = {}
    names = [f"layers.{i}.{n}" for i in range(2) for n in ("attention.qkv", "attention.o", "ffn.gate_up", "ffn.down")]
    for source, wanted in ((tiny_model(CONFIG), names[:4]), (half, names[4:])):
        for name in wanted:
            source.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, 1))
            )
        logits_of(source, tokens)
    for name, hessian, (mean_abs, max_abs) in zip(names, seen, sizes, strict=True):
        torch.testing.assert_close(hessian, hessian_of(inputs[name]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mean_abs, inputs[name].abs().mean(0))
        torch.testing.assert_close(max_abs, inputs[name].abs().amax(0))


LINEARS = ("attention.qkv", "attention.o", "ffn.gate_up", "ffn.down")


@torch.no_grad()
def seen_by(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """What the whole model puts into each linear, norm and layer, [n, K], and at "end" what comes out of the last."""
    inputs = {}

    def keep(name: str) -> None:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args: inputs.__setitem__(name, args[0].flatten(0, 1)))

    for i in range(len(model.layers)):
        for name in (*LINEARS, "attention_norm", "ffn_norm"):
            keep(f"layers.{i}.{name}")
    keep("norm")
    logits_of(model, tokens)
    return inputs


@torch.no_grad()
def test_linears_of_a_layer_see_what_quantized_ones_before_them_make() -> None:
    tokens, seen = tokens_like_text(5, 12), []

    def method(linear: QuantizedLinear, weight: Tensor, hessian: Tensor) -> Codes:
        seen.append((weight, hessian))
        return linear.quantize(weight)

    model = tiny_model(CONFIG)
    plain = {name: module.weight for name, module in tiny_model(CONFIG).named_modules() if isinstance(module, Linear)}
    run(model, tokens, method, batch=2)
    inputs = seen_by(model, tokens)  # nothing after a linear changes what goes into it
    for name, (weight, hessian) in zip([f"layers.{i}.{n}" for i in range(2) for n in LINEARS], seen, strict=True):
        assert torch.equal(weight, plain[name])
        torch.testing.assert_close(hessian, hessian_of(inputs[name]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_aiming_is_a_regression_on_what_the_unquantized_model_makes() -> None:
    config = replace(CONFIG, qkv_bias=True, o_bias=True, ffn_bias=True)
    tokens, chosen, ridge = tokens_like_text(24, 20), [], 0.003  # 7.5 tokens for each of 64 inputs, and 3 of 160

    def method(linear: QuantizedLinear, weight: Tensor, hessian: Tensor) -> Codes:
        chosen.append(weight)
        return linear.quantize(weight)

    model, plain = tiny_model(config), tiny_model(config)
    run(model, tokens, method, replace(INT4, group_size=32), batch=4, aim=ridge)
    real, ideal = seen_by(model, tokens), seen_by(plain, tokens)
    for name, weight in zip([f"layers.{i}.{n}" for i in range(2) for n in LINEARS], chosen, strict=True):
        linear, x = plain.get_submodule(name), real[name].double()
        if name.endswith(("qkv", "gate_up")):
            wanted = ideal[name].double() @ linear.weight.double().T
        else:  # what the residual stream is to be after it, less what it is before
            layer = int(name.split(".")[1])
            before, after = ("attention_norm", "ffn_norm") if name.endswith("o") else ("ffn_norm", "attention_norm")
            layer_after = layer if name.endswith("o") else layer + 1
            end = "norm" if layer_after == 2 else f"layers.{layer_after}.{after}"
            wanted = ideal[end].double() - real[f"layers.{layer}.{before}"].double() - linear.bias.double()
        h = x.T @ x
        h += ridge * h.diagonal().mean() * torch.eye(len(h))
        lacking = wanted - x @ linear.weight.double().T
        share = (480 / len(h) - 2) / 8
        expected = linear.weight + share * torch.linalg.solve(h, x.T @ lacking).T
        torch.testing.assert_close(weight.double(), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(chosen[-1], plain.layers[1].ffn.down.weight, atol=1e-3)


def test_a_regression_on_few_tokens_is_believed_in_part() -> None:
    assert [_share(tokens, 64) for tokens in (1, 128, 384, 640, 10**6)] == [0, 0, 0.5, 1, 1]
    sample, weights = tokens_like_text(3, 40), []

    def method(linear: QuantizedLinear, weight: Tensor, hessian: Tensor) -> Codes:
        weights.append(weight)
        return linear.quantize(weight)

    run(tiny_model(CONFIG), sample, method, aim=0.01)
    plain = [module.weight for _, module in tiny_model(CONFIG).layers.named_modules() if isinstance(module, Linear)]
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))


def test_aiming_brings_logits_nearer() -> None:
    sample, fresh = tokens_like_text(40, 40), tokens_like_text(6, 40)
    wanted, errors = logits_of(tiny_model(CONFIG), fresh), []
    for aim in (0.01, None):
        model = tiny_model(CONFIG)
        run(model, sample, recipe=replace(INT4, format="int3"), aim=aim)
        errors.append((logits_of(model, fresh) - wanted).square().mean().item())
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hessians_of_many_columns_are_whole_and_symmetric(dtype: torch.dtype) -> None:
    K = COLUMNS + 77
    pieces = [torch.randn(2, 30, K).to(dtype), torch.randn(1, 30, K).to(dtype)]
    x = torch.cat([piece.flatten(0, 1) for piece in pieces])
    found = _inputs(pieces)
    torch.testing.assert_close(found.hessian, hessian_of(x.float()), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.hessian, found.hessian.T)
    torch.testing.assert_close(found.mean_abs, x.float().abs().mean(0))
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


def test_all_linears_are_quantized_as_the_recipe_says_and_biases_kept() -> None:
    config = replace(CONFIG, qkv_bias=True, ffn_bias=True, tied_head=True)
    model, plain = tiny_model(config), tiny_model(config)
    reports = run(model, tokens_like_text(4, 16))
    assert [r.layer for r in reports] == [0, 1]
    assert not any(isinstance(m, Linear) for m in model.modules())
    assert (model.layers[0].attention.qkv.group, model.layers[1].ffn.down.group) == (64, 32)
    assert torch.equal(model.layers[0].attention.qkv.bias, plain.layers[0].attention.qkv.bias)
    assert torch.equal(model.layers[1].ffn.down.bias, plain.layers[1].ffn.down.bias)
    assert torch.equal(model.embed.weight, plain.embed.weight)
    assert isinstance(model.head, Int8Linear)
    nearest = Int8Linear(64, CONFIG.vocab_size, dtype=torch.float32)
    nearest.pack_rows(0, plain.embed.weight)
    assert torch.equal(model.head.packed.data, nearest.data)


def test_errors_are_those_of_the_layers_outputs() -> None:
    weight, x = torch.randn(20, 64), correlated(100, 64)
    linear = Int4Linear(64, 20, dtype=torch.float32, group=32)
    linear.pack_rows(0, weight)
    quantized = linear.dequantize(torch.float32)
    wanted = (x @ (weight - quantized).T).norm() / (x @ weight.T).norm()
    assert output_error(weight, quantized, hessian_of(x)) == pytest.approx(wanted.item(), rel=1e-3)
    assert output_error(weight, weight, hessian_of(x)) == 0.0
    assert output_error(torch.zeros(20, 64), torch.zeros(20, 64), hessian_of(x)) == 0.0
    for report in run(tiny_model(CONFIG), tokens_like_text(8, 32)):
        assert list(report.errors) == ["attention.qkv", "attention.o", "ffn.gate_up", "ffn.down"]
        assert all(0.0 < error < 0.3 for error in report.errors.values())


def test_a_second_run_gives_the_same_model() -> None:
    tokens = tokens_like_text(6, 24)
    first, second = tiny_model(CONFIG), tiny_model(CONFIG)
    assert run(first, tokens) == run(second, tokens)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_batches_do_not_change_what_is_seen() -> None:
    config = replace(CONFIG, sliding_window=5, sliding_layers=(1,))
    tokens, models = tokens_like_text(5, 16), []
    for batch in (1, 2, 64):
        model = tiny_model(config)
        errors = [e for report in run(model, tokens, to_nearest, batch=batch) for e in report.errors.values()]
        models.append(torch.tensor(errors))
    torch.testing.assert_close(models[0], models[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(models[0], models[2], rtol=1e-3, atol=1e-5)


def test_bfloat16_and_3_bits_and_8_bits() -> None:
    tokens = tokens_like_text(8, 32)
    errors = []
    for recipe in (Recipe(format="int8", head="int8"), INT4, replace(INT4, format="int3")):
        model = tiny_model(CONFIG, dtype=torch.bfloat16)
        reports = run(model, tokens, recipe=recipe)
        errors.append(sum(reports[-1].errors.values()))
        assert logits_of(model, tokens).isfinite().all()
    assert errors[0] < 0.3 * errors[1] < 0.3 * errors[2]


def test_what_is_no_sample_is_refused() -> None:
    model = tiny_model(CONFIG)
    with pytest.raises(ValueError, match=r"at least one; got \[0, 4\]"):
        run(model, torch.zeros(0, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"at least one; got \[4\]"):
        run(model, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="513 tokens and the model takes 512"):
        run(model, torch.zeros(1, 513, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens 0 to 131 are not all among the 131"):
        run(model, torch.tensor([[0, 131]]))
    model.layers[1].ffn.down.weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.1\.ffn\.down: a weight is NaN or infinite"):
        run(model, tokens_like_text(2, 8))
    with pytest.raises(ValueError, match="quantized already"):
        run(model, tokens_like_text(2, 8))


def test_samples_are_windows_of_the_text_from_different_places() -> None:
    text = torch.randperm(1000).tolist()
    tokens = sample_tokens(text, samples=50, seq_len=20, seed=3)
    assert (tokens.shape, tokens.dtype) == ((50, 20), torch.int64)
    starts = [text.index(row[0]) for row in tokens.tolist()]
    assert len(set(starts)) == 50
    assert all(row == text[s : s + 20] for row, s in zip(tokens.tolist(), starts, strict=True))
    assert torch.equal(tokens, sample_tokens(text, samples=50, seq_len=20, seed=3))
    assert not torch.equal(tokens, sample_tokens(text, samples=50, seq_len=20, seed=4))
    assert sorted(sample_tokens(text[:22], samples=3, seq_len=20, seed=0)[:, 0].tolist()) == sorted(text[:3])


def test_a_short_text_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"3 sequences of 20 tokens .* need 22 tokens and the text has 21"):
        sample_tokens(range(21), samples=3, seq_len=20, seed=0)
    with pytest.raises(ValueError, match="got 0 of 20"):
        sample_tokens(range(21), samples=0, seq_len=20, seed=0)
