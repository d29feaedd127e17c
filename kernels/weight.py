"""A linear's matrix as the kernels read it. `quant/README.md` defines the packed layouts."""

from typing import NamedTuple

from torch import Tensor


class Weight(NamedTuple):
    """A linear's matrix [N, K]."""

    format: str  # "float" | "int8" | "int4" | "fp8"
    data: Tensor  # float: [N, K]; int8 and fp8: int32 [N, K/4]; int4: int32 [N, 16 ceil(K/128)]
    scale: Tensor | None = None  # int8, fp8: fp32 [N]; int4: [N, K/group] in the model's dtype
    zero: Tensor | None = None  # int4 asymmetric only: [N, K/group], in steps: the code that means 0
    bias: Tensor | None = None  # [N]
    group: int = 0  # int4: how many neighbours along K share a scale: 32, 64 or 128
    int8_inputs: bool = False  # int8: what it multiplies is rounded to int8 too, where there are many rows of it

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        N, words = self.data.shape
        if self.format == "int4":
            return N, self.scale.shape[1] * self.group
        return N, words if self.format == "float" else 4 * words

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self[1:5] if t is not None)


def most_rows(format: str) -> int:
    """Up to how many rows the kernels for few rows are faster than the large product."""
    return 16 if format == "float" else 64


def block_of(format: str) -> int:
    """How many inputs have their codes in 64 bytes of a packed row."""
    return 128 if format == "int4" else 64
