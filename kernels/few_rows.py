"""A bf16 matrix product for few rows (a decode step), where reading the weights is most of the work.

There is no torch version of it: `FewRows.of` gives None where the kernel can't be had, and the caller keeps torch's
product, which is also the definition (`torch.nn.functional.linear`).
"""

from __future__ import annotations

import ctypes

import torch

from kernels import native


class FewRows:
    """y = x W^T for x [rows, inputs] bf16: [rows, outputs] bf16, one float32 sum for each output, rounded once.

    A row's result is the same bits however many rows stand beside it.  The weight is kept in the order it is read:
    [outputs / 16, inputs / 2, 16, 2].
    """

    def __init__(self, library: ctypes.CDLL, packed: torch.Tensor):
        self._library, self._packed = library, packed

    @classmethod
    def of(cls, weight: torch.Tensor) -> FewRows | None:
        """None unless the processor has AVX512-BF16 and the weight [outputs, inputs] is bf16, with outputs a multiple
        of 16 and inputs of 2."""
        library = native.load()
        packed = None if library is None else native.pack_for_few_rows(library, weight)
        return None if packed is None else cls(library, packed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return native.multiply_few_rows(self._library, x, self._packed)
