"""Find the best plan of each matrix of a model on this GPU, and keep it in kernels/tuned.json.

    python -m scripts.tune --checkpoint random:llama-3.1-8b --formats float,int8,int4,fp8,attention --rows 1,16

Weights are rotated through more memory than any cache holds, launches are captured in a graph as in a decode step,
and processes compile the candidates beforehand. A later start takes the plans from the table and tunes nothing.
"""

import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch

import checkpoint
import cli
import hardware
from generator import Generator, Request
from kernels import digits, linear, tuning, wide
from kernels.tuning import Plan
from kernels.weight import Weight, block_of
from model import ModelConfig, Transformer
from quant.linears import BYTES, GROUPS, NIBBLES


class Case(NamedTuple):
    """One matrix of a model, and with how many rows of activations it is used."""

    format: str
    mode: str
    N: int  # outputs: of each half for "glu"
    K: int
    rows: int

    @property
    def nbytes(self) -> int:
        bits = {"float": 16, "int8": 8, "fp8": 8, "int4": 4 + 16 / self.group}[self.format]
        return int(self.N * self.K * (2 if self.mode == "glu" else 1) * bits / 8)

    @property
    def words(self) -> int:
        """Of 32 bits, in a packed row."""
        return (NIBBLES if self.format == "int4" else BYTES).words(self.K)

    @property
    def group(self) -> int:
        """Of int4: the largest that divides a row, as a recipe takes it."""
        return next((size for size in GROUPS if self.K % size == 0), GROUPS[-1])


@dataclass(frozen=True, kw_only=True)
class Options:
    checkpoint: str = cli.option(checkpoint.DEFAULT_CHECKPOINT, "as for generate.py")
    formats: str = cli.option("float", "of float, int8, int4, fp8 and attention, separated by commas")
    rows: str = cli.option("1", "how many rows of activations, separated by commas")
    jobs: int = cli.option(min(8, os.cpu_count() or 1), "processes that compile")
    dry_run: bool = cli.option(False, "leave kernels/tuned.json as it is")
    json: bool = cli.option(False, "print one JSON document")

    def __post_init__(self) -> None:
        for format in self.formats.split(","):
            if format not in (*FORMATS, "attention"):
                raise ValueError(f"--formats has {format!r}; there are {', '.join(FORMATS)} and attention")
        if not all(count.isdecimal() and 1 <= int(count) <= 64 for count in self.rows.split(",")):
            raise ValueError(f"--rows takes numbers from 1 to 64, separated by commas; got {self.rows!r}")


FORMATS = ("float", "int8", "fp8", "int4")


def cases(config: ModelConfig, formats: list[str], rows: list[int]) -> Iterator[Case]:
    qkv = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    shapes = [
        ("store", qkv, config.dim),
        ("add", config.dim, config.n_heads * config.head_dim),
        ("glu", config.ffn_dim, config.dim),
        ("add", config.dim, config.ffn_dim),
        ("argmax", config.vocab_size, config.dim),
    ]
    for format, count, (mode, N, K) in itertools.product(formats, rows, shapes):
        if mode == "argmax" and format == "int4":
            format = "int8"  # a head has 8 bits at least
        yield Case(format, mode, N, K, count)


def tuned(case: Case) -> bool:
    """Whether what runs takes its plan from the table: on Hopper most float matrices of several rows do not, nor packed
    ones of many.
    """
    if torch.cuda.get_device_capability()[0] != 9:
        return True
    if case.format != "float":
        return case.mode == "argmax" or case.rows < (wide if case.format == "int4" else digits).LEAST_ROWS
    N, glu = case.N * (2 if case.mode == "glu" else 1), case.mode == "glu"
    return tuning.rows_plan(case.rows, N, case.K, glu=glu, add=case.mode == "add") is None


