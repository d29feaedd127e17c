"""Turn a checkpoint into a quantized one.

    python quantize.py --checkpoint CKPT --bits 4 --group-size 128 --output DIR

Every linear's matrix becomes codes and scales, by one of `METHODS`, and DIR a checkpoint as any other: its config.json
carries the recipe, and generate.py and the scripts load it as it is, without rounding again. What is said of each
linear is the relative error that its codes leave, ||W - W'|| / ||W|| over the whole matrix.

A method that looks at activations keeps each finished layer in a folder beside DIR, `.NAME.work`, until DIR is there: a
run that ended before goes on from it when the same command is given again.

This file refuses to know the packed layouts (`quant/`) and the files (`checkpoint.py`). Its one idea: a method is a
function from a checkpoint and the options to a quantized model, which reports each linear as it is done.
"""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import cli
import hardware
from model import Block, ModelConfig, Transformer
from quant import awq, gptq, smoothquant
from quant.calibrate import Method, Preparation, calibrate, sample_tokens
from quant.export import FORMATS as EXPORTS
from quant.linears import GROUPS, PIECE, Codes, QuantizedLinear, Recipe, Storage
from quant.recipes import read_rules, storages, with_rules
from quant.resume import WorkFolder, fingerprint

METHODS_VERSION = 3  # to be raised where a method chooses or stores other codes: no run goes on from layers of another


