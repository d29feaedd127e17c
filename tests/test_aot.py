"""Libraries compiled ahead of time: made once, kept, remade when damaged, done without where they do not load."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import aot
from checkpoint import load_model, open_checkpoint
from generator import Generator, Request
from hf_config import hf_config
from model import Transformer
from quant.linears import Int4Linear, Recipe, Storage
from sampling import SamplingParams
from serving.engine import Engine, EngineOptions
from serving.request import Request as Asked
from serving.runner import Runner
from tests.conftest import TINY, tiny_model


def tokens(model: Transformer) -> list[int]:
    request = Request(prompt=[3, 1, 4, 1, 5], max_new_tokens=12)
    for _ in Generator(model, max_seq_len=64).run([request]):
        pass
    return request.token_ids


def compiled(directory: Path) -> Transformer:
    model = tiny_model()
    aot.compile_for_cpu(model, directory)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the libraries of the tiny model."""
    directory = tmp_path_factory.mktemp("aot")
    assert tokens(compiled(directory)) == tokens(tiny_model())
    if any(path.stat().st_size == 0 for path in directory.iterdir()):
        pytest.skip("torch's compiled libraries do not load on this installation")
    return directory


def test_a_library_serves_all_layers_and_the_next_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(path.name.split("-")[0] for path in folder.iterdir()) == ["head", "layer"]
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("compiled again"))
    assert tokens(compiled(folder)) == tokens(tiny_model())


def test_over_blocks_there_is_a_library_for_one_row_and_one_for_several(folder: Path, monkeypatch) -> None:
    def served(model: Transformer) -> list[dict]:
        runner = Runner(model, n_blocks=60, block_size=4, max_running=5, max_step_tokens=40)
        for size in (1, 2):
            runner.prepare(size)
        found = []
        for count in (1, 2, 5):
            prompts = [[3 + i, 1, 4, 1, 5, 9, 2][: 3 + i] for i in range(count)]
            requests = [
                Asked(id=str(i), prompt=p, params=SamplingParams(), max_new_tokens=12) for i, p in enumerate(prompts)
            ]
            outputs = Engine(runner, options=EngineOptions()).run(requests)
            found.append(sorted((o.request_id, token) for o in outputs for token in o.token_ids))
        return found

    expected, before = served(tiny_model()), set(folder.iterdir())
    model = compiled(folder)
    assert served(model) == expected
    assert [path.name.split("-")[0] for path in set(folder.iterdir()) - before] == ["layer", "layer"]
    monkeypatch.setattr(model.layers[0].forward, "eager", lambda *args: pytest.fail("ran as it is"))
    runner = Runner(model, n_blocks=60, block_size=4, max_running=5, max_step_tokens=40)
    for size in (1, 2, 3, 5):
        runner.prepare(size)


def test_a_damaged_library_is_made_anew(folder: Path) -> None:
    head = next(folder.glob("head-*"))
    head.write_bytes(head.read_bytes()[:1000])
    assert tokens(compiled(folder)) == tokens(tiny_model())
    assert head.stat().st_size > 1000


def test_quantized_layers_are_a_library_of_their_own(folder: Path) -> None:
    stored = {"attention.qkv": "w8a8", "attention.o": "fp8", "ffn.gate_up": "int4", "ffn.down": "int4"}
    exceptions = {f"layers.0.{name}": Storage(format, 32 * (format == "int4")) for name, format in stored.items()}
    recipe = Recipe(format="int8", head="int8", symmetric=False, exceptions=exceptions)
    config = replace(TINY, dim=64, ffn_dim=96, head_dim=16, n_heads=4, n_layers=1)

    def quantized() -> Transformer:
        file = folder.parent / "config.json"
        file.write_text(json.dumps(hf_config(config)))
        return load_model(open_checkpoint(f"random:{file}"), device="cpu", dtype=torch.float32, quantize=recipe)

    model = quantized()
    before = set(folder.iterdir())
    aot.compile_for_cpu(model, folder)
    assert tokens(model) == tokens(quantized())
    assert sorted(path.name.split("-")[0] for path in set(folder.iterdir()) - before) == ["head", "layer"]


def test_several_rows_times_codes_are_a_library_where_there_are_operators(folder: Path, monkeypatch) -> None:
    stored = {"attention.qkv": "int8", "attention.o": "w8a8", "ffn.gate_up": "int4", "ffn.down": "int4"}
    exceptions = {f"layers.0.{name}": Storage(format, 32 * (format == "int4")) for name, format in stored.items()}
    recipe = Recipe(format="int8", head="int8", exceptions=exceptions)
    file = folder.parent / "several.json"
    file.write_text(json.dumps(hf_config(replace(TINY, dim=64, ffn_dim=96, head_dim=16, n_heads=4, n_layers=1))))
    model = load_model(open_checkpoint(f"random:{file}"), device="cpu", dtype=torch.bfloat16, quantize=recipe)
    runner = Runner(model, n_blocks=60, block_size=4, max_running=20, max_step_tokens=40)
    rows = torch.arange(17)
    runner.tables[:17, :2] = 1 + torch.arange(34).view(17, 2)

    def hidden(n: int) -> torch.Tensor:
        inputs = rows[:n] + 3, rows[:n] % 7, rows[:n].int()
        return runner._hidden(*inputs, n, torch.tensor([n], dtype=torch.int32), 0)

    expected = {n: hidden(n) for n in (2, 9, 17)}
    aot.compile_for_cpu(model, folder)
    layer = model.layers[0].forward
    eager, ran = layer.eager, []
    monkeypatch.setattr(layer, "eager", lambda *args: ran.append(args) or eager(*args))
    for n, want in expected.items():
        assert (hidden(n) - want).abs().max() <= 2**-6 * want.abs().max()
        assert len(ran) == (n > 16)  # what the operator over bytes is good for


def test_a_library_calls_the_operator_over_nibbles(folder: Path) -> None:
    model = tiny_model(replace(TINY, dim=64, vocab_size=144), dtype=torch.bfloat16)
    model.head = Int4Linear(64, 144, dtype=torch.bfloat16, group=32, symmetric=False)
    model.head.pack_rows(0, torch.randn(144, 64))
    x = torch.randn(1, 1, 64, dtype=torch.bfloat16)
    expected = model.logits(x)
    aot.compile_for_cpu(model, folder)
    y = model.logits(x)
    assert torch.equal(y, expected) or (y - expected).abs().max() < 2**-6 * expected.abs().max()


def test_another_model_is_another_library(folder: Path) -> None:
    inputs = [torch.zeros(1, 1, 48)] * 3
    keys = {
        aot._Library(("head", name), aot._HeadFunction(tiny_model()), folder)._key([x.to(dtype) for x in inputs])
        for name in ("one config", "another")
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(keys) == 4


def test_a_library_that_does_not_load_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(aot, "_loads", lambda path: False)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, package_path: None)
    assert tokens(compiled(tmp_path)) == tokens(tiny_model())
    assert "does not load here" in caplog.text
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("compiled again"))
    assert tokens(compiled(tmp_path)) == tokens(tiny_model())
