"""Block shapes: a table measured per GPU, and a rule for what it does not have.

Nothing is tuned at start-up. `tuned.json` holds the best plan found by `python -m scripts.tune` for each matrix of the
common models on the GPUs it ran on, which stand for others of their kind. A GPU or matrix that is not in it gets the
rule's plan, derived from one thought: enough bytes in flight (16 to 32 KB of weights a program), enough programs to
fill the chip. Plans for many rows (`rows_plan` and those around it) are rules alone, whose thresholds were measured on
an H100 (README.md).
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import language
from kernels.language import triton
from kernels.weight import block_of


class Plan(NamedTuple):
    """How a kernel for a matrix is cut."""

    BN: int  # outputs in a block
    BK: int  # inputs in a block; 0 for packed weights whose words go to registers and whose programs take whole rows
    num_warps: int
    depth: int = 1  # stages of a pipeline of tiles; 64-byte blocks of a packed row that a warp takes at a time
    across: int = 0  # packed weights: how many of the warps share BK, where words go through shared memory
    splits: int = 1  # with `across`, of what adds to the residual stream: parts that the inputs are cut into


class AttentionPlan(NamedTuple):
    """How attention is cut."""

    BS: int  # cached tokens in a block
    shortest: int  # cached tokens in a split, at least
    programs: int  # in all, which splitting aims at
    num_warps: int


class PromptPlan(NamedTuple):
    """How attention of prompts is cut."""

    BM: int  # tokens times query heads in a tile
    BN: int  # cached tokens in a block
    num_warps: int
    depth: int  # blocks under way


class WidePlan(NamedTuple):
    """How a product of a packed matrix and many rows is cut."""

    BM: int  # rows of activations in a tile: a power of two, or two of them added
    BN: int  # outputs in a tile
    num_warps: int
    depth: int  # blocks under way
    splits: int = 1  # parts that the inputs are cut into


class DigitsPlan(NamedTuple):
    """How a product of a matrix of int8 and many rows of digits is cut."""

    BM: int  # rows of activations in a tile
    BN: int  # outputs in a tile
    num_warps: int
    depth: int  # blocks under way
    whole: int  # columns of tiles that take all inputs
    splits: int  # parts that the inputs are cut into for the columns after these


class RowsPlan(NamedTuple):
    """How a product of a float matrix and many rows is cut."""

    BM: int  # rows of activations in a tile
    BN: int  # rows of the matrix in a tile
    BK: int  # inputs in a block
    num_warps: int
    depth: int  # blocks under way
    splits: int = 1  # parts that the inputs are cut into
    ahead: int = 0  # inputs that are asked for into the L2 cache before the kernel before has ended


TABLE = Path(__file__).with_name("tuned.json")


HOPPER_SMS = 132  # processors of an H100 and an H200
HOPPERS = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")  # those tuned on: another Hopper GPU borrows their plans


@functools.cache
def table(gpu: str) -> dict[str, list[int]]:
    """Key -> plan for a GPU by its name; empty for one that was never tuned."""
    return json.loads(TABLE.read_text()).get(gpu, {}) if TABLE.exists() else {}


def lookup(device: torch.device, key: str) -> list[int] | None:
    """The plan that was measured for a key on this GPU, or on another Hopper where this is one; None without."""
    if device.type != "cuda":
        return None
    gpus = [torch.cuda.get_device_name(device)]
    if torch.cuda.get_device_capability(device) == (9, 0):
        gpus += HOPPERS
    return next((table(gpu)[key] for gpu in gpus if key in table(gpu)), None)


def key(format: str, M: int, N: int, K: int, mode: str) -> str:
    """The table's key for a matrix of N outputs (rows of each half for "glu") and K inputs."""
    least = 16 if M >= 8 or (M > 1 and format == "float") else 1
    rows = max(least, 1 << (M - 1).bit_length())
    return f"{format} {mode} {N}x{K} rows {rows}"


