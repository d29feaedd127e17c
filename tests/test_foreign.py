"""quant/foreign.py: what other libraries packed, in tests/data/foreign (see make_foreign.py), gives their logits."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import cli
from checkpoint import load_model, open_checkpoint, save_model
from generator import Generator, Request
from model import Transformer
from quant.foreign import Matrix
from quant.linears import Int4Linear, Int8Linear, QuantizedLinear, Recipe, Storage
from scripts import bench
from tests.conftest import new_cache

FOLDER = Path(__file__).parent / "data" / "foreign"
TOKENS = [3, 17, 42, 9, 88, 5, 61, 30, 12, 77, 4, 19, 54, 2, 36, 71]  # as make_foreign.py has them

LINEARS = ("attention.qkv", "attention.o", "ffn.gate_up", "ffn.down")
INT4, FLOAT = Storage("int4", 32), Storage("float")
MODELS: dict[str, tuple[str, dict[str, Storage]]] = {  # what it is called, and how the layers' linears are stored
    "gptq-int4": ("gptq-int4-g32", dict.fromkeys(LINEARS, INT4)),
    "gptq-int4-asymmetric": ("gptq-int4-g32-asymmetric", dict.fromkeys(LINEARS, INT4)),
    "gptq-v2-int4-asymmetric": ("gptq-int4-g32-asymmetric", dict.fromkeys(LINEARS, INT4)),
    "gptq-int4-per-row": ("gptq-int4-g64", dict.fromkeys(LINEARS, Storage("int4", 64)) | {"ffn.down": INT4}),
    "gptq-int4-act-order": ("gptq-float", dict.fromkeys(LINEARS, FLOAT)),
    "gptq-int8-per-row": ("gptq-int8", dict.fromkeys(LINEARS, Storage("int8"))),
    "gptq-int8-groups": ("gptq-float", dict.fromkeys(LINEARS, FLOAT)),
    "awq-int4": ("awq-int4-g32-asymmetric", dict.fromkeys(LINEARS, INT4)),
    "compressed-int4": ("compressed-tensors-int4-g32", dict.fromkeys(LINEARS, INT4)),
    "compressed-int4-asymmetric": ("compressed-tensors-int4-g32-asymmetric", dict.fromkeys(LINEARS, INT4)),
    "compressed-int8": ("compressed-tensors-int8", dict.fromkeys(LINEARS, Storage("int8"))),
    "compressed-int8-packed": ("compressed-tensors-int8", dict.fromkeys(LINEARS, Storage("int8"))),
    "compressed-fp8": ("compressed-tensors-fp8", dict.fromkeys(LINEARS, Storage("fp8"))),
    "compressed-fp8-per-tensor": ("compressed-tensors-fp8", dict.fromkeys(LINEARS, Storage("fp8"))),
}


def load(spec: object, dtype: torch.dtype = torch.float32, **options) -> Transformer:
    return load_model(open_checkpoint(str(spec)), device="cpu", dtype=dtype, **options)


def logits(model: Transformer) -> Tensor:
    T = len(TOKENS)
    return model(torch.tensor([TOKENS]), torch.arange(T)[None], new_cache(model, batch=1, length=T))[0]


def reference(name: str) -> Tensor:
    return load_file(FOLDER / name / "logits.safetensors")["logits"]


def storage(model: Transformer, name: str) -> Storage:
    linear = model.get_submodule(name)
    return Storage(linear.format, linear.group) if isinstance(linear, QuantizedLinear) else FLOAT


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model with other tensors, or with something else in its quantization_config or beside it."""

    def copy(name: str, change: Callable[[dict], object] = lambda tensors: None, **config: object) -> Path:
        directory = tmp_path / "copy"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(FOLDER / name, directory)
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / "model.safetensors")
        raw = json.loads((directory / "config.json").read_text())
        outside = {key: config.pop(key) for key in list(config) if key in raw}
        raw["quantization_config"] |= config
        (directory / "config.json").write_text(json.dumps(raw | outside))
        return directory

    return copy


