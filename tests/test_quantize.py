"""quantize.py and the checkpoints that it writes: what they hold, that they load as they were, what is refused."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import checkpoint
import cli
import generate
import quantize
from checkpoint import load_model, open_checkpoint, save_model
from generator import Generator, Request
from model import Transformer
from quant import awq, gptq, resume
from quant.linears import QuantizedLinear, Recipe, Storage
from quant.resume import WorkFolder
from scripts import bench, evaluate
from tests.conftest import TINY, new_cache, tiny_model
from tests.test_checkpoint import tiny_gguf
from tokenizer import load_tokenizer

ROOT = Path(quantize.__file__).parent
FORMATS = {  # how the command line asks for it, and the recipe that it means
    "int8": (["--bits", "8"], Recipe(format="int8", head="int8")),
    "fp8": (["--bits", "8", "--format", "fp"], Recipe(format="fp8", head="int8")),
    "int4-asymmetric": (["--bits", "4"], Recipe(format="int4", head="int8", symmetric=False)),
    "int4": (["--bits", "4", "--symmetric"], Recipe(format="int4", head="int8")),
    "int4-g32-asymmetric": (
        ["--group-size", "32"],
        Recipe(format="int4", head="int8", group_size=32, symmetric=False),
    ),
}


@pytest.fixture(autouse=True)
def environment(cache_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TACHYON_CACHE", str(cache_folder))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def sources(tiny_directory: Path, tmp_path_factory) -> dict[str, Path]:
    """Models whose rows hold groups of 128, 64 and 32, and some that none divides; tied, biased."""
    folder, tokenizer = tmp_path_factory.mktemp("sources"), load_tokenizer(tiny_directory)
    config = replace(TINY, vocab_size=tokenizer.vocab_size, dim=128, n_heads=4, head_dim=16, ffn_dim=48)
    configs = {
        "plain": config,
        "tied": replace(config, tied_head=True, ffn_dim=160),
        "biased": replace(config, architecture="Qwen2ForCausalLM", qkv_bias=True, ffn_dim=256),
    }
    for seed, (name, config) in enumerate(configs.items()):
        save_model(tiny_model(config, seed=seed), folder / name, tokenizer=tokenizer)
    return {name: folder / name for name in configs}


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., tuple[str, str]]:
    """quantize.py, or another command, in this process; what it prints on stdout and on stderr."""

    def run(*options: object, main: Callable[[list[str]], None] = quantize.main) -> tuple[str, str]:
        capsys.readouterr()
        cli.run(main, [*map(str, options), "--device", "cpu"])
        return capsys.readouterr()

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable[..., str]:
    """The one line with which a command line ends that cannot work; it leaves no new file."""

    def refused(*options: object, main: Callable[[list[str]], None] = quantize.main) -> str:
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as ended:
            cli.run(main, [*map(str, options), "--device", "cpu"])
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, "")
        assert sorted(tmp_path.rglob("*")) == before
        lines = [line for line in err.splitlines() if not line.startswith("[")]  # progress
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    return refused


def load(spec: object, dtype: torch.dtype = torch.bfloat16, **options) -> Transformer:
    return load_model(open_checkpoint(str(spec)), device="cpu", dtype=dtype, **options)


def same(a: Transformer, b: Transformer) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def kinds(model: Transformer) -> dict[str, Storage]:
    return {
        name: Storage(linear.format, linear.group)
        for name, linear in model.named_modules()
        if isinstance(linear, QuantizedLinear)
    }


def edit_recipe(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"] |= changes
    path.write_text(json.dumps(raw))


# ---- What is written, and read again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["plain", "tied", "biased"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_loads_as_rounding_on_the_fly_would_make_it_bit_for_bit(name, model, sources, run, tmp_path):
    options, recipe = FORMATS[name]
    run("--checkpoint", sources[model], *options, "--output", tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert same(loaded, load(sources[model], quantize=recipe))
    assert open_checkpoint(str(tmp_path / "out")).quantized == name
    assert loaded.embed.weight is not getattr(loaded.head, "weight", None)


def test_a_gguf_of_4_bits_is_quantized_anew_from_what_it_stands_for(run, tmp_path):
    file = tiny_gguf(tmp_path / "x.gguf", kinds=(gguf.GGMLQuantizationType.Q4_1,))
    run("--checkpoint", file, "--bits", "8", "--output", "out")
    assert open_checkpoint(str(file)).quantized == "gguf-int4-g32-asymmetric"
    assert same(load("out"), load(file, quantize="int8"))
    (tmp_path / "text").write_text("ab a ab ab a a " * 9)
    calibration = ("--method", "gptq", "--calibration", "text", "--samples", 2, "--seq-len", 8)
    run("--checkpoint", file, "--bits", "8", *calibration, "--output", "by-gptq")
    assert open_checkpoint("by-gptq").quantized == "gptq-int8"


@pytest.mark.parametrize("name", FORMATS)
def test_it_generates_what_rounding_on_the_fly_generates(name, sources, run, tmp_path):
    options, recipe = FORMATS[name]
    run("--checkpoint", sources["tied"], *options, "--output", "out", "--dtype", "float32")
    generation = ["--prompt", "The quick brown", "--max-new-tokens", "12", "--dtype", "float32", "--json"]
    document = json.loads(run("--checkpoint", "out", *generation, main=generate.main)[0])
    assert document["stats"]["quantize"] == name
    generator = Generator(load(sources["tied"], torch.float32, quantize=recipe), max_seq_len=64)
    prompt = open_checkpoint("out").tokenizer.encode("The quick brown")
    request = Request(prompt=prompt, max_new_tokens=12, stop_ids=frozenset(open_checkpoint("out").eos_ids))
    list(generator.run([request]))
    assert document["samples"][0]["token_ids"] == request.token_ids
    if name in generate.RECIPES:
        flying = ["--checkpoint", str(sources["tied"]), "--quantize", name]
        assert json.loads(run(*flying, *generation, main=generate.main)[0])["samples"] == document["samples"]


def test_another_dtype_takes_the_codes_as_they_are(sources, run, tmp_path):
    run("--checkpoint", sources["plain"], "--output", "out", "--bits", 4)
    narrow, wide = load("out"), load("out", torch.float32)
    for name, linear in narrow.named_modules():
        if isinstance(linear, QuantizedLinear):
            other = wide.get_submodule(name)
            assert torch.equal(linear.data, other.data)
            assert torch.equal(linear.dequantize(torch.float32), other.dequantize(torch.float32))
    assert wide.layers[0].attention.qkv.scale.dtype == torch.float32


def test_the_file_has_packed_tensors_by_hugging_faces_names(sources, run, tmp_path):
    run("--checkpoint", sources["biased"], "--output", "out", "--group-size", 64)
    stored, qkv = load_file("out/model.safetensors"), load("out").layers[1].attention.qkv
    name = "model.layers.1.self_attn.{}_proj.{}"
    for kind in ("data", "scale", "zero", "bias"):
        parts = [stored[name.format(x, kind)] for x in "qkv"]
        assert [len(part) for part in parts] == [64, 32, 32]
        assert torch.equal(torch.cat(parts), getattr(qkv, kind))
    assert stored["model.layers.0.mlp.down_proj.data"].shape == (128, 256 // 8)
    assert stored["model.layers.0.mlp.down_proj.zero"].shape == (128, 256 // 64)
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert not any(name.endswith("proj.weight") for name in stored)


def test_a_tied_head_is_stored_beside_the_embedding(sources, run, tmp_path):
    run("--checkpoint", sources["tied"], "--output", "out", "--bits", 8)
    with safe_open("out/model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {"model.embed_tokens.weight", "lm_head.data", "lm_head.scale"} <= names
    assert "lm_head.weight" not in names
    assert torch.equal(load("out").embed.weight, load(sources["tied"]).embed.weight)


def test_the_config_has_the_recipe_and_what_differs_from_it(sources, run, tmp_path):
    run("--checkpoint", sources["tied"], "--output", "out")  # rows of 128, 64 and 160: groups of 128, 64 and 32
    other = {f"model.layers.{i}.self_attn.o_proj": {"format": "int4", "group_size": 64} for i in (0, 1)}
    other |= {f"model.layers.{i}.mlp.down_proj": {"format": "int4", "group_size": 32} for i in (0, 1)}
    assert json.loads(Path("out/config.json").read_text())["quantization_config"] == {
        "quant_method": "tachyon",
        "layout": 3,
        "method": "rtn",
        "format": "int4",
        "group_size": 128,
        "symmetric": False,
        "exceptions": other | {"lm_head": {"format": "int8"}},
    }
    run("--checkpoint", sources["plain"], "--output", "plain")  # rows of 48 have no groups
    assert kinds(load("plain"))["layers.1.ffn.down"] == Storage("int8")
    run("--checkpoint", sources["plain"], "--output", "fp8", "--bits", 8, "--format", "fp")
    assert json.loads(Path("fp8/config.json").read_text())["quantization_config"] == {
        "quant_method": "tachyon",
        "layout": 3,
        "method": "rtn",
        "format": "fp8",
        "exceptions": {"lm_head": {"format": "int8"}},
    }


def test_codes_in_another_order_are_refused(sources, run, tmp_path):
    run("--checkpoint", sources["plain"], "--output", "out")
    config = json.loads(Path("out/config.json").read_text())
    del config["quantization_config"]["layout"]
    Path("out/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: the codes lie in layout 1 and only 3 is read; quantize"):
        load("out")


def test_a_file_decides_on_its_layout_and_not_the_rule_that_made_it(sources, tmp_path):
    recipe = Recipe(
        format="int4",
        head="int8",
        method="other",
        exceptions={"layers.1.attention.qkv": Storage("int4", 32), "layers.0.ffn.gate_up": Storage("fp8")},
    )
    model = load(sources["biased"], quantize=recipe)
    save_model(model, tmp_path / "out", recipe=recipe, max_shard_bytes=20000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded = load(tmp_path / "out")
    assert same(loaded, model)
    assert kinds(loaded)["layers.1.attention.qkv"] == Storage("int4", 32)
    assert kinds(loaded)["layers.0.ffn.gate_up"] == Storage("fp8")
    assert open_checkpoint(str(tmp_path / "out")).quantized == "other-int4"


@pytest.mark.parametrize("source", ["tied", "biased"])
def test_linears_may_stay_floats_in_a_quantized_checkpoint(source, sources, tmp_path):
    floats = {"head": Storage("float"), "layers.1.attention.qkv": Storage("float")}
    recipe = Recipe(format="int4", head="int8", exceptions=floats)
    model = load(sources[source], quantize=recipe)
    save_model(model, tmp_path / "out", recipe=recipe)
    loaded, plain = load(tmp_path / "out"), load(sources[source])
    assert same(loaded, model)
    assert kinds(loaded).keys() == kinds(load(sources[source], quantize="int8")).keys() - floats.keys()
    for name in floats:
        assert torch.equal(loaded.get_submodule(name).weight, plain.get_submodule(name).weight)
    assert (loaded.head.weight is loaded.embed.weight) == (source == "tied")


@pytest.mark.parametrize("name", FORMATS)
def test_codes_scales_and_zeros_that_rounding_would_not_choose_stay(name, sources, tmp_path):
    recipe = replace(FORMATS[name][1], method="other")
    model = load(sources["tied"], quantize=recipe)
    for linear in model.modules():
        if isinstance(linear, QuantizedLinear):
            linear.data.random_(-(2**31), 2**31 - 1)
            linear.scale.normal_()
            if linear.zero is not None:
                linear.zero.uniform_(0, 15)
    save_model(model, tmp_path / "out", recipe=recipe)
    assert same(load(tmp_path / "out"), model)


def test_bench_and_evaluate_run_it_and_name_the_recipe(sources, run, tmp_path):
    run("--checkpoint", sources["tied"], "--output", "out")
    measured = json.loads(run("--checkpoint", "out", "--new-tokens", 3, "--repeats", 1, "--json", main=bench.main)[0])
    assert measured["quantize"] == "int4-asymmetric"
    Path("text").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    options = ["--text", "text", "--context", 32, "--windows", 1, "--json"]
    assert json.loads(run("--checkpoint", "out", *options, main=evaluate.main)[0])["quantize"] == "int4-asymmetric"


def test_its_config_is_one_for_random_weights(sources, run, tmp_path):
    run("--checkpoint", sources["plain"], "--output", "out")
    assert kinds(load("random:out/config.json")) == kinds(load("out"))


def test_progress_of_loading_ends_at_its_total(sources, run, tmp_path):
    run("--checkpoint", sources["tied"], "--output", "out")
    seen = []
    model = load("out", progress=lambda *args: seen.append(args))
    assert seen[-1] == (sum(t.nbytes for t in model.state_dict().values()),) * 2


# ---- What it says ----------------------------------------------------------------------------------------------------


def test_every_linear_is_reported_with_the_error_it_keeps(sources, run, tmp_path):
    out, err = run("--checkpoint", sources["tied"], "--output", "out", "--json", "--dtype", "float32")
    document = json.loads(out)
    plain, quantized = load(sources["tied"], torch.float32), load("out", torch.float32)
    squares = torch.zeros(2)
    assert document["linears"].keys() == kinds(quantized).keys()
    for name, said in document["linears"].items():
        weight, linear = plain.get_submodule(name).weight, quantized.get_submodule(name)
        error = linear.dequantize(torch.float32) - weight
        assert said["relative_error"] == pytest.approx((error.norm() / weight.norm()).item(), rel=1e-4)
        assert (said["format"], said["group_size"] or 0) == (linear.format, linear.group)
        squares += torch.stack((error.square().sum(), weight.square().sum()))
    assert document["relative_error"] == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=1e-4)
    lines = err.splitlines()
    assert len(lines) == 9 and lines[-1].startswith("[9/9] ")
    assert any("layers.0.ffn.down: int4, groups of 32, relative error 0." in line for line in lines)
    assert document["bytes"] == sum(file.stat().st_size for file in Path("out").iterdir())
    assert document["quantize"] == "int4-asymmetric"


def test_a_run_for_people_ends_in_one_line(sources, run, tmp_path):
    out, _ = run("--checkpoint", sources["plain"], "--output", "out", "--bits", 8)
    assert out.startswith(f"{tmp_path}/out: int8, ")
    assert out.count("\n") == 1


def test_finer_groups_and_more_bits_leave_smaller_errors(sources, run, tmp_path):
    def error(*options: object) -> float:
        shutil.rmtree("out", ignore_errors=True)
        out, _ = run("--checkpoint", sources["biased"], "--output", "out", "--json", *options)
        return json.loads(out)["relative_error"]

    coarse, fine, byte = error("--group-size", 128), error("--group-size", 32), error("--bits", 8)
    assert 0.2 > coarse > fine > byte > 0
    assert error("--group-size", 128, "--symmetric") > coarse


# ---- Bad input -------------------------------------------------------------------------------------------------------


def test_a_quantized_checkpoint_is_not_quantized_again(sources, run, refused, tmp_path):
    run("--checkpoint", sources["plain"], "--output", "out", "--bits", 8)
    for main, options in (
        (quantize.main, ["--output", "again"]),
        (generate.main, ["--quantize", "int8", "--prompt", "a"]),
        (bench.main, ["--quantize", "int4"]),
    ):
        message = refused("--checkpoint", "out", *options, main=main)
        assert "out is quantized already (int8): load it as it is, or quantize the checkpoint that" in message


@pytest.mark.parametrize("place", ["out", "file", "file/below"])
def test_an_output_in_use_is_refused_before_the_work(place, sources, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", lambda *args, **options: pytest.fail("began to work"))
    Path("out").mkdir()
    Path("out/notes").write_text("mine")
    Path("file").write_text("mine")
    message = refused("--checkpoint", sources["plain"], "--output", place)
    assert f"{tmp_path}/" in message and (
        "already exists" in message or "file is not a directory that can be written" in message
    )


def test_an_output_is_needed(sources, refused):
    assert "--output is missing" in refused("--checkpoint", sources["plain"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", 2], ["--bits 2 --format int", "3 int, 4 int, 8 int and 8 fp"]),
        (["--bits", 3, "--format", "fp"], ["--bits 3 --format fp"]),
        (["--bits", 4, "--format", "fp"], ["--bits 4 --format fp"]),
        (["--bits", 8, "--group-size", 64], ["--group-size", "--bits 3 or 4"]),
        (["--bits", 8, "--symmetric"], ["--symmetric", "--bits 3 or 4"]),
        (["--bits", 8, "--clip"], ["--clip", "--bits 3 or 4"]),
        (["--method", "awq", "--calibration", "x", "--clip"], ["awq", "--clip"]),
        (["--group-size", 48], ["--group-size", "128, 64, 32", "48"]),
        (["--method", "magic"], ["'magic'", "rtn"]),
    ],
)
def test_options_that_do_not_fit(options, words, sources, refused):
    message = refused("--output", "out", "--checkpoint", sources["plain"], *options)
    assert all(word in message for word in words), message


def test_rows_that_cannot_be_packed_are_named(tiny_directory, refused, tmp_path):
    config = replace(TINY, vocab_size=load_tokenizer(tiny_directory).vocab_size, ffn_dim=72)
    save_model(tiny_model(config), tmp_path / "odd", tokenizer=load_tokenizer(tiny_directory))
    assert "layers.0.ffn.down has rows of 72 weights" in refused("--checkpoint", "odd", "--output", "out")


def test_weights_that_are_not_finite_leave_nothing(sources, refused, tmp_path):
    shutil.copytree(sources["plain"], "bad")
    tensors = load_file("bad/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, "bad/model.safetensors")
    message = refused("--checkpoint", "bad", "--output", "out")
    assert "layers.1.ffn.gate_up.weight has NaN or infinity" in message


def test_random_weights_are_calibrated_on_random_tokens_and_have_no_tokenizer(sources, run, refused, tmp_path):
    spec = f"random:{sources['plain']}"
    run("--checkpoint", spec, "--output", "rtn")
    run("--checkpoint", spec, "--output", "gptq", "--method", "gptq", "--samples", 2, "--seq-len", 16)
    assert kinds(load("rtn")) == kinds(load("gptq"))
    assert not same(load("rtn"), load("gptq"))
    options = ["--method", "gptq", "--calibration", TEXT]
    assert "its weights are random" in refused("--checkpoint", spec, "--output", "out", *options)


def test_a_full_disk_is_one_line_and_leaves_nothing(sources, tmp_path):
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    options = ["--checkpoint", sources["plain"], "--output", tmp_path / "out", "--bits", "8", "--device", "cpu"]
    command = [sys.executable, ROOT / "quantize.py", *map(str, options)]
    settings = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "timeout": 120}
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files, **settings)
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot write ") and "File too large" in last
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- Quantized checkpoints that are damaged, or not ours -------------------------------------------------------------


def test_another_quantization_is_refused_by_its_name(sources, run, refused, tmp_path):
    run("--checkpoint", sources["plain"], "--output", "out")
    for method in ("bitsandbytes", "fp8"):
        edit_recipe(tmp_path / "out", quant_method=method)
        message = refused("--checkpoint", "out", "--prompt", "a", main=generate.main)
        assert f"quantization {method!r} is not supported" in message
        assert "config.json" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "int2"}, ["'int2'", "int8, w8a8, int4, int3, fp8, float"]),
        ({"format": None}, ["None"]),
        ({"group_size": 48}, ["48", "128, 64, 32"]),
        ({"symmetric": "no"}, ["symmetric"]),
        ({"exceptions": ["lm_head"]}, ["exceptions"]),
        ({"exceptions": {"lm_head": "int8"}}, ["lm_head"]),
        ({"exceptions": {"model.vision.0": {"format": "int8"}}}, ["'model.vision.0'"]),
        (
            {
                "exceptions": {
                    "model.layers.0.self_attn.q_proj": {"format": "int8"},
                    "model.layers.0.self_attn.k_proj": {"format": "fp8"},
                }
            },
            ["k_proj", "q_proj", "one matrix"],
        ),
    ],
)
def test_a_recipe_that_makes_no_sense_is_named(changes, words, sources, run, refused, tmp_path):
    run("--checkpoint", sources["plain"], "--output", "out")
    edit_recipe(tmp_path / "out", **changes)
    message = refused("--checkpoint", "out", "--prompt", "a", main=generate.main)
    assert all(word in message for word in ("config.json", *words)), message


def test_tensors_that_do_not_fit_the_recipe_are_named(sources, run, tmp_path):
    run("--checkpoint", sources["biased"], "--output", "out")
    path, name = tmp_path / "out" / "model.safetensors", "model.layers.0.mlp.up_proj.data"
    stored = load_file(path)
    for changed, words in (
        (stored[name].float(), f"{name} is stored as torch.float32; packed codes are int32"),
        (stored[name][:, 1:].clone(), rf"{name} has shape \[256, 15\], but the config asks for \[256, 16\]"),
    ):
        save_file(stored | {name: changed}, path)
        with pytest.raises(ValueError, match=words):
            load("out")
    del stored[name]
    save_file(stored, path)
    with pytest.raises(ValueError, match=f"lacks {name}"):
        load("out")
    edit_recipe(tmp_path / "out", symmetric=True)
    with pytest.raises(ValueError, match=r"has unknown model\.layers\.0\.mlp\.down_proj\.zero"):
        load("out")


def test_scales_that_overflow_in_another_dtype_are_named(sources, run, tmp_path):
    run("--checkpoint", sources["plain"], "--output", "out")
    path, name = tmp_path / "out" / "model.safetensors", "model.layers.1.self_attn.o_proj.scale"
    stored = load_file(path)
    stored[name][0, 0] = 1e5
    save_file(stored, path)
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.o\.scale has NaN or infinity as float16"):
        load("out", torch.float16)
    load("out")


# ---- Methods that look at activations --------------------------------------------------------------------------------

TEXT = ROOT / "tests" / "data" / "prose.txt"


@pytest.mark.parametrize(
    ("method", "model", "format"),
    [
        ("gptq", "plain", "int4"),
        ("gptq", "tied", "int4"),
        ("gptq", "biased", "fp8"),
        ("awq", "tied", "int4"),
        ("awq", "biased", "int4"),
    ],
)
def test_methods_leave_a_smaller_error_in_the_logits_than_rounding(method, model, format, sources, run, tmp_path):
    calibration = ["--method", method, "--calibration", TEXT, "--samples", 16, "--seq-len", 64]
    bits = ["--bits", 8, "--format", "fp"] if format == "fp8" else ["--group-size", 32]
    command = ["--checkpoint", sources[model], *bits, "--dtype", "float32"]
    out, err = run(*command, *calibration, "--output", tmp_path / method, "--json")
    run(*command, "--output", tmp_path / "rtn")
    linears = json.loads(out)["linears"]
    assert all(linears[name]["output_error"] < 0.2 for name in linears if name != "head")
    assert f"[{len(linears)}/{len(linears)}] head: int8" in err
    source = open_checkpoint(str(sources[model]))
    tokens = torch.tensor([source.tokenizer.encode(TEXT.read_text())[:64]])
    logits = {}
    for name in (method, "rtn", None):
        loaded = load(tmp_path / name if name else sources[model], torch.float32)
        cache = new_cache(loaded, batch=1, length=64).narrow(64, tail=True)
        logits[name] = loaded(tokens, torch.arange(64)[None], cache)
    error = {name: (logits[name] - logits[None]).norm().item() for name in (method, "rtn")}
    assert error[method] < error["rtn"]
    assert open_checkpoint(str(tmp_path / method)).recipe.method == method


def test_awq_changes_norms_and_biases_and_the_checkpoint_carries_them(sources, run, tmp_path):
    calibration = ["--calibration", TEXT, "--samples", 4, "--seq-len", 32]
    run("--checkpoint", sources["biased"], "--method", "awq", *calibration, "--symmetric", "--output", "out")
    saved = load("out")
    options = quantize.Options(
        checkpoint=str(sources["biased"]),
        method="awq",
        symmetric=True,
        output=tmp_path / "again",
        calibration=TEXT,
        samples=4,
        seq_len=32,
    )
    source = open_checkpoint(options.checkpoint)
    where = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "report": quantize.Report(9)}
    made = quantize.by_awq(source, options, recipe=options.recipe_for(source.config), **where)
    assert same(saved, made)
    plain = load(sources["biased"])
    for name in ("attention_norm.weight", "ffn_norm.weight", "attention.qkv.bias"):
        assert not torch.equal(saved.layers[1].get_parameter(name), plain.layers[1].get_parameter(name))
    assert torch.equal(saved.norm.weight, plain.norm.weight)
    assert open_checkpoint("out").quantized == "awq-int4"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "gptq"], ["--calibration"]),
        (["--method", "awq"], ["awq", "--calibration"]),
        (["--method", "rtn", "--calibration", TEXT], ["--calibration", "gptq", "awq"]),
        (["--method", "awq", "--calibration", TEXT, "--bits", 8], ["awq", "--bits 4", "--bits 8"]),
        (["--method", "awq", "--calibration", TEXT, "--bits", 8, "--format", "fp"], ["awq", "--bits 4", "--format fp"]),
        (["--method", "awq", "--calibration", TEXT, "--samples", 10**7], ["10000000 sequences", "longer text"]),
        (["--method", "gptq", "--calibration", TEXT, "--samples", 0], ["--samples must be at least 1; got 0"]),
        (["--method", "awq", "--calibration", TEXT, "--seq-len", -1], ["--seq-len must be at least 1; got -1"]),
        (["--method", "gptq", "--calibration", TEXT, "--samples", 10**7], ["10000000 sequences", "longer text"]),
        (["--method", "gptq", "--calibration", "missing.txt"], ["missing.txt"]),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(options, words, sources, refused, tmp_path):
    line = refused("--checkpoint", sources["plain"], *options, "--output", tmp_path / "out")
    assert all(word in line for word in words)


# ---- Stopped, and begun again ----------------------------------------------------------------------------------------


def calibrated(sources: dict[str, Path], method: str = "gptq", output: str = "out", *more: object) -> list[object]:
    command = ["--checkpoint", sources["biased"], "--method", method, "--calibration", TEXT, "--output", output]
    return [*command, "--samples", 16, "--seq-len", 64, "--json", *more]  # enough to aim by


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch, run) -> Callable[..., None]:
    """Run a command that ends with `error` when it has done its first layer and begins to keep its second."""

    def stop(*options: object, error: type[BaseException] = KeyboardInterrupt) -> None:
        save = WorkFolder.save

        def save_first(self: WorkFolder, layer: int, *args: object) -> None:
            if layer == 1:
                raise error("stopped")
            save(self, layer, *args)

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(WorkFolder, "save", save_first)
            run(*options)

    return stop


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_run_that_was_stopped_goes_on_and_ends_bit_for_bit_the_same(method, sources, run, stop, monkeypatch, capsys):
    whole = json.loads(run(*calibrated(sources, method, "whole"))[0])
    stop(*calibrated(sources, method))
    assert "the same command goes on after them" in capsys.readouterr().err
    assert not Path("out").exists()
    assert sorted(file.name for file in Path(".out.work").iterdir()) == ["layer-00000.safetensors", "run.json"]
    Path(".out.work/.layer-00001.safetensors.part").write_bytes(b"half of it")  # as a kill while writing leaves
    chosen = []
    module = {"gptq": gptq, "awq": awq}[method]
    choose = module.choose_codes
    monkeypatch.setattr(module, "choose_codes", lambda *args, **more: chosen.append(1) or choose(*args, **more))
    out, err = run(*calibrated(sources, method))
    resumed = json.loads(out)
    assert len(chosen) == 4  # linears of the second layer
    assert "goes on after layer 1 of 2, from " in err and err.count("layers.0.ffn.down: ") == 1
    for key in ("linears", "relative_error", "bytes", "quantize"):
        assert resumed[key] == whole[key]
    for file in Path("whole").iterdir():
        assert (Path("out") / file.name).read_bytes() == file.read_bytes(), file.name
    assert not Path(".out.work").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--group-size", 32], "--group-size"),
        (["--exclude", "lm_head"], "--exclude"),
        (["--seed", 1], "--seed"),
        (["--method", "awq"], "--method"),
        (["--dtype", "float32"], "--dtype"),
        (["--checkpoint", "other"], "--checkpoint"),
    ],
)
def test_layers_of_another_run_are_refused_and_kept(changes, words, sources, run, stop, refused, tmp_path):
    tensors = load_file(sources["biased"] / "model.safetensors")
    shutil.copytree(sources["biased"], "other")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2}, "other/model.safetensors")
    stop(*calibrated(sources))
    message = refused(*calibrated(sources), *changes)
    assert f"{tmp_path}/.out.work holds layers of an unfinished run with other " in message and words in message
    assert "goes on after layer 1" in run(*calibrated(sources))[1]


def test_a_damaged_layer_is_made_again(sources, run, stop):
    run(*calibrated(sources, "gptq", "whole"))
    stop(*calibrated(sources))
    file = Path(".out.work/layer-00000.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert "goes on" not in run(*calibrated(sources))[1]
    assert same(load("out"), load("whole"))


def test_what_would_fail_again_keeps_nothing(sources, stop):
    stop(*calibrated(sources), error=ValueError)
    assert not Path(".out.work").exists() and not Path("out").exists()


@pytest.mark.parametrize("place", [resume, checkpoint])  # where a layer is kept, where the model is written
def test_a_full_disk_keeps_the_layers_before_and_the_same_command_goes_on(place, sources, run, monkeypatch, capsys):
    save, files = place.save_file, []

    def full(tensors: dict, path: Path, **options: object) -> None:
        files.append(path)
        if len(files) == (2 if place is resume else 1):
            path.write_bytes(b"half")
            raise SafetensorError("No space left on device")
        save(tensors, path, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(place, "save_file", full)
        run(*calibrated(sources))
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: cannot write ") and "No space left on device" in last
    assert not Path("out").exists() and not [path for path in Path().rglob("*") if "part" in path.name]
    assert f"goes on after layer {1 if place is resume else 2} of 2" in run(*calibrated(sources))[1]
    assert open_checkpoint("out").recipe.method == "gptq" and not Path(".out.work").exists()


KILLED = """
import os, signal, sys
import checkpoint, cli, quantize

