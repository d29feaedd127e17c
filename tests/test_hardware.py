"""hardware.py: choosing a device, remembering its bandwidth, memory that stays, clocks."""

import json
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import hardware
from hardware import Arena, pick_device, read_bandwidth

CPU = torch.device("cpu")


def test_devices_are_picked_by_name() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device(None).type in ("cpu", "cuda", "mps")


def test_the_best_device_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device(None) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device(None) == pick_device("cuda") == torch.device("cuda", 0)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert current == [0, 0, 1]  # kernels are launched on the current device
    with pytest.raises(ValueError, match=r"--device cuda:2: this torch .* sees 2 CUDA devices; use --device cpu"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "meta", "xpu", "cpu cuda"])
def test_unknown_devices_list_the_known(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown device '{name}'; use cpu, cuda, cuda:N or mps"):
        pick_device(name)


def test_devices_that_are_not_there_name_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--device cuda: .* sees 0 CUDA devices; use --device cpu"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="--device mps: this torch has no MPS; use --device cpu"):
        pick_device("mps")


# ---- Bandwidth ------------------------------------------------------------------------------------------------------


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that were probed; each probe finds one GB/s more."""
    probed: list[torch.device] = []

    def measure(device: torch.device) -> float:
        probed.append(device)
        return 1e9 * len(probed)

    monkeypatch.setattr(hardware, "measure_read_bandwidth", measure)
    return probed


def test_bandwidth_is_probed_once_for_each_device(
    probes: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [read_bandwidth(CPU, tmp_path) for _ in range(3)] == [1e9] * 3
    assert len(probes) == 1
    name = hardware.device_name(CPU)
    monkeypatch.setattr(hardware, "device_name", lambda device: "another")
    assert read_bandwidth(CPU, tmp_path) == 2e9
    monkeypatch.setattr(hardware, "device_name", lambda device: name)
    assert read_bandwidth(CPU, tmp_path) == 1e9
    assert [path.name for path in tmp_path.iterdir()] == ["bandwidth.json"]
    assert len(json.loads((tmp_path / "bandwidth.json").read_text())) == 2


def test_a_run_that_reads_faster_than_the_probe_has_it_taken_again(probes: list, tmp_path: Path) -> None:
    assert read_bandwidth(CPU, tmp_path, seen=5e9) == 1e9  # nothing was known
    assert read_bandwidth(CPU, tmp_path, seen=1e9) == 1e9
    assert read_bandwidth(CPU, tmp_path, seen=5e9) == 2e9
    known = json.loads((tmp_path / "bandwidth.json").read_text())
    assert list(known.values()) == [2e9] and len(probes) == 2
    (tmp_path / "bandwidth.json").write_text(json.dumps(dict.fromkeys(known, 4e9)))
    assert read_bandwidth(CPU, tmp_path, seen=5e9) == 4e9  # the third probe found 3e9


@pytest.mark.parametrize("damage", ["", "{", "\x00"])
def test_a_damaged_record_is_written_anew(probes: list, tmp_path: Path, damage: str) -> None:
    (tmp_path / "bandwidth.json").write_text(damage)
    assert read_bandwidth(CPU, tmp_path) == read_bandwidth(CPU, tmp_path) == 1e9
    assert len(probes) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_cache_that_cannot_be_written_is_an_os_error(probes: list, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        read_bandwidth(CPU, tmp_path)


def test_a_cache_that_is_not_there_is_an_os_error(probes: list, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        read_bandwidth(CPU, tmp_path / "missing")


def test_the_probe_finds_a_plausible_bandwidth() -> None:
    assert 1e8 < hardware.measure_read_bandwidth(CPU) < 1e13


# ---- Memory ---------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64)


def test_arena_tensors_have_their_shape_and_do_not_touch_each_other() -> None:
    arena = Arena(CPU)
    shapes = [(3,), (5, 7), (1, 1, 1), (64, 2), (13,)] * 8
    tensors = [arena.empty(torch.Size(s), DTYPES[i % len(DTYPES)]).fill_(i) for i, s in enumerate(shapes)]
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, DTYPES[i % len(DTYPES)], True)
        assert tensor.data_ptr() % 64 == 0
        assert (tensor == i).all()


def test_values_survive_the_arena_and_new_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arena, "block_bytes", mmap.PAGESIZE)
    arena = Arena(CPU)
    size = mmap.PAGESIZE // 4
    counts = [size // 2, size // 2, 1, 5 * size, size, 3]  # fills a block, begins one, is larger than one, ...
    tensors = [arena.empty(torch.Size([n]), torch.float32).fill_(i) for i, n in enumerate(counts)]
    del arena
    for i, tensor in enumerate(tensors):
        assert (tensor == i).all()
        assert tensor.numel() == counts[i]


def test_arena_gives_empty_and_scalar_tensors() -> None:
    arena = Arena(CPU)
    assert arena.empty(torch.Size([0, 4]), torch.float32).shape == (0, 4)
    assert arena.empty(torch.Size([]), torch.float32).fill_(2.0).item() == 2.0


def test_peak_memory_and_process_age_are_sane() -> None:
    assert 10e6 < hardware.peak_memory_bytes(CPU) < 1e12
    first, second = hardware.process_age(), hardware.process_age()
    assert 0.0 < first <= second < 7 * 24 * 3600


def test_the_devices_name_says_how_many_threads_there_are() -> None:
    assert hardware.device_name(CPU).endswith(f", {torch.get_num_threads()} threads")


# ---- Between host and device -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_arrays_of_all_sizes_and_types_are_sent_in_one_copy(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty  # as if there were a GPU
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, pin_memory=False, device=None: empty(*shape, dtype=dtype))
    arrays = [
        np.arange(3, dtype=np.int64),
        np.zeros((0, 4), dtype=np.float32),
        np.arange(6, dtype=np.int32).reshape(2, 3).T,  # not contiguous
        np.array([[0.5], [np.inf]], dtype=np.float32),
        np.array([], dtype=np.int64),
        np.array([True, False, True]),
        np.array([2**62], dtype=np.int64),
    ]
    sent = hardware.send(torch.device(device), *arrays)
    assert len(sent) == len(arrays)
    for got, want in zip(sent, arrays, strict=True):
        assert got.shape == want.shape and np.array_equal(got.numpy(), want) and got.numpy().dtype == want.dtype
    assert hardware.send(torch.device(device)) == []


def test_tensors_arrive_on_the_host() -> None:
    x, y = torch.arange(3), torch.ones(2, 2)
    got = hardware.Arrival(x, y).wait()
    assert torch.equal(got[0], x) and torch.equal(got[1], y)
