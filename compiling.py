"""What runs a model fast: our kernels where there is Triton, compiled libraries on a CPU, else torch.compile.

It has the model's `hidden` and `logits`, computes the same and takes the same caches, so whoever steps a model steps
this by the same code.
"""

import importlib.util
import os
from typing import TYPE_CHECKING

import torch

import aot
import checkpoint
from model import Transformer

if TYPE_CHECKING:
    from kernels.decoder import Decoder


def compile_model(model: Transformer, *, max_seq_len: int, batch_size: int) -> "Transformer | Decoder":
    """The model, to be run over caches of up to so many slots and rows.

    Compiled by regions: one layer's code serves all, so compiling takes seconds, whatever the depth.
    """
    # Beside the models, where a reboot does not empty them.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(checkpoint.cache_dir() / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(checkpoint.cache_dir() / "triton"))
    device = model.embed.weight.device
    if has_kernels(device):
        from kernels.decoder import Decoder

        return Decoder(model, max_seq_len=max_seq_len, batch_size=batch_size)
    if device.type == "cpu":
        aot.compile_for_cpu(model, checkpoint.cache_dir() / "aot")
    elif "begin" not in vars(model):  # else it is already
        # All layers run the same code: each of its uses (a prompt, a token, one row, several) in each kind of layer
        # counts.
        torch._dynamo.config.recompile_limit = 64
        for layer in model.layers:
            layer.compile(fullgraph=True, dynamic=True)
        model.begin = torch.compile(model.begin, fullgraph=True, dynamic=True)
        model.logits = torch.compile(model.logits, fullgraph=True, dynamic=True)
    return model


def has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
