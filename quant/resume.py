"""Layers that are done, kept on disk until all are: a run that was killed goes on after the last one.

A work folder holds one safetensors file a layer, with what was said of it, and run.json, the identity of the run: all
that its result depends on. Files get their names when they are whole, so a kill leaves the layers before. This file
refuses to know how layers are quantized; it keeps and gives back what they hold.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SAMPLED = 4096  # numbers of a tensor that its fingerprint looks at


class WorkFolder:
    """The layers of one run. ValueError if `folder` is another run's."""

    def __init__(self, folder: Path, identity: Mapping[str, object]) -> None:
        self.folder = folder
        self.finished = 0  # layers, from the first
        run = folder / "run.json"
        if run.is_file():
            self._compare(json.loads(run.read_text(encoding="utf-8")), json.loads(json.dumps(identity)))
            while self._whole(self.finished):
                self.finished += 1
        else:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it began
            folder.mkdir(parents=True)
            _write(run, lambda path: path.write_text(json.dumps(identity), encoding="utf-8"))

    def _compare(self, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
        other = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if other:
            raise ValueError(
                f"{self.folder} holds layers of an unfinished run with other {', '.join(other)}; "
                "finish that one with its own command, remove the folder, or choose another --output"
            )

    def _whole(self, layer: int) -> bool:
        try:
            with safe_open(self._file(layer), framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def save(self, layer: int, module: nn.Module, said: Mapping[str, object]) -> None:
        """Keep what `module`, the model's layer of that number, holds, and what was `said` of it (JSON)."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}
        _write(self._file(layer), lambda path: save_file(tensors, path, metadata={"said": json.dumps(said)}))

    def load(self, layer: int, module: nn.Module) -> dict[str, object]:
        """Give `module`, which is built as the one that was saved, what that held; returns what was said of it."""
        with safe_open(self._file(layer), framework="pt") as file:
            module.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            return json.loads(file.metadata()["said"])

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(path: Path, write) -> None:
    """Let `write` fill a file that gets its name when it is whole; OSError if it cannot be."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        part.replace(path)
    except (SafetensorError, OSError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error}); the layers before it are kept") from None


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and some of the numbers: what tells two checkpoints, or two texts' tokens, apart."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)].contiguous().cpu()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
