"""The paged cache of one layer, and its layout.

K blocks are stored transposed, so that the 16 keys of a block lie side by side and a query's dot products
with all of them are one vector operation per dimension; V blocks are stored row by row, as the weighted
sum reads them.

    keys    [blocks, kv_heads, head_dim, BLOCK_SIZE]
    values  [blocks, kv_heads, BLOCK_SIZE, head_dim]

Block 0 is the null block: never given to a request.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.plan import BLOCK_SIZE


class LayerCache(NamedTuple):
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def empty(cls, blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu") -> LayerCache:
        """Not initialised: nothing is read before it is written, and memory is taken as blocks are first used."""
        return cls(
            torch.empty(blocks, kv_heads, head_dim, BLOCK_SIZE, dtype=dtype, device=device),
            torch.empty(blocks, kv_heads, BLOCK_SIZE, head_dim, dtype=dtype, device=device),
        )


def bytes_per_block(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    return 2 * layers * kv_heads * head_dim * BLOCK_SIZE * dtype.itemsize