class Report:
    """The error that each linear's codes leave, shown on standard error as soon as all its rows have some."""

    def __init__(self, total: int) -> None:
        self.linears: dict[str, dict] = {}
        self.total = total
        self.start = time.perf_counter()
        self._sums: dict[str, Tensor] = {}  # of squares, fp64 [2]: the error's and the weights'
        self._rows: dict[str, int] = {}

    def __call__(
        self, name: str, linear: QuantizedLinear, start: int, rows: Tensor, *, output_error: float | None = None
    ) -> None:
        """Rows start .. start + n of the linear called `name` now stand for rows [n, K]."""
        sums = self._sums.setdefault(name, torch.zeros(2, dtype=torch.float64))
        for piece in rows.split(max(1, PIECE // linear.in_features)):
            weight = piece.float()
            error = linear.dequantize(torch.float32, slice(start, start + len(piece))) - weight
            sums += torch.stack((error.square().sum(), weight.square().sum())).cpu()
            start += len(piece)
        self._rows[name] = self._rows.get(name, 0) + len(rows)
        if self._rows[name] == linear.out_features:
            format, group = linear.storage
            said = {"format": format, "group_size": group or None, "relative_error": _relative(sums)}
            self._say(name, said if output_error is None else {**said, "output_error": output_error})

    def _say(self, name: str, said: dict) -> None:
        self.linears[name] = said
        groups = f", groups of {said['group_size']}" if said["group_size"] else ""
        outputs = f", of its outputs {said['output_error']:.5f}" if "output_error" in said else ""
        print(
            f"[{len(self.linears)}/{self.total}] {name}: {said['format']}{groups}, relative error "
            f"{said['relative_error']:.5f}{outputs}, {time.perf_counter() - self.start:.1f} s",
            file=sys.stderr,
        )

    def of_layer(self, path: str) -> dict[str, list]:
        """What was said of the linears of a layer, for `again`."""
        names = [name for name in self.linears if name.startswith(f"{path}.")]
        return {name: [self.linears[name], self._sums[name].tolist()] for name in names}

    def again(self, layer: dict[str, list]) -> None:
        """Say it again, in a later run."""
        for name, (said, sums) in layer.items():
            self._sums[name] = torch.tensor(sums, dtype=torch.float64)
            self._say(name, said)

    @property
    def relative_error(self) -> float:
        """Over all linears together."""
        return _relative(sum(self._sums.values()))


def _relative(sums: Tensor) -> float:
    error, weight = sums.tolist()
    return (error / weight) ** 0.5 if weight else 0.0


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoint: str = cli.option(checkpoint.DEFAULT_CHECKPOINT, "what to quantize; as for generate.py")
    output: Path | None = cli.option(None, "a directory to be made (needed)")
    method: str = cli.option(
        "rtn",
        "what chooses the codes: rtn rounds to nearest; gptq, awq for 3 or 4 bits, and smoothquant for --bits 8, whose "
        "inputs are rounded to 8 bits as well, need --calibration",
        choices=("rtn", "gptq", "awq", "smoothquant"),
    )
    alpha: float | None = cli.option(
        None,
        f"smoothquant: how much of the inputs' outliers the weights take, 0 to 1; {smoothquant.ALPHA} if not given",
    )
    bits: int = cli.option(4, "of a weight in the layers: 3, 4 or 8; the head has 8, and 3 take the memory of 4")
    format: str = cli.option("int", "of codes: int, or with --bits 8 fp (e4m3)", choices=("int", "fp"))
    group_size: int | None = cli.option(
        None,
        "with 3 or 4 bits: how many weights share a scale, 128 (default), 64 or 32; less where it does not divide rows",
    )
    symmetric: bool = cli.option(False, "with 3 or 4 bits: scales only, without zero points")
    clip: bool = cli.option(
        False, "with 3 or 4 bits, rtn or gptq: search for the range of each group that leaves the smallest error"
    )
    exclude: tuple[str, ...] = cli.option(
        (), "linears to leave as they are, as 'model.layers.0.*' or lm_head; may be given several times", metavar="GLOB"
    )
    recipe: Path | None = cli.option(
        None, 'JSON, a glob to how its linears are stored: {"*.down_proj": {"bits": 8}, ...}; the first match counts'
    )
    export: str | None = cli.option(
        None, "write GPTQ's files, which transformers and vLLM load, rather than our own", choices=EXPORTS
    )
    dtype: str = cli.option("bfloat16", "of the other weights and of 4-bit scales", choices=tuple(hardware.DTYPES))
    device: str | None = cli.option(None, "cpu, cuda, cuda:N or mps (default: the best there is)")
    calibration: Path | None = cli.option(None, "a text that a method looks at the model's activations on")
    samples: int = cli.option(128, "sequences taken from it, at random places")
    seq_len: int = cli.option(2048, "tokens in each, at most the model's context")
    seed: int = cli.option(0, "of the places")
    json: bool = cli.option(False, "print one JSON document")

    def __post_init__(self) -> None:
        random = self.checkpoint.startswith("random:")  # as random as its weights are the tokens it is calibrated on
        if self.method != "rtn" and self.calibration is None and not random:
            raise ValueError(f"--method {self.method} needs --calibration FILE, a text like those the model will read")
        if self.method == "rtn" and self.calibration is not None:
            raise ValueError(
                "--method rtn looks at no activations; leave out --calibration, or use --method gptq or --method awq"
            )
        if self.method == "awq" and (self.bits == 8 or self.format == "fp"):
            raise ValueError(
                f"--method awq goes with --bits 4 or 3 --format int; got --bits {self.bits} --format {self.format}, "
                "which --method rtn rounds with little loss"
            )
        if self.method == "smoothquant" and (self.bits, self.format) != (8, "int"):
            raise ValueError(
                f"--method smoothquant goes with --bits 8 --format int; got --bits {self.bits} --format {self.format}"
            )
        if self.alpha is not None and (self.method != "smoothquant" or not 0 <= self.alpha <= 1):
            raise ValueError(f"--alpha is from 0 to 1, and for --method smoothquant; got {self.alpha}")
        if self.output is None:
            raise ValueError("--output is missing; name the directory to be made")
        if (self.bits, self.format) not in ((3, "int"), (4, "int"), (8, "int"), (8, "fp")):
            raise ValueError(
                f"--bits {self.bits} --format {self.format} is no format; there are 3 int, 4 int, 8 int and 8 fp"
            )
        if self.bits == 8 and self.recipe is None and (self.group_size is not None or self.symmetric or self.clip):
            raise ValueError(
                "--group-size, --symmetric and --clip are for --bits 3 or 4; 8 bits have one symmetric scale a row"
            )
        if self.export is not None and self.format == "fp":
            raise ValueError(f"--export {self.export} writes integers; leave out --format fp")
        if self.clip and self.method == "awq":
            raise ValueError("--method awq searches for ranges as it is; leave out --clip")
        for name in ("samples", "seq_len"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be at least 1; got {getattr(self, name)}")
        if self.group_size not in (None, *GROUPS):
            raise ValueError(f"--group-size must be one of {', '.join(map(str, GROUPS))}; got {self.group_size}")

    def recipe_for(self, config: ModelConfig) -> Recipe:
        """How the linears of a model are to be stored; ValueError where that cannot be."""
        format = "w8a8" if self.method == "smoothquant" else f"{self.format}{self.bits}"
        head = "int8" if self.export is None else "float"
        group_size = self.group_size or GROUPS[0]
        rules = [(pattern, Storage("float")) for pattern in self.exclude]
        if self.recipe is not None:
            rules += read_rules(self.recipe, group_size)
        recipe = Recipe(
            format=format,
            head=head,
            method=self.method,
            group_size=group_size,
            symmetric=self.symmetric,
            clip=self.clip,
        )
        return with_rules(recipe, rules, config)


def round_to_nearest(
    source: checkpoint.Checkpoint,
    options: Options,
    *,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
) -> Transformer:
    """The checkpoint's weights, rounded as they stream in: the unquantized model is never held."""
    return checkpoint.load_model(source, device=device, dtype=dtype, quantize=recipe, packed=report)


def by_gptq(source: checkpoint.Checkpoint, options: Options, **where) -> Transformer:
    """The layers by GPTQ, one after another; the head rounded to nearest."""

    def choose(name: str, linear: QuantizedLinear, weight: Tensor, hessian: Tensor) -> Codes:
        return gptq.choose_codes(linear, weight, hessian)

    return _by_calibration(source, options, choose, aim=gptq.AIM, **where)


def by_awq(source: checkpoint.Checkpoint, options: Options, **where) -> Transformer:
    """The layers by AWQ, one after another; the head rounded to nearest. Errors are those of the scaled weights."""
    qk_rows = (source.config.n_heads + source.config.n_kv_heads) * source.config.head_dim

    def choose(name: str, linear: QuantizedLinear, weight: Tensor, hessian: Tensor) -> Codes:
        return awq.choose_codes(linear, weight, hessian, unclipped=qk_rows if name == "attention.qkv" else 0)

    return _by_calibration(source, options, choose, awq.fold_scales, **where)


def by_smoothquant(source: checkpoint.Checkpoint, options: Options, **where) -> Transformer:
    """The layers' weights and inputs in 8 bits, smoothed by SmoothQuant; the head's inputs stay as they are."""
    alpha = smoothquant.ALPHA if options.alpha is None else options.alpha

    def choose(name: str, linear: QuantizedLinear, weight: Tensor, hessian: Tensor) -> Codes:
        return linear.quantize(weight)

    return _by_calibration(source, options, choose, partial(smoothquant.fold_scales, alpha=alpha), **where)


def _by_calibration(
    source: checkpoint.Checkpoint,
    options: Options,
    method: Method,
    prepare: Preparation | None = None,
    *,
    aim: float | None = None,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
) -> Transformer:
    """The layers by `method` on sequences of the calibration text, the head rounded to nearest."""
    tokens = _calibration_tokens(source, options)
    model = checkpoint.load_model(source, device=device, dtype=dtype)
    _check_finite(source, model)
    work = WorkFolder(work_folder(options.output), _identity(options, recipe, model, tokens))
    if work.finished:
        print(f"goes on after layer {work.finished} of {len(model.layers)}, from {work.folder}", file=sys.stderr)
    head, weights = model.head.weight, {}

    def choose(name: str, linear: QuantizedLinear, weight: Tensor, hessian: Tensor) -> Codes:
        weights[name] = weight
        return method(name, linear, weight, hessian)

    def fill(layer: Block, *, index: int) -> None:
        report.again(work.load(index, layer))

    finished = [partial(fill, index=index) for index in range(work.finished)]
    try:
        for done in calibrate(model, tokens, recipe, choose, prepare=prepare, aim=aim, finished=finished):
            for name, error in done.errors.items():
                full_name = f"layers.{done.layer}.{name}"
                report(full_name, model.get_submodule(full_name), 0, weights[name], output_error=error)
            weights.clear()
            work.save(done.layer, model.layers[done.layer], report.of_layer(f"layers.{done.layer}"))
    except ValueError:
        work.remove()  # the same command would end here again
        raise
    except KeyboardInterrupt:
        print(f"finished layers are in {work.folder}; the same command goes on after them", file=sys.stderr)
        raise
    if isinstance(model.head, QuantizedLinear):
        report("head", model.head, 0, head)
    return model


def _calibration_tokens(source: checkpoint.Checkpoint, options: Options) -> Tensor:
    """[samples, seq_len] of the text; for random weights, of no text at all."""
    seq_len = min(options.seq_len, source.config.max_seq_len)
    if source.random and options.calibration is None:
        generator = torch.Generator().manual_seed(options.seed)
        return torch.randint(source.config.vocab_size, (options.samples, seq_len), generator=generator)
    text = source.tokenizer.encode(cli.read_text(options.calibration))
    return sample_tokens(text, samples=options.samples, seq_len=seq_len, seed=options.seed)


def _check_finite(source: checkpoint.Checkpoint, model: Transformer) -> None:
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            dtype = str(weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"{source.name}: {name} has NaN or infinity as {dtype}; take another dtype or another checkpoint"
            )


def _identity(options: Options, recipe: Recipe, model: Transformer, tokens: Tensor) -> dict[str, object]:
    """All that the result depends on, as messages name it."""
    return {
        "methods": METHODS_VERSION,
        "--method": options.method,
        "--alpha": options.alpha,
        "--dtype": options.dtype,
        "recipe (--bits, --group-size, --symmetric, --clip, --exclude, --recipe)": repr(recipe),
        "weights (--checkpoint)": fingerprint(dict(model.named_parameters())),
        "tokens (--calibration, --samples, --seq-len, --seed)": fingerprint({"": tokens}),
    }


def work_folder(output: Path) -> Path:
    """Where finished layers wait for `output` to be written."""
    output = output.expanduser().resolve()
    return output.with_name(f".{output.name}.work")


METHODS: dict[str, Callable[..., Transformer]] = {
    "rtn": round_to_nearest,
    "gptq": by_gptq,
    "awq": by_awq,
    "smoothquant": by_smoothquant,
}


def quantize(options: Options) -> dict:
    output = checkpoint.new_directory(options.output)  # fails now rather than after the work
    device, dtype = hardware.pick_device(options.device), hardware.DTYPES[options.dtype]
    source = checkpoint.open_checkpoint(options.checkpoint)
    source = source.widened or source
    checkpoint.refuse_quantized(source)
    recipe, tokenizer = options.recipe_for(source.config), None if source.random else source.tokenizer
    report = Report(sum(storage.format != "float" for storage in storages(recipe, source.config).values()))
    scheme = checkpoint.export_scheme(recipe, source.config) if options.export else None
    model = METHODS[options.method](source, options, recipe=recipe, device=device, dtype=dtype, report=report)
    files = {"tokenizer": tokenizer, "eos_ids": source.eos_ids, "sampling": source.sampling}
    checkpoint.save_model(model, output, recipe=recipe, scheme=scheme, **files)
    shutil.rmtree(work_folder(output), ignore_errors=True)  # whoever began it: there is no place for the result now
    return {
        "checkpoint": options.checkpoint,
        "output": str(output),
        "quantize": str(recipe),
        "device": hardware.device_name(device),
        "dtype": options.dtype,
        "bytes": sum(file.stat().st_size for file in output.iterdir()),
        "seconds": time.perf_counter() - report.start,
        "relative_error": report.relative_error,
        "linears": report.linears,
    }


def main(arguments: list[str]) -> None:
    parser = cli.Parser(description="Turn a checkpoint into a quantized one, which generate.py loads as any other.")
    cli.add_options(parser, Options)
    options = cli.take_options(Options, parser.parse_args(arguments))
    result = quantize(options)
    if options.json:
        cli.print_json(result)
    else:
        print(
            f"{result['output']}: {result['quantize']}, {result['bytes'] / 1e6:.1f} MB, "
            f"relative error {result['relative_error']:.5f}, {result['seconds']:.1f} s"
        )


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
