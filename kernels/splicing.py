"""What position-independent reuse needs of a cache, in torch on any device: keys and values of a document that were
computed elsewhere are copied to where it stands now, and what the question looks at is found out.

The copy is the request's own: some of its tokens are computed again, in place, and others reuse the same document with
other tokens computed again.
"""

from __future__ import annotations

import torch

from kernels import reference
from kernels.cache import FP8, LayerCache
from kernels.plan import BLOCK_SIZE


def copy(cache: LayerCache, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy keys and values, as they are, from the slots `source` [n] int64 to the slots `target` [n]."""
    for cached in cache:
        if cached is not None:
            raw = cached.view(torch.uint8) if cached.dtype == FP8 else cached
            raw[target // BLOCK_SIZE, :, target % BLOCK_SIZE] = raw[source // BLOCK_SIZE, :, source % BLOCK_SIZE]


def splice(cache: LayerCache, source: torch.Tensor, target: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Copy keys and values from the slots `source` [n] int64 to the slots `target` [n], the keys turned further by cos
    and sin [n, head_dim] float32 (the first half of sin negated): turned by p and then by d is turned by p + d."""
    block, offset = source // BLOCK_SIZE, source % BLOCK_SIZE
    keys, values = (
        _at(cached, scales, block, offset)
        for cached, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
    )
    reference.write(cache, reference.rotate(keys, cos, sin), values, target)


def _at(cached: torch.Tensor, scales: torch.Tensor | None, block: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """[n, kv_heads, head_dim] float32, float64 of a float64 cache."""
    if scales is not None:
        read = cached.view(torch.uint8)[block, :, offset].view(cached.dtype)
        return read.float() * scales[block, :, offset][..., None]
    read = cached[block, :, offset]
    return read if read.dtype == torch.float64 else read.float()


def attention_received(
    query: torch.Tensor, cache: LayerCache, blocks: torch.Tensor, context: int, scale: float
) -> torch.Tensor:
    """How much each of the first `context` tokens is attended to by query [rows, heads, head_dim], turned already and
    the last `rows` of them: weights summed over rows and heads, [context] float32.  `blocks` [width] hold them."""
    rows, heads, dim = query.shape
    position = torch.arange(context, device=query.device)
    slots = blocks.long()[position // BLOCK_SIZE]
    keys = _at(cache.keys, cache.key_scales, slots, position % BLOCK_SIZE)
    group = heads // keys.shape[1]
    folded = query.to(keys.dtype).view(rows, keys.shape[1], group, dim).permute(1, 2, 0, 3).flatten(1, 2)
    scores = (folded @ keys.permute(1, 2, 0)).view(keys.shape[1], group, rows, context) * scale
    seen = position <= position[context - rows :, None]
    return scores.masked_fill(~seen, float("-inf")).softmax(-1).sum((0, 1, 2)).float()