# ---- What the libraries wrote ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_librarys_own_weights(name):
    expected = reference(name)
    assert (logits(load(FOLDER / name)) - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("name", MODELS)
def test_linears_are_packed_where_our_layouts_can_hold_them(name):
    called, storages = MODELS[name]
    model = load(FOLDER / name, torch.float16)
    layer = len(model.layers) - 1
    found = {linear: storage(model, f"layers.{layer}.{linear}") for linear in LINEARS}
    assert found == storages | ({"attention.qkv": FLOAT} if name == "compressed-int4" else {})  # k_proj is ignored
    assert storage(model, "head") == Storage("fp8" if name == "compressed-fp8" else "float")
    assert open_checkpoint(str(FOLDER / name)).quantized == called
    for linear in model.modules():
        if isinstance(linear, Int4Linear):
            assert (linear.zero is None) == ("asymmetric" not in called)


def test_linears_that_a_checkpoint_leaves_alone_stay_alone():
    model, stored = load(FOLDER / "compressed-int4"), load_file(FOLDER / "compressed-int4" / "model.safetensors")
    assert [storage(model, f"layers.0.{linear}") for linear in LINEARS] == [INT4, INT4, FLOAT, FLOAT]
    assert torch.equal(model.layers[0].ffn.down.weight, stored["model.layers.0.mlp.down_proj.weight"].float())


@pytest.mark.parametrize("name", ["gptq-int4-asymmetric", "awq-int4", "compressed-int4-asymmetric"])
def test_fp16_scales_zeros_and_codes_are_the_stored_ones(name):
    down, stored = load(FOLDER / name, torch.float16).layers[0].ffn.down, load_file(FOLDER / name / "model.safetensors")
    scales = {key.rpartition(".")[2]: t for key, t in stored.items() if ".down_proj." in key}
    assert torch.equal(down.scale, scales["weight_scale"] if "weight_scale" in scales else scales["scales"].t())
    assert down.zero.unique().tolist() == list(range(int(down.zero.min()), int(down.zero.max()) + 1))
    assert len(down.layout.unpack(down.data, down.in_features).unique()) == 16


@pytest.mark.parametrize("name", ["gptq-int4-act-order", "gptq-int8-groups", "compressed-int4"])
def test_matrices_that_become_floats_are_said_to(name, caplog):
    with caplog.at_level(logging.WARNING, logger="tachyon"):
        open_checkpoint(str(FOLDER / name))
    (line,) = caplog.messages
    number = {"compressed-int4": 2}.get(name, 7)  # q_proj and v_proj, whose k_proj is not quantized
    assert f"{number} matrices become floats, model.layers." in line


def test_opening_one_does_not_import_torchs_compiler():
    code = (
        "import sys; from checkpoint import open_checkpoint\n"
        "for name in sys.argv[1:]: open_checkpoint(name)\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    command = [sys.executable, "-c", code, *(str(FOLDER / name) for name in MODELS)]
    assert subprocess.run(command, cwd=FOLDER.parents[2]).returncode == 0


def test_the_commands_run_it_and_name_it(cache_folder, monkeypatch, capsys):
    monkeypatch.setenv("TACHYON_CACHE", str(cache_folder))
    options = ["--checkpoint", str(FOLDER / "awq-int4"), "--device", "cpu", "--json"]
    cli.run(bench.main, [*options, "--new-tokens", "3", "--repeats", "1"])
    assert json.loads(capsys.readouterr().out)["quantize"] == "awq-int4-g32-asymmetric"
    with pytest.raises(SystemExit):
        cli.run(bench.main, [*options, "--new-tokens", "3", "--quantize", "int8"])
    assert "is quantized already (awq-int4-g32-asymmetric)" in capsys.readouterr().err


def test_generated_tokens_are_those_of_the_reference():
    model = load(FOLDER / "gptq-int4")
    request = Request(prompt=TOKENS, max_new_tokens=1, stop_ids=frozenset())
    list(Generator(model, max_seq_len=32).run([request]))
    assert request.token_ids == [reference("gptq-int4")[-1].argmax().item()]


def test_it_is_saved_in_our_own_layout(tmp_path):
    for name in ("awq-int4", "compressed-int4", "compressed-fp8"):
        source = open_checkpoint(str(FOLDER / name))
        model = load(FOLDER / name)
        save_model(model, tmp_path / name, recipe=source.recipe)
        again = open_checkpoint(str(tmp_path / name))
        assert (again.repack, again.quantized) == (False, source.quantized)
        assert torch.equal(logits(load(tmp_path / name)), logits(model))


def test_progress_of_loading_ends_at_its_total():
    for name in ("gptq-int4", "gptq-int4-act-order", "compressed-int4"):
        seen = []
        load(FOLDER / name, progress=lambda *args, seen=seen: seen.append(args))
        assert seen[-1][0] == seen[-1][1] > 0


# ---- Variants of the files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptq-int4", "gptq-int4-asymmetric"])
def test_gptq_of_the_second_version_has_its_zeros_as_they_are(name, copy):
    def to_second(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            if key.endswith(".qzeros"):
                nibbles = tensors[key][..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15
                tensors[key] = ((nibbles + 1) << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)

    directory = copy(name, to_second, checkpoint_format="gptq_v2")
    assert torch.equal(logits(load(directory)), logits(load(FOLDER / name)))
    assert not torch.allclose(logits(load(copy(name, checkpoint_format="gptq_v2"))), reference(name), atol=0.1)


def test_gptqs_zeros_minus_one_borrow_across_a_word(copy):
    zeros = torch.tensor([5, 0, 0, 15, 1, 0, 9, 0])  # of eight neighbouring outputs
    word = sum(int(zero) << 4 * i for i, zero in enumerate(zeros)) - 0x11111111
    word = word % 2**32 - (2**32 if word % 2**32 >= 2**31 else 0)

    def set_word(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.o_proj.qzeros"][1, 2] = word

    o = load(copy("gptq-int4-asymmetric", set_word)).layers[0].attention.o
    assert torch.equal(o.zero[16:24, 1], zeros.float())


def test_groups_in_order_are_packed_even_where_the_order_is_stored(copy):
    model = load(copy("gptq-int4", desc_act=True))
    assert storage(model, "layers.0.attention.o") == INT4

    def drop(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("g_idx")]:
            del tensors[key]

    assert torch.equal(logits(load(copy("gptq-int4", drop))), logits(model))


def test_biases_of_zeros_are_left_out_and_others_are_not(copy):
    bias = "model.layers.0.mlp.up_proj.bias"
    assert load(copy("gptq-int4", lambda tensors: tensors.update({bias: torch.zeros(96)}))) is not None
    with pytest.raises(ValueError, match=f"has unknown {bias}"):
        load(copy("gptq-int4", lambda tensors: tensors.update({bias: torch.ones(96)})))


def test_symmetric_and_asymmetric_matrices_share_a_model(copy):
    def mix(tensors: dict[str, Tensor]) -> None:
        other = load_file(FOLDER / "gptq-int4" / "model.safetensors")
        tensors |= {key: tensor for key, tensor in other.items() if ".q_proj." in key}

    model = load(copy("gptq-int4-asymmetric", mix))
    expected = load(FOLDER / "gptq-int4").layers[0].attention.qkv.dequantize(torch.float32)[:64]
    assert torch.equal(model.layers[0].attention.qkv.dequantize(torch.float32)[:64], expected)


def test_a_quantized_head_is_not_tied_even_where_the_config_says_so(copy):
    directory = copy("compressed-fp8", tie_word_embeddings=True)
    assert torch.equal(logits(load(directory)), logits(load(FOLDER / "compressed-fp8")))


def test_a_tied_head_stays_the_embedding(copy):
    model = load(copy("gptq-int4", lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=True))
    assert model.head.weight is model.embed.weight


def test_tensors_in_any_order_and_in_several_files(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(FOLDER / "compressed-int4-asymmetric", directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = [f"model-{i}.safetensors" for i in range(3)]
    weight_map = {key: files[sum(map(ord, key)) % 3] for key in tensors}
    for file in files:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(load(directory)), logits(load(FOLDER / "compressed-int4-asymmetric")))


@pytest.mark.parametrize("symmetric", [True, False])
def test_larger_groups_repeat_their_scales(symmetric):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (6, 512), generator=generator, dtype=torch.uint8)
    zero = None if symmetric else torch.randint(0, 16, (6, 2), generator=generator, dtype=torch.uint8)
    matrix = Matrix("int4", codes, torch.rand(6, 2, generator=generator), zero)
    assert matrix.storage() == Storage("int4", 128)
    linear = Int4Linear(512, 6, dtype=torch.float32, symmetric=symmetric)
    linear.store_rows(0, matrix.pack(linear))
    assert torch.equal(linear.dequantize(torch.float32), matrix.dequantize())


def test_int8_with_zeros_of_its_own_becomes_floats():
    codes, scale = torch.arange(32, dtype=torch.uint8).view(2, 16), torch.tensor([[0.5], [2.0]])
    middle = Matrix("int8", codes, scale, torch.full((2, 1), 128, dtype=torch.uint8))
    other = Matrix("int8", codes, scale, torch.tensor([[128], [3]], dtype=torch.uint8))
    assert (middle.storage(), other.storage()) == (Storage("int8"), FLOAT)
    assert torch.equal(other.dequantize(), torch.stack(((codes[0] - 128.0) * 0.5, (codes[1] - 3.0) * 2)))
    linear = Int8Linear(16, 2, dtype=torch.float32)
    linear.store_rows(0, middle.pack(linear))
    assert torch.equal(linear.dequantize(torch.float32), middle.dequantize())


# ---- What is not read ------------------------------------------------------------------------------------------------

GROUP = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gptq-int4", {"bits": 3}, ["gptq: bits is 3", "4 or 8"]),
        ("gptq-int4", {"checkpoint_format": "marlin"}, ["checkpoint_format is 'marlin'", "'gptq' or 'gptq_v2'"]),
        ("gptq-int4", {"is_marlin_format": True}, ["is_marlin_format is True"]),
        ("awq-int4", {"version": "gemv"}, ["awq: version is 'gemv'", "'gemm'"]),
        ("awq-int4", {"bits": 8}, ["bits is 8"]),
        ("compressed-int4", {"format": "nvfp4-pack-quantized"}, ["format is 'nvfp4-pack-quantized'"]),
        ("compressed-int4", {"kv_cache_scheme": STATIC}, ["kv_cache_scheme"]),
        ("compressed-int4", {"transform_config": {"config_groups": {"R1": {}}}}, ["transform_config"]),
        ("compressed-int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["'sparse-24-bitmask'"]),
        ("compressed-int4", {"config_groups": {"W4A16": ["Linear"]}}, ["config_groups.W4A16"]),
        ("compressed-int4", {"config_groups": {"a": GROUP | {"format": "marlin-24"}}}, ["'marlin-24'"]),
        ("compressed-int4", {"config_groups": {"a": {"weights": {"num_bits": 2}}}}, ["num_bits is 2"]),
        ("compressed-int4", {"config_groups": {"a": {"weights": {"strategy": "block"}}}}, ["strategy is 'block'"]),
        (
            "compressed-int4",
            {"config_groups": {"a": GROUP | {"input_activations": STATIC}}},
            ["input_activations of config_groups.a", "fixed scales"],
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(name, changes, words, copy):
    with pytest.raises(ValueError) as error:
        open_checkpoint(str(copy(name, **changes)))
    assert all(word in str(error.value) for word in ("config.json", "quantize.py", *words)), error.value


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("gptq-int4", lambda t: t.pop(f"{UP}.qzeros"), [f"{UP}: qzeros is missing"]),
        ("gptq-int4", lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].float()}), ["qweight is stored as"]),
        ("gptq-int4", lambda t: t.update({f"{UP}.perm": torch.zeros(1)}), [f"{UP}: perm would be left over"]),
        ("gptq-int4", lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"][:, :6]}), [f"{UP}: weights have 2 bits"]),
        (
            "gptq-int4",
            lambda t: t.update({f"{UP}.scales": torch.ones(3, 96), f"{UP}.g_idx": None}),
            [f"{UP}: 3 scales do not divide a row of 64"],
        ),
        ("awq-int4", lambda t: t.update({f"{UP}.g_idx": torch.zeros(64)}), [f"{UP}: g_idx would be left over"]),
        ("compressed-int4-asymmetric", lambda t: t.update({f"{UP}.input_scale": torch.ones(1)}), ["input_scale"]),
    ],
)
def test_tensors_that_make_no_matrix_are_named(name, change, words, copy):
    def apply(tensors: dict[str, Tensor]) -> None:
        change(tensors)
        for key in [key for key in tensors if tensors[key] is None]:
            del tensors[key]

    with pytest.raises(ValueError) as error:
        load(copy(name, apply))
    assert all(word in str(error.value) for word in words), error.value


def test_a_matrix_of_another_models_shape_is_named(copy):
    with pytest.raises(ValueError, match=r"mlp\.(gate|up|down)_proj\.weight has shape .* but the config asks for"):
        load(copy("gptq-int4", intermediate_size=128))


def test_scales_that_overflow_are_named(copy):
    def enlarge(tensors: dict[str, Tensor]) -> None:
        key = "model.layers.0.self_attn.o_proj.weight_scale"
        tensors[key] = tensors[key].float()
        tensors[key][3] = 1e5

    directory = copy("compressed-int4-asymmetric", enlarge)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.o\.weight has NaN or infinity as float16"):
        load(directory, torch.float16)
    load(directory, torch.bfloat16)


def test_its_config_is_none_for_random_weights():
    with pytest.raises(ValueError, match="leave out its quantization_config"):
        open_checkpoint(f"random:{FOLDER / 'gptq-int4'}")


def test_a_recipe_names_every_linear():
    recipe = open_checkpoint(str(FOLDER / "gptq-int4")).recipe
    assert recipe == Recipe(
        format="int4",
        head="float",
        method="gptq",
        group_size=32,
        exceptions={f"layers.0.{linear}": INT4 for linear in LINEARS} | {"head": FLOAT},
    )
