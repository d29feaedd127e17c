"""Decode speed on the CPU beside transformers and llama.cpp: the same weights in bf16, one run, alternating rounds.

    pip install transformers llama-cpp-python
    python -m scripts.bench_peers --json

Every engine is a process of its own that waits while another one runs, so that all meet the same machine; a peer
that is not installed is left out. Figures are medians of tokens per second at batch 1 after a short prompt.
"""

import contextlib
import importlib.util
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import cli

log = logging.getLogger("tachyon")

PROMPT = "Once upon a time there was a small village by the sea, and in it lived"


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoint: str = cli.option(checkpoint.DEFAULT_CHECKPOINT, "as for generate.py, with a tokenizer")
    new_tokens: int = cli.option(128, "tokens in each round")
    rounds: int = cli.option(9, "rounds of each engine")
    threads: int = cli.option(torch.get_num_threads(), "CPU threads of each engine")
    json: bool = cli.option(False, "print one JSON document")


def tachyon(path: str, ids: list[int], new: int, threads: int) -> Callable[[], float]:
    from generator import Generator, Request
    from meter import Meter

    torch.set_num_threads(threads)
    model = checkpoint.load_model(checkpoint.open_checkpoint(path), device="cpu", dtype=torch.bfloat16)
    generator = Generator(model, max_seq_len=len(ids) + new + 1, compile=True)
    generator.warm_up([Request(prompt=ids, max_new_tokens=new + 1)])

    def round() -> float:
        meter = Meter(generator)
        generator.cached = []
        for _ in meter.run([Request(prompt=ids, max_new_tokens=new + 1)]):
            pass
        return meter.decode_tokens / meter.decode_s

    return round


def transformers(path: str, ids: list[int], new: int, threads: int) -> Callable[[], float]:
    sys.modules["kernels"] = None  # ours has the name of an optional package of transformers: hide it here
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    prompt = torch.tensor([ids])

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        return time.perf_counter() - start

    return lambda: new / (seconds(new + 1) - seconds(1))


def llama_cpp(path: str, ids: list[int], new: int, threads: int) -> Callable[[], float]:
    from llama_cpp import Llama

    model = Llama(f"{path}/model.gguf", n_threads=threads, n_threads_batch=threads, n_ctx=1024, verbose=False)

    def round() -> float:
        model.reset()
        model.eval(ids)
        model.eval([model.sample(temp=0.0)])  # the first decode step after a prompt sets buffers up
        start = time.perf_counter()
        for _ in range(new):
            model.eval([model.sample(temp=0.0)])
        return new / (time.perf_counter() - start)

    return round


ENGINES = {"tachyon": tachyon, "transformers": transformers, "llama_cpp": llama_cpp}
PACKAGES = {"transformers": "transformers", "llama_cpp": "llama-cpp-python"}


def write_gguf(source: checkpoint.Checkpoint, path: Path) -> None:
    """The weights of a GGUF checkpoint as a bf16 GGUF file, metadata unchanged."""
    import gguf

    reader = gguf.GGUFReader(checkpoint.locate(source.name))
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, entry.contents(), entry.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim > 1:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(options: Options) -> dict:
    source = checkpoint.open_checkpoint(options.checkpoint)
    source = source.widened or source
    ids = source.tokenizer.encode(PROMPT)
    names = [name for name in ENGINES if name == "tachyon" or importlib.util.find_spec(name)]
    if missing := [PACKAGES[name] for name in ENGINES if name not in names]:
        log.warning(f"not compared, as they are not installed: pip install {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as path, contextlib.ExitStack() as stack:
        model = checkpoint.load_model(source, device="cpu", dtype=torch.bfloat16)
        checkpoint.save_model(model, Path(path) / "hf", tokenizer=source.tokenizer, eos_ids=source.eos_ids)
        if "llama_cpp" in names:
            if checkpoint.locate(source.name).suffix != ".gguf":
                raise ValueError(
                    f"llama.cpp reads GGUF only and {source.name} is none; use {checkpoint.DEFAULT_CHECKPOINT}"
                )
            write_gguf(source, Path(path) / "hf" / "model.gguf")
        del model
        workers = {}
        for name in names:
            worker = [name, f"{path}/hf", str(options.new_tokens), str(options.threads), ",".join(map(str, ids))]
            command = [sys.executable, "-m", "scripts.bench_peers", "--worker", *worker]
            pipe = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(pipe.kill)
            workers[name] = pipe
            _ask(name, pipe, None)  # one after another: ready, and quiet until asked
        speeds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for name, pipe in workers.items():
                speeds[name].append(float(_ask(name, pipe, "go")))
    median = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = {
        name: statistics.median(ours / theirs for ours, theirs in zip(speeds["tachyon"], values, strict=True))
        for name, values in speeds.items()
    }
    return {
        "checkpoint": options.checkpoint, "threads": options.threads, "new_tokens": options.new_tokens,
        "tok_s": median, "tachyon_times": ratios, "rounds": speeds,
    }  # fmt: skip


def _ask(name: str, pipe: subprocess.Popen, line: str | None) -> str:
    if line is not None:
        pipe.stdin.write(line + "\n")
        pipe.stdin.flush()
    answer = pipe.stdout.readline()
    if not answer:
        raise ValueError(f"{name} ended early; its error is above")
    return answer


def work(name: str, path: str, new: str, threads: str, ids: str) -> None:
    """A worker: load, say so, and run a round for every line of input."""
    round = ENGINES[name](path, [int(i) for i in ids.split(",")], int(new), int(threads))
    round()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(round(), flush=True)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--worker"]:
        return work(*arguments[1:])
    parser = cli.Parser(prog="python -m scripts.bench_peers", description=__doc__.split("\n\n")[0])
    cli.add_options(parser, Options)
    options = cli.take_options(Options, parser.parse_args(arguments))
    result = compare(options)
    if options.json:
        return cli.print_json(result)
    for name, speed in result["tok_s"].items():
        print(f"{name:14}{speed:8.1f} tok/s   tachyon is {result['tachyon_times'][name]:.2f} times that")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
