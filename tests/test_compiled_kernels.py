"""The kernels are compiled for GPUs that need not be there: what the interpreter cannot see.

`compile_kernels` does it in a process of its own, since kernels in this one are the interpreter's.
"""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

pytest.importorskip("triton")

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # bytes that a program may have


def compiled_for(capability: int) -> dict[str, dict[str, int]]:
    """For each kernel the most that a form of it takes or leaves, see `compile_kernels.compile_all`."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.compile_kernels", str(capability)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    most: dict[str, dict[str, int]] = {}
    for form in json.loads(done.stdout.splitlines()[-1]):
        kernel = most.setdefault(form.pop("kernel"), form)
        kernel.update({name: max(kernel[name], form[name]) for name in form})
    return most


def most_shared_memory(most: dict[str, dict[str, int]]) -> int:
    return max(kernel["shared"] for kernel in most.values())


def test_every_kernel_compiles_for_a_hopper_and_fits_into_its_shared_memory() -> None:
    most = compiled_for(90)
    sources = "".join(path.read_text() for path in Path(inspect.getfile(kernels)).parent.glob("*.py"))
    launched = set(re.findall(r"^ +(\w+_kernel)\[", sources, re.MULTILINE))
    assert len(launched) > 15 and launched == most.keys()
    assert most_shared_memory(most) <= SHARED_MEMORY[90]
    assert most["_wide_kernel"]["pending"] == 0  # whose left side's registers are written again in the next turn
    assert most["_product_kernel"]["pending"] > 0  # a left side in shared memory has time: so the count sees something


def test_what_older_gpus_run_compiles_for_an_ampere() -> None:
    most = compiled_for(80)
    assert {"_vector_kernel", "_tile_kernel", "packed_kernel", "_attention_kernel", "_dequantize_kernel"} <= most.keys()
    assert most_shared_memory(most) <= SHARED_MEMORY[80]
