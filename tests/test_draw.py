"""Drawing by temperature: the kernel against its twin, and both against `sampling.sample`."""

import pytest
import torch

from kernels.draw import draw_kernel, draw_twin
from sampling import SamplingBatch, SamplingParams, sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [(0.0, 0), (0.6, 1), (1.0, 2**40 + 5), (2.5, 2**63 - 1), (0.0, 7), (0.1, 123456789)]  # temperature, seed


@pytest.mark.parametrize("V", [1, 5, 4096, 4097, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_twin_and_sampling_draw_the_same(V: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    apart = torch.randn(7, V + 3, device=DEVICE) * 3
    logits = apart.to(dtype)[:, :V]  # rows are further apart than they are long
    temperature, seed = (torch.tensor(x, device=DEVICE) for x in zip(*ROWS, strict=True))
    rows = torch.tensor([3, 5, 0, 1, 4, 2, 2], device=DEVICE)  # in an order of their own, one of them twice
    position = torch.tensor([0, 1, 77, 1000, 5, 131071, 131071], device=DEVICE)
    params = [SamplingParams(temperature=ROWS[row][0], seed=ROWS[row][1]) for row in rows.tolist()]
    want = sample(logits, SamplingBatch(params, vocab_size=V, device=DEVICE), position)
    for each in (draw_twin, draw_kernel):
        out = torch.empty_like(position)
        each(logits, rows, temperature, seed, position, out)
        assert torch.equal(out, want)


def test_of_equal_logits_the_first_wins() -> None:
    pytest.importorskip("triton")
    logits = torch.zeros(1, 5000, device=DEVICE)
    logits[0, [4500, 17, 4200]] = 3.0
    zero = torch.zeros(1, device=DEVICE)
    row, out = zero.long(), torch.empty(1, dtype=torch.int64, device=DEVICE)
    draw_kernel(logits, row, zero, row, row, out)
    assert out.tolist() == [17]
