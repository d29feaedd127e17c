"""A layer compiled ahead of time, for decoding on the CPU.

On CUDA a graph hides what it costs to call compiled layers. A CPU pays it for every layer of every token: checking
torch.compile's guards and unpacking the module takes longer than a small model's matrices. AOTInductor makes a
library that takes nothing but tensors, so one serves every layer of a kind, a call costs microseconds, and the next
start loads it from disk without compiling or even tracing.

It is for one token: of one row over a static cache, or of any number of sequences over a paged one. Longer inputs,
where the matrices dominate, run as they are, and so do several rows where a quantized matrix has no operator for them.
Where such a library cannot be loaded, torch.compile does its work.
"""

import contextlib
import copy
import functools
import hashlib
import inspect
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import cache
import model
import paged
from hardware import device_name
from kernels import codes, int8
from quant import linears

log = logging.getLogger("tachyon")


def compile_for_cpu(transformer: model.Transformer, directory: Path) -> None:
    """Let `transformer` decode with compiled layers and head, whose libraries are kept in `directory`."""
    if isinstance(transformer.logits, _Head):
        return  # it does already
    linears.settle_model(transformer)  # the libraries are handed the tensors as they are now
    libraries: dict[tuple, Callable[..., _Library]] = {}
    for layer in transformer.layers:
        kind = ("layer", layer.attention.use_rope, layer.attention.sliding, repr(transformer.config), repr(layer))
        if kind not in libraries:
            libraries[kind] = _libraries(kind, layer, transformer.config.sliding_window, directory)
        layer.forward = _Layer(layer, libraries[kind])
    kind = ("head", repr(transformer.config), repr(transformer.head))
    transformer.logits = _Head(transformer, _Library(kind, _HeadFunction(transformer), directory))


def _libraries(
    kind: tuple, layer: model.Block, window: int | None, directory: Path
) -> Callable[[torch.dtype, int | None, bool], "_Library"]:
    """A library of `layer` for each type and size of blocks that a cache may have, and for one or several rows."""
    layer = copy.copy(layer)  # `_Layer` will take the place of its forward

    @functools.cache
    def library(kv_dtype: torch.dtype, block_size: int | None, several: bool) -> _Library:
        function = _LayerFunction(layer)
        if block_size is not None:
            function = _PagedLayerFunction(layer, window if layer.attention.sliding else None, several=several)
        return _Library((*kind, kv_dtype, block_size, several), function, directory)

    return library


def _quantized(layer: model.Block) -> list[linears.QuantizedLinear]:
    return [module for module in layer.modules() if isinstance(module, linears.QuantizedLinear)]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Everything that `module` holds and a library is handed, by name."""
    return dict([*module.named_parameters(), *module.named_buffers()])


class _Layer:
    """Takes the place of a block's `forward`."""

    def __init__(self, layer: model.Block, libraries: Callable[[torch.dtype, int | None, bool], "_Library"]) -> None:
        self.eager, self.sliding, self.libraries = layer.forward, layer.attention.sliding, libraries
        self.weights = list(_tensors(layer).values())
        self.quantized = _quantized(layer)

    @functools.cached_property
    def compiled(self) -> Callable[..., Tensor]:
        return _torch_compile(self.eager)

    def __call__(self, x: Tensor, step: model.Step, kv: cache.LayerCache) -> Tensor:
        mask = step.window_mask if self.sliding else step.mask
        if isinstance(kv, paged.PagedLayer):
            seen, stored, block_size = self._decodes(x, mask, kv), kv.pool.tensors, kv.k.shape[1]
        else:
            seen = None if x.shape[:2] != (1, 1) or mask is None or mask.shape[-1] == 1 else [mask]
            stored, block_size = kv.tensors, None
        if seen is None:
            return self.eager(x, step, kv)
        library = self.libraries(kv.k.dtype, block_size, x.shape[1] > 1)
        y = library([x, step.cos, step.sin, step.input_pos, *seen, *stored, *self.weights])
        return self.compiled(x, step, kv) if y is None else y

    def _decodes(self, x: Tensor, parts: Sequence[paged.Part], kv: paged.PagedLayer) -> list[Tensor] | None:
        """What a library has to know of the blocks where all x [1, T, C] are single tokens; None where they are not."""
        blocks, rows = parts[0].blocks, x.shape[1]
        # A dynamic size starts at 2.
        if len(blocks) != rows or blocks.shape[1] == 1:
            return None
        if rows > 1 and not all(rows <= module.few and module.has_operator(x.dtype) for module in self.quantized):
            return None
        return [blocks, *kv.view.places]


class _Head:
    """Takes the place of a transformer's `logits`."""

    def __init__(self, transformer: model.Transformer, library: "_Library") -> None:
        self.eager, self.library = transformer.logits, library
        self.weights = list(_tensors(nn.Sequential(transformer.norm, transformer.head)).values())

    @functools.cached_property
    def compiled(self) -> Callable[..., Tensor]:
        return _torch_compile(self.eager)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[:-1] != (1, 1):
            return self.eager(x)
        y = self.library([x, *self.weights])
        return self.compiled(x) if y is None else y


