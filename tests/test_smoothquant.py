"""quant/smoothquant.py and linears whose inputs are in 8 bits too: scales by the paper, products of integers."""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.linear
import quantize
from checkpoint import load_model, open_checkpoint, save_model
from generator import Generator, Request
from kernels import int8, language
from kernels.int8 import int8_linear, quantize_rows
from kernels.weight import most_rows
from model import ModelConfig, Transformer
from quant.calibrate import calibrate
from quant.folding import fold
from quant.linears import Int8Linear, QuantizedLinear, Recipe, W8A8Linear
from quant.smoothquant import fold_scales, smoothing_scales
from tests.conftest import TINY, tiny_model
from tests.test_awq import BIASED, CONFIG, HEADS, inputs_of, outliers, seen
from tests.test_gptq import logits_of, tokens_like_text
from tokenizer import load_tokenizer

W8A8 = Recipe(format="w8a8", head="int8", method="smoothquant")
TEXT = Path(__file__).parent / "data" / "prose.txt"
SHAPES = [(1, 48, 64), (2, 8, 16), (7, 33, 96), (16, 20, 576), (17, 24, 64), (65, 131, 80)]  # M, N, K


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def made(weight: Tensor, bias: Tensor | None = None, kind: type = W8A8Linear) -> QuantizedLinear:
    linear = kind(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.pack_rows(0, weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


def run(model: Transformer, tokens: Tensor, *, alpha: float | None = 0.5, recipe: Recipe = W8A8) -> Transformer:
    prepare = None if alpha is None else partial(fold_scales, alpha=alpha)
    list(calibrate(model, tokens, recipe, lambda name, linear, weight, _: linear.quantize(weight), prepare=prepare))
    return model


# ---- Products of integers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_to_steps_of_their_largest_over_127(dtype: torch.dtype) -> None:
    x = (torch.randn(9, 70) * torch.logspace(-3, 2, 9)[:, None]).to(dtype)
    x[4] = 0
    steps, scale = quantize_rows(x)
    assert (steps.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (9, 1))
    torch.testing.assert_close(scale[:, 0], x.float().abs().amax(-1) / 127)
    assert ((steps * scale - x.float()).abs() <= scale * 0.5001).all()
    assert steps.abs().amax(-1).tolist() == [127, 127, 127, 127, 0, 127, 127, 127, 127]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_product_of_what_both_sides_round_to(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    M, N, K = shape
    x, linear = torch.randn(M, K, dtype=dtype), made(torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype))
    steps, scale = quantize_rows(x)
    expected = F.linear((steps * scale).double(), linear.dequantize(torch.float32).double(), linear.bias.double())
    packed = int8_linear(x, linear.packed)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2e-5}
    torch.testing.assert_close(packed, expected.to(dtype), **tolerance)  # what CUDA runs, from the packed layout
    for y in (linear(x), linear(x[:, None]).squeeze(1), linear(x)):
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected.to(dtype), **tolerance)


def test_compiled_it_gives_the_same() -> None:
    linear = made(torch.randn(24, 64), torch.randn(24)).requires_grad_(False)
    unused = copy.deepcopy(linear)  # compiled before its codes are in a CPU's order
    for x in (torch.randn(1, 1, 64), torch.randn(3, 64)):
        y = linear(x)
        for one in (linear, unused):
            torch.testing.assert_close(torch.compile(one, backend="aot_eager", fullgraph=True)(x), y)


def test_the_product_is_not_that_of_the_unrounded_inputs() -> None:
    x, weight = torch.randn(4, 64), torch.randn(8, 64)
    exact = made(weight, kind=Int8Linear)(x)
    error = (made(weight)(x) - exact).norm() / exact.norm()
    assert 1e-3 < error < 2e-2


