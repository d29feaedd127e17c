"""Models side by side on one text: `scripts.evaluate --compare`.

The first model is the reference. What is kept of it is the last layer's output for every token, C numbers, with its
norm and its head: the logits, V numbers a token, are made anew from that whenever another model's stand beside them.
So models are loaded one after another, and a text of any length fits.
"""

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import checkpoint
import cli
import hardware
from cache import KV_DTYPES, check_kv_dtype
from checkpoint import Checkpoint
from generator import Generator
from model import Linear, Transformer
from quant.linears import RECIPES, QuantizedLinear
from sampling import SamplingParams
from scripts import bench
from scripts.plots import picture
from scripts.scoring import Row, note, positions, windows_of

if TYPE_CHECKING:
    from scripts.evaluate import Options

VARIANTS = {  # what may follow a checkpoint after a plus
    **{name: {"quantize": name} for name in RECIPES},
    **{f"kv-{name}": {"kv_dtype": name} for name in KV_DTYPES},
}
SPEED = {"prompt_len": 32, "new_tokens": 32, "repeats": 3}  # what decoding is timed on


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model to be compared: a checkpoint, what is done to it while it loads, and what its cache is stored in."""

    name: str  # what the user wrote
    checkpoint: str
    quantize: str | None = None
    kv_dtype: str | None = None


def parse_variant(item: str) -> Variant:
    """`CKPT`, or `CKPT+VARIANT...` as in "smollm2-135m+int8"; what exists by its whole name is that file."""
    spec, changes = item, {}
    while "+" in spec and not Path(spec).expanduser().exists():
        base, _, name = spec.rpartition("+")
        if name not in VARIANTS and "@" in base:
            break  # a revision's name
        if name not in VARIANTS:
            raise ValueError(
                f"--compare {item}: no such file, and {name!r} after the plus is none of {', '.join(VARIANTS)}"
            )
        change = VARIANTS[name]
        if changes.keys() & change.keys():
            raise ValueError(f"--compare {item} asks for two things at once; leave out +{name}")
        spec, changes = base, changes | change
    return Variant(name=item, checkpoint=spec, **changes)


def compare(o: "Options") -> Iterator[dict]:
    """Each model's figures as soon as they are known; the reference is the first."""
    device, dtype = hardware.pick_device(o.device), hardware.DTYPES[o.dtype]
    variants = [parse_variant(item) for item in o.compare]
    sources = [checkpoint.open_checkpoint(variant.checkpoint) for variant in variants]
    for variant, source in zip(variants, sources, strict=True):
        check_kv_dtype(variant.kv_dtype, device)
        if variant.quantize is not None:
            checkpoint.refuse_quantized(source.widened or source)
    rows = _rows(sources, o)
    reference = None
    for variant, source in zip(variants, sources, strict=True):
        model = checkpoint.load_model(
            source, device=device, dtype=dtype, quantize=variant.quantize, progress=cli.show_progress
        )
        quantize = variant.quantize or source.quantized
        figures = {"model": variant.name, "quantize": quantize, "kv_dtype": variant.kv_dtype, **_size(model)}
        first = reference is None
        reference = reference or Reference(model)
        figures |= reference.measure(model, rows, o, variant, first=first)
        yield figures | _speed(model, o, variant.kv_dtype)
        del model
        gc.collect()  # a compiled model holds itself


def _rows(sources: Sequence[Checkpoint], o: "Options") -> list[Row]:
    """The windows of the text, which have to be the same tokens for all models."""
    text, first, tokens = cli.read_text(o.text), sources[0], None
    for source in sources:
        limit = source.config.max_seq_len
        if o.context > limit:
            raise ValueError(f"--context {o.context} is more than the {limit} that {source.name} holds")
        own = source.tokenizer.encode(text, special=False)
        tokens = tokens or own
        if own != tokens or source.config.vocab_size != first.config.vocab_size:
            raise ValueError(
                f"{first.name} and {source.name} do not read the text as the same tokens; only models with the same "
                "tokenizer and as large a vocabulary can be compared"
            )
    return windows_of(tokens, context=o.context, windows=o.windows)


def _size(model: Transformer) -> dict:
    """What the model takes in memory, and what a weight does in its linears, scales and zeros included."""
    linears = [module for module in model.modules() if isinstance(module, Linear | QuantizedLinear)]
    packed = sum(linear.nbytes for linear in linears if isinstance(linear, QuantizedLinear))
    plain = sum(linear.weight.nbytes for linear in linears if isinstance(linear, Linear))
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    held = packed + sum(parameter.nbytes for parameter in model.parameters())  # a tied head is one with the embedding
    return {"bytes": held, "bits_per_weight": 8 * (packed + plain) / weights}