def save_file(tensors, path, **options):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file = save_file
cli.run(quantize.main, sys.argv[1:])
"""


def test_a_kill_while_the_output_is_written_leaves_none_and_the_same_command_goes_on_and_sweeps(sources, run):
    command = [*map(str, calibrated(sources)), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    (left,) = Path().glob(".out.*.part")
    assert (left / "model.safetensors").read_bytes() == b"half" and not Path("out").exists()
    kept = [f".out.{os.getppid()}.part", ".out.my.part"]  # of a process that runs, and of nobody
    for name in kept:
        Path(name).mkdir()
    assert "goes on after layer 2 of 2" in run(*calibrated(sources))[1]
    run(*calibrated(sources, "gptq", "whole"))
    assert same(load("out"), load("whole"))
    assert sorted(path.name for path in Path().glob(".*")) == sorted(kept)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_that_are_not_finite_are_found_before_the_work(method, sources, refused, monkeypatch):
    monkeypatch.setattr(quantize, "calibrate", lambda *args, **options: pytest.fail("began to work"))
    shutil.copytree(sources["biased"], "bad")
    tensors = load_file("bad/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, "bad/model.safetensors")
    message = refused(*calibrated(sources, method), "--checkpoint", "bad")
    assert "layers.1.ffn.gate_up.weight has NaN or infinity as bfloat16" in message


# ---- Some linears otherwise ------------------------------------------------------------------------------------------


def test_excluded_linears_keep_their_weights_and_the_config_says_so(sources, run):
    options = ["--exclude", "model.layers.0.*", "--exclude", "lm_head"]
    for method in (["--method", "rtn"], ["--method", "gptq", "--calibration", TEXT, "--samples", 2, "--seq-len", 16]):
        shutil.rmtree("out", ignore_errors=True)
        out, _ = run("--checkpoint", sources["tied"], "--output", "out", *options, *method, "--json")
        assert list(json.loads(out)["linears"]) and all("layers.1." in name for name in json.loads(out)["linears"])
        loaded, plain = load("out"), load(sources["tied"])
        assert torch.equal(loaded.layers[0].attention.qkv.weight, plain.layers[0].attention.qkv.weight)
        assert loaded.head.weight is loaded.embed.weight
        assert all(name.startswith("layers.1.") for name in kinds(loaded)) and len(kinds(loaded)) == 4
        said = json.loads(Path("out/config.json").read_text())["quantization_config"]["exceptions"]
        assert said["model.layers.0.mlp.up_proj"] == said["lm_head"] == {"format": "float"}


RULES = {
    "model.layers.1.mlp.down_proj": {"format": "fp8"},
    "*.down_proj": {"bits": 8},
    "*.mlp.*": {"bits": 3, "group_size": 32},
    "lm_head": {"bits": 4},
}


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_the_first_rule_that_matches_says_how_a_linear_is_stored(method, sources, run):
    Path("rules.json").write_text(json.dumps(RULES))
    options = [] if method == "rtn" else ["--calibration", TEXT, "--samples", 4, "--seq-len", 32]
    options += ["--method", method, "--recipe", "rules.json", "--exclude", "*.0.self_attn.o_proj"]
    out, _ = run("--checkpoint", sources["biased"], "--output", "out", *options, "--json")
    formats = {name: (said["format"], said["group_size"]) for name, said in json.loads(out)["linears"].items()}
    assert formats == {
        "layers.0.attention.qkv": ("int4", 128),
        "layers.0.ffn.gate_up": ("int3", 32),
        "layers.0.ffn.down": ("int8", None),
        "layers.1.attention.qkv": ("int4", 128),
        "layers.1.attention.o": ("int4", 64),
        "layers.1.ffn.gate_up": ("int3", 32),
        "layers.1.ffn.down": ("fp8", None),
        "head": ("int4", 128),
    }
    loaded = load("out")
    for name, (format, group) in formats.items():
        assert loaded.get_submodule(name).storage == (format, group or 0)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("{", ["rules.json is not JSON"]),
        ([1], ["rules.json has to hold an object"]),
        ({"lm_head": 8}, ["'lm_head' has 8"]),
        ({"lm_head": {"bits": 8, "grup_size": 32}}, ["'lm_head' has 'grup_size'"]),
        ({"lm_head": {}}, ["'lm_head' has to have either bits or format"]),
        ({"lm_head": {"bits": 8, "format": "int8"}}, ["either bits or format"]),
        ({"lm_head": {"bits": 5}}, ["bits 5; there are 3, 4, 8"]),
        ({"lm_head": {"bits": True}}, ["bits True"]),
        ({"lm_head": {"format": "int2"}}, ["'int2'; there are int8, w8a8, int4, int3, fp8, float"]),
        ({"lm_head": {"bits": 8, "group_size": 32}}, ["group_size", "int8 has none"]),
        ({"lm_head": {"bits": 4, "group_size": 48}}, ["group_size 48; there are 128, 64, 32"]),
        (
            {"lm_head": {"bits": 8}, "model.layers.7.*": {"bits": 8}},
            ["'model.layers.7.*' matches no linear", "lm_head"],
        ),
        ({"model.embed_tokens": {"bits": 8}}, ["'model.embed_tokens' matches no linear"]),
        ({"*.q_proj": {"bits": 8}}, ["layers.0.self_attn.q_proj is to be stored unlike", "k_proj", "one matrix"]),
        ({"*.q_proj": {"bits": 8}, "*": {"bits": 3}}, ["q_proj", "one matrix"]),
        ({"*": {"format": "float"}}, ["nothing is left to quantize"]),
    ],
)
def test_a_recipe_file_that_makes_no_sense_is_named_before_the_work(rules, words, sources, refused, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", lambda *args, **options: pytest.fail("began to work"))
    Path("rules.json").write_text(rules if isinstance(rules, str) else json.dumps(rules))
    message = refused("--checkpoint", sources["plain"], "--output", "out", "--recipe", "rules.json")
    assert all(word in message for word in words), message


def test_a_recipe_file_that_is_missing_and_patterns_that_match_nothing(sources, refused):
    assert "none.json" in refused("--checkpoint", sources["plain"], "--output", "out", "--recipe", "none.json")
    options = ["--exclude", "lm_head", "--exclude", "model.layers.9.*"]
    message = refused("--checkpoint", sources["plain"], "--output", "out", *options)
    assert "'model.layers.9.*' matches no linear" in message


# ---- 3 bits, and clipped ranges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [[], ["--symmetric"]])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_3_bits_take_8_codes_of_the_4_bit_layout(method, symmetric, sources, run):
    options = [] if method == "rtn" else ["--calibration", TEXT, "--samples", 4, "--seq-len", 32]
    run("--checkpoint", sources["biased"], "--output", "out", "--bits", 3, "--method", method, *options, *symmetric)
    loaded, linear = load("out"), load("out").layers[1].ffn.gate_up
    codes = linear.layout.unpack(linear.data, linear.in_features)
    least = 4 if symmetric else 0
    assert least <= codes.min() and codes.max() == least + 7
    assert linear.storage == ("int3", 128) and kinds(loaded)["layers.1.ffn.gate_up"] == ("int4", 128)
    name = {"rtn": "int3"}.get(method, f"{method}-int3") + ("" if symmetric else "-asymmetric")
    assert open_checkpoint("out").quantized == name


@pytest.mark.parametrize("options", [[], ["--symmetric"], ["--bits", 3], ["--bits", 3, "--symmetric"]])
def test_clipped_ranges_leave_a_smaller_error_in_the_weights(options, sources, run):
    errors = []
    for clip in ([], ["--clip"]):
        shutil.rmtree("out", ignore_errors=True)
        out, _ = run("--checkpoint", sources["biased"], "--output", "out", "--json", *options, *clip)
        errors.append({name: said["relative_error"] for name, said in json.loads(out)["linears"].items()})
    plain, clipped = errors
    assert all(clipped[name] < plain[name] for name in plain if name != "head")
    assert open_checkpoint("out").quantized.endswith("-clip")
