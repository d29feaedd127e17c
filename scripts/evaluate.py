"""How well a model predicts text: perplexity over a file, lm-eval's tasks, and models compared.

    python -m scripts.evaluate --checkpoint CKPT --text FILE --context 1024 --json
    python -m scripts.evaluate --compare CKPT CKPT+int8 ... --text FILE --plot FILE.png

Perplexity is over consecutive windows that do not overlap: window i reads the tokens [i * context, (i + 1) * context)
and predicts the same shifted by one, with no BOS put before. Tasks that ask for the likelihood of an answer get it from
the same `score`.
"""

import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoint
import cli
import hardware
from cache import KV_DTYPES, check_kv_dtype
from generator import Answer, Generator, Request
from meter import weights_of
from model import Transformer
from quant.linears import RECIPES
from sampling import SamplingParams
from scripts import compare
from scripts.plots import check_plot
from scripts.scoring import Row, Score, note, score, windows_of
from tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoint: str = cli.option(checkpoint.DEFAULT_CHECKPOINT, "as for generate.py")
    text: Path | None = cli.option(None, "measure perplexity on this file of UTF-8 text")
    context: int = cli.option(1024, "tokens in each window of the text")
    windows: int | None = cli.option(None, "how many windows (default: all that the text has)")
    compare: tuple[str, ...] = cli.option(
        (),
        "a table of these models' size, perplexity, divergence from the first one and speed; each is what --checkpoint "
        f"takes, or that and what is done to it as it loads: CKPT+{', CKPT+'.join(compare.VARIANTS)}",
        metavar="CKPT",
        many=True,
    )
    plot: Path | None = cli.option(None, "with --compare: draw perplexity against size into this .png, .svg or .pdf")
    tasks: str | None = cli.option(None, "run these tasks of lm-eval, separated by commas")
    limit: int | None = cli.option(None, "look at this many examples of each task (default: all)")
    batch: int = cli.option(1, "windows or examples in one forward")
    compile: bool = cli.option(False, "as for generate.py")
    dtype: str = cli.option("bfloat16", "of weights and cache", choices=tuple(hardware.DTYPES))
    quantize: str | None = cli.option(None, "as for generate.py", choices=tuple(RECIPES))
    kv_dtype: str | None = cli.option(None, "as for generate.py", choices=tuple(KV_DTYPES))
    device: str | None = cli.option(None, "cpu, cuda, cuda:N or mps (default: the best there is)")
    json: bool = cli.option(False, "print one JSON document")

    def __post_init__(self) -> None:
        for name in ("context", "windows", "limit", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1; got {value}")
        if self.compare:
            self._check_compare()
        elif self.plot is not None:
            raise ValueError("--plot draws what is compared; give --compare CKPT CKPT ...")
        elif self.text is None and not self.tasks:
            raise ValueError("nothing to evaluate: give --text FILE, --tasks NAMES, or both")

    def _check_compare(self) -> None:
        if len(self.compare) < 2:
            raise ValueError(f"--compare takes a reference and models to hold against it; got {self.compare[0]} alone")
        if self.text is None:
            raise ValueError("--compare measures on a text; give --text FILE")
        for name, remedy in (
            ("checkpoint", "the first model of --compare is the reference"),
            ("quantize", "write --compare CKPT+FORMAT"),
            ("kv_dtype", "write --compare CKPT+kv-FORMAT"),
            ("tasks", "run them for one model at a time"),
            ("limit", "it is for --tasks"),
        ):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"--{name.replace('_', '-')} does not go with --compare: {remedy}")


def perplexity(model: Transformer, tokenizer: Tokenizer, rows: list[Row], o: Options) -> dict:
    """The text's figures, and how long they took, compiling apart."""
    generator = Generator(model, max_seq_len=o.context, batch_size=o.batch, compile=o.compile, kv_dtype=o.kv_dtype)
    groups = [rows[i : i + o.batch] for i in range(0, len(rows), o.batch)]
    start = time.perf_counter()
    if o.compile:
        for group in {len(group): group for group in groups}.values():
            score(generator, group)
    compile_s = time.perf_counter() - start
    start, nll, tokens = time.perf_counter(), 0.0, 0
    for done, group in enumerate(groups, 1):
        nll += sum(s.nll for s in score(generator, group))
        tokens += len(group) * o.context
        note(f"perplexity {math.exp(nll / tokens):.4f}, batch", done, len(groups))
    seconds = time.perf_counter() - start
    nbytes = sum(len(tokenizer.token_bytes(t, skip_special=False)) for row, _ in rows for t in row[1:])
    return {
        "text": str(o.text),
        "context": o.context,
        "windows": len(rows),
        "perplexity": math.exp(nll / tokens),
        "nll": nll / tokens,
        "bits_per_byte": nll / math.log(2) / nbytes if nbytes else None,
        "tokens": tokens,
        "bytes": nbytes,
        "seconds": seconds,
        "tok_s": tokens / seconds,
        "compile_s": compile_s,
    }