def _speed(model: Transformer, o: "Options", kv_dtype: str | None) -> dict:
    limit = model.config.max_seq_len
    prompt_len = min(SPEED["prompt_len"], limit // 2)
    length = {"prompt_len": prompt_len, "new_tokens": min(SPEED["new_tokens"], limit - prompt_len)}
    options = bench.Options(**(SPEED | length), compile=o.compile, kv_dtype=kv_dtype)
    timed = bench.time_model(model, options, SamplingParams(), load_s=0.0, quantize=None)
    return {name: timed[name] for name in ("decode_tok_s", "decode_gbs", "bandwidth_fraction", "prefill_tok_s")}


class Reference:
    """What other models are held against."""

    def __init__(self, model: Transformer) -> None:
        self.logits = nn.Sequential(model.norm, model.head)
        self.hidden: list[Tensor] = []  # of every piece of `positions`, in their order, [N, C]

    @torch.no_grad()
    def measure(self, model: Transformer, rows: Sequence[Row], o: "Options", variant: Variant, *, first: bool) -> dict:
        """Perplexity of `model` on rows, mean divergence from the reference, and how often both prefer one token.

        The divergence is KL(reference || model) in nats. `first`: this is the reference, whose outputs are kept.
        """
        generator = Generator(model, max_seq_len=o.context, batch_size=o.batch, kv_dtype=variant.kv_dtype)
        nll = divergence = agreed = 0.0
        tokens, pieces = sum(count for _, count in rows), iter(self.hidden)
        for begin in range(0, len(rows), o.batch):
            for _, target, x in positions(generator, rows[begin : begin + o.batch]):
                log_q = model.logits(x[None])[0].float().log_softmax(-1)  # [N, V]
                nll -= log_q.gather(1, target[:, None]).sum().item()
                if first:
                    self.hidden.append(x.cpu())
                    agreed += len(x)
                else:
                    log_p = self.logits(next(pieces).to(x)[None])[0].float().log_softmax(-1)
                    agreed += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
                    divergence += log_q.sub_(log_p).neg_().mul_(log_p.exp_()).sum().item()
            done = min(begin + o.batch, len(rows))
            note(f"{variant.name}: window", done, len(rows), keep=False)
        return {
            "perplexity": math.exp(nll / tokens),
            "nll": nll / tokens,
            "kl": divergence / tokens,
            "agreement": agreed / tokens,
        }


# ---- For people -----------------------------------------------------------------------------------------------------

COLUMNS = {  # and how wide they are
    "size": 8,
    "bits/weight": 11,
    "perplexity": 10,
    "KL, nats/token": 14,
    "same top token": 14,
    "decode": 12,
    "memory read": 16,
}


def table_head(names: Sequence[str]) -> str:
    """Two lines of Markdown above those of `table_line`, for models of these names."""
    wide = max(map(len, names))
    titles = [f"{'model':{wide}}", *(f"{column:>{width}}" for column, width in COLUMNS.items())]
    lines = ["-" * (wide + 2), *("-" * (width + 1) + ":" for width in COLUMNS.values())]
    return f"| {' | '.join(titles)} |\n|{'|'.join(lines)}|"


def table_line(figures: dict, names: Sequence[str]) -> str:
    cells = (
        size_text(figures["bytes"]),
        f"{figures['bits_per_weight']:.2f}",
        f"{figures['perplexity']:.4f}",
        f"{figures['kl']:.5f}",
        f"{figures['agreement']:.2%}",
        f"{figures['decode_tok_s']:.1f} tok/s",
        f"{figures['decode_gbs']:.1f} GB/s, {figures['bandwidth_fraction']:.0%}",
    )
    padded = [f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True)]
    return f"| {figures['model']:{max(map(len, names))}} | {' | '.join(padded)} |"


def size_text(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def plot(models: Sequence[dict], path: Path) -> None:
    """Draw perplexity against size: a point for each model, and a line at the reference's perplexity."""
    unit, name = (1e9, "GB") if max(model["bytes"] for model in models) >= 1e9 else (1e6, "MB")
    perplexities = [model["perplexity"] for model in models]
    with picture(path, size=(9, 5.5)) as (figure, (axes,)):
        axes.axhline(perplexities[0], color="0.6", linewidth=1, linestyle="--", zorder=0)
        for i, model in enumerate(models):  # hollow, so that one point does not hide another
            style = {"marker": "osD^v+x"[i % 7], "color": f"C{i % 10}", "linestyle": "none", "fillstyle": "none"}
            axes.plot(model["bytes"] / unit, model["perplexity"], markeredgewidth=1.8, label=model["model"], **style)
        if max(perplexities) > 5 * min(perplexities):
            axes.set_yscale("log")
        axes.margins(0.08)
        axes.set_xlabel(f"size, {name}")
        axes.set_ylabel("perplexity")
        axes.grid(color="0.92")
        figure.legend(loc="outside right upper")
