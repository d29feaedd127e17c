"""kernels/draw.py: the kernel draws what its twin draws."""

import pytest
import torch

from kernels.draw import draw_kernel, draw_twin

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("B", "V"), [(1, 1), (1, 5), (7, 131), (3, 1024), (5, 1025), (2, 5000), (0, 9)])
def test_the_kernel_draws_what_its_twin_draws(B: int, V: int) -> None:
    generator = torch.Generator().manual_seed(V)
    temperature = torch.tensor([0.0, 1.0, 0.5]).repeat(B)[:B, None].to(DEVICE)
    for position in (0, 1, 77, 2**31 + 5, 2**32 - 1):
        logits = torch.randn(B, V, generator=generator).to(DEVICE)
        logits[:, 1::3] = -torch.inf
        seed = torch.randint(2**62, (B, 1), generator=generator).to(DEVICE)
        at = torch.full((B, 1), position, device=DEVICE)
        got, want = (f(logits, temperature, seed, at) for f in (draw_kernel, draw_twin))
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_rows_draw_by_their_own_seed_and_position() -> None:
    logits, temperature = torch.zeros(1, 400, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    drawn = {
        draw_kernel(logits, temperature, *(torch.tensor([[x]], device=DEVICE) for x in (seed, position))).item()
        for seed in (0, 1, 2**32, 2**40 + 1)
        for position in (0, 1, 2)
    }
    assert len(drawn) > 8


def test_a_scaled_view_is_read_as_it_is_meant() -> None:
    """Logits and parameters need not be contiguous."""
    logits = torch.randn(9, 4, device=DEVICE).t()
    temperature, seed = torch.ones(4, 2, device=DEVICE)[:, :1], torch.arange(12, device=DEVICE).view(4, 3)[:, 1:2]
    at = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE).expand(4, 1)
    assert torch.equal(draw_kernel(logits, temperature, seed, at), draw_twin(logits, temperature, seed, at))
