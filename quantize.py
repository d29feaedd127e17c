"""Turn a checkpoint into a quantized one.

    python quantize.py --checkpoint CKPT --bits 4 --group-size 128 --output DIR

Every linear's matrix becomes codes and scales, by one of `METHODS`, and DIR a checkpoint as any other: its config.json
carries the recipe, and generate.py and the scripts load it as it is, without rounding again. What is said of each
linear is the relative error that its codes leave, ||W - W'|| / ||W|| over the whole matrix.

This file refuses to know the packed layouts (`quant/`) and the files (`checkpoint.py`). Its one idea: a method is a
function from a checkpoint and the options to a quantized model, which reports each linear as it is done.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import cli
import hardware
from model import Transformer
from quant import awq, gptq
from quant.calibrate import Method, Preparation, calibrate, sample_tokens
from quant.linears import GROUPS, PIECE, Codes, QuantizedLinear, Recipe


class Report:
    """The error that each linear's codes leave, shown on standard error as soon as all its rows have some."""

    def __init__(self, n_layers: int) -> None:
        self.linears: dict[str, dict] = {}
        self.total = 4 * n_layers + 1  # fused as they are in our model, and the head
        self.start = time.perf_counter()
        self._sums: dict[str, Tensor] = {}  # of squares, fp64 [2]: the error's and the weights'
        self._rows: dict[str, int] = {}

    def __call__(self, name: str, linear: QuantizedLinear, start: int, rows: Tensor) -> None:
        """Rows start .. start + n of the linear called `name` now stand for rows [n, K]."""
        sums = self._sums.setdefault(name, torch.zeros(2, dtype=torch.float64))
        for piece in rows.split(max(1, PIECE // linear.in_features)):
            weight = piece.float()
            error = linear.dequantize(torch.float32, slice(start, start + len(piece))) - weight
            sums += torch.stack((error.square().sum(), weight.square().sum())).cpu()
            start += len(piece)
        self._rows[name] = self._rows.get(name, 0) + len(rows)
        if self._rows[name] == linear.out_features:
            kind = {"format": linear.format, "group_size": linear.group or None}
            self.linears[name] = {**kind, "relative_error": _relative(sums)}
            groups = f", groups of {linear.group}" if linear.group else ""
            print(
                f"[{len(self.linears)}/{self.total}] {name}: {linear.format}{groups}, relative error "
                f"{_relative(sums):.5f}, {time.perf_counter() - self.start:.1f} s",
                file=sys.stderr,
            )

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
        "what chooses the codes: rtn rounds to nearest; gptq, and awq for --bits 4, need --calibration",
        choices=("rtn", "gptq", "awq"),
    )
    bits: int = cli.option(4, "of a weight in the layers: 4 or 8; the head has 8")
    format: str = cli.option("int", "of codes: int, or with --bits 8 fp (e4m3)", choices=("int", "fp"))
    group_size: int | None = cli.option(
        None,
        "with --bits 4: how many weights share a scale, 128 (default), 64 or 32; less where it does not divide rows",
    )
    symmetric: bool = cli.option(False, "with --bits 4: scales only, without zero points")
    dtype: str = cli.option("bfloat16", "of the other weights and of 4-bit scales", choices=tuple(hardware.DTYPES))
    device: str | None = cli.option(None, "cpu, cuda, cuda:N or mps (default: the best there is)")
    calibration: Path | None = cli.option(None, "a text that a method looks at the model's activations on")
    samples: int = cli.option(128, "sequences taken from it, at random places")
    seq_len: int = cli.option(2048, "tokens in each, at most the model's context")
    seed: int = cli.option(0, "of the places")
    json: bool = cli.option(False, "print one JSON document")

    def __post_init__(self) -> None:
        if self.method != "rtn" and self.calibration is None:
            raise ValueError(f"--method {self.method} needs --calibration FILE, a text like those the model will read")
        if self.method == "rtn" and self.calibration is not None:
            raise ValueError(
                "--method rtn looks at no activations; leave out --calibration, or use --method gptq or --method awq"
            )
        if self.method == "gptq" and self.format == "fp":
            raise ValueError("--method gptq chooses integers; leave out --format fp")
        if self.method == "awq" and (self.bits, self.format) != (4, "int"):
            raise ValueError(
                f"--method awq goes with --bits 4 --format int; got --bits {self.bits} --format {self.format}, "
                "which --method rtn rounds with little loss"
            )
        if self.output is None:
            raise ValueError("--output is missing; name the directory to be made")
        if (self.bits, self.format) not in ((4, "int"), (8, "int"), (8, "fp")):
            raise ValueError(f"--bits {self.bits} --format {self.format} is no format; there are 4 int, 8 int and 8 fp")
        if self.bits != 4 and (self.group_size is not None or self.symmetric):
            raise ValueError("--group-size and --symmetric are for --bits 4; 8 bits have one symmetric scale a row")
        if self.group_size not in (None, *GROUPS):
            raise ValueError(f"--group-size must be one of {', '.join(map(str, GROUPS))}; got {self.group_size}")

    @property
    def recipe(self) -> Recipe:
        format = f"{self.format}{self.bits}"
        head = "fp8" if format == "fp8" else "int8"
        if format != "int4":
            return Recipe(format=format, head=head, method=self.method)
        group_size = self.group_size or GROUPS[0]
        return Recipe(format=format, head=head, method=self.method, group_size=group_size, symmetric=self.symmetric)


def round_to_nearest(
    source: checkpoint.Checkpoint, options: Options, *, device: torch.device, dtype: torch.dtype, report: Report
) -> Transformer:
    """The checkpoint's weights, rounded as they stream in: the unquantized model is never held."""
    return checkpoint.load_model(source, device=device, dtype=dtype, quantize=options.recipe, packed=report)


def by_gptq(source: checkpoint.Checkpoint, options: Options, **where) -> Transformer:
    """The layers by GPTQ, one after another; the head rounded to nearest."""

    def choose(name: str, linear: QuantizedLinear, weight: Tensor, hessian: Tensor) -> Codes:
        return gptq.choose_codes(linear, weight, hessian)

    return _by_calibration(source, options, choose, **where)


def by_awq(source: checkpoint.Checkpoint, options: Options, **where) -> Transformer:
    """The layers by AWQ, one after another; the head rounded to nearest. Errors are those of the scaled weights."""
    qk_rows = (source.config.n_heads + source.config.n_kv_heads) * source.config.head_dim

    def choose(name: str, linear: QuantizedLinear, weight: Tensor, hessian: Tensor) -> Codes:
        return awq.choose_codes(linear, weight, hessian, unclipped=qk_rows if name == "attention.qkv" else 0)

    return _by_calibration(source, options, choose, awq.fold_scales, **where)


def _by_calibration(
    source: checkpoint.Checkpoint,
    options: Options,
    method: Method,
    prepare: Preparation | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
) -> Transformer:
    """The layers by `method` on sequences of the calibration text, the head rounded to nearest."""
    text = source.tokenizer.encode(cli.read_text(options.calibration))
    seq_len = min(options.seq_len, source.config.max_seq_len)
    tokens = sample_tokens(text, samples=options.samples, seq_len=seq_len, seed=options.seed)
    model = checkpoint.load_model(source, device=device, dtype=dtype)
    head, weights = model.head.weight, {}

    def choose(name: str, linear: QuantizedLinear, weight: Tensor, hessian: Tensor) -> Codes:
        weights[name] = weight
        return method(name, linear, weight, hessian)

    for done in calibrate(model, tokens.to(device), options.recipe, choose, prepare=prepare):
        for name, error in done.errors.items():
            full_name = f"layers.{done.layer}.{name}"
            report(full_name, model.get_submodule(full_name), 0, weights[name])
            report.linears[full_name]["output_error"] = error
        weights.clear()
    report("head", model.head, 0, head)
    return model


METHODS: dict[str, Callable[..., Transformer]] = {"rtn": round_to_nearest, "gptq": by_gptq, "awq": by_awq}


def quantize(options: Options) -> dict:
    output = checkpoint.new_directory(options.output)  # fails now rather than after the work
    device, dtype, recipe = hardware.pick_device(options.device), hardware.DTYPES[options.dtype], options.recipe
    source = checkpoint.open_checkpoint(options.checkpoint)
    source = source.widened or source
    tokenizer, report = source.tokenizer, Report(source.config.n_layers)
    model = METHODS[options.method](source, options, device=device, dtype=dtype, report=report)
    checkpoint.save_model(model, output, tokenizer=tokenizer, eos_ids=source.eos_ids, recipe=recipe)
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
