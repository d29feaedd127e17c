"""Compiles what decoders launch for a GPU that need not be there: python -m tests.compile_kernels 90

The interpreter runs a kernel's Python and knows nothing of what Triton's compiler refuses: a variable whose type
changes in a loop, layouts that it cannot make, more shared memory than there is. Compiling needs no GPU. Here tensors
are on torch's meta device, which computes shapes alone, and a launch only compiles. Prints what was compiled as JSON.
"""

import json
import os
import re
import sys
from dataclasses import replace
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cache import StaticCache
from hf_config import PRESETS
from kernels import dequantize, draw, language, probe, tuning
from kernels.decoder import Decoder
from model import Transformer
from paged import PagedBatch, PagedCache
from quant.linears import RECIPES, Recipe, quantize_model

META = torch.device("meta")
ASYMMETRIC = Recipe(format="int4", head="int8", group_size=32, symmetric=False)


class Driver:
    """Stands for a GPU's driver as far as compiling asks."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Argument:
    """A tensor as a launch sees it: aligned, and nowhere."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.dtype = tensor, tensor.dtype

    def data_ptr(self) -> int:
        return 0


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def model_of(name: str, recipe: Recipe | None = None, dtype: torch.dtype = torch.bfloat16, **changes) -> Transformer:
    """A preset's first layer and head."""
    with META:
        model = Transformer(replace(PRESETS[name], n_layers=1, **changes)).to(dtype)
        if recipe:
            quantize_model(model, recipe, dtype=dtype)
    return model.to(META)


def storage(model: Transformer, kv_dtype: str | None) -> dict:
    """What every cache for it is made with."""
    sizes = {"n_layers": 1, "n_kv_heads": model.config.n_kv_heads, "head_dim": model.config.head_dim}
    return {"dtype": model.norm.weight.dtype, "device": META, "kv_dtype": kv_dtype, **sizes}


def decode(model: Transformer, *rows: int, length: int = 2048, kv_dtype: str | None = None) -> None:
    """A greedy step of so many rows."""
    for B in rows:
        decoder = Decoder(model, max_seq_len=length, batch_size=B)
        tokens, pos = (empty(B, 1, dtype=torch.int64) for _ in range(2))
        x = decoder.hidden(tokens, pos, StaticCache.allocate(batch=B, max_seq_len=length, **storage(model, kv_dtype)))
        decoder.greedy(x, tokens, pos, length - 1)


def prompt(model: Transformer, T: int, kv_dtype: str | None = None) -> None:
    decoder = Decoder(model, max_seq_len=T, batch_size=2)
    tokens, pos = (empty(2, T, dtype=torch.int64) for _ in range(2))
    cache = StaticCache.allocate(batch=2, max_seq_len=T, **storage(model, kv_dtype))
    decoder.logits(decoder.hidden(tokens, pos, cache))


