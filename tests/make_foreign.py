"""Makes tests/data/foreign: tiny checkpoints quantized and written by other libraries, for tests/test_foreign.py.

    python -m venv V && V/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate compressed-tensors==0.20.0
    V/bin/pip install --no-deps --no-build-isolation auto-gptq==0.7.1 autoawq==0.2.9 gptqmodel==7.7.0
    V/bin/pip install threadpoolctl device-smi pypcre tokenicer logbar torchao defuser pillow   # what gptqmodel imports
    cd tests && ../V/bin/python make_foreign.py

Only their modules for packing are imported from AutoGPTQ and AutoAWQ, which no longer import whole. Weights are rounded
to nearest, packed by the library, and beside each model.safetensors lie the logits of transformers' model on `TOKENS`,
in fp32, with the weights that the library itself makes of what it packed.
"""

import copy
import functools
import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "data" / "foreign"
TOKENS = [3, 17, 42, 9, 88, 5, 61, 30, 12, 77, 4, 19, 54, 2, 36, 71]


@functools.cache
def packing_modules() -> tuple[types.ModuleType, ...]:
    """AutoGPTQ's linears without and with g_idx, AutoAWQ's linear and its unpacking."""
    for package in ("auto_gptq", "awq"):
        (folder,) = importlib.util.find_spec(package).submodule_search_locations
        for inner in ("", ".nn_modules", ".nn_modules.qlinear", ".modules", ".modules.linear", ".utils"):
            module = sys.modules[package + inner] = types.ModuleType(package + inner)  # without its __init__
            module.__path__ = [folder + inner.replace(".", "/")]
    names = ("auto_gptq.nn_modules.qlinear.qlinear_cuda_old", "auto_gptq.nn_modules.qlinear.qlinear_cuda")
    names += ("awq.modules.linear.gemm", "awq.utils.packing_utils")
    return tuple(importlib.import_module(name) for name in names)


def tiny_model(n_layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
    )
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():  # larger than the default, so that mistakes show
        parameter.add_(torch.randn_like(parameter) * 0.2) if "norm" in name else parameter.normal_(0.0, 0.15)
        parameter.copy_(parameter.half())  # what is not quantized is stored as it is
    return model


def write(name: str, model: nn.Module, tensors: dict[str, Tensor], quantization: dict) -> None:
    """A checkpoint of `tensors`, and the logits of `model`, whose weights are what the library makes of them."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    save_file({"logits": model(torch.tensor([TOKENS])).logits[0]}, folder / "logits.safetensors")
    config = json.loads(model.config.to_json_string()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def plain(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.half() for name, tensor in model.state_dict().items()}


# ---- GPTQ and AWQ ----------------------------------------------------------------------------------------------------


def grid(
    weight: Tensor, group_of: Tensor, *, bits: int, symmetric: bool, least: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights rounded to codes, weights [N, K], and scales and zeros [N, G]; zeros are `least` at least, fp32."""
    n_groups, most = int(group_of.max()) + 1, 2**bits - 1
    groups = [weight[:, group_of == g] for g in range(n_groups)]
    low = torch.stack([group.amin(1).clamp(max=0) for group in groups], 1)  # [N, G]
    high = torch.stack([group.amax(1).clamp(min=0) for group in groups], 1)
    if symmetric:
        scale = (torch.maximum(-low, high) * 2 / most).half().float()
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        scale = ((high - low) / most).half().float()
        zero = (-low / scale).round().clamp(least, most)  # AutoGPTQ's packing of zeros minus 1 breaks on 0
    scales, zeros = scale[:, group_of], zero[:, group_of]  # [N, K]
    codes = (weight / scales + zeros).round().clamp(0, most)
    return (codes - zeros) * scales, scale, zero


def quantized_linears(
    model: nn.Module, pack: Callable[[nn.Linear], tuple[dict[str, Tensor], Tensor]]
) -> dict[str, Tensor]:
    """The model's tensors with each layer's linears as `pack` stores them; the model gets the weights it returns."""
    tensors = plain(model)
    for name, linear in model.model.named_modules():
        if isinstance(linear, nn.Linear):
            packed, weight = pack(linear)
            del tensors[f"model.{name}.weight"]
            tensors |= {f"model.{name}.{kind}": tensor for kind, tensor in packed.items()}
            linear.weight.copy_(weight)
    return tensors