def candidates(case: Case) -> list[Plan]:
    """The plans worth a try."""
    halves = 2 if case.mode == "glu" else 1
    reach = 1 << (case.K - 1).bit_length()  # the power of two that holds a row
    small = case.N * case.K < 1 << 23
    plans = []
    if case.rows == 1 and case.format == "float":
        for BN, BK, warps in itertools.product((1, 2, 4, 8), (512, 1024, 2048, 4096, 8192), (1, 2, 4, 8)):
            block = BN * BK * halves * 2  # bytes
            if reach >= BK and (2048 if small else 4096) <= block <= 32768 and 32 <= block / (32 * warps) <= 128:
                plans.append(Plan(BN, BK, warps))
    elif case.format != "float" and case.rows >= 8:
        return shared_candidates(case)
    elif case.format != "float":
        loads = -(-case.words // 16)  # 64 bytes each, of a row
        tiles, depths = ((16, 32), (2, 4, 8)) if case.rows == 1 else ((16, 32, 64), (1,))
        for rows, warps, depth in itertools.product(tiles, (2, 4, 8, 16), depths):
            if loads <= 32 * warps and (depth - 1) * warps < loads:
                plans.append(Plan(rows // halves, 0, warps, depth))
    else:
        for BN, BK, stages in itertools.product((16, 32, 64), (64, 128, 256, 512), (2, 3, 4, 5)):
            block = BN * BK * halves * 2  # bytes
            if 4096 <= block <= 32768 and 24576 <= block * stages <= 98304 and reach >= BK:
                plans.append(Plan(BN, BK, 4, stages))
    return plans


PARTS = (1, 2, 4)  # that the inputs of what adds to the residual stream are cut into


def shared_candidates(case: Case) -> list[Plan]:
    """The plans worth a try for packed words that go through shared memory."""
    halves, inputs = 2 if case.mode == "glu" else 1, block_of(case.format)
    plans = []
    parts = PARTS if case.mode == "add" else (1,)
    for across, alongside, tiles, blocks, splits in itertools.product(
        (1, 2, 4, 8), (1, 2, 4), (1, 2), (1, 2, 4), parts
    ):
        rows, BK = 16 * alongside * tiles, inputs * across * blocks
        if not 2 <= across * alongside <= 8 or rows < 32 or 2 * BK * splits > case.K:
            continue
        if case.N * halves * splits < 96 * rows:
            continue
        for depth in (3, 4, 5, 6):
            plan = Plan(rows // halves, BK, across * alongside, depth, across, splits)
            if 49152 <= tuning.step_bytes(plan, case.format, case.rows, case.mode) * (depth - 1) <= 163840:
                plans.append(plan)
    return plans


class Bench:
    """One case's tensors: copies of the matrix that together exceed the cache."""

    def __init__(self, case: Case, copies: int) -> None:
        self.case = case
        N = case.N * (2 if case.mode == "glu" else 1)
        self.weights = []
        for _ in range(copies):
            if case.format == "float":
                self.weights.append(Weight("float", torch.randn(N, case.K, device="cuda", dtype=torch.bfloat16)))
                continue
            data = torch.randint(-(2**31), 2**31, (N, case.words), device="cuda", dtype=torch.int64).to(torch.int32)
            if case.format == "int4":
                scale, group = torch.rand(N, case.K // case.group, device="cuda").bfloat16(), case.group
            else:
                scale, group = torch.rand(N, device="cuda"), 0
            self.weights.append(Weight(case.format, data, scale, group=group))
        self.x = torch.randn(case.rows, case.K, device="cuda").bfloat16()
        self.norm = torch.ones(case.K, device="cuda").bfloat16() if case.mode != "add" else None
        self.out = torch.zeros(case.rows, case.N, device="cuda").bfloat16()
        self.parts = torch.empty(max(PARTS), case.rows, case.N, device="cuda") if case.mode == "add" else None
        if case.mode == "argmax":
            self.out = torch.full((case.rows,), linear.NOTHING, dtype=torch.int64, device="cuda")

    def launch(self, weight: Weight, plan: Plan) -> None:
        options = {"norm": self.norm, "eps": 1e-5, "plan": plan}
        if plan.splits > 1:
            parts = self.parts[: plan.splits]
            return linear.launch(self.x, weight, parts, mode="parts", **options)
        linear.launch(self.x, weight, self.out, mode=self.case.mode, **options)

    def microseconds(self, plan: Plan) -> float:
        """Median time of one launch among many in a graph."""
        self.launch(self.weights[0], plan)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in self.weights:
                self.launch(weight, plan)
        times = []
        for _ in range(7):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(self.weights))
        return statistics.median(times[2:])


def fits(plan: Plan, bench: Bench) -> bool:
    """Whether the plan can be launched: some ask for more registers or shared memory than there is."""
    from triton.runtime.errors import OutOfResources

    try:
        bench.launch(bench.weights[0], plan)
        torch.cuda.synchronize()
    except OutOfResources:
        return False
    return True


def compile_one(job: tuple[Case, Plan]) -> None:
    case, plan = job
    fits(plan, Bench(case._replace(N=max(plan.BN, 16)), 1))  # the number of rows is not compiled in


def best_plans(todo: list[Case], jobs: int) -> dict[str, dict]:
    """For each case the fastest plans by themselves, best first."""
    found = {}
    work = [(case, plan) for case in todo for plan in candidates(case)]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, work, chunksize=4))
    for case in todo:
        bench = Bench(case, max(3, min(24, -(-400_000_000 // case.nbytes))))
        plans = [plan for plan in candidates(case) if fits(plan, bench)]
        if not plans:  # a matrix too small to be worth it
            continue
        times = sorted((bench.microseconds(plan), plan) for plan in plans)
        found[tuning.key(case.format, case.rows, case.N, case.K, case.mode)] = {
            "plans": [list(plan) for _, plan in times],
            "us": times[0][0],
            "gbs": case.nbytes / times[0][0] / 1e3,
        }
    return found


def refine(options: Options, format: str, rows: int, found: dict[str, dict], keep: int = 4) -> None:
    """Choose among the best few of each matrix by the time of a whole step, where each kernel meets its neighbours."""
    source = checkpoint.open_checkpoint(options.checkpoint)
    quantize = None if format == "float" else format
    model = checkpoint.load_model(source, device="cuda", dtype=torch.bfloat16, quantize=quantize)
    table = tuning.table(torch.cuda.get_device_name())
    chosen = {key: result["plans"] for key, result in found.items()}
    table.update({key: plans[0] for key, plans in chosen.items()})
    best = step_time(model, rows)[0]
    first = best
    for key, plans in sorted(chosen.items(), key=lambda item: -found[item[0]]["us"]):
        for plan in plans[1:keep]:
            before = table[key]
            table[key] = plan
            time = step_time(model, rows)[0]
            if time < best * 0.9995:
                best = time
            else:
                table[key] = before
        found[key]["plan"] = list(table[key])
    what = f"{options.checkpoint} {format}, {rows} rows"
    print(f"{what}: a step takes {best:.1f} us, before {first:.1f}", file=sys.stderr, flush=True)


ATTENTION = [
    (32, 32, 264, 2),
    (64, 64, 264, 4),
    (128, 128, 264, 4),
    (256, 256, 264, 8),
    (64, 256, 264, 4),
    (128, 256, 264, 8),
    (32, 32, 528, 2),
]
CONTEXTS = (40, 160, 280, 2000, 8000, 30000)  # tokens to judge the plans by


def tune_attention(options: Options, rows: int) -> dict[str, list[int]]:
    """The best plans by the time of a whole step with int8 weights, where attention weighs more."""
    source = checkpoint.open_checkpoint(options.checkpoint)
    config = source.config
    contexts: dict[str, list[int]] = {}  # by the kind of plan that they take
    for length in CONTEXTS:
        if length + 64 <= config.max_seq_len:
            contexts.setdefault(tuning.attention_kind(config.n_kv_heads, length, rows), []).append(length)
    model = checkpoint.load_model(source, device="cuda", dtype=torch.bfloat16, quantize="int8")
    table = tuning.table(torch.cuda.get_device_name())
    found = {}
    for kind, lengths in contexts.items():
        key = tuning.attention_key(config.n_kv_heads, config.head_dim, kind)
        times = {}
        for plan in ATTENTION:
            table[key] = plan
            times[plan] = statistics.mean(step_time(model, rows, lengths))
        table[key] = found[key] = list(min(times, key=times.get))
        print(f"{options.checkpoint} {key}: {times}", file=sys.stderr, flush=True)
    return found


def step_time(model: Transformer, rows: int, contexts: Sequence[int] = (160,)) -> list[float]:
    """Median microseconds of a greedy decode step over some tokens of context, for each number of them."""
    tuning.forget()
    generator = Generator(model, max_seq_len=max(contexts) + 64, batch_size=rows, compile=True)
    sampling = generator.sampling_for([Request(prompt=[0]) for _ in range(rows)])
    bursts = 16 // generator.burst

    def microseconds(length: int) -> float:
        generator.input_pos.fill_(length)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(2):  # the first captures
            generator.decode(length, sampling, generator.burst)
        start.record()
        for _ in range(bursts):
            generator.decode(length, sampling, generator.burst)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3 / (bursts * generator.burst)

    with torch.no_grad():
        return [statistics.median([microseconds(length) for _ in range(7)][1:]) for length in contexts]


def main(arguments: list[str]) -> None:
    parser = cli.Parser(prog="python -m scripts.tune", description=__doc__.split("\n\n")[0])
    cli.add_options(parser, Options)
    options = cli.take_options(Options, parser.parse_args(arguments))
    if hardware.pick_device(None).type != "cuda":
        raise ValueError("tuning needs a CUDA device, and this torch sees none")
    config = checkpoint.open_checkpoint(options.checkpoint).config
    found: dict[str, dict] = {}
    for format, rows in itertools.product(options.formats.split(","), map(int, options.rows.split(","))):
        if format == "attention":
            plans = tune_attention(options, rows)
            found |= plans
            if not options.dry_run:
                save(plans)
            continue
        part = best_plans(
            [case for case in dict.fromkeys(cases(config, [format], [rows])) if tuned(case)], options.jobs
        )
        if part:
            refine(options, format, rows, part)
        for key, result in part.items():
            top = result.pop("plans")[:4]
            print(f"{key:36s} {result['us']:8.2f} us {result['gbs']:6.0f} GB/s {result['plan']} {top}", file=sys.stderr)
        found |= part
        if not options.dry_run:
            save({key: result["plan"] for key, result in part.items()})
    if options.json:
        cli.print_json({"gpu": torch.cuda.get_device_name(), "plans": found})


def save(plans: dict[str, list[int]]) -> None:
    """Add plans of this GPU to the table, one a line."""
    known = json.loads(tuning.TABLE.read_text()) if tuning.TABLE.exists() else {}
    known.setdefault(torch.cuda.get_device_name(), {}).update(plans)
    gpus = (
        f" {json.dumps(gpu)}: {{\n" + ",\n".join(f"  {json.dumps(k)}: {p}" for k, p in sorted(plans.items())) + "\n }"
        for gpu, plans in sorted(known.items())
    )
    tuning.TABLE.write_text("{\n" + ",\n".join(gpus) + "\n}\n")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
