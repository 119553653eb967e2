"""Every kernel in plain torch: the definition that the faster ones are checked against, and the fallback where
none can be built."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.cache import LayerCache
from kernels.plan import BLOCK_SIZE, AttentionPlan


def store(cache: LayerCache, keys: torch.Tensor, values: torch.Tensor, plan: AttentionPlan) -> None:
    """Write this step's keys and values ([tokens, kv_heads, head_dim]) into their slots."""
    block = plan.slot_mapping // BLOCK_SIZE
    offset = plan.slot_mapping % BLOCK_SIZE
    cache.keys[block, :, :, offset] = keys
    cache.values[block, :, offset, :] = values


def attend(
    query: torch.Tensor, cache: LayerCache, plan: AttentionPlan, scale: float, window: int | None = None
) -> torch.Tensor:
    """Causal attention of query [tokens, heads, head_dim] over each sequence's blocks; same shape and dtype back.

    `window`: a query sees itself and the window - 1 tokens before it (Mistral's sliding window).
    Scores and sums are float32 (float64 for float64 input).
    """
    if plan.decode_only:
        return _attend_rows(query.unsqueeze(1), cache, plan.block_tables, plan.context_lens, scale, window).squeeze(1)
    out = torch.empty_like(query)
    starts = plan.query_start.tolist()
    for s in range(len(starts) - 1):
        rows = slice(starts[s], starts[s + 1])
        used = -(-int(plan.context_lens[s]) // BLOCK_SIZE)
        out[rows] = _attend_rows(
            query[rows].unsqueeze(0),
            cache,
            plan.block_tables[s : s + 1, :used],
            plan.context_lens[s : s + 1],
            scale,
            window,
        ).squeeze(0)
    return out


def _attend_rows(query, cache, tables, context_lens, scale, window):
    """query [seqs, q, heads, head_dim], the last q tokens of each context; the heads of one KV head are
    folded into the query length, so keys and values are read once for all of them."""
    seqs, q, heads, dim = query.shape
    tables = tables.long()
    kv_heads = cache.keys.shape[1]
    group = heads // kv_heads
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = cache.keys[tables].permute(0, 2, 3, 1, 4).reshape(seqs, kv_heads, dim, -1).to(wide)
    values = cache.values[tables].permute(0, 2, 1, 3, 4).reshape(seqs, kv_heads, -1, dim).to(wide)
    folded = query.view(seqs, q, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(seqs, kv_heads, group * q, dim)
    scores = (folded.to(wide) @ keys) * scale
    key_position = torch.arange(keys.shape[-1], device=query.device)
    query_position = context_lens.long()[:, None] - q + torch.arange(q, device=query.device)
    visible = key_position[None, None, :] <= query_position[:, :, None]
    if window is not None:
        visible &= key_position[None, None, :] > query_position[:, :, None] - window
    mask = visible[:, None, None].expand(seqs, 1, group, q, -1).reshape(seqs, 1, group * q, -1)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    # a block past the context may hold anything, NaN included, and 0 * NaN is NaN
    values = torch.where(mask.any(2)[..., None], values, values.new_zeros(()))
    out = weights @ values
    return out.view(seqs, kv_heads, group, q, dim).permute(0, 3, 1, 2, 4).reshape(seqs, q, heads, dim).to(query.dtype)


def add_rms_norm(hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if delta is not None:
        hidden += delta
    return F.rms_norm(hidden, weight.shape, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, head_dim] turned by its position's cos and sign-folded sin [tokens, head_dim]."""
    return x * cos.unsqueeze(1) + x.roll(x.shape[-1] // 2, -1) * sin.unsqueeze(1)


def rotate_and_store(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: LayerCache,
    plan: AttentionPlan,
) -> torch.Tensor:
    cos, sin = cos[plan.positions], sin[plan.positions]
    store(cache, rotate(keys, cos, sin), values, plan)
    return rotate(query, cos, sin)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    scales = (wide.abs().amax(1) / 127).clamp(min=1e-12)
    return (wide / scales[:, None]).round_().add_(128).to(torch.uint8), scales


def scale_rows(x: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    y = x * scales[:, None]
    return (y if bias is None else y + bias).to(dtype)
