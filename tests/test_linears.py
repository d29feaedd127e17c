"""quant/linears.py: where each bit lies, how far rounding goes, and which linears a recipe takes."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.linear
from generator import Generator, Request
from model import Linear, Transformer
from quant import linears
from quant.linears import (
    BYTES,
    NIBBLES,
    RECIPES,
    Codes,
    Fp8Linear,
    Int4Linear,
    Int8Linear,
    Layout,
    QuantizedLinear,
    Recipe,
    quantize_model,
    round_fp8,
    round_int4,
    round_int8,
)
from tests.conftest import TINY, tiny_model

CONFIG = replace(TINY, dim=64, ffn_dim=96, n_heads=8, head_dim=12)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS: dict[str, Callable[..., QuantizedLinear]] = {
    "int8": Int8Linear,
    "fp8": Fp8Linear,
    "int4": lambda *args, **kwargs: Int4Linear(*args, group=64, **kwargs),
    "int4 asymmetric": lambda *args, **kwargs: Int4Linear(*args, group=32, symmetric=False, **kwargs),
}


def made(kind: str, weight: Tensor, bias: Tensor | None = None) -> QuantizedLinear:
    linear = KINDS[kind](weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.pack_rows(0, weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random weights of very different sizes in each row, not centred."""
    size = torch.logspace(-3, 2, rows)[torch.randperm(rows), None]
    return ((torch.randn(rows, columns) + 0.3 * torch.randn(rows, 1)) * size).to(dtype)


# ---- The packed layouts ---------------------------------------------------------------------------------------------


def check(layout: Layout, K: int, words: int, place: Callable[[int], tuple[int, int]]) -> None:
    """`place` says of each k in which half-word of its row it is, and how many bits up."""
    codes = torch.randint(0, 2**layout.bits, (3, K), dtype=torch.uint8)
    data = layout.pack(codes)
    assert (data.shape, data.dtype, layout.words(K)) == ((3, words), torch.int32, words)
    assert torch.equal(layout.unpack(data, K), codes)
    for n in range(3):
        for k in range(K):
            half, up = place(k)
            assert (data.view(torch.int16)[n, half].item() >> up) & (2**layout.bits - 1) == codes[n, k]


