"""A quantized checkpoint's recipe in its config.json: what `quant/README.md` shows, written and read.

This file refuses to know how codes lie and which tensors hold them. Its one idea: a file says of each linear how it is
stored, so that no rule of `Recipe` decides how an old checkpoint is read.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from hf_config import hf_modules, our_module
from model import Linear, ModelConfig, Transformer
from quant.linears import FORMATS, GROUPED, GROUPS, Int4Linear, QuantizedLinear, Recipe, Storage, fit

LAYOUT = 3  # which order of codes; quant/README.md describes it, and nothing reads an older one
OUR_METHOD = "tachyon"  # the `quant_method` of a config.json whose weights lie as quant/README.md says


def write_recipe(recipe: Recipe, model: Transformer) -> dict:
    """`quantization_config` of a config.json: the recipe, and the linears of `model` that are stored otherwise."""
    raw = {"quant_method": OUR_METHOD, "layout": LAYOUT, "method": recipe.method}
    raw |= _write_storage(recipe.format, recipe.group_size)
    if any(isinstance(module, Int4Linear) for module in model.modules()):
        raw |= {"symmetric": recipe.symmetric} | ({"clip": True} if recipe.clip else {})
    usual = Storage(recipe.format, recipe.group_size if recipe.format in GROUPED else 0)
    exceptions = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear | QuantizedLinear):
            stored = module.storage if isinstance(module, QuantizedLinear) else Storage("float")
            if stored != usual:
                exceptions |= {part: _write_storage(*stored) for part in hf_modules(name)}
    return raw | {"exceptions": exceptions}


def _write_storage(format: str, group: int) -> dict:
    return {"format": format, "group_size": group} if format in GROUPED else {"format": format}


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
    method, others = raw.get("method", "rtn"), raw.get("exceptions", {})
    symmetric, clip = raw.get("symmetric", True), raw.get("clip", False)
    if not (isinstance(method, str) and isinstance(symmetric, bool) and isinstance(clip, bool)):
        raise ValueError(f"{file}: quantization_config has a method, symmetric or clip of the wrong type")
    if not isinstance(others, dict):
        raise ValueError(f"{file}: quantization_config has exceptions of the wrong type")
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
        format=format,
        head=head,
        method=method,
        group_size=group or 128,
        symmetric=symmetric,
        clip=clip,
        exceptions=exceptions,
    )


def _read_storage(raw: object, name: str, file: Path) -> Storage:
    format, group = (raw.get("format"), raw.get("group_size")) if isinstance(raw, dict) else (None, None)
    if format not in FORMATS:
        raise ValueError(f"{file}: {name} has the format {format!r}; there are {', '.join(FORMATS)}")
    if format not in GROUPED:
        return Storage(format)
    if group not in GROUPS:
        raise ValueError(f"{file}: {name} has the group_size {group!r}; there are {', '.join(map(str, GROUPS))}")
    return Storage(format, group)


# ---- Rules for some linears ------------------------------------------------------------------------------------------

Rule = tuple[str, Storage]  # a glob on a checkpoint's module names, and how those linears are to be stored
_BITS = {3: "int3", 4: "int4", 8: "int8"}


def read_rules(file: Path, group_size: int) -> list[Rule]:
    """A user's recipe file: JSON, pattern -> {"bits" or "format", "group_size"}; ValueError for what makes no sense."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f'{file} has to hold an object, as {{"model.layers.0.*": {{"bits": 8}}}}')
    return [(pattern, _read_rule(value, group_size, f"{file}: {pattern!r}")) for pattern, value in raw.items()]


def _read_rule(raw: object, group_size: int, where: str) -> Storage:
    if not isinstance(raw, dict):
        raise ValueError(f'{where} has {raw!r}; it takes an object, as {{"bits": 8}}')
    if unknown := sorted(raw.keys() - {"bits", "format", "group_size"}):
        raise ValueError(f"{where} has {', '.join(map(repr, unknown))}; it takes bits or format, and group_size")
    if ("bits" in raw) == ("format" in raw):
        raise ValueError(f"{where} has to have either bits or format")
    bits, format = raw.get("bits"), raw.get("format")
    if "bits" in raw:
        if type(bits) is not int or bits not in _BITS:
            raise ValueError(f"{where} has bits {bits!r}; there are {', '.join(map(str, _BITS))}")
        format = _BITS[bits]
    if format not in FORMATS:
        raise ValueError(f"{where} has the format {format!r}; there are {', '.join(FORMATS)}")
    group = raw.get("group_size", group_size)
    if "group_size" in raw and format not in GROUPED:
        raise ValueError(f"{where} has a group_size, which is for {' and '.join(GROUPED)}; {format} has none")
    if type(group) is not int or group not in GROUPS:
        raise ValueError(f"{where} has the group_size {group!r}; there are {', '.join(map(str, GROUPS))}")
    return Storage(format, group)


def with_rules(recipe: Recipe, rules: Sequence[Rule], config: ModelConfig) -> Recipe:
    """`recipe` for the model of `config`, with the linears that a rule matches as exceptions; the first match wins.

    ValueError for linears that cannot be packed, a rule that matches none, rules that part a matrix which is fused
    here, and where nothing is left to quantize.
    """
    linears = _linears(config)
    idle, exceptions = {pattern for pattern, _ in rules}, {}
    for name, K in linears.items():
        stored: dict[str, Storage | None] = {}  # by its name in a checkpoint
        for part in hf_modules(name):
            matches = [(pattern, storage) for pattern, storage in rules if fnmatchcase(part, pattern)]
            idle -= {pattern for pattern, _ in matches}
            stored[part] = matches[0][1] if matches else None
        if len(set(stored.values())) > 1:
            odd = next(part for part in stored if stored[part] is not None)
            raise ValueError(
                f"{odd} is to be stored unlike {', '.join(part for part in stored if stored[part] != stored[odd])}, "
                "but they make one matrix here; give all of them the same"
            )
        storage = next(iter(stored.values()))
        if storage is not None:
            exceptions[name] = fit(storage, K)
    if idle:
        names = [part for name in linears for part in hf_modules(name)]
        raise ValueError(
            f"{', '.join(repr(pattern) for pattern, _ in rules if pattern in idle)} matches no linear; "
            f"they are called {names[0]}, ..., {names[-1]}"
        )
    recipe = replace(recipe, exceptions={**recipe.exceptions, **exceptions})
    if all(storage.format == "float" for storage in storages(recipe, config).values()):
        raise ValueError("every linear is excluded, so that nothing is left to quantize")
    return recipe


def storages(recipe: Recipe, config: ModelConfig) -> dict[str, Storage]:
    """How each linear of a model is stored, by its name in the model."""
    return {name: recipe.storage(name, K) for name, K in _linears(config).items()}


def _linears(config: ModelConfig) -> dict[str, int]:
    """The linears of a model, and how many weights their rows have."""
    with torch.device("meta"):
        modules = Transformer(config).named_modules()
    return {name: module.in_features for name, module in modules if isinstance(module, Linear)}