def gptq(name: str, *, bits: int, group: int, symmetric: bool, act_order: bool = False) -> None:
    model, without_order, with_order = tiny_model(), *packing_modules()[:2]

    def pack(linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        N, K = linear.weight.shape
        group_of = torch.arange(K, dtype=torch.int32) // (group if group > 0 else K)
        if act_order:
            group_of = group_of[torch.randperm(K)]
        rounded, scale, zero = grid(linear.weight, group_of, bits=bits, symmetric=symmetric)
        linear = copy.deepcopy(linear)
        linear.weight.copy_(rounded)
        packed = (with_order if act_order else without_order).QuantLinear(bits, group, K, N, bias=False)
        packed.pack(linear, scale, zero, group_of)
        tensors = packed.state_dict()
        return tensors | {"scales": tensors["scales"].half()}, packed(torch.eye(K)).t()

    quantization = {
        "bits": bits,
        "group_size": group,
        "damp_percent": 0.01,
        "desc_act": act_order,
        "static_groups": False,
        "sym": symmetric,
        "true_sequential": True,
        "quant_method": "gptq",
    }
    write(name, model, quantized_linears(model, pack), quantization)


def gptq_v2(name: str, *, group: int) -> None:
    """Zeros as they are, down to 0, by GPTQModel."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    model = tiny_model()

    def pack(linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        N, K = linear.weight.shape
        linear = copy.deepcopy(linear)
        linear.weight[:, :group].abs_()  # whose zeros are 0
        group_of = torch.arange(K, dtype=torch.int32) // group
        rounded, scale, zero = grid(linear.weight, group_of, bits=4, symmetric=False, least=0)
        linear.weight.copy_(rounded)
        packed = TorchLinear(4, group, False, False, K, N)
        packed.pack_original(linear, scale, zero, group_of)
        packed.post_init()
        tensors = {kind: tensor.clone() for kind, tensor in packed.state_dict().items()}
        packed.scales = packed.scales.float()  # so that the product with them is not rounded
        return tensors, packed.dequantize_weight().t()

    quantization = {
        "bits": 4,
        "group_size": group,
        "desc_act": False,
        "sym": False,
        "true_sequential": True,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
    }
    write(name, model, quantized_linears(model, pack), quantization)


def awq(name: str, *, group: int) -> None:
    model, (*_, gemm, unpacking) = tiny_model(), packing_modules()

    def pack(linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        group_of = torch.arange(linear.in_features) // group
        rounded, scale, zero = grid(linear.weight, group_of, bits=4, symmetric=False)
        linear = copy.deepcopy(linear)
        linear.weight.copy_(rounded)
        packed = gemm.WQLinear_GEMM.from_linear(linear, 4, group, scales=scale.t(), zeros=zero.t())
        weight = unpacking.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, group)
        return packed.state_dict(), weight.t()

    quantization = {
        "bits": 4,
        "group_size": group,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    write(name, model, quantized_linears(model, pack), quantization)


# ---- compressed-tensors ----------------------------------------------------------------------------------------------


def compressed(name: str, weights: dict, *, format: str, ignore: list[str], dynamic: bool = False, n_layers: int = 1):
    model = tiny_model(n_layers)
    group = {"targets": ["Linear"], "weights": weights}
    if dynamic:
        inputs = {"num_bits": 8, "type": weights["type"], "strategy": "token", "symmetric": True, "dynamic": True}
        group["input_activations"] = inputs
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=ignore, format=format)
    apply_quantization_config(model, config)
    for linear in model.modules():
        if (scheme := getattr(linear, "quantization_scheme", None)) is not None:
            arguments = scheme.weights
            size = {"group": arguments.group_size, "channel": linear.in_features}.get(arguments.strategy)
            values = linear.weight.unflatten(1, (-1, size)) if size else linear.weight.flatten()
            scale, zero = calculate_qparams(values.amin(-1), values.amax(-1), arguments)
            linear.weight_scale.data.copy_(scale.half())
            if hasattr(linear, "weight_zero_point"):
                linear.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=format)
    compressor.compress_model(model)
    tensors = {
        key: tensor.clone().half() if tensor.dtype == torch.float32 else tensor.clone()
        for key, tensor in model.state_dict().items()
    }
    compressor.decompress_model(model)
    for linear in model.modules():  # the weights alone: inputs as they are
        linear.quantization_enabled = False
    write(name, model, tensors, {})
    compressor.quantization_config.quantization_status = QuantizationStatus.COMPRESSED  # when the tensors were taken
    compressor.update_config(FOLDER / name)


def main() -> None:
    gptq("gptq-int4", bits=4, group=32, symmetric=True)
    gptq("gptq-int4-asymmetric", bits=4, group=32, symmetric=False)
    gptq("gptq-int4-act-order", bits=4, group=32, symmetric=True, act_order=True)
    gptq("gptq-int4-per-row", bits=4, group=-1, symmetric=True)
    gptq("gptq-int8-per-row", bits=8, group=-1, symmetric=True)
    gptq("gptq-int8-groups", bits=8, group=32, symmetric=True)
    gptq_v2("gptq-v2-int4-asymmetric", group=32)
    awq("awq-int4", group=32)
    integers = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    partly = ["lm_head", "re:.*layers[.]0[.]mlp.*", "model.layers.1.self_attn.k_proj"]
    options = {"format": "pack-quantized"}
    compressed("compressed-int4", {**integers, "symmetric": True}, ignore=partly, n_layers=2, **options)
    compressed("compressed-int4-asymmetric", {**integers, "symmetric": False}, ignore=["lm_head"], **options)
    integers = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    compressed("compressed-int8", integers, format="int-quantized", ignore=["lm_head"], dynamic=True)
    compressed("compressed-int8-packed", integers, ignore=["lm_head"], **options)
    floats = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    compressed("compressed-fp8", floats, format="float-quantized", ignore=[], dynamic=True)
    floats["strategy"] = "tensor"
    compressed("compressed-fp8-per-tensor", floats, format="naive-quantized", ignore=["lm_head"])


if __name__ == "__main__":
    with torch.no_grad():
        main()
