"""Where a decode step's time goes, kernel by kernel, against what the device can read: how to find the next percent.

A decode step has to read every matrix and the live cache once, so the device's read bandwidth is its roof. `trace`
records a few replays of the step's graph with torch's profiler, `breakdown` says how far each part of the step stays
under the roof, `show` prints it. Nothing here knows how kernels work: the k-th matrix kernel of a step reads the k-th
matrix, and that is all that connects time with bytes.

The one idea: kernels overlap where each is launched before the one before it ends (programmatic dependent launch), so
durations do not add up. A kernel's own time is therefore its end minus the latest end before it, or its start if that
is later, which leaves a gap. Own times and gaps add up to the step. What a kernel read ahead during another's own time
makes it look faster and the other slower: trust the sum before the parts.
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

import checkpoint
import hardware
from generator import Generator, Request

if TYPE_CHECKING:
    from kernels.weight import Weight


class Launch(NamedTuple):
    """One kernel, copy or fill as the device ran it."""

    name: str
    start_us: float
    end_us: float


MATRIX_KERNELS = frozenset({"_vector_kernel", "packed_kernel", "shared_kernel", "_tile_kernel", "_product_kernel"})
LAYER_ROLES = ("qkv", "o", "gate_up", "down")  # a layer's matrices in the order they are read


def check(device: torch.device, *, compile: bool) -> None:
    """Refuse what has no graph of kernels to trace, before any work is done."""
    if device.type != "cuda":
        raise ValueError(f"--roofline traces kernels of a GPU and the device is {device.type!r}; use --device cuda")
    if not compile:
        raise ValueError("--roofline traces the graph of a compiled decode step; add --compile")


@torch.no_grad()
def trace(generator: Generator, requests: Sequence[Request], length: int, *, steps: int = 8) -> dict:
    """`breakdown` of `steps` decode steps of these requests' kind, as if each row held `length` tokens.

    What the cache held is overwritten from slot `length` on. ValueError where the model does not run through the
    kernels, or where the profiler sees none.
    """
    from kernels.decoder import Decoder, matrices  # Triton is imported only where it is used

    decoder, rows = generator.decoder, len(requests)
    if not isinstance(decoder, Decoder):
        raise ValueError(
            f"--roofline traces Triton kernels and this model runs as {type(decoder).__name__}; "
            "use --compile with CUDA, and install triton"
        )
    sampling = generator.sampling_for(requests)

    def run(count: int) -> None:
        for _ in range(count):
            generator.decode(length + steps, sampling)  # one graph for all of them

    generator.input_pos.fill_(length)
    run(3)  # the first compiles what is missing, the second captures the graph, the third replays it
    generator.input_pos.fill_(length)
    launches = record(lambda: run(steps), generator.device)
    generator.cached = []
    cache, n_layers = generator.cache, len(decoder.layers)
    live = (min(length, layer.heads.window or length) for layer in decoder.layers)
    result = breakdown(
        launches,
        steps=steps,
        matrices=matrices(decoder),
        attention_bytes=sum(cache.narrow(tokens, rows=rows).nbytes // n_layers for tokens in live),
        read_gbs=hardware.read_bandwidth(generator.device, checkpoint.cache_dir()) / 1e9,
        rows=rows,
    )
    return {"length": length, **result}


def record(run: Callable[[], None], device: torch.device) -> list[Launch]:
    """What the device ran during `run()`, kernels of a graph's replay one by one."""
    hardware.synchronize(device)  # what was asked for before is no part of it
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        hardware.synchronize(device)
    launches = [
        Launch(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    if not launches:
        raise ValueError(
            "--roofline: torch's profiler saw no kernel on this GPU; run without another profiler (nsys, ncu) around "
            "it, and with a torch that has CUPTI"
        )
    return launches


def breakdown(
    launches: Sequence[Launch],
    *,
    steps: int,
    matrices: "Sequence[Weight]",
    attention_bytes: int,
    read_gbs: float,
    rows: int = 1,
) -> dict:
    """The parts of one decode step, from what ran in `steps` consecutive steps of `rows` rows.

    `matrices` stand in the order a step reads them, `attention_bytes` is the live cache of all layers, `read_gbs` the
    device's read bandwidth in GB/s. Times are microseconds a step, medians over the steps (so that parts add up to
    the total but for what differs between steps), bytes are what a step has to read, and a `fraction` is of `read_gbs`.
    A part is a role, or a kernel's name where there is none; `gap_us` is the time before its kernels in which nothing
    ran. Where not each matrix has one kernel, as beyond the kernels' rows, parts are names alone and have no bytes.
    Where the launches do not divide into steps, times are means.
    """
    launches = sorted(launches, key=lambda launch: launch[1])
    names = [short_name(name) for name, _, _ in launches]
    parts = _parts(names, steps, len(matrices))
    cuts = steps if len(launches) % steps == 0 else 1
    own, gaps = _times(launches, parts, cuts)

    def middle(us: Sequence[float]) -> float:
        return statistics.median(us) * cuts / steps

    gaps_us = middle([sum(us) for us in zip(*gaps.values(), strict=True)])
    total_us = middle([sum(us) for us in zip(*own.values(), *gaps.values(), strict=True)])
    nbytes = defaultdict(int, attention=attention_bytes)
    for i, matrix in enumerate(matrices):
        nbytes[_role(i, len(matrices))] += matrix.nbytes
    table = []
    for part in own:
        us = middle(own[part])
        table.append(
            {
                "part": part,
                "kernels": list(dict.fromkeys(name for name, p in zip(names, parts, strict=True) if p == part)),
                "launches": parts.count(part) / steps,
                "us": us,
                "share": us / total_us,
                "gap_us": middle(gaps[part]),
                **_speed(nbytes.get(part), us, read_gbs),
            }
        )
    return {
        "steps": steps,
        "rows": rows,
        "parts": table,
        "gaps_us": gaps_us,
        "total_us": total_us,
        "tok_s": rows * 1e6 / total_us,
        "read_gbs": read_gbs,
        **_speed(sum(nbytes.values()), total_us, read_gbs),
    }


def _times(
    launches: Sequence[Launch], parts: Sequence[str], cuts: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Own microseconds of each part, and those of the gaps before it, in each of `cuts` equal runs of launches."""
    own = {part: [0.0] * cuts for part in parts}
    gaps = {part: [0.0] * cuts for part in parts}
    latest = launches[0][1]
    for i, (part, (_, start, end)) in enumerate(zip(parts, launches, strict=True)):
        cut = i * cuts // len(launches)
        gaps[part][cut] += max(start - latest, 0.0)
        own[part][cut] += max(end - max(start, latest), 0.0)
        latest = max(latest, end)
    return own, gaps


def _speed(nbytes: int | None, us: float, read_gbs: float) -> dict:
    gbs = nbytes / us / 1e3 if nbytes is not None and us else None
    return {"bytes": nbytes, "gbs": gbs, "fraction": None if gbs is None else gbs / read_gbs}


def _role(index: int, n_matrices: int) -> str:
    return "head" if index == n_matrices - 1 else LAYER_ROLES[index % len(LAYER_ROLES)]


def _parts(names: Sequence[str], steps: int, n_matrices: int) -> list[str]:
    """The part of the step that each launch is."""
    if sum(name in MATRIX_KERNELS for name in names) != steps * n_matrices:
        return list(names)
    parts, read = [], 0
    for name in names:
        if name in MATRIX_KERNELS:
            parts.append(_role(read % n_matrices, n_matrices))
            read += 1
        else:
            parts.append("attention" if "attention" in name else f"other:{name}")
    return parts


def short_name(name: str) -> str:
    """A kernel's own name: a C++ signature's without return type, namespaces, template and call arguments."""
    name = name.replace("(anonymous namespace)::", "")
    while (shorter := re.sub(r"<[^<>]*>", "", name)) != name:  # innermost template arguments first
        name = shorter
    name = re.sub(r"^.*\s(?=\S*::)|^void ", "", name.partition("(")[0])
    return name.rpartition("::")[2].strip()


def show(result: dict) -> str:
    """The table for people."""
    width = max(len(row["part"]) for row in result["parts"])
    total_us, launches = result["total_us"], sum(row["launches"] for row in result["parts"])
    lines = [
        f"a decode step, batch {result['rows']}, {result['length']} tokens of context, {result['steps']} steps traced",
        f"{'part':{width}}  launches        us  of step   us each  gap before        MB     GB/s  of read  kernel",
    ]
    for row in result["parts"]:
        kernels = "" if row["part"].removeprefix("other:") in row["kernels"] else ", ".join(row["kernels"])
        lines.append(
            f"{row['part']:{width}}  {row['launches']:8g}  {row['us']:8.1f}  {row['share']:7.1%}  "
            f"{row['us'] / row['launches']:8.2f}  {row['gap_us']:10.1f}  {_show_speed(row)}  {kernels}"
        )
    lines.append(f"{'gaps':{width}}  {'':8}  {result['gaps_us']:8.1f}  {result['gaps_us'] / total_us:7.1%}")
    lines.append(
        f"{'step':{width}}  {launches:8g}  {total_us:8.1f}  {1:7.1%}  {'':8}  {result['gaps_us']:10.1f}  "
        f"{_show_speed(result)}  {result['tok_s']:.1f} tok/s"
    )
    return "\n".join(line.rstrip() for line in lines)


def _show_speed(row: dict) -> str:
    if row["gbs"] is None:
        return f"{'':8}  {'':7}  {'':7}"
    return f"{row['bytes'] / 1e6:8.1f}  {row['gbs']:7.1f}  {row['fraction']:7.1%}"
