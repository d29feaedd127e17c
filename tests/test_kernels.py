"""Kernels against their twins, under Triton's interpreter where there is no GPU: awkward shapes, fresh inputs."""

import copy
import dataclasses
import functools

import pytest
import torch

from cache import KV_DTYPES
from kernels import attention, codes, dequantize, language, linear, probe, tuning
from kernels.attention import Heads, Scratch
from kernels.decoder import Decoder, matrices
from kernels.linear import NOTHING, Stream
from kernels.tuning import AttentionPlan, Plan
from kernels.weight import Weight, block_of
from model import Linear, Transformer
from quant.linears import RECIPES, Fp8Linear, Int4Linear, Int8Linear
from tests.conftest import TINY, new_cache, tiny_model

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = {
    "float": None,
    "int8": Int8Linear,
    "fp8": Fp8Linear,
    "int4 g32": functools.partial(Int4Linear, group=32),
    "int4 g64 asymmetric": functools.partial(Int4Linear, group=64, symmetric=False),
    "int4 g128": functools.partial(Int4Linear, group=128),
}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def random_weight(format: str, N: int, K: int, *, dtype: torch.dtype = torch.float32, bias: bool = False) -> Weight:
    matrix = random(N, K, dtype=dtype) * K**-0.5
    if FORMATS[format] is None:
        weight = Weight("float", matrix)
    else:
        module = FORMATS[format](K, N, dtype=dtype).to(DEVICE)
        module.pack_rows(0, matrix)
        weight = module.packed
    return weight._replace(bias=random(N, dtype=dtype)) if bias else weight


