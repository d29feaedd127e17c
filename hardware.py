"""The device: choosing it, its read bandwidth, its memory, its clock.

A decoder at batch 1 is limited by reading its weights, so every speed is shown beside the read bandwidth that this
very device reaches, measured once by a short probe and kept in the cache directory.
"""

import contextlib
import itertools
import json
import mmap
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(name: str | None) -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:1", "mps"), or the best one there is."""
    mps = torch.backends.mps.is_available()
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; use cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"--device {name}: this torch {torch.__version__} sees {count} CUDA devices; use --device cpu"
            )
        torch.cuda.set_device(device.index or 0)  # where kernels are launched and graphs captured
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not mps:
        raise ValueError("--device mps: this torch has no MPS; use --device cpu")
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"unknown device {name!r}; use cpu, cuda, cuda:N or mps")
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpuinfo = Path("/proc/cpuinfo").read_text()
        name = next(
            (line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), name
        )
    return f"{name}, {torch.get_num_threads()} threads"


def has_fp8(device: torch.device) -> bool:
    """Whether float8_e4m3fn can be used: on CUDA, by a GPU that knows it (Ada, Hopper and up)."""
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)
    return device.type == "cpu"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def send(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Small arrays as tensors on `device`. For CUDA in one copy that nobody waits for."""
    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in arrays]
    if device.type != "cuda":
        return [x.to(device) for x in tensors]
    offsets = [0, *itertools.accumulate(-(-x.nbytes // 16) * 16 for x in tensors)]
    # torch gives pinned memory away again when copies from it are done, so nobody has to guard it.
    there = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=True)
    here = torch.empty(offsets[-1], dtype=torch.uint8, device=device)
    sent = []
    for x, begin in zip(tensors, offsets, strict=False):
        on_host, on_device = (y[begin : begin + x.nbytes].view(x.dtype).view(x.shape) for y in (there, here))
        on_host.copy_(x)
        sent.append(on_device)
    here.copy_(there, non_blocking=True)
    return sent


class Arrival:
    """Tensors on their way to the host, by copies that nobody waits for before `wait`."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        if not tensors[0].is_cuda:
            self.tensors = [x.to("cpu", copy=True) for x in tensors]
            return
        pinned = (torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors)
        self.tensors = [there.copy_(x, non_blocking=True) for there, x in zip(pinned, tensors, strict=True)]
        self.event = torch.cuda.Event()
        self.event.record()

    def wait(self) -> list[torch.Tensor]:
        if self.event is not None:
            self.event.synchronize()
        return self.tensors


class Arena:
    """Memory for tensors that stay: on a Linux CPU in huge pages, elsewhere torch's own.

    Streaming a model through 4 KiB pages spends more time on translating addresses than on memory: huge pages make
    a CPU's decode steps 1.3 to 1.6 times as fast. A block is only taken from the system where it is touched.
    """

    block_bytes = 1 << 28

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.block: mmap.mmap | None = None
        self.used = 0

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        nbytes = shape.numel() * dtype.itemsize
        if self.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or nbytes == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self.block is None or self.used + nbytes > len(self.block):
            self.block = mmap.mmap(-1, max(nbytes, self.block_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self.block.madvise(mmap.MADV_HUGEPAGE)
            self.used = 0
        tensor = torch.frombuffer(self.block, dtype=dtype, count=shape.numel(), offset=self.used).view(shape)
        self.used += -(-nbytes // 64) * 64  # vector loads like their cache lines whole
        return tensor


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: allocated on a CUDA device, resident on others."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def process_age() -> float | None:
    """Seconds since this process started, imports included; None where the system has no /proc."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            started = int(stat.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
            return float(uptime.read().split()[0]) - started
    except FileNotFoundError:
        return None


def read_bandwidth(device: torch.device, cache_dir: Path, seen: float = 0.0) -> float:
    """Bytes per second that `device` reads from its memory, probed once and kept in `cache_dir`/bandwidth.json.

    Where a run was `seen` to read faster, something disturbed the probe, or the run's bytes lie in the processor's
    caches: it is probed again, and the best probe is kept.
    """
    path = cache_dir / "bandwidth.json"
    key = bandwidth_key(device)
    try:
        known = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        known = {}
    if known.get(key, 0.0) < max(seen, 1.0):
        known[key] = max(known.get(key, 0.0), measure_read_bandwidth(device))
        with tempfile.NamedTemporaryFile("w", dir=cache_dir, delete=False) as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)
    return known[key]


def bandwidth_key(device: torch.device) -> str:
    return f"{device_name(device)}, torch {torch.__version__}, probe 2"


def measure_read_bandwidth(device: torch.device) -> float:
    """Median over several rounds of reading more memory than any cache holds."""
    from kernels import probe  # what only CUDA needs is not for every start

    size, passes = 2**28, 1  # bytes
    if device.type == "cuda":  # several queued passes hide the launch
        size, passes = 2**32 if torch.cuda.mem_get_info(device)[0] > 2**33 else 2**30, 4
    words = torch.ones(size // 4, device=device)
    read = probe.read if device.type == "cuda" else torch.Tensor.sum
    return size / _seconds(lambda: read(words), device, passes)


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one large matrix product: median over several."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / _seconds(lambda: a @ b, device, 4)


def _seconds(run: Callable[[], object], device: torch.device, passes: int) -> float:
    """Of one `run()`: the median over several rounds of `passes` queued ones, after two to warm up."""
    times = []
    for _ in range(9):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(passes):
            run()
        synchronize(device)
        times.append((time.perf_counter() - start) / passes)
    return statistics.median(times[2:])