def serve(model: Transformer, decodes: int, prompts: int = 0, kv_dtype: str | None = None, length: int = 2048) -> None:
    """A step of an engine: so many decoding sequences, and so many of 40 tokens."""
    rows, T = decodes + prompts, decodes + 40 * prompts
    cache = PagedCache.allocate(n_blocks=9, block_size=64, **storage(model, kv_dtype))
    tables, at, starts = (empty(*s, dtype=torch.int32) for s in ((rows, length // 64), (rows,), (prompts + 1,)))
    decoder = Decoder(model, max_seq_len=length, batch_size=max(rows, 1))
    tokens, pos = (empty(1, T, dtype=torch.int64) for _ in range(2))
    x = decoder.hidden(tokens, pos, cache.view(PagedBatch(tables, at, decodes, starts, 40)))
    logits = decoder.logits(x[0, :rows])
    floats, numbers = empty(rows, dtype=torch.float32), empty(rows, dtype=torch.int64)
    draw.draw(logits, empty(rows, dtype=torch.int32), floats, numbers, numbers)


def ampere() -> None:
    """What runs on GPUs before Hopper, by the rules' plans."""
    decode(model_of("smollm2-135m"), 1, 3)
    serve(model_of("qwen3-0.6b"), 5, 2, "int8")
    decode(model_of("qwen2.5-0.5b", ASYMMETRIC, torch.float16), 1, 8)
    decode(model_of("llama-3.1-8b", RECIPES["int8"]), 16, 100)


def hopper() -> None:
    """Every kernel in each of its forms, by the plans for an H100."""
    small, qwen, llama = (model_of(name) for name in ("smollm2-135m", "qwen3-0.6b", "llama-3.1-8b"))
    decode(small, 1, 3, 48)
    prompt(small, 300)
    for length in (256, 1024, 4096, 8192):
        decode(qwen, 1, length=length)
        serve(qwen, 1, length=length)
        serve(small, 4, length=length)
    serve(qwen, 200, 2)
    serve(model_of("smollm2-135m", sliding_window=100), 0, 2)
    decode(llama, 16, 32, 100, length=32768)
    for recipe in (*RECIPES.values(), Recipe(format="w8a8", head="int8")):
        model = model_of("llama-3.1-8b", recipe)
        decode(model, 1, 16)
        serve(model, 250)
    decode(model_of("llama-3.1-8b", RECIPES["int4"]), 3)
    for decodes, prompts in ((20, 0), (80, 0), (140, 0), (0, 13)):
        serve(model_of("llama-3.1-8b", RECIPES["int4"]), decodes, prompts)
    serve(model_of("qwen2.5-0.5b", ASYMMETRIC), 60)
    serve(model_of("qwen2.5-0.5b", ASYMMETRIC, torch.float16), 150)
    for kv_dtype in ("int8", "fp8"):
        decode(qwen, 2, kv_dtype=kv_dtype)
        serve(qwen, 1, 0, kv_dtype)
        serve(qwen, 5, 1, kv_dtype)
    probe.read(empty(20000, dtype=torch.float32))


def pending(code: str) -> int:
    """How many asynchronous products (of a warp group) a loop of Triton's code leaves under way from turn to turn."""
    now = most = 0
    for line in code.splitlines():
        if wait := re.search(r"warp_group_dot_wait .*pendings = (\d+)", line):
            now = min(now, int(wait[1]))
        elif "warp_group_dot " in line and "isAsync = true" in line:
            now += 1
        elif "scf.yield" in line:
            most = max(most, now)
    return most


def compile_all(capability: int) -> list[dict]:
    """What was launched, each kernel in each form once: its name, the shared memory that it takes, in bytes, and what
    `pending` counts.
    """
    compiled: dict[int, dict] = {}
    compiles = JITFunction.run

    def compile_only(kernel: JITFunction, *args, grid, warmup, **options):
        args = [Argument(x) if isinstance(x, Tensor) else x for x in args]
        options = {name: Argument(x) if isinstance(x, Tensor) else x for name, x in options.items()}
        binary = compiles(kernel, *args, grid=grid, warmup=True, **options)
        assert "launch_pdl" not in options or "griddepcontrol.wait" in binary.asm["ptx"], kernel.__name__
        form = {"kernel": kernel.__name__, "shared": binary.metadata.shared, "pending": pending(binary.asm["ttgir"])}
        compiled[id(binary)] = form | {"binary": binary}
        return binary

    triton.runtime.driver.set_active(Driver(capability))
    gpu = tuning.table("NVIDIA H100 80GB HBM3") if capability == 90 else {}
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(language, "on_gpu", lambda x: True),
        mock.patch.object(dequantize, "on_gpu", lambda x: True),
        mock.patch.object(language, "_capability", lambda device: divmod(capability, 10)),
        mock.patch.object(tuning, "lookup", lambda device, key: gpu.get(key)),
    ):
        {80: ampere, 90: hopper}[capability]()
    return [{name: entry[name] for name in ("kernel", "shared", "pending")} for entry in compiled.values()]


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
