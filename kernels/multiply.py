"""Products with rounded weights: Triton on a GPU, the definition in torch elsewhere."""

from __future__ import annotations

import torch

from kernels import gpu, rounding
from kernels.rounding import Packed, Rounded


def multiply_rounded(x: torch.Tensor, weight: Rounded, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, inputs] times the transpose of weight [outputs, inputs] in FP8 or int8, x's rows rounded to the same on
    the way in (per-channel, per-token), plus bias [outputs]: [rows, outputs] in x's dtype."""
    if gpu.serves(x):
        from kernels.gpu import multiply

        return multiply.multiply_rounded(x, weight, bias)
    rounded, scales = rounding.round_rows(x, weight.weight.dtype)
    y = (rounded.float() @ weight.weight.float().T) * scales[:, None] * weight.scales
    return (y if bias is None else y + bias).to(x.dtype)


def multiply_packed(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, inputs] times the transpose of four-bit weights, x as it is, plus bias [outputs]: [rows, outputs] in x's
    dtype."""
    if gpu.serves(x):
        from kernels.gpu import packed

        return packed.multiply_packed(x, weight, bias)
    y = x.float() @ weight.values().T
    return (y if bias is None else y + bias).to(x.dtype)
