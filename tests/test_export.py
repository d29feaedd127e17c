"""quant/export.py: GPTQ's files as their own libraries write them, which quant/foreign.py reads back exactly."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import cli
import quantize
from checkpoint import export_scheme, load_model, open_checkpoint, save_model
from model import Transformer
from quant.linears import QuantizedLinear
from tests.conftest import TINY, tiny_model
from tokenizer import load_tokenizer

TEXT = Path(__file__).parent / "data" / "prose.txt"
GPTQ = ["--method", "gptq", "--calibration", TEXT, "--samples", 4, "--seq-len", 32]
FOREIGN = Path(__file__).parent / "data" / "foreign"
TOKENS = [3, 17, 42, 9, 88, 5, 61, 30, 12, 77, 4, 19, 54, 2, 36, 71]  # whose logits lie beside a foreign model


@pytest.fixture(scope="module")
def source(tiny_directory: Path, tmp_path_factory) -> Path:
    """A model whose rows hold groups of 128 and of 32, with biases and a tied head."""
    tokenizer, folder = load_tokenizer(tiny_directory), tmp_path_factory.mktemp("source") / "model"
    config = replace(TINY, architecture="Qwen2ForCausalLM", vocab_size=tokenizer.vocab_size, dim=128, n_heads=4)
    config = replace(config, head_dim=16, ffn_dim=160, qkv_bias=True, tied_head=True)
    save_model(tiny_model(config), folder, tokenizer=tokenizer)
    return folder


@pytest.fixture
def run(source: Path, cache_folder: Path, monkeypatch, tmp_path: Path) -> Callable[..., None]:
    """quantize.py, with fp16, which keeps all scales."""
    monkeypatch.setenv("TACHYON_CACHE", str(cache_folder))
    monkeypatch.chdir(tmp_path)

    def run(*options: object) -> None:
        command = ["--checkpoint", source, "--dtype", "float16", "--device", "cpu", *options]
        cli.run(quantize.main, list(map(str, command)))

    return run


def load(spec: object, dtype: torch.dtype = torch.float16) -> Transformer:
    return load_model(open_checkpoint(str(spec)), device="cpu", dtype=dtype)


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    return {name: module.dequantize(torch.float32) for name, module in modules.items()}


def export(name: str, output: Path) -> None:
    """A model of `FOREIGN`, read and written again."""
    source = open_checkpoint(str(FOREIGN / name))
    save_model(load(FOREIGN / name), output, recipe=source.recipe, scheme=export_scheme(source.recipe, source.config))


WRITTEN = {  # by AutoGPTQ, and the second version by GPTQModel
    "gptq-int4": "gptq",
    "gptq-int4-asymmetric": "gptq",
    "gptq-int8-per-row": "gptq",
    "gptq-v2-int4-asymmetric": "gptq_v2",
}


@pytest.mark.parametrize(("name", "version"), WRITTEN.items())
def test_tensors_are_those_that_a_library_wrote_of_the_same_codes(name, version, tmp_path):
    export(name, tmp_path / "out")
    wanted, found = (load_file(folder / "model.safetensors") for folder in (FOREIGN / name, tmp_path / "out"))
    config, theirs = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (tmp_path / "out", FOREIGN / name)
    )
    assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert {key: theirs[key] for key in config.keys() & theirs.keys()}.items() <= config.items()
    for key, tensor in wanted.items():
        *_, kind = key.rpartition(".")
        if kind == "bias":  # that library gives every linear one, of zeros
            continue
        got = found[key]
        if kind == "qzeros" and config["checkpoint_format"] != version:
            got = got - 0x11111111
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape) and torch.equal(got, tensor), key
    assert not {key for key in found if key.endswith(("data", "scale", "zero"))}


TRANSFORMERS = """
import sys, torch, transformers
config = transformers.GPTQConfig(bits=int(sys.argv[2]), backend="torch")
load = transformers.AutoModelForCausalLM.from_pretrained
model = load(sys.argv[1], dtype=torch.float32, quantization_config=config)
torch.save(model(torch.tensor([eval(sys.argv[3])])).logits[0].detach(), sys.argv[4])
"""


@pytest.mark.skipif(
    any(importlib.util.find_spec(library) is None for library in ("transformers", "optimum", "gptqmodel")),
    reason="transformers reads GPTQ's files with optimum and gptqmodel",
)
@pytest.mark.parametrize("name", WRITTEN)
def test_transformers_makes_the_same_logits_of_what_is_written(name, tmp_path):
    export(name, tmp_path / "out")
    bits = "8" if "int8" in name else "4"
    arguments = [tmp_path / "out", bits, TOKENS, tmp_path / "logits"]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    subprocess.run([sys.executable, "-c", TRANSFORMERS, *map(str, arguments)], check=True, env=environment)
    expected = load_file(FOREIGN / name / "logits.safetensors")["logits"]
    error = (torch.load(tmp_path / "logits") - expected).abs().max()
    assert error < 0.01 * expected.std()  # gptqmodel rounds its weights to fp16


@pytest.mark.parametrize(
    ("options", "config", "name"),
    [
        ([], {"bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}, "gptq-int4-g32-asymmetric"),
        (["--symmetric"], {"bits": 4, "sym": True, "checkpoint_format": "gptq"}, "gptq-int4-g32"),
        (["--bits", 3], {"bits": 4, "sym": False}, "gptq-int4-g32-asymmetric"),
        (["--bits", 8], {"bits": 8, "group_size": -1, "sym": True, "checkpoint_format": "gptq"}, "gptq-int8"),
        (GPTQ, {"bits": 4, "sym": False}, "gptq-int4-g32-asymmetric"),
        (
            ["--exclude", "*.down_proj"],
            {"group_size": 64, "dynamic": {rf"-:^model\.layers\.{i}\.mlp\.down_proj$": {} for i in range(2)}},
            "gptq-int4-g64-asymmetric",
        ),
    ],
)
def test_what_is_written_is_read_back_exactly(options, config, name, run, source):
    run("--output", "ours", "--exclude", "lm_head", *options)
    run("--output", "out", "--export", "gptq", *options)
    said = json.loads(Path("out/config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "gptq" and said["desc_act"] is False and {**said, **config} == said
    ours, out = load("ours"), load("out")
    if "--bits" in options and 8 in options:  # whose scales were fp32
        for one, other in zip(weights(ours).values(), weights(out).values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=0)
    else:
        assert weights(ours).keys() == weights(out).keys()
        assert all(torch.equal(weight, weights(out)[key]) for key, weight in weights(ours).items())
    for key, parameter in ours.named_parameters():
        assert torch.equal(parameter, out.get_parameter(key)), key
    assert open_checkpoint("out").quantized == name


def test_shards_have_the_tensors_of_a_linear_together(run, source, tmp_path):
    run("--output", "out", "--export", "gptq")
    recipe = quantize.Options(output=tmp_path, export="gptq").recipe_for(open_checkpoint(str(source)).config)
    model = load_model(open_checkpoint(str(source)), device="cpu", dtype=torch.float16, quantize=recipe)
    scheme = export_scheme(recipe, model.config)
    save_model(model, tmp_path / "shards", recipe=recipe, scheme=scheme, max_shard_bytes=30_000)
    index = json.loads(Path("shards/model.safetensors.index.json").read_text())
    tensors = load_file("out/model.safetensors")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert len(set(index["weight_map"].values())) > 3
    for key, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "shards" / file)[key], tensors[key])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", 8, "--format", "fp"], ["--export gptq", "--format fp"]),
        (["--recipe", {"*.down_proj": {"bits": 8}}], ["one width", "self_attn.q_proj has int4", "down_proj int8"]),
        (["--recipe", {"*.down_proj": {"format": "fp8"}}], ["no fp8", "down_proj"]),
        (["--recipe", {"lm_head": {"bits": 8}}], ["no quantized head", "lm_head"]),
        (["--export", "awq"], ["'awq'", "gptq"]),
    ],
)
def test_what_gptqs_files_cannot_hold_is_refused_before_the_work(options, words, run, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "load_model", lambda *args, **options: pytest.fail("began to work"))
    for option in options:
        if isinstance(option, dict):
            Path("rules.json").write_text(json.dumps(option))
    with pytest.raises(SystemExit):
        run("--output", "out", "--export", "gptq", *("rules.json" if isinstance(o, dict) else o for o in options))
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert message.count("\n") == 1 and not Path("out").exists()