@pytest.mark.parametrize(("M", "N"), [(1, 8), (16, 16), (16, 21), (17, 24), (40, 3)])
def test_shapes_that_cuda_does_not_take_are_padded(M: int, N: int) -> None:
    a, b = torch.randint(-127, 128, (M, 32), dtype=torch.int8), torch.randint(-127, 128, (N, 32), dtype=torch.int8)
    padded_a, padded_b = int8.pad(a, b)
    assert len(padded_a) > 16 and len(padded_b) % 8 == 0
    assert (len(padded_a), len(padded_b)) == (max(M, 17), -(-N // 8) * 8)
    y = torch._int_mm(padded_a, padded_b.t())[:M, :N]
    assert torch.equal(y, a.int() @ b.int().t())


@pytest.mark.parametrize("end", [{}, {"glu": True}, {"residual": True}, {"norm": True}, {"out_dtype": torch.float32}])
def test_many_rows_on_a_gpu_are_a_product_of_integers(end: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    linear, options = made(torch.randn(32, 64, dtype=torch.bfloat16)).to(device), dict(end)
    x = torch.randn(most_rows("int8") + 1, 64, device=device).bfloat16()
    if "residual" in end:
        options["residual"] = torch.randn(len(x), 32, device=device).bfloat16()
    if "norm" in end:
        options |= {"norm": torch.rand(64, device=device).bfloat16(), "eps": 1e-5}
    rounded = linear.packed._replace(int8_inputs=False)
    exact = kernels.linear.linear_twin(
        x, rounded, **{k: v.clone() if k == "residual" else v for k, v in options.items()}
    )
    monkeypatch.setattr(language, "on_gpu", lambda x: True)
    y = kernels.linear.linear(x, linear.packed, **options)
    assert y.dtype == exact.dtype
    error = (y.float() - exact.float()).norm() / exact.float().norm()
    assert 2e-3 < error < 3e-2


# ---- Scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_scales_are_those_of_equation_4(alpha: float) -> None:
    x, w = torch.rand(40) * 100 + 0.1, torch.rand(40) + 0.01
    s = smoothing_scales(x, w, alpha)
    torch.testing.assert_close(s / s[0], (x**alpha / w ** (1 - alpha)) / (x[0] ** alpha / w[0] ** (1 - alpha)))
    assert s.max() * s.min() == pytest.approx(1.0, rel=1e-4)
    if alpha == 0.5:  # the difficulty is shared: channels are as large on both sides
        shared = (x / s) / (w * s)
        torch.testing.assert_close(shared, shared[0].expand(40))


def test_inputs_and_weights_that_are_always_zero_have_scales_that_are_not() -> None:
    x, w = torch.rand(40), torch.rand(40)
    x[3], w[5] = 0, 0
    s = smoothing_scales(x, w, 0.5)
    assert s.isfinite().all() and (s > 0).all()
    assert smoothing_scales(torch.zeros(8), torch.zeros(8), 0.5).tolist() == [1.0] * 8


@pytest.mark.parametrize("config", [CONFIG, BIASED, HEADS], ids=["grouped", "biased", "a value head for each query"])
def test_a_layer_computes_the_same_with_outliers_in_its_weights(config: ModelConfig) -> None:
    model, tokens = outliers(config), tokens_like_text(4, 24)
    wanted = logits_of(model, tokens)
    for layer in model.layers:
        x = inputs_of(layer, lambda: logits_of(model, tokens))
        inputs = {name: seen(x[name]) for name in x}
        linears = {name: W8A8Linear(*layer.get_submodule(name).weight.shape[::-1], dtype=torch.float32) for name in x}
        fold_scales(layer, linears, inputs, alpha=0.5)
        now = inputs_of(layer, lambda: logits_of(model, tokens))
        for name in x:
            torch.testing.assert_close(inputs[name].max_abs, seen(now[name]).max_abs, rtol=1e-3, atol=1e-5)
            ratio = inputs[name].max_abs / layer.get_submodule(name).weight.abs().amax(0)
            if name == "attention.o":  # shared by the query heads of a value head: their largest is
                pairs = zip((inputs[name].max_abs, layer.attention.o.weight.abs().amax(0)), range(2), strict=True)
                x_max, w_max = (t.view(config.n_kv_heads, -1, config.head_dim).amax(1) for t, _ in pairs)
                ratio = x_max / w_max
            if name in ("attention.qkv", "ffn.gate_up", "attention.o"):
                assert ratio.max() < 1.01 * ratio.min(), name
    torch.testing.assert_close(logits_of(model, tokens), wanted, rtol=1e-3, atol=1e-3)


def test_linears_of_other_formats_and_what_feeds_them_stay_as_they_are() -> None:
    model, plain = outliers(CONFIG), outliers(CONFIG)
    layer, old = model.layers[0], plain.layers[0]
    x = inputs_of(layer, lambda: logits_of(model, tokens_like_text(2, 16)))
    linears = {name: Int8Linear(*layer.get_submodule(name).weight.shape[::-1], dtype=torch.float32) for name in x}
    fold_scales(layer, linears, {name: seen(x[name]) for name in x}, alpha=0.5)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), old.parameters(), strict=True))