class _LayerFunction(nn.Module):
    """A block over a static cache as a function of tensors alone."""

    def __init__(self, layer: model.Block) -> None:
        super().__init__()
        self.block = [layer]  # in a list because the weights of a submodule would be constants of the library
        self.names = list(_tensors(layer))

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        x, cos, sin, input_pos, *rest = inputs
        (block,) = self.block
        cached, weights = rest[: -len(self.names)], rest[-len(self.names) :]
        mask, kv = self.cache_of(cached, x, input_pos)
        step = model.Step(cos, sin, input_pos, mask, mask)
        return torch.func.functional_call(block, dict(zip(self.names, weights, strict=True)), (x, step, kv))

    def cache_of(self, tensors: Sequence[Tensor], x: Tensor, input_pos: Tensor) -> tuple:
        """What attention takes for a mask, and the cache."""
        mask, *stored = tensors
        return mask, cache.layer_of(stored, x.dtype)

    def dynamic_shapes(self, count: int) -> list:
        S, weights = torch.export.Dim("S", min=2, max=1 << 24), len(self.names)
        return [None, None, None, None, {3: S}, *[{1: S}] * (count - 5 - weights), *[None] * weights]


class _PagedLayerFunction(_LayerFunction):
    """The same over blocks, for a token of one or of several sequences."""

    def __init__(self, layer: model.Block, window: int | None, *, several: bool) -> None:
        super().__init__(layer)
        self.window, self.several = window, several

    def cache_of(self, tensors: Sequence[Tensor], x: Tensor, input_pos: Tensor) -> tuple:
        blocks, block, slot, *stored = tensors
        view = paged.PagedView([cache.layer_of(stored, x.dtype)], batch=None)
        view.places = block, slot
        length = blocks.shape[1] * stored[0].shape[1]
        mask = cache.masks_of(input_pos.view(-1, 1), length, self.window)[1]
        return [paged.Part(slice(None), blocks, length, mask)], view.layers[0]

    def dynamic_shapes(self, count: int) -> list:
        Dim, weights = torch.export.Dim, len(self.names)
        N, n_blocks = (Dim(name, min=2, max=1 << 24) for name in ("N", "n_blocks"))
        most = min((module.few for module in _quantized(self.block[0])), default=1 << 16)
        B = Dim("B", min=2, max=most) if self.several else Dim.STATIC
        stored = [{0: n_blocks}] * (count - 7 - weights)
        return [*[{1: B}] * 4, {0: B, 1: N}, {0: B}, {0: B}, *stored, *[None] * weights]


class _HeadFunction(nn.Module):
    """The final norm and the head as a function of tensors alone."""

    def __init__(self, transformer: model.Transformer) -> None:
        super().__init__()
        self.final = [nn.Sequential(transformer.norm, transformer.head)]

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        x, *weights = inputs
        (final,) = self.final
        return torch.func.functional_call(final, dict(zip(_tensors(final), weights, strict=True)), (x,))

    @staticmethod
    def dynamic_shapes(count: int) -> list:
        return [None] * count


class _Library:
    """A function compiled at its first call, or loaded if some earlier process compiled the same."""

    def __init__(self, kind: tuple, function: _LayerFunction | _HeadFunction, directory: Path) -> None:
        self.kind, self.function, self.directory = kind, function, directory
        self.run: Callable[[list[Tensor]], list[Tensor]] | None = None
        self.works = True

    def __call__(self, inputs: list[Tensor]) -> Tensor | None:
        """The function's result; None where this machine cannot run such a library."""
        if self.run is None and self.works:
            self.run = self._load(inputs)
            self.works = self.run is not None
        return self.run(list(inputs))[0] if self.works else None

    def _load(self, inputs: list[Tensor]) -> Callable[[list[Tensor]], list[Tensor]] | None:
        path = self.directory / f"{self.kind[0]}-{self._key(inputs)}.pt2"
        if path.exists():
            if path.stat().st_size == 0:
                return None
            with contextlib.suppress(RuntimeError):  # damaged: it is made anew
                return torch._inductor.aoti_load_package(str(path)).loader.boxed_run
        log.info("compiling the %s for this CPU, once", self.kind[0])
        self.directory.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.pt2")
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's own, about its deprecations
            shapes = (self.function.dynamic_shapes(len(inputs)),)
            program = torch.export.export(self.function, (inputs,), dynamic_shapes=shapes, strict=False)
            torch._inductor.aoti_compile_and_package(program, package_path=str(part))
        if not _loads(part):  # an empty file says so, and saves the next start from compiling in vain
            log.warning("a library compiled ahead of time does not load here; torch.compile does its work, slower")
            part.write_bytes(b"")
        part.replace(path)  # two processes may do the same work, neither sees half of it
        return torch._inductor.aoti_load_package(str(path)).loader.boxed_run if path.stat().st_size else None

    def _key(self, inputs: list[Tensor]) -> str:
        """Everything that the compiled code depends on: a stale library would compute another model."""
        modules = (model, cache, paged, codes, linears, int8, sys.modules[__name__])
        sources = [inspect.getsource(module) for module in modules]
        tensors = [(t.dtype, t.dim()) for t in inputs]
        facts = (self.kind, sources, tensors, torch.__version__, device_name(torch.device("cpu")))
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _torch_compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What serves where libraries do not load; importing torch's compiler takes a second that others need not pay."""
    torch._dynamo.config.recompile_limit = 64  # all layers share one compiled function
    return torch.compile(function, dynamic=True)


def _loads(path: Path) -> bool:
    """Whether a library can be loaded: on some installations that crashes inside torch, so another process tries."""
    load = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"
    return subprocess.run([sys.executable, "-c", load, str(path)], capture_output=True, check=False).returncode == 0