def test_byte_p_of_half_word_i_of_a_block_is_weight_8p_plus_i() -> None:
    check(BYTES, 48, 12, lambda k: (k // 16 * 8 + k % 8, k % 16 // 8 * 8))


@pytest.mark.parametrize(("K", "words"), [(256, 32), (96, 16), (160, 32)])
def test_nibble_p_of_half_word_i_of_a_block_is_weight_32p_plus_i(K: int, words: int) -> None:
    check(NIBBLES, K, words, lambda k: (k // 128 * 32 + k % 32, k % 128 // 32 * 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_read_the_same_matrix(kind: str, dtype: torch.dtype) -> None:
    linear = made(kind, matrix(5, 128, dtype), torch.randn(5))
    packed = linear.packed
    assert packed.format == kind.split()[0]
    assert packed.shape == (5, 128)
    assert packed.bias is linear.bias
    assert torch.equal(kernels.linear.dequantize_twin(packed, torch.float32), linear.dequantize(torch.float32))


# ---- Rounding to nearest --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_off_by_half_a_step_of_the_rows_largest_over_127(dtype: torch.dtype) -> None:
    weight = matrix(9, 80, dtype)
    step = weight.float().abs().amax(-1, keepdim=True) / 127
    error = (made("int8", weight).dequantize(torch.float32) - weight.float()).abs()
    assert (error <= step * 0.5001).all()
    assert (error > step * 0.4).any()
    codes = round_int8(weight).codes
    assert codes.min() >= 1
    assert ((codes == 1) | (codes == 255)).any(-1).all()  # the largest weight of each row takes the largest code


def test_int8_lies_in_memory_as_twos_complement() -> None:
    weight = matrix(5, 48)
    linear = made("int8", weight)
    steps = linear.layout.unpack(linear.data, 48).view(torch.int8)
    assert (steps.abs().amax(1) == 127).all() and torch.equal(steps.sign().float() * weight.sign(), steps.sign().abs())
    assert torch.equal(steps.float() * linear.scale[:, None], linear.dequantize(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_is_off_by_a_sixteenth_of_the_weight(dtype: torch.dtype) -> None:
    weight = matrix(9, 80, dtype)
    step = weight.float().abs().amax(-1, keepdim=True) / 448
    error = (made("fp8", weight).dequantize(torch.float32) - weight.float()).abs()
    assert (error <= (weight.float().abs() / 16).maximum(2 * step * 2**-10) * 1.0001).all()
    codes = round_fp8(weight).codes
    assert (codes & 127 < 127).all()  # no NaN
    assert (codes & 127 > 126 - 8).any(-1).all()  # the largest weight of each row is 448 or within an octave of it


def test_the_scale_of_fp8_is_the_best_of_an_octave() -> None:
    weight = matrix(40, 96)
    found = round_fp8(weight)
    smallest = weight.abs().amax(1) * (1 / 448)
    ratio = found.scale / smallest
    assert (ratio >= 1).all() and (ratio < 2).all() and len(ratio.unique()) > 4

    def error(scale: torch.Tensor) -> torch.Tensor:
        rounded = (weight / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale[:, None]
        return (rounded - weight).square().sum(1)

    errors = torch.stack([error(smallest * 2 ** (i / 8)) for i in range(8)])
    assert torch.allclose(error(found.scale), errors.amin(0))
    assert errors.amin(0).sum() < 0.95 * errors[0].sum()


def test_fp8_decodes_every_code_as_torch_does() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 < 127]
    linear = made("fp8", torch.zeros(1, 16))
    one = torch.ones(1)
    assert torch.equal(linear.decode(codes, one, None), codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_is_off_by_half_a_step_of_its_group(dtype: torch.dtype, group: int, symmetric: bool) -> None:
    weight = matrix(9, 256, dtype)
    linear = Int4Linear(256, 9, dtype=dtype, group=group, symmetric=symmetric)
    linear.pack_rows(0, weight)
    groups = weight.float().view(9, -1, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    step = groups.abs().amax(-1) / 7 if symmetric else (high - low) / 15
    assert linear.scale.dtype == dtype
    assert torch.allclose(linear.scale.float(), step, rtol=torch.finfo(dtype).eps, atol=1e-7)
    error = (linear.dequantize(torch.float32).view_as(groups) - groups).abs()
    slack = 0.5001 + 15 * torch.finfo(dtype).eps  # the rounded scale may not reach the ends of the span
    assert (error <= step[..., None] * slack).all()
    assert (error > step[..., None] * 0.4).any()


def test_a_weight_of_zero_stays_zero() -> None:
    for kind in KINDS:
        weight = matrix(6, 128)
        weight[:, ::7] = 0
        assert (made(kind, weight).dequantize(torch.float32)[:, ::7] == 0).all(), kind


@pytest.mark.parametrize("size", [0.0, 1e-44, 8.8e-43])  # their scales round to few bits
def test_rows_of_zeros_or_almost_are_no_nan(size: float) -> None:
    for kind in KINDS:
        weight = matrix(4, 128)
        weight[1] = size
        weight[2, :64] = -size
        held = made(kind, weight).dequantize(torch.float32)
        assert held.isfinite().all(), kind
        assert held[1].abs().max() <= 2 * size
        assert held[2, :64].abs().max() <= 2 * size
    assert (round_fp8(torch.full((1, 16), size)).codes & 127 < 127).all()  # e4m3's NaN


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_scale_of_its_row_alone(bad: float) -> None:
    for kind in KINDS:
        weight = matrix(4, 128)
        weight[2, random.randrange(128)] = bad
        finite = made(kind, weight).scale.view(4, -1).isfinite().all(-1)
        assert finite.tolist() == [True, True, False, True], kind


def test_asymmetric_takes_the_whole_range_of_a_group_on_one_side() -> None:
    weight = torch.rand(4, 64) + 1
    rounded = round_int4(weight, group=32, symmetric=False, dtype=torch.float32)
    assert (rounded.zero == 0).all()
    assert (round_int4(-weight, group=32, symmetric=False, dtype=torch.float32).zero == 15).all()
    assert rounded.codes.amax() == 15


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_clipped_span_leaves_no_group_a_larger_error(bits: int, symmetric: bool) -> None:
    weight = torch.randn(40, 128)
    weight[0], weight[1, 32:64] = 0, 0
    weight[2, 5], weight[3, 70] = torch.nan, torch.inf
    options = {"group": 32, "symmetric": symmetric, "dtype": torch.bfloat16, "bits": bits}

    def error(codes: Codes) -> torch.Tensor:
        zero = 8 if codes.zero is None else codes.zero.float()[..., None]
        steps = codes.codes.unflatten(1, (-1, 32)).float() - zero
        return (steps * codes.scale.float()[..., None] - weight.unflatten(1, (-1, 32))).square().sum(-1)

    plain, clipped = round_int4(weight, **options), round_int4(weight, **options, clip=True)
    finite = weight.unflatten(1, (-1, 32)).isfinite().all(-1)
    assert (error(clipped) <= error(plain))[finite].all()
    assert error(clipped)[finite].sum() < 0.98 * error(plain)[finite].sum()
    assert torch.equal(clipped.scale.isfinite(), finite) and torch.equal(plain.scale.isfinite(), finite)
    assert not error(clipped)[0].any() and error(clipped)[1, 1] == 0
    low, high = (8 - 2 ** (bits - 1), 7 + 2 ** (bits - 1)) if symmetric else (0, 2**bits - 1)
    for codes in (plain.codes, clipped.codes):
        assert low <= codes[4:].min() and codes.max() == high


# ---- The linears ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_packed_one_part_at_a_time_are_the_matrix_packed_whole(kind: str, monkeypatch) -> None:
    weight, whole = matrix(11, 192), None
    for piece in (linears.PIECE, 3 * 192):  # also where the rows of one call are rounded in pieces
        monkeypatch.setattr(linears, "PIECE", piece)
        linear = KINDS[kind](192, 11, dtype=torch.float32)
        for start, end in ((7, 11), (0, 2), (2, 7)):
            linear.pack_rows(start, weight[start:end])
        whole = whole or made(kind, weight)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(linear.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_a_product_with_the_dequantized_matrix(kind: str, dtype: torch.dtype) -> None:
    bias = torch.randn(7, dtype=dtype) if random.random() < 0.5 else None
    linear = made(kind, torch.randn(7, 192, dtype=dtype), bias)
    for shape in ((192,), (1, 1, 192), (3, 192), (2, 5, 192)):
        x = torch.randn(shape, dtype=dtype)
        y = linear(x)
        expected = F.linear(x.double(), linear.dequantize(dtype).double(), None if bias is None else bias.double())
        assert (y.dtype, y.shape) == (dtype, (*shape[:-1], 7))
        assert (y - expected).abs().max() < 30 * torch.finfo(dtype).eps * expected.abs().max().clamp(min=1)


# ---- In a CPU's order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [16, 80, 144])
@pytest.mark.parametrize("rows", [64, 32])
def test_row_blocks_unpack_what_they_pack(rows: int, N: int) -> None:
    codes = torch.randint(0, 16, (N, 96), dtype=torch.uint8)
    order = linears.RowBlocks(rows)
    data = order.pack(codes)
    assert (data.dtype, data.shape) == (torch.uint8, (N * 48,))
    assert torch.equal(order.unpack(data, 96), codes)


def test_this_cpus_order_of_nibbles_is_known() -> None:
    """Where it is not, products are right but slow."""
    order = linears.cpu_nibbles()
    if order is None:
        pytest.skip("an order that is not known")
    codes = torch.randint(0, 16, (176, 64), dtype=torch.uint8)
    assert torch.equal(order.pack(codes), torch._convert_weight_to_int4pack_for_cpu(codes.int(), 2).flatten())


def fractional(linear: QuantizedLinear) -> QuantizedLinear:
    """As other libraries may have them, zeros between codes."""
    if linear.zero is not None:
        linear.zero.add_(torch.rand_like(linear.zero) - 0.5)
    return linear


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [80, 23])  # whole blocks of rows and a rest; what the 4-bit operator does not take
@pytest.mark.parametrize("few", [64, 4])  # also where 16 rows are many
def test_a_product_on_the_cpu_is_one_with_the_dequantized_matrix(
    kind: str, dtype: torch.dtype, N: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Int4Linear, "few", few)
    monkeypatch.setattr(linears, "SLICE", 64 * 192)  # several slices
    bias = torch.randn(N, dtype=dtype)
    linear = fractional(made(kind, torch.randn(N, 192, dtype=dtype), bias))
    matrix = linear.dequantize(torch.float32)
    for M in (65, 1, 2, 7, 16):  # many first, so that none has settled it
        x = torch.randn(M, 192, dtype=dtype)
        expected = x.float() @ matrix.t() + bias.float()
        # fp32: sums in another order. 16 bits: the matrix, scales or the product rounded, then the sum with the bias.
        loose = (30 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
        assert (linear(x) - expected).abs().max() < loose * expected.abs().max().clamp(min=10), M
    operator = dtype == torch.bfloat16 and N % 16 == 0 and linears.cpu_nibbles() is not None
    assert (linear.native is not None) == (linear.format != "int4" or operator)
    assert torch.equal(linear.dequantize(torch.float32), matrix)
    assert torch.equal(linear.dequantize(torch.float32, slice(N - 11, N - 2)), matrix[N - 11 : N - 2])


def test_a_product_before_its_scale_does_not_leave_fp16s_range() -> None:
    linear = made("int8", torch.full((16, 192), 0.01, dtype=torch.float16))
    assert torch.allclose(
        linear(torch.full((40, 192), 100.0, dtype=torch.float16)).float(), torch.tensor(192.0), rtol=0.01
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settled", [True, False])
def test_compiled_it_gives_the_same(kind: str, dtype: torch.dtype, settled: bool) -> None:
    linear = fractional(made(kind, torch.randn(80, 192, dtype=dtype), torch.randn(80))).requires_grad_(False)
    inputs = [torch.randn(shape, dtype=dtype) for shape in ((1, 1, 192), (2, 192))]
    expected = [linear(x) for x in inputs]
    if not settled:
        linear._unsettle()
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    for x, y in zip(inputs, expected, strict=True):
        assert compiled(x).dtype == dtype
        loose = {torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
        assert torch.allclose(compiled(x).float(), y.float(), rtol=8 * torch.finfo(dtype).eps, atol=loose)


@pytest.mark.parametrize("kind", KINDS)
def test_products_leave_what_is_stored_as_it_was_in_the_same_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "PIECE", 64 * 192)  # several pieces
    linear = fractional(made(kind, torch.randn(208, 192, dtype=torch.bfloat16)))
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    data, nbytes = linear.data.data_ptr(), linear.nbytes
    linear(torch.ones(1, 192, dtype=torch.bfloat16))
    assert linear.data is None
    assert linear.native.data_ptr() == data
    assert linear.nbytes <= nbytes
    after = linear.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(linear.packed.data, before["data"])
    twin = made(kind, torch.zeros(208, 192, dtype=torch.bfloat16))
    twin(torch.ones(1, 192, dtype=torch.bfloat16))
    twin.load_state_dict(after)
    assert torch.equal(twin.dequantize(torch.float32), linear.dequantize(torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_stored_after_a_product(kind: str) -> None:
    weight = torch.randn(80, 192, dtype=torch.bfloat16)
    linear, twin = made(kind, torch.randn_like(weight)), made(kind, weight)
    linear(weight[:1])
    linear.pack_rows(0, weight)
    assert torch.equal(linear(weight[:1]), twin(weight[:1]))
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in linear.state_dict().items())


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="no operators")
@pytest.mark.parametrize(("kind", "name"), [("int8", "_weight_int8pack_mm"), ("int4", "_weight_int4pack_mm_for_cpu")])
def test_few_rows_run_an_operator_over_codes(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, operator, calls = made(kind, torch.randn(80, 192, dtype=torch.bfloat16)), getattr(torch, name), []
    monkeypatch.setattr(torch, name, lambda *args: calls.append(len(args[0])) or operator(*args))
    for M in (1, 16, 200):
        linear(torch.ones(M, 192, dtype=torch.bfloat16))
    assert calls == [1, 16]


def test_another_methods_codes_are_stored_as_they_are() -> None:
    linear = Int4Linear(64, 4, dtype=torch.float32, group=32, symmetric=False)
    codes = torch.randint(0, 16, (4, 64), dtype=torch.uint8)
    scale, zero = torch.rand(4, 2), 15 * torch.rand(4, 2)  # zeros between codes
    linear.store_rows(0, linears.Codes(codes[:1], scale[:1], zero[:1]))
    linear.store_rows(1, linears.Codes(codes[1:], scale[1:], zero[1:]))
    expected = (codes.view(4, 2, 32) - zero[..., None]) * scale[..., None]
    assert torch.equal(linear.dequantize(torch.float32), expected.view(4, 64))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Int8Linear(40, 8, dtype=torch.float32), "chunks of 16 and a row has 40"),
        (lambda: Fp8Linear(8, 8, dtype=torch.float32), "chunks of 16 and a row has 8"),
        (lambda: Int4Linear(96, 8, dtype=torch.float32), "96 weights, which groups of 128 do not divide"),
        (lambda: Int4Linear(96, 8, dtype=torch.float32, group=48), "128, 64, 32 weights; got 48"),
    ],
)
def test_what_does_not_fit_a_layout_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# ---- Which linears --------------------------------------------------------------------------------------------------


def quantized(recipe: Recipe, **changes: object) -> Transformer:
    with torch.device("meta"):
        model = Transformer(replace(CONFIG, **changes))
    quantize_model(model, recipe, dtype=torch.bfloat16)
    return model


def packs(model: Transformer) -> dict[str, tuple[str, int]]:
    modules = {name.removeprefix("layers.0."): module for name, module in model.named_modules()}
    return {name: (m.format, m.group) for name, m in modules.items() if isinstance(m, QuantizedLinear)}


def layer_and_head(model: Transformer) -> list[tuple[str, int]]:
    formats = packs(model)
    return [formats[name] for name in ("attention.qkv", "attention.o", "ffn.gate_up", "ffn.down", "head")]


def test_every_linear_is_quantized_and_nothing_else() -> None:
    for recipe in RECIPES.values():
        model = quantized(recipe, qkv_bias=True)
        assert not any(isinstance(module, Linear) for module in model.modules())
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        kept = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters()}
        assert kept == {"embed", "norm", "attention_norm", "ffn_norm", "qkv"}  # qkv: its bias


def test_int8_takes_every_linear_and_fp8_all_but_the_head() -> None:
    assert layer_and_head(quantized(RECIPES["int8"])) == [("int8", 0)] * 5
    assert layer_and_head(quantized(RECIPES["fp8"])) == [("fp8", 0)] * 4 + [("int8", 0)]


def test_int4_takes_the_largest_group_that_divides_a_row_and_int8_for_the_head() -> None:
    big = quantized(RECIPES["int4"], dim=256, ffn_dim=384)
    assert layer_and_head(big) == [("int4", 128), ("int4", 32), ("int4", 128), ("int4", 128), ("int8", 0)]
    odd = quantized(RECIPES["int4"], ffn_dim=80)
    assert layer_and_head(odd) == [("int4", 64), ("int4", 32), ("int4", 64), ("int8", 0), ("int8", 0)]
    small = quantized(Recipe(format="int4", head="int8", group_size=32, symmetric=False), dim=256)
    assert layer_and_head(small)[0] == ("int4", 32)
    assert small.layers[0].attention.qkv.zero.shape == (144, 8)


@pytest.mark.parametrize("name", RECIPES)
def test_rows_that_no_layout_takes_name_the_linear(name: str) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.ffn\.down has rows of 90 weights.*multiples of 16"):
        quantized(RECIPES[name], ffn_dim=90)


def test_a_tied_head_becomes_a_matrix_of_its_own() -> None:
    model = quantized(RECIPES["int8"], tied_head=True)
    assert not hasattr(model.head, "weight")
    assert model.head.data.shape == (CONFIG.vocab_size, 64 // 4)
    assert model.embed.weight.shape == (CONFIG.vocab_size, 64)


def real(name: str, plain: Transformer) -> Transformer:
    """`plain` in another recipe, filled by hand."""
    weights = dict(plain.named_modules())
    model = tiny_model(plain.config)
    quantize_model(model, RECIPES[name], dtype=torch.float32)
    model.to_empty(device="cpu")
    model.rope_freqs = plain.rope_freqs
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.pack_rows(0, weights[path].weight)
        elif list(module.parameters(recurse=False)):
            module.load_state_dict(weights[path].state_dict())
    return model


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_model_generates_as_its_dequantized_weights_do(name: str, tied: bool) -> None:
    plain = tiny_model(replace(CONFIG, tied_head=tied), seed=random.randrange(1000))
    model = real(name, plain)
    twin = tiny_model(replace(CONFIG, tied_head=False))
    twin.load_state_dict(plain.state_dict())
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            twin.get_submodule(path).weight.data = module.dequantize(torch.float32)
    prompt, answers = random.choices(range(CONFIG.vocab_size), k=9), []
    for one in (model, twin):
        request = Request(prompt=prompt, max_new_tokens=8)
        for _ in Generator(one, max_seq_len=64).run([request]):
            pass
        answers.append(request.token_ids)
    assert answers[0] == answers[1]


def test_a_step_reads_the_packed_weights_and_not_the_embedding() -> None:
    model = real("int4", tiny_model(replace(CONFIG, tied_head=True)))
    generator = Generator(model, max_seq_len=64)
    norms = 4 * 64 * (2 * CONFIG.n_layers + 1)
    words = 4 * 16 * (144 + 64 + 192 + 64)  # of qkv, o, gate_up, down, whose rows end with a whole block
    scales = 4 * (144 * 1 + 64 * 3 + 192 * 1 + 64 * 3)
    head = CONFIG.vocab_size * (64 + 4)
    cache = generator.cache.narrow(5).nbytes
    assert generator.step_bytes(5) == norms + CONFIG.n_layers * (words + scales) + head + cache
