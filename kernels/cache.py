"""The paged cache of one layer, and its layout.

    keys, values    [blocks, kv_heads, BLOCK_SIZE, head_dim]

On a CPU the keys of a block are stored transposed (a stride, not a shape), so that its 16 keys lie side by side and a
query's dot products with all of them are one vector operation per dimension.  A cache in FP8 keeps a scale for each
token's head beside it: nothing to calibrate, and a token never rounds another one again.

Block 0 is the null block: never given to a request.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels import gpu
from kernels.plan import BLOCK_SIZE

FP8 = torch.float8_e4m3fn


class LayerCache(NamedTuple):
    """`key_scales` and `value_scales` [blocks, kv_heads, BLOCK_SIZE] float32 where keys and values are FP8."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> LayerCache:
        """Not initialised: nothing is read before it is written, and memory is taken as blocks are first used."""

        def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        values = new(blocks, kv_heads, BLOCK_SIZE, head_dim)
        if dtype == FP8:
            scales = [new(blocks, kv_heads, BLOCK_SIZE, dtype=torch.float32) for _ in range(2)]
            return cls(torch.empty_like(values), values, *scales)
        if gpu.serves(values):
            return cls(torch.empty_like(values), values)
        return cls(new(blocks, kv_heads, head_dim, BLOCK_SIZE).transpose(2, 3), values)


def bytes_per_block(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    scale = torch.float32.itemsize if dtype == FP8 else 0
    return 2 * layers * kv_heads * BLOCK_SIZE * (head_dim * dtype.itemsize + scale)
