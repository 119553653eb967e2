"""Linear layers with their weights laid out for the processor once, at load."""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F

import kernels

WIDE_ROWS = 32  # from here on a multiplication is bound by arithmetic, below by reading the weights
PADDED = 16  # wide batches are filled up to a multiple: oneDNN compiles, and keeps, code for each number of rows


class Linear:
    """y = x W^T + b for x [tokens, in], in the weight's dtype.

    CPU weights are reordered into oneDNN's blocked layout: a plain `F.linear` reorders bf16 weights on every
    call, which doubles the time of a decode step.  `rows` says what to expect, so that no layout is kept in vain:

    "any"     one layout for all
    "few"     (the head, that few rows reach) our kernel's, where the processor has the instructions
    "apart"   few rows as above, and a float32 copy of the same bf16 weights for batches of WIDE_ROWS and more: some
              processors have bf16 instructions that are slower than their float32 ones (`float32_is_faster`), and
              then only small batches gain from reading half the bytes

    Few rows with a bias are rounded twice in bf16: the product, then the sum.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, rows: str = "any"):
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        self._few = kernels.FewRows.of(weight) if rows != "any" else None
        packs = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float32)
        self._packed = packs and torch.backends.mkldnn.is_available()
        self._weight = None if self._few else _pack(weight) if self._packed else weight
        self._wide = _pack(weight.float()) if self._packed and rows == "apart" else None
        self._wide_bias = None if bias is None else bias.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._wide is not None and len(x) >= WIDE_ROWS:
            return _multiply(padded(x, torch.float32), self._wide, self._wide_bias)[: len(x)].to(x.dtype)
        if self._few:
            y = self._few(x)
            return y if self._bias is None else y + self._bias
        if not self._packed:
            return F.linear(x, self._weight, self._bias)
        if len(x) < WIDE_ROWS:
            return _multiply(x, self._weight, self._bias)
        return _multiply(padded(x, x.dtype), self._weight, self._bias)[: len(x)]


def padded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [rows, width] in `dtype`, with rows of zeros up to a multiple of PADDED."""
    rows = -(-len(x) // PADDED) * PADDED
    if rows == len(x):
        return x.to(dtype)
    out = x.new_empty(rows, x.shape[1], dtype=dtype)
    out[: len(x)] = x
    out[len(x) :] = 0
    return out


@functools.cache
def float32_is_faster(rows: int = 128, width: int = 1024) -> bool:
    """Whether this processor multiplies wide batches at least a quarter faster in float32 than in bf16."""
    if not torch.backends.mkldnn.is_available():
        return False
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        weight, x = _pack(torch.ones(width, width, dtype=dtype)), torch.ones(rows, width, dtype=dtype)
        times = []
        for _ in range(7):
            started = time.perf_counter()
            _multiply(x, weight, None)
            times.append(time.perf_counter() - started)
        seconds[dtype] = sorted(times)[len(times) // 2]
    return seconds[torch.float32] * 1.25 < seconds[torch.bfloat16]


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def _multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