@functools.cache
def _plan(device: torch.device, format: str, M: int, N: int, K: int, mode: str, itemsize: int) -> Plan:
    known = lookup(device, key(format, M, N, K, mode)) if itemsize == 2 else None
    plan = Plan(*known) if known else rule(format, M, N, K, mode)
    if device.type != "cuda" or M == 1 or (format != "float" and not plan.across):
        return plan
    limit = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    if format == "float":
        return fit(plan, M, mode, itemsize, limit)
    depth = min(plan.depth, 1 + limit // step_bytes(plan, format, M, mode))
    return plan._replace(depth=depth) if depth > 1 and itemsize == 2 else register_rule(format, K, mode)


def step_bytes(plan: Plan, format: str, M: int, mode: str) -> int:
    """Shared memory that a step of `packed.shared_kernel` takes; a pipeline has one step less than stages."""
    rows = plan.BN * (2 if mode == "glu" else 1)
    return plan.BK * (rows // (2 if format == "int4" else 1) + 2 * max(8, 1 << (M - 1).bit_length()))


def fit(plan: Plan, M: int, mode: str, itemsize: int, limit: int) -> Plan:
    """A plan for tiles, cut down until what it keeps in shared memory is at most `limit` bytes."""
    while tile_bytes(plan, M, mode, itemsize) > limit and plan.BK > 32:
        plan = plan._replace(BK=plan.BK // 2)
    while tile_bytes(plan, M, mode, itemsize) > limit and plan.depth > 1:
        plan = plan._replace(depth=plan.depth - 1)
    return plan


def tile_bytes(plan: Plan, M: int, mode: str, itemsize: int) -> int:
    """Shared memory that a tile kernel takes at most: the pipeline's blocks of weights and of x."""
    rows = plan.BN * (2 if mode == "glu" else 1) + max(16, 1 << (M - 1).bit_length())
    return plan.depth * plan.BK * rows * itemsize


def forget() -> None:
    """Let changes of the table count."""
    _plan.cache_clear()


def rule(format: str, M: int, N: int, K: int, mode: str) -> Plan:
    """A plan by arithmetic alone."""
    halves = 2 if mode == "glu" else 1
    reach = 1 << (K - 1).bit_length()
    if M == 1 and format == "float":
        BK = min(2048, reach)
        return Plan(max(1, min(8192 // BK, 2) // halves), BK, 4 if BK >= 1024 else 1)
    if format != "float":
        return shared_rule(format, M, N, K) if M >= 8 else register_rule(format, K, mode)
    if N >= 24576:
        return Plan(64, 256, 4, 2)
    return Plan(32 if N // 32 >= 96 else 16, 128, 4, 4)


def register_rule(format: str, K: int, mode: str) -> Plan:
    """For packed words that go to registers."""
    reach = 1 << (K - 1).bit_length()
    return Plan(8 if mode == "glu" else 16, 0, max(1, min(4 if K <= 4096 else 8, reach // block_of(format))), 4)


def shared_rule(format: str, M: int, N: int, K: int) -> Plan:
    """For packed words that go through shared memory: of a row some hundred neighbouring bytes a step."""
    BM, inputs = max(8, 1 << (M - 1).bit_length()), block_of(format)
    if N >= 8192:
        return Plan(64, max(1, min(4, 8192 // (BM * inputs))) * inputs, 4, 3 if format == "int4" else 4, 1)
    across = min(4, 1 << (-(-K // inputs) - 1).bit_length())
    return Plan(32, across * inputs * (2 if format != "int4" and M <= 16 else 1), 2 * across, 5, across)


def plan(format: str, M: int, N: int, K: int, mode: str, x: Tensor) -> Plan:
    """The table's plan, or the rule's, as far as the device has shared memory for it."""
    return _plan(x.device, format, M, N, K, mode, x.element_size())


BRIEF, SHORT, MEDIUM = CONTEXTS = 256, 1024, 4096  # slots up to which attention has plans for such contexts
FEW = 16  # rows times key/value heads up to which latency counts in all of these


def attention_plan(n_kv_heads: int, head_dim: int, slots: int, x: Tensor, page: int = 0) -> AttentionPlan:
    """For a cache view of `slots` and rows x; the slots of a paged cache lie in blocks of `page`."""
    row, half, rows = head_dim * x.element_size(), x.element_size() == 2, len(x)
    spread = spreads(n_kv_heads, head_dim, rows, x, page)
    if page and not spread:
        kind = "paged" if rows * n_kv_heads <= 64 else "paged wide"
    else:
        kind = attention_kind(n_kv_heads, slots, rows)
    known = lookup(x.device, attention_key(n_kv_heads, head_dim, kind))
    plan = AttentionPlan(*known) if known and half else attention_rule(kind, row)
    if plan.BS > page > 0 and not spread:
        plan = plan._replace(BS=page, num_warps=max(plan.num_warps * page // plan.BS, 1))
    return plan


def spreads(n_kv_heads: int, head_dim: int, rows: int, x: Tensor, page: int) -> bool:
    """Whether attention of a model whose activations are as x takes slots of several of a paged cache's blocks at once.

    So it does for few rows, whose plans are those of a cache without blocks. Of wider rows or larger numbers 256 slots
    would not fit the registers; on other GPUs they were not tried.
    """
    few = rows * n_kv_heads <= FEW and head_dim <= 128
    return few and page < BRIEF and x.element_size() == 2 and language.hopper(x)


def attention_rule(kind: str, row: int) -> AttentionPlan:
    """A plan by arithmetic alone; keys of `row` bytes lie in registers.

    Rows of a paged cache differ in length: many are cut so that no long one ends last, fewer to fill the GPU.
    """
    if row <= {"brief": 256, "medium": 256, "short": 128}.get(kind, 0):
        return AttentionPlan(256, 256, 2 * HOPPER_SMS, 8)
    if row <= {"short": 256, "long": 128}.get(kind, 0):
        return AttentionPlan(128, 128, 2 * HOPPER_SMS, 4)
    BS = 64 if row <= 256 else 32
    if kind == "paged":
        return AttentionPlan(BS, 128, 2048, 2 if row <= 128 else 4)
    if kind == "paged wide":
        return AttentionPlan(BS, 256, 8 * HOPPER_SMS, 2) if row <= 128 else AttentionPlan(BS, 512, 2048, 4)
    return AttentionPlan(BS, 256 if kind == "wide" else BS, 2 * HOPPER_SMS, 4)


def attention_kind(n_kv_heads: int, slots: int, rows: int) -> str:
    """In a "brief" context, which one block holds, and a "short" one latency counts, in a "long" one bandwidth. In a
    "medium" one it is latency for few rows, whose slots all programs together hold at once; for more it is a "long
    wide" one. In a short and "wide" one there are programs enough, and it is not worth cutting into splits that have to
    be combined.
    """
    if slots > SHORT:
        if rows * n_kv_heads > FEW:
            return "long wide"
        return "medium" if slots <= MEDIUM else "long"
    if rows * n_kv_heads >= 64:
        return "wide"
    return "brief" if slots <= BRIEF else "short"


def attention_key(n_kv_heads: int, head_dim: int, kind: str) -> str:
    """The table's key for attention over that many key/value heads, of one of the kinds above."""
    return f"attention {n_kv_heads}x{head_dim} {kind}"


def prompt_plan(page: int, x: Tensor) -> PromptPlan:
    """For prompts over a paged cache with blocks of `page` slots."""
    if x.element_size() == 4:
        return PromptPlan(32, min(32, page), 4, 2)
    return PromptPlan(64, min(64, page), 4, 3)


def wide_plan(M: int, N: int, K: int) -> WidePlan:
    """For a matrix of int4 and M rows: tiles for what a Hopper's processors hold at once, if need be along K too.

    They hold as many programs in bf16 without zeros; in fp16 or with zeros registers suffice for fewer.
    """
    large = N >= 12288
    if M <= 32:
        plan, programs = WidePlan(32, 64, 4, 4 if large else 6), 3 * HOPPER_SMS
    elif M <= 64:
        small = N <= 4096
        plan, programs = WidePlan(64, 64, 4, 4 if small else 3), (2 if small else 3) * HOPPER_SMS
    elif M <= 128:
        BM = 96 if M <= 96 else 128
        plan, programs = WidePlan(BM, 128, 8, 3) if large else WidePlan(BM, 64, 4, 3), 2 * HOPPER_SMS
    elif M <= 160:
        plan, programs = WidePlan(160, 128, 8, 3), HOPPER_SMS
    else:
        plan, programs = WidePlan(96 if M <= 192 else 128, 128, 8, 3), 2 * HOPPER_SMS
    tiles = triton.cdiv(N, plan.BN) * triton.cdiv(M, plan.BM)
    return plan._replace(splits=_parts(triton.cdiv(K, 128), min(programs // tiles, K // 512)))


def _parts(blocks: int, most: int) -> int:
    """How many parts of as many blocks each to cut blocks into: at most so many, of which none is empty."""
    return triton.cdiv(blocks, triton.cdiv(blocks, max(most, 1)))


def digits_plan(M: int, N: int, K: int, digits: int) -> DigitsPlan:
    """For a matrix of int8 and M rows of so many digits, on a Hopper's 132 processors.

    A round is as many tiles as run at once. What is left after the last whole round is cut along K if it fills another
    one then.
    """
    if M <= 192 or N * K <= 1 << 25:
        BM, num_warps, depth, programs = 64, 4, 3, 2 * HOPPER_SMS  # two of them beside each other
    else:
        BM, num_warps, depth, programs = 128, 8, 4, HOPPER_SMS
    BM, BN = BM * 2 // digits, 128
    tiles, columns = triton.cdiv(M, BM), triton.cdiv(N, BN)
    whole = tiles * columns // programs * programs // tiles
    splits = max(1, min(programs // max(tiles * (columns - whole), 1), K // 1024))
    return DigitsPlan(BM, BN, num_warps, depth, columns if splits == 1 else whole, splits)


def rows_plan(M: int, N: int, K: int, *, glu: bool, add: bool) -> RowsPlan | None:
    """For a float matrix of 16 bits [N, K] and M rows on Hopper; None where another way is as fast.

    The thresholds lie between the matrices of llama-3.1-8b, qwen3-0.6b and smollm2-135m where plans for one of them
    were measured to be slower for another.
    """
    if M > 256 or K % 64:
        return None
    small, head = N * K < 1 << 23, N >= 24576 and not glu
    most = 64 if head else 256 if small else 128
    if not (16 if head else 1) < M <= most and not (glu and N >= 24576 and M > 224):
        return None
    few, wide = M <= 32, N >= 12288
    if few:  # of blocks of x, little in shared memory
        BM = 16 if M <= 16 else 32
        plan = RowsPlan(BM, 64, 128, 4, 8 if M <= 16 else 4) if wide else RowsPlan(BM, 64, 256, 4, 3)
    elif M <= 64:
        plan = RowsPlan(64, 128, 128, 4, 3) if wide else RowsPlan(64, 64 if N >= 3072 else 32, 128, 4, 4)
    elif small and M * N <= 128 * 4096:
        plan = RowsPlan(64, 64, 128, 4, 4)
    elif M <= 128:
        plan = RowsPlan(128, 128, 128, 8, 3) if wide else RowsPlan(128, 64, 128, 8, 4)
    elif small:
        plan = RowsPlan(128, 64, 128, 8, 4) if M * N <= 256 * 4096 and K % 128 == 0 else RowsPlan(128, 128, 64, 8, 4)
    else:
        plan = RowsPlan(128, 256, 64, 8, 4)
    while K % plan.BK:
        plan = plan._replace(BK=plan.BK // 2, depth=min(2 * plan.depth, 6))
    if add:
        tiles = triton.cdiv(M, plan.BM) * triton.cdiv(N, plan.BN)
        plan = plan._replace(splits=_parts(K // plan.BK, min(HOPPER_SMS // tiles, K // (2 * plan.BK), K // 256)))
    asks = (small and M <= 64) or (few and not add and not wide)  # with gate/up or down of a large model it is slower
    return plan._replace(ahead=512 if asks else 0)
