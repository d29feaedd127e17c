"""quant/linears.py on CUDA: weights that are rounded there are those that a CPU rounds to."""

import pytest
import torch

from quant.linears import round_fp8

pytestmark = pytest.mark.gpu


def test_fp8_has_the_codes_and_scales_that_it_has_on_a_cpu() -> None:
    weight = torch.randn(3000, 576) * torch.logspace(-6, 3, 3000)[:, None]
    weight[7] = 0
    on_cpu, on_cuda = round_fp8(weight), round_fp8(weight.cuda())
    assert torch.equal(on_cuda.scale.cpu(), on_cpu.scale)
    assert torch.equal(on_cuda.codes.cpu(), on_cpu.codes)