class TaskModel:
    """What lm-eval asks of a model; `run_tasks` makes it an `lm_eval.api.model.LM`. A request holds its `args`.

    Prompts begin with BOS where the checkpoint's tokenizer puts one, and lose their beginning where they are too long.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, eos_ids: Sequence[int], options: Options) -> None:
        super().__init__()
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.stop_ids = frozenset(eos_ids)
        self.limit = model.config.max_seq_len
        start = tokenizer.encode("")[:1]
        self.bos = start if start == [tokenizer.bos_id] else []
        # What an empty context becomes: a first token has to be predicted from something.
        self.beginning = self.bos or [t for t in (tokenizer.bos_id, *eos_ids, 0) if t is not None][:1]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The log likelihood of each continuation after its context, and whether it is what greedy decoding gives."""
        scores = self._score([self._pair(*request.args) for request in requests])
        return [(-s.nll, s.greedy) for s in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log likelihood of each whole text: every token predicted once, from as much before it as one pass has."""
        rows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = [*self.beginning, *self.tokenizer.encode(request.args[0], special=False)]
            for begin in range(1, len(tokens), self.limit):
                end = min(begin + self.limit, len(tokens))
                rows.append((tokens[max(0, end - 1 - self.limit) : end], end - begin))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, s in zip(owners, self._score(rows), strict=True):
            totals[owner] -= s.nll
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The text that answers each context, up to the first of its stop strings."""
        answers = {}
        for index, request in enumerate(requests):
            text, how = request.args
            until = how.get("until") or []
            sampled = how.get("do_sample", how.get("temperature", 0.0) > 0.0)
            new = min(how.get("max_gen_toks", 256), self.limit - 1)
            prompt = [*self.bos, *self.tokenizer.encode(text, special=False)] or self.beginning
            answers[index] = Answer(
                Request(
                    prompt=prompt[-(self.limit - new) :],
                    params=SamplingParams(
                        temperature=how.get("temperature", 1.0) if sampled else 0.0,
                        top_p=how.get("top_p", 1.0),
                        top_k=how.get("top_k", 0),
                        seed=index,
                    ),
                    max_new_tokens=new,
                    stop_ids=self.stop_ids,
                ),
                self.tokenizer,
                [until] if isinstance(until, str) else [s for s in until if s],
            )
        longest = max((len(a.request.prompt) + a.request.max_new_tokens for a in answers.values()), default=1)
        generator = self._generator(longest)
        for group in self._groups(list(answers), lambda index: len(answers[index].request.prompt), "answers"):
            by_request = {answers[index].request: answers[index] for index in group}
            for request in generator.run(list(by_request)):
                by_request[request].update()
        return [answer.text for answer in answers.values()]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """One row to score: the two are encoded together, and spaces between them belong to the continuation."""
        continuation = context[len(context.rstrip()) :] + continuation
        context = context.rstrip()
        before = [*self.bos, *self.tokenizer.encode(context, special=False)] if context else self.beginning
        whole = [*self.bos, *self.tokenizer.encode(context + continuation, special=False)]
        after = whole[len(before) :] if context else self.tokenizer.encode(continuation, special=False)
        tokens = [*before, *after][-(self.limit + 1) :]
        return tokens, min(len(after), len(tokens) - 1)

    def _score(self, rows: list[tuple[list[int], int]]) -> list[Score]:
        scores: dict[int, Score] = {}
        generator = self._generator(max((len(tokens) for tokens, _ in rows), default=1))
        for group in self._groups(list(range(len(rows))), lambda i: len(rows[i][0]), "likelihoods"):
            scores |= zip(group, score(generator, [rows[i] for i in group]), strict=True)
        return [scores[i] for i in range(len(rows))]

    def _generator(self, length: int) -> Generator:
        o = self.options
        return Generator(self.model, max_seq_len=length, batch_size=o.batch, compile=o.compile, kv_dtype=o.kv_dtype)

    def _groups(self, indices: list[int], length: Callable[[int], int], what: str) -> Iterator[list[int]]:
        """Batches of about equal lengths, the longest first, so that memory runs out at once or never."""
        indices = sorted(indices, key=length, reverse=True)
        for begin in range(0, len(indices), self.options.batch):
            group = indices[begin : begin + self.options.batch]
            yield group
            note(what, begin + len(group), len(indices))


def run_tasks(model: Transformer, tokenizer: Tokenizer, eos_ids: Sequence[int], options: Options) -> dict:
    """lm-eval's results by task."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Adapter(TaskModel, LM):
        pass

    names, manager = options.tasks.split(","), TaskManager()
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists those there are")
    adapter = Adapter(model, tokenizer, eos_ids, options)
    return simple_evaluate(adapter, tasks=names, limit=options.limit, task_manager=manager)["results"]


def evaluate(options: Options) -> dict:
    if options.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm-eval, which is not installed: pip install -e .[eval]")
    device = hardware.pick_device(options.device)
    check_kv_dtype(options.kv_dtype, device)
    start = time.perf_counter()
    source = checkpoint.open_checkpoint(options.checkpoint)
    rows: list[Row] = []
    if options.text is not None:  # before the weights are read: it may turn out too short
        limit = source.config.max_seq_len
        if options.context > limit:
            raise ValueError(f"--context {options.context} is more than the {limit} that {source.name} holds")
        tokens = source.tokenizer.encode(cli.read_text(options.text), special=False)
        rows = windows_of(tokens, context=options.context, windows=options.windows)
    dtype = hardware.DTYPES[options.dtype]
    model = checkpoint.load_model(
        source, device=device, dtype=dtype, quantize=options.quantize, progress=cli.show_progress
    )
    hardware.synchronize(device)
    result = {
        "checkpoint": options.checkpoint,
        "dtype": options.dtype,
        "quantize": options.quantize or source.quantized,
        "kv_dtype": options.kv_dtype,
        "device": hardware.device_name(device),
        "batch": options.batch,
        "compile": options.compile,
        "load_s": time.perf_counter() - start,
    }
    if rows:
        result |= perplexity(model, source.tokenizer, rows, options)
    if options.tasks:
        result["tasks"] = run_tasks(model, source.tokenizer, source.eos_ids, options)
    return result | {"peak_memory_gb": hardware.peak_memory_bytes(device) / 1e9}


def run_compare(options: Options) -> dict:
    """The figures of all models, shown as they come to people, and drawn where asked for."""
    if options.plot is not None:
        check_plot(options.plot)
    models = []
    for figures in compare.compare(options):
        models.append(figures)
        if not options.json:
            head = [compare.table_head(options.compare)] if len(models) == 1 else []
            print(*head, compare.table_line(figures, options.compare), sep="\n", flush=True)
    if options.plot is not None:
        compare.plot(models, options.plot)
    device = hardware.pick_device(options.device)
    return {
        "text": str(options.text),
        **{name: getattr(options, name) for name in ("context", "dtype", "batch", "compile")},
        "device": hardware.device_name(device),
        "models": models,
        "peak_memory_gb": hardware.peak_memory_bytes(device) / 1e9,
    }


def main(arguments: list[str]) -> None:
    parser = cli.Parser(prog="python -m scripts.evaluate", description=__doc__.split("\n\n")[0])
    cli.add_options(parser, Options)
    options = cli.take_options(Options, parser.parse_args(arguments))
    result = run_compare(options) if options.compare else evaluate(options)
    if options.json:
        cli.print_json(result)
    elif not options.compare:
        show(result)


def show(result: dict) -> None:
    print(f"{result['checkpoint']}, {weights_of(result)} on {result['device']}")
    if "perplexity" in result:
        per_byte = f", {result['bits_per_byte']:.4f} bits per byte" if result["bits_per_byte"] else ""
        print(f"perplexity     {result['perplexity']:9.4f} = {result['nll']:.5f} nats per token{per_byte}")
        print(f"over           {result['windows']:9d} windows of {result['context']} tokens, batch {result['batch']}")
        print(f"took           {result['seconds']:9.1f} s = {result['tok_s']:.0f} tok/s")
    for name, metrics in result.get("tasks", {}).items():
        values = [f"{key} {value:.4f}" for key, value in metrics.items() if isinstance(value, float)]
        print(f"{name:14} {', '.join(values)}")
    print(f"peak memory    {result['peak_memory_gb']:9.2f} GB")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
