"""A quantized checkpoint's recipe in its config.json: what `quant/README.md` shows, written and read.

This file refuses to know how codes lie and which tensors hold them. Its one idea: a file says of each linear how it is
stored, so that no rule of `Recipe` decides how an old checkpoint is read.
"""

from pathlib import Path

from hf_config import hf_modules, our_module
from model import Linear, Transformer
from quant.linears import GROUPS, QuantizedLinear, Recipe, Storage

LAYOUT = 2  # which order of codes; quant/README.md describes it, and nothing reads an older one
OUR_METHOD = "tachyon"  # the `quant_method` of a config.json whose weights lie as quant/README.md says


def write_recipe(recipe: Recipe, model: Transformer) -> dict:
    """`quantization_config` of a config.json: the recipe, and the linears of `model` that are stored otherwise."""
    raw = {"quant_method": OUR_METHOD, "layout": LAYOUT, "method": recipe.method}
    raw |= _write_storage(recipe.format, recipe.group_size)
    if recipe.format == "int4":
        raw["symmetric"] = recipe.symmetric
    usual = Storage(recipe.format, recipe.group_size if recipe.format == "int4" else 0)
    exceptions = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear | QuantizedLinear):
            stored = Storage(module.format, module.group) if isinstance(module, QuantizedLinear) else Storage("float")
            if stored != usual:
                exceptions |= {part: _write_storage(*stored) for part in hf_modules(name)}
    return raw | {"exceptions": exceptions}


def _write_storage(format: str, group: int) -> dict:
    return {"format": format, "group_size": group} if format == "int4" else {"format": format}


def read_recipe(raw: object, file: Path) -> Recipe | None:
    """What `write_recipe` put into the config.json called `file`; None if there is nothing."""
    if not raw:
        return None
    method = raw.get("quant_method", "unknown") if isinstance(raw, dict) else raw
    if method != OUR_METHOD:
        raise ValueError(
            f"{file}: quantization {method!r} is not supported; choose the unquantized checkpoint (and quantize it "
            "with quantize.py, whose checkpoints are read)"
        )
    if raw.get("layout") != LAYOUT:
        raise ValueError(
            f"{file}: the codes lie in layout {raw.get('layout', 1)} and only {LAYOUT} is read; quantize the original "
            "checkpoint again with quantize.py"
        )
    format, group = _read_storage(raw, "quantization_config", file)
    method, symmetric, others = raw.get("method", "rtn"), raw.get("symmetric", True), raw.get("exceptions", {})
    if not (isinstance(method, str) and isinstance(symmetric, bool) and isinstance(others, dict)):
        raise ValueError(f"{file}: quantization_config has a method, symmetric or exceptions of the wrong type")
    exceptions: dict[str, Storage] = {}
    for name, storage in others.items():
        module = our_module(name)
        if module is None:
            raise ValueError(
                f"{file}: quantization_config has an exception for {name!r}, which this model does not have"
            )
        stored = _read_storage(storage, name, file)
        if exceptions.setdefault(module, stored) != stored:
            raise ValueError(f"{file}: {name} is stored unlike {hf_modules(module)[0]}; the two make one matrix here")
    head = exceptions.get("head", Storage(format)).format
    return Recipe(
        format=format, head=head, method=method, group_size=group or 128, symmetric=symmetric, exceptions=exceptions
    )


def _read_storage(raw: object, name: str, file: Path) -> Storage:
    format, group = (raw.get("format"), raw.get("group_size")) if isinstance(raw, dict) else (None, None)
    if format not in ("int8", "w8a8", "int4", "fp8", "float"):
        raise ValueError(f"{file}: {name} has the format {format!r}; there are int8, w8a8, int4, fp8 and float")
    if format != "int4":
        return Storage(format)
    if group not in GROUPS:
        raise ValueError(f"{file}: {name} has the group_size {group!r}; there are {', '.join(map(str, GROUPS))}")
    return Storage(format, group)
