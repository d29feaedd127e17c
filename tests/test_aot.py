"""Libraries compiled ahead of time: made once, kept, remade when damaged, done without where they do not load."""

import json
from pathlib import Path

import pytest
import torch

import aot
from checkpoint import load_model, open_checkpoint
from generate import Generator, Request
from hf_config import hf_config
from model import Transformer
from quant.linears import Recipe
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


def test_a_damaged_library_is_made_anew(folder: Path) -> None:
    head = next(folder.glob("head-*"))
    head.write_bytes(head.read_bytes()[:1000])
    assert tokens(compiled(folder)) == tokens(tiny_model())
    assert head.stat().st_size > 1000


@pytest.mark.parametrize("format", ["int8", "w8a8"])  # fp8 is alike but for how codes are read
def test_quantized_layers_are_a_library_of_their_own(format: str, folder: Path) -> None:
    def quantized() -> Transformer:
        config = folder.parent / "config.json"
        config.write_text(json.dumps(hf_config(TINY)))
        source = open_checkpoint(f"random:{config}")
        return load_model(source, device="cpu", dtype=torch.float32, quantize=Recipe(format=format, head=format))

    model = quantized()
    before = set(folder.iterdir())
    aot.compile_for_cpu(model, folder)
    assert tokens(model) == tokens(quantized())
    assert sorted(path.name.split("-")[0] for path in set(folder.iterdir()) - before) == ["head", "layer"]


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