def same(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    got, want = got.double(), want.double()
    assert torch.isfinite(got).all()
    error = (got - want).norm() / want.norm()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("mode", ["store", "add", "glu"])
def test_linear(format: str, M: int, mode: str) -> None:
    N, K = 70, 192 if "128" not in format else 384
    weight = random_weight(format, N, K, bias=mode != "add")
    norm = 1 + 0.1 * random(K)
    x = random(M, K)
    residual = random(M, N) if mode == "add" else None
    options = {"norm": norm, "eps": 1e-5, "glu": mode == "glu"}
    want = linear.linear_twin(x, weight, **options, residual=None if residual is None else residual.clone())
    got = linear.linear_kernel(x, weight, **options, residual=residual)
    same(got, want, 3e-5)


@pytest.mark.parametrize("mode", ["store", "add", "glu", "argmax"])
@pytest.mark.parametrize("format", ["int8", "int4 g32"])
def test_a_packed_matrix_cut_into_several_programs_warps_and_loads(format: str, mode: str) -> None:
    N, K, M = 44, 416, 1 if mode == "argmax" else 2  # rows and inputs that nothing divides
    weight, x, norm = random_weight(format, N, K), random(M, K), 1 + 0.1 * random(K)
    outputs = N // 2 if mode == "glu" else N
    out = random(M, outputs)
    want = linear.linear_twin(x, weight, norm=norm, glu=mode == "glu", residual=out.clone() if mode == "add" else None)
    if mode == "argmax":
        out = torch.full((M,), NOTHING, dtype=torch.int64, device=DEVICE)
    plan = Plan(BN=16, BK=0, num_warps=2, depth=1)
    linear.launch(x, weight, out, norm=norm, eps=0.0, mode=mode, plan=plan)
    if mode == "argmax":
        assert 0xFFFFFFFF - (out & 0xFFFFFFFF).item() == want.argmax().item()
    else:
        same(out, want, 3e-5)


SHARED = {  # blocks of 64 bytes of a row: in a step of all warps; plans
    "warps share inputs": (1, Plan(BN=64, BK=0, num_warps=2, depth=3, across=1)),
    "and rows": (4, Plan(BN=32, BK=0, num_warps=4, depth=2, across=2)),
}


@pytest.mark.parametrize("plan", SHARED)
@pytest.mark.parametrize("mode", ["store", "add", "glu", "argmax"])
@pytest.mark.parametrize("format", ["int8", "fp8", "int4 g32", "int4 g64 asymmetric", "int4 g128"])
def test_a_packed_matrix_through_shared_memory(format: str, mode: str, plan: str) -> None:
    blocks, plan = SHARED[plan]
    N, K, M = 44, 384 if format == "int4 g128" else 448, 11  # an odd number of blocks, and rows that nothing divides
    weight, x, residual = random_weight(format, N, K, bias=mode != "glu"), random(M, K), random(M, N)
    out = residual.clone() if mode == "add" else random(M, N // 2 if mode == "glu" else N)
    want = linear.linear_twin(x, weight, glu=mode == "glu", residual=residual if mode == "add" else None)
    if mode == "argmax":
        out = torch.full((M,), NOTHING, dtype=torch.int64, device=DEVICE)
    plan = plan._replace(BK=blocks * block_of(weight.format))
    linear.launch(x, weight, out, norm=None, eps=0.0, mode=mode, plan=plan)
    if mode == "argmax":
        assert torch.equal(0xFFFFFFFF - (out & 0xFFFFFFFF), want.argmax(-1))
    else:
        same(out, want, 3e-5)


@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("format", ["int8", "int4 g64 asymmetric"])
def test_a_packed_matrix_whose_inputs_are_cut_over_programs(format: str, splits: int, monkeypatch) -> None:
    blocks, plan = SHARED["warps share inputs"]
    N, K, M = 44, 448, 11
    weight, x, residual = random_weight(format, N, K, bias=True), random(M, K), random(M, N)
    plan = plan._replace(BK=blocks * block_of(weight.format), splits=splits)
    monkeypatch.setattr(tuning, "plan", lambda *_: plan)
    monkeypatch.setattr(language, "on_gpu", lambda x: True)
    want = linear.linear_twin(x, weight, residual=residual.clone())
    stream = Stream(residual.clone())
    linear.linear(x, weight, residual=stream)
    assert torch.equal(stream.x, residual) and stream.parts.shape == (splits, M, N)  # yet to be added
    same(stream.whole(), want, 3e-5)
    same(linear.linear_kernel(x, weight, residual=residual), want, 3e-5)


@pytest.mark.parametrize("M", [5, 8, 9, 17])
@pytest.mark.parametrize("format", ["float", "int8", "int4 g32"])
def test_linear_of_more_rows(format: str, M: int) -> None:
    weight, norm, x = random_weight(format, 40, 96, bias=True), 1 + 0.1 * random(96), random(M, 96)
    want = linear.linear_twin(x, weight, norm=norm, eps=1e-5, glu=True)
    same(linear.linear_kernel(x, weight, norm=norm, eps=1e-5, glu=True), want, 3e-5)


@pytest.mark.parametrize("M", [1, 3])
def test_large_activations_do_not_overflow_in_fp16(M: int) -> None:
    weight, x = random_weight("float", 24, 64, dtype=torch.float16), (2e4 * random(M, 64).sign()).half()
    norm = torch.full((64,), 6.0, dtype=torch.float16, device=DEVICE)
    same(linear.linear_kernel(x, weight, norm=norm, eps=1e-5), linear.linear_twin(x, weight, norm=norm, eps=1e-5), 5e-3)


def test_a_plan_for_tiles_is_cut_down_to_the_shared_memory_there_is() -> None:
    for M, mode, itemsize in ((2, "store", 2), (16, "glu", 4)):
        fitted = tuning.fit(Plan(64, 512, 4, 4), M, mode, itemsize, 101376)
        assert tuning.tile_bytes(fitted, M, mode, itemsize) <= 101376
        assert tuning.fit(fitted, M, mode, itemsize, 101376) == fitted
    assert tuning.fit(Plan(32, 128, 4, 4), 16, "store", 2, 232448) == Plan(32, 128, 4, 4)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("M", [8, 16, 33, 64])
def test_the_rule_cuts_packed_matrices_into_whole_tiles_that_a_hopper_has_room_for(format: str, M: int) -> None:
    for N, K, mode in ((14336, 4096, "glu"), (128256, 4096, "argmax"), (4096, 14336, "add"), (48, 64, "glu")):
        plan = tuning.rule(format, M, N, K, mode)
        least = (8 if mode == "glu" else 16) * plan.num_warps // plan.across  # outputs of all warps' tiles
        assert plan.BN % least == 0
        assert plan.BK % (plan.across * block_of(format)) == 0
        assert 2 * tuning.step_bytes(plan, format, M, mode) <= 232448


@pytest.mark.parametrize("M", [1, 2])
@pytest.mark.parametrize("K", [16, 48, 2080, 4128])
def test_linear_at_lengths_around_a_block(M: int, K: int) -> None:
    for format in ("float", "int8"):
        weight, x = random_weight(format, 5, K), random(M, K)
        same(linear.linear_kernel(x, weight), linear.linear_twin(x, weight), 3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("M", [1, 4])
def test_linear_in_half_precision(format: str, dtype: torch.dtype, M: int) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16 and (M > 1 or format != "float"):
        pytest.skip("the interpreter multiplies bf16 matrices as if they were integers")
    weight, x = random_weight(format, 40, 256, dtype=dtype), random(M, 256, dtype=dtype)
    norm = (1 + 0.1 * random(256)).to(dtype)
    exact = weight._replace(data=weight.data.float()) if format == "float" else weight
    want = linear.linear_twin(x.float(), exact, norm=norm.float(), eps=1e-5)
    same(linear.linear_kernel(x, weight, norm=norm, eps=1e-5), want, 1e-2)


@pytest.mark.parametrize("format", ["float", "int8", "int4 g128"])
@pytest.mark.parametrize("M", [1, 3])
def test_argmax_finds_the_first_of_the_largest_and_moves_the_state(format: str, M: int) -> None:
    weight, norm, x = random_weight(format, 77, 128), 1 + 0.1 * random(128), random(M, 128)
    # A tie, if it is the largest. Both are the fifth of a tile: the interpreter's sums depend on where a row is in one.
    weight.data[52] = weight.data[20]
    if weight.scale is not None:
        weight.scale[52] = weight.scale[20]
    best = torch.full((M,), NOTHING, dtype=torch.int64, device=DEVICE)
    tokens, pos = torch.zeros(M, 1, dtype=torch.int64, device=DEVICE), torch.full((M, 1), 8, device=DEVICE)
    linear.argmax_kernel(x, weight, best, norm=norm, eps=1e-5)
    twin = torch.full_like(best, NOTHING)
    linear.argmax_twin(x, weight, twin, norm=norm, eps=1e-5)
    assert (best & 0xFFFFFFFF).tolist() == (twin & 0xFFFFFFFF).tolist()
    linear.take_best_kernel(best, tokens, pos, 9)
    want = linear.linear_twin(x, weight, norm=norm, eps=1e-5).argmax(-1)
    assert tokens[:, 0].tolist() == want.tolist()
    assert pos[:, 0].tolist() == [9] * M and best.tolist() == [NOTHING] * M
    linear.take_best_kernel(best, tokens, pos, 9)
    assert pos[:, 0].tolist() == [9] * M  # the last slot is not passed


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "float"])
def test_dequantize(format: str) -> None:
    weight = random_weight(format, 7, 2176)
    same(dequantize.dequantize_kernel(weight, torch.float32), dequantize.dequantize_twin(weight, torch.float32), 1e-6)


@pytest.mark.parametrize("n", [1, 8192, 20001])
def test_the_probe_reads_every_word(n: int) -> None:
    words = torch.randint(-100, 100, (n,), device=DEVICE).float()
    assert torch.equal(probe.read_kernel(words), probe.read_twin(words))


ATTENTION = {
    "one head a key head": Heads(n_heads=2, n_kv_heads=2, head_dim=16),
    "grouped, odd": Heads(n_heads=9, n_kv_heads=3, head_dim=8),
    "more than eight a key head": Heads(n_heads=12, n_kv_heads=1, head_dim=16),
    "no rope, one key head": Heads(n_heads=4, n_kv_heads=1, head_dim=64, use_rope=False),
    "window": Heads(n_heads=4, n_kv_heads=2, head_dim=32, window=70),
    "head dim 128": Heads(n_heads=2, n_kv_heads=1, head_dim=128),
    "head dim 80": Heads(n_heads=2, n_kv_heads=1, head_dim=80),
}


def attention_inputs(heads: Heads, positions: list[int], slots: int, dtype: torch.dtype) -> tuple:
    B, D = len(positions), heads.head_dim
    qkv = random(B, (heads.n_heads + 2 * heads.n_kv_heads) * D, dtype=dtype)
    angle = torch.rand(slots, D // 2, device=DEVICE) * 6
    k, v = random(2, B, slots, heads.n_kv_heads, D, dtype=dtype)
    return qkv, angle.cos(), angle.sin(), torch.tensor(positions, device=DEVICE)[:, None], k, v


PLANS = {  # how the slots are cut
    "one block a split": AttentionPlan(64, 64, 64, 4),
    "blocks in a row": AttentionPlan(32, 64, 8, 2),
    "one split": AttentionPlan(128, 128, 1, 4),
    "eight warps": AttentionPlan(256, 256, 264, 8),
    "one warp": AttentionPlan(32, 256, 264, 1),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("positions", [[0], [63], [64], [200, 3, 130]])
@pytest.mark.parametrize("name", ATTENTION)
def test_decode_attention(monkeypatch: pytest.MonkeyPatch, name: str, positions: list[int], plan: str) -> None:
    monkeypatch.setattr(tuning, "attention_plan", lambda *_: PLANS[plan])
    heads = ATTENTION[name]
    if DEVICE == "cuda" and plan == "eight warps" and heads.head_dim > 64:
        pytest.skip("in fp32 it takes more shared memory than there is; it is for keys of 256 bytes at most")
    qkv, cos, sin, pos, k, v = attention_inputs(heads, positions, 256, torch.float32)
    scratch = Scratch(batch=len(positions), heads=heads, device=qkv.device)
    k2, v2 = k.clone(), v.clone()
    for row, position in enumerate(positions):
        for cache in (k, v, k2, v2):
            cache[row, position:] = float("nan")  # what is not live is never read
    want = []
    for row, position in enumerate(positions):
        one, live = slice(row, row + 1), slice(0, position + 1)
        caches = k2[one, live], v2[one, live]
        want.append(attention.decode_attention_twin(qkv[one], cos, sin, pos[one], *caches, heads))
    want = torch.cat(want)
    for _ in range(2):  # a second time over the counters that the first one left
        got = attention.decode_attention_kernel(qkv, cos, sin, pos, k, v, heads, scratch)
        same(got, want, 3e-5)
    assert torch.equal(k.isnan(), k2.isnan()) and torch.equal(v.isnan(), v2.isnan())
    same(k.nan_to_num(), k2.nan_to_num(), 1e-6)


@pytest.mark.parametrize(
    ("slots", "rows", "kind"),
    [
        (256, 1, "brief"),
        (257, 1, "short"),
        (1024, 7, "short"),
        (256, 8, "wide"),
        (1024, 8, "wide"),
        (1025, 8, "long wide"),
        (4097, 3, "long wide"),
        (1025, 2, "medium"),
        (4096, 2, "medium"),
        (4097, 1, "long"),
    ],
)
def test_the_kind_of_attention_goes_by_context_and_rows(slots: int, rows: int, kind: str) -> None:
    assert tuning.attention_kind(8, slots, rows) == kind


def test_steps_of_few_rows_over_blocks_go_by_context_where_slots_may_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "hopper", lambda x: True)
    decoder = Decoder(tiny_model(dtype=torch.bfloat16), max_seq_len=64, batch_size=2)
    assert [bool(decoder.paged_buckets(rows, 64)) for rows in (1, 8, 9)] == [True, True, False]  # of two key heads
    assert decoder.paged_buckets(1, 128) == tuning.CONTEXTS and not decoder.paged_buckets(1, 256)
    half, single = (torch.zeros(1, dtype=dtype) for dtype in (torch.float16, torch.float32))
    assert tuning.spreads(8, 128, 2, half, 64) and not tuning.spreads(8, 192, 2, half, 64)
    assert not tuning.spreads(8, 128, 2, single, 64)
    monkeypatch.setattr(language, "hopper", lambda x: False)
    assert not tuning.spreads(8, 128, 2, half, 64)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(
    ("name", "plan", "positions"),
    [
        ("one head a key head", "one block a split", [0]),
        ("grouped, odd", "blocks in a row", [130, 3]),
        ("more than eight a key head", "one split", [64]),
        ("no rope, one key head", "one block a split", [63]),
        ("window", "blocks in a row", [200, 3]),
        ("head dim 80", "one block a split", [130]),
    ],
)
@pytest.mark.usefixtures("rounded_fp8")
def test_decode_attention_over_codes(
    monkeypatch: pytest.MonkeyPatch, name: str, plan: str, positions: list[int], kv_dtype: str
) -> None:
    monkeypatch.setattr(tuning, "attention_plan", lambda *_: PLANS[plan])
    heads = ATTENTION[name]
    qkv, cos, sin, pos, k, v = attention_inputs(heads, positions, 256, torch.float32)
    scratch = Scratch(batch=len(positions), heads=heads, device=qkv.device)
    (k, k_scale), (v, v_scale) = (codes.encode(x, KV_DTYPES[kv_dtype]) for x in (k, v))
    for row, position in enumerate(positions):
        k_scale[row, position:], v_scale[row, position:] = 0.0, 0.0  # what the newest has must come with it
        k_scale[row, position + 1 :], v_scale[row, position + 1 :] = float("nan"), float("nan")
    k2, v2, k2_scale, v2_scale = (x.clone() for x in (k, v, k_scale, v_scale))
    want = []
    for row, position in enumerate(positions):
        one, live = slice(row, row + 1), slice(0, position + 1)
        caches, scales = ([x[one, live] for x in pair] for pair in ((k2, v2), (k2_scale, v2_scale)))
        inputs = qkv[one], cos, sin, pos[one], *caches, heads
        want.append(attention.decode_attention_twin(*inputs, k_scale=scales[0], v_scale=scales[1]))
    for _ in range(2):
        inputs = qkv, cos, sin, pos, k, v, heads, scratch
        got = attention.decode_attention_kernel(*inputs, k_scale=k_scale, v_scale=v_scale)
        same(got, torch.cat(want), 2e-3)
    for ours, twins in ((k_scale, k2_scale), (v_scale, v2_scale)):
        assert torch.equal(ours.isnan(), twins.isnan())
        same(ours.nan_to_num(), twins.nan_to_num(), 1e-6)
    # Where rounding in the embedding moves a number over the middle of two codes, it may have the other.
    assert sum((a.float() != b.float()).sum() for a, b in ((k, k2), (v, v2))) <= 2


def test_decode_attention_with_norms_in_half_precision() -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cannot multiply bf16 matrices
    norms = [1 + 0.1 * random(64) for _ in range(2)]
    heads = Heads(n_heads=4, n_kv_heads=2, head_dim=64, q_norm=norms[0], k_norm=norms[1], eps=1e-6)
    qkv, cos, sin, pos, k, v = attention_inputs(heads, [150], 256, torch.float32)
    want = attention.decode_attention_twin(qkv, cos, sin, pos, k.clone(), v.clone(), heads)
    half = heads._replace(q_norm=norms[0].to(dtype), k_norm=norms[1].to(dtype))
    scratch = Scratch(batch=1, heads=half, device=qkv.device)
    got = attention.decode_attention_kernel(qkv.to(dtype), cos, sin, pos, k.to(dtype), v.to(dtype), half, scratch)
    same(got, want, 2e-2)


CONFIGS = {
    "llama": TINY,
    "biases": dataclasses.replace(TINY, qkv_bias=True, o_bias=True, ffn_bias=True),
    "q/k norm, tied": dataclasses.replace(TINY, qk_norm=True, tied_head=True),
    "window": dataclasses.replace(TINY, sliding_window=5, sliding_layers=(1,)),
    "no rope": dataclasses.replace(TINY, no_rope_layers=(0,)),
}


@pytest.mark.parametrize(
    ("name", "quantize", "kv_dtype"),
    [*((name, None, None) for name in CONFIGS), ("biases", "int4", None), ("window", None, "int8")],
)
def test_decoder_gives_the_models_logits(
    monkeypatch: pytest.MonkeyPatch, name: str, quantize: str | None, kv_dtype: str | None
) -> None:
    model = tiny_model(CONFIGS[name], device=DEVICE)
    if quantize:
        quantize_in_place(model, quantize)
    monkeypatch.setattr(language, "on_gpu", lambda x: True)  # the kernels, by the interpreter if need be
    # More rows than are used. A copy, as on a CPU the model brings its codes into another order.
    decoder = Decoder(copy.deepcopy(model), max_seq_len=64, batch_size=4)
    ours, theirs = (new_cache(model, batch=2, length=64, kv_dtype=kv_dtype) for _ in range(2))
    tokens = torch.randint(TINY.vocab_size, (2, 11), device=DEVICE)
    with torch.no_grad():
        for begin, end in ((0, 7), (7, 8), (8, 9), (9, 11)):  # prompts and steps
            pos = torch.arange(begin, end, device=DEVICE).expand(2, -1)
            tail = end - begin > 1
            x = decoder.hidden(tokens[:, begin:end], pos, ours.narrow(end if tail else 64, tail=tail))
            want = model(tokens[:, begin:end], pos, theirs.narrow(end if tail else 64, tail=tail))
            # Where rounding moves a number over the middle of two codes, the two have different ones.
            same(decoder.logits(x), want, 1e-4 if kv_dtype is None else 5e-3)
        last, pos = tokens[:, -1:].clone(), torch.full((2, 1), 10, device=DEVICE)
        decoder.greedy(x[:, -1:], last, pos, 63)
    assert last[:, 0].tolist() == want[:, -1].argmax(-1).tolist()
    assert pos[:, 0].tolist() == [11, 11]


def quantize_in_place(model: Transformer, name: str) -> None:
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear):
            packed = RECIPES[name].linear(path, module, torch.float32)
            packed.pack_rows(0, module.weight)
            if module.bias is not None:
                packed.bias = module.bias
            model.set_submodule(path, packed.to(DEVICE))


def test_decoder_lists_every_matrix_that_a_step_reads() -> None:
    model = tiny_model(device=DEVICE)
    found = sum(w.nbytes for w in matrices(Decoder(model, max_seq_len=8, batch_size=1)))
    assert found == sum(m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert isinstance(model, Transformer)