def test_only_what_is_named_is_folded() -> None:
    model, plain = outliers(CONFIG), outliers(CONFIG)
    layer, old = model.layers[0], plain.layers[0]
    x = inputs_of(layer, lambda: logits_of(model, tokens_like_text(2, 16)))
    fold(layer, {name: seen(x[name]) for name in x}, {"ffn.down": torch.full((CONFIG.ffn_dim,), 2.0)})
    F_ = CONFIG.ffn_dim
    torch.testing.assert_close(layer.ffn.down.weight, 2 * old.ffn.down.weight)
    torch.testing.assert_close(layer.ffn.gate_up.weight[F_:], old.ffn.gate_up.weight[F_:] / 2)
    assert torch.equal(layer.ffn.gate_up.weight[:F_], old.ffn.gate_up.weight[:F_])
    assert torch.equal(layer.attention.qkv.weight, old.attention.qkv.weight)


# ---- Whole models ---------------------------------------------------------------------------------------------------


def test_logits_are_nearer_than_without_smoothing() -> None:
    sample, fresh = tokens_like_text(14, 40), tokens_like_text(6, 40)
    wanted = logits_of(outliers(CONFIG), fresh)
    plain, smooth = (run(outliers(CONFIG), sample, alpha=alpha) for alpha in (None, 0.5))
    errors = [(logits_of(model, fresh) - wanted).square().mean().item() for model in (plain, smooth)]
    assert errors[1] < 0.7 * errors[0]
    assert type(smooth.head) is Int8Linear
    assert all(type(layer.ffn.down) is W8A8Linear for layer in smooth.layers)


def test_a_prompt_and_its_tokens_one_by_one_give_the_same() -> None:
    """Each row has a scale of its own, so that what is computed together does not matter."""
    model = run(tiny_model(CONFIG), tokens_like_text(4, 16))
    tokens = tokens_like_text(3, 20)
    together = logits_of(model, tokens)
    for row in range(3):
        torch.testing.assert_close(logits_of(model, tokens[row : row + 1])[0], together[row], rtol=1e-4, atol=1e-4)


@pytest.fixture
def source(tiny_directory: Path, tmp_path: Path) -> Path:
    tokenizer = load_tokenizer(tiny_directory)
    config = replace(TINY, vocab_size=tokenizer.vocab_size, tied_head=True)
    save_model(tiny_model(config), tmp_path / "source", tokenizer=tokenizer)
    return tmp_path / "source"


def options(source: Path, **changes: object) -> quantize.Options:
    given = {"checkpoint": str(source), "method": "smoothquant", "bits": 8, "output": source.with_name("out")}
    given |= {"calibration": TEXT, "samples": 4, "seq_len": 32, "dtype": "float32", "device": "cpu"}
    return quantize.Options(**(given | changes))


