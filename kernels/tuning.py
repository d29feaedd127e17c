"""Block shapes: a table measured per GPU, and a rule for what it does not have.

Nothing is tuned at start-up. `tuned.json` holds the best plan found by `python -m scripts.tune` for each matrix of the
common models on the GPUs it ran on; a GPU or matrix that is not in it gets the rule's plan, which is derived from one
thought: enough bytes in flight (16 to 32 KB of weights a program), enough programs to fill the chip.
"""

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """How a kernel for a matrix is cut."""

    BN: int  # outputs in a block
    BK: int  # inputs in a block; packed weights with one row of activations take all of them
    num_warps: int
    depth: int = 1  # blocks that a program of packed weights takes one after another; stages of a pipeline of tiles


class AttentionPlan(NamedTuple):
    """How attention is cut."""

    BS: int  # cached tokens in a block
    shortest: int  # cached tokens in a split, at least
    programs: int  # in all, which splitting aims at
    num_warps: int


TABLE = Path(__file__).with_name("tuned.json")


HOPPER = "NVIDIA H100 80GB HBM3"  # what an H200 or another Hopper GPU does as, until it is tuned itself


@functools.cache
def table(gpu: str) -> dict[str, list[int]]:
    """Key -> plan for a GPU by its name in the table; empty for one that was never tuned."""
    return _tables().get(gpu, {})


@functools.cache
def _tables() -> dict[str, dict[str, list[int]]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def key(format: str, M: int, N: int, K: int, mode: str) -> str:
    """The table's key for a matrix of N outputs (rows of each half for "glu") and K inputs."""
    rows = "1" if M == 1 else f"{max(16, 1 << (M - 1).bit_length())}"
    return f"{format} {mode} {N}x{K} rows {rows}"


@functools.cache
def known_plan(gpu: str, format: str, M: int, N: int, K: int, mode: str) -> Plan:
    """The table's plan, or the rule's."""
    known = table(gpu).get(key(format, M, N, K, mode))
    return Plan(*known) if known else rule(format, M, N, K, mode)


def rule(format: str, M: int, N: int, K: int, mode: str) -> Plan:
    """A plan by arithmetic alone."""
    halves = 2 if mode == "glu" else 1
    reach = 1 << (K - 1).bit_length()
    if M == 1 and format == "float":
        BK = min(2048, reach)
        return Plan(max(1, min(8192 // BK, 2) // halves), BK, 4 if BK >= 1024 else 1)
    if M == 1:
        warps = min(16, max(1, reach // (32 * 16 if format != "int4" else 32 * 32)))
        BN = 4 // halves
        return Plan(BN, reach, warps, max(1, min(8, N // (BN * 528))))
    BN = 32 if N // 32 >= 96 else 16
    return Plan(BN, 128 if format == "float" else 256, 4, 4 if format == "float" else 3)


def plan(format: str, M: int, N: int, K: int, mode: str, x: Tensor) -> Plan:
    return known_plan(gpu_name(x.device), format, M, N, K, mode)


def most_rows(format: str, shape: tuple[int, int]) -> int:
    """Up to how many rows the kernels for few rows are faster than the large product."""
    return 16 if format == "float" else 64


SHORT = 1024  # slots up to which attention runs by its plan for short contexts


def attention_plan(n_kv_heads: int, head_dim: int, slots: int, x: Tensor) -> AttentionPlan:
    """For a cache view of `slots`: in a short context latency counts, in a long one bandwidth."""
    kind = "short" if slots <= SHORT else "long"
    known = table(gpu_name(x.device)).get(attention_key(n_kv_heads, head_dim, kind))
    if known and x.element_size() == 2:
        return AttentionPlan(*known)
    row = head_dim * x.element_size()  # bytes of a key; blocks of keys and values have to fit into shared memory
    if kind == "short" and row <= 128:
        return AttentionPlan(256, 256, 264, 8)
    BS = 64 if row <= 256 else 32
    return AttentionPlan(BS, BS, 264, 4)


def attention_key(n_kv_heads: int, head_dim: int, kind: str) -> str:
    """The table's key for attention over that many key/value heads; kind is "short" or "long"."""
    return f"attention {n_kv_heads}x{head_dim} {kind}"


@functools.cache
def gpu_name(device: torch.device) -> str:
    """The name by which the table may know a device."""
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device)
    return HOPPER if name not in _tables() and torch.cuda.get_device_capability(device) == (9, 0) else name


@functools.cache
def _pdl(device: torch.device) -> int:
    return 1 if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) else 0


def pdl(x: Tensor) -> int:
    """Whether kernels are launched before the one before them ends (programmatic dependent launch, Hopper and up)."""
    return 0 if "TRITON_INTERPRET" in os.environ else _pdl(x.device)