def test_a_checkpoint_loads_as_it_was_made(source: Path) -> None:
    made = quantize.quantize(options(source))
    assert made["quantize"] == "smoothquant-w8a8"
    assert {linear["format"] for name, linear in made["linears"].items() if name != "head"} == {"w8a8"}
    recipe = json.loads((source.with_name("out") / "config.json").read_text())["quantization_config"]
    assert (recipe["method"], recipe["format"], recipe["exceptions"]) == (
        "smoothquant",
        "w8a8",
        {"lm_head": {"format": "int8"}},
    )
    opened = open_checkpoint(str(source.with_name("out")))
    loaded = load_model(opened, device="cpu", dtype=torch.float32)
    assert {type(m) for layer in loaded.layers for m in layer.modules() if isinstance(m, QuantizedLinear)} == {
        W8A8Linear
    }
    assert type(loaded.head) is Int8Linear
    again = copy.deepcopy(loaded)
    prompt, answers = opened.tokenizer.encode("The quick brown"), []
    for model in (loaded, again):
        request = Request(prompt=prompt, max_new_tokens=8)
        list(Generator(model, max_seq_len=64).run([request]))
        answers.append(request.token_ids)
    assert answers[0] == answers[1] and len(answers[0]) == 8
    save_model(loaded, source.with_name("copy"), tokenizer=opened.tokenizer, recipe=opened.recipe)  # after it ran
    assert (source.with_name("copy") / "model.safetensors").read_bytes() == (
        source.with_name("out") / "model.safetensors"
    ).read_bytes()


def test_alpha_is_passed_on(source: Path) -> None:
    norms = []
    for i, alpha in enumerate((None, 0.5, 0.8)):
        out = source.with_name(f"out{i}")
        quantize.quantize(options(source, alpha=alpha, output=out))
        model = load_model(open_checkpoint(str(out)), device="cpu", dtype=torch.float32)
        norms.append(model.layers[0].ffn_norm.weight)
    assert torch.equal(norms[0], norms[1]) and not torch.allclose(norms[1], norms[2], rtol=0.01)


def test_linears_that_are_excluded_stay_as_they_are(source: Path) -> None:
    quantize.quantize(options(source, exclude=("*.mlp.down_proj",)))
    out, plain = (
        load_model(open_checkpoint(str(p)), device="cpu", dtype=torch.float32)
        for p in (source.with_name("out"), source)
    )
    for layer, old in zip(out.layers, plain.layers, strict=True):
        assert torch.equal(layer.ffn.down.weight, old.ffn.down.weight)
        assert type(layer.ffn.gate_up) is W8A8Linear
    tokens = tokens_like_text(2, 16)
    error = (logits_of(out, tokens) - logits_of(plain, tokens)).norm() / logits_of(plain, tokens).norm()
    assert error < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 4}, "--method smoothquant goes with --bits 8 --format int; got --bits 4 --format int"),
        ({"format": "fp"}, "--method smoothquant goes with --bits 8 --format int; got --bits 8 --format fp"),
        ({"calibration": None}, "--method smoothquant needs --calibration FILE"),
        ({"alpha": 1.5}, "--alpha is from 0 to 1, and for --method smoothquant; got 1.5"),
        ({"alpha": float("nan")}, "--alpha is from 0 to 1, and for --method smoothquant; got nan"),
        ({"method": "gptq", "alpha": 0.5}, "--alpha is from 0 to 1, and for --method smoothquant; got 0.5"),
    ],
)
def test_options_that_do_not_fit(changes: dict, message: str, source: Path) -> None:
    with pytest.raises(ValueError) as error:
        options(source, **changes)
    assert message in str(error.value)


def test_other_libraries_files_do_not_hold_it(source: Path) -> None:
    with pytest.raises(ValueError, match=r"GPTQ's files hold no w8a8: leave out model\.layers\.0\.self_attn\.q_proj"):
        quantize.quantize(options(source, export="gptq"))
    assert not source.with_name("out").exists()


def test_inputs_that_are_not_finite_are_named() -> None:
    model = tiny_model(CONFIG)
    model.layers[0].ffn_norm.weight[2] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.ffn\.gate_up: the inputs' Hessian has NaN or infinity"):
        run(model, tokens_like_text(2, 8))
