"""Into the paged cache in Triton: this step's keys and values to their slots, as they are or turned by their
positions first, in the cache's dtype or rounded to FP8.

A program writes one KV head of one token, and turns the query heads that share it: everything is read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.cache import LayerCache
from kernels.plan import BLOCK_SIZE, AttentionPlan

FP8_MAX = tl.constexpr(448.0)  # of float8_e4m3fn


def store(cache: LayerCache, keys: torch.Tensor, values: torch.Tensor, plan: AttentionPlan) -> None:
    """As `kernels.reference.store`; a token's heads must be contiguous, tokens may be strided."""
    _write(keys[:, :0], keys, values, None, None, None, cache, plan)


def rotate_and_store(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: LayerCache,
    plan: AttentionPlan,
) -> torch.Tensor:
    """As `kernels.reference.rotate_and_store`, with float32 products rounded once; strides as for `store`."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _write(query, keys, values, cos, sin, out, cache, plan)
    return out


def _write(query, keys, values, cos, sin, out, cache: LayerCache, plan: AttentionPlan) -> None:
    tokens, kv_heads, dim = keys.shape
    group = query.shape[1] // kv_heads
    scaled = cache.key_scales is not None
    _write_heads[(tokens, kv_heads)](
        query,
        keys,
        values,
        keys if cos is None else cos,
        keys if sin is None else sin,
        keys if out is None else out,
        cache.keys,
        cache.values,
        cache.key_scales if scaled else keys,
        cache.value_scales if scaled else keys,
        plan.positions,
        plan.slot_mapping,
        query.stride(0),
        keys.stride(0),
        values.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_PADDED=triton.next_power_of_2(max(group, 1)),
        DIM=dim,
        DIM_PADDED=triton.next_power_of_2(dim),
        BLOCK_SIZE=BLOCK_SIZE,
        ROTATES=cos is not None,
        SCALED=scaled,
        num_warps=1 if group <= 1 else 2,
    )


@triton.jit
def turn(x, turned, cos, sin):
    return x.to(tl.float32) * cos.to(tl.float32) + turned.to(tl.float32) * sin.to(tl.float32)


@triton.jit
def _put(x, cache, scales, slot, d, DIM: tl.constexpr, SCALED: tl.constexpr):
    if SCALED:
        scale = tl.maximum(tl.div_rn(tl.max(tl.where(d < DIM, tl.abs(x), 0.0), 0), FP8_MAX), 1e-12)
        tl.store(scales + slot, scale)
        x = tl.div_rn(x, scale)
    tl.store(cache + slot * DIM + d, x.to(cache.dtype.element_ty), mask=d < DIM)


@triton.jit
def _write_heads(
    query,
    new_keys,
    new_values,
    cos_table,
    sin_table,
    out,
    keys,
    values,
    key_scales,
    value_scales,
    positions,
    slots,
    query_stride,
    key_stride,
    value_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTATES: tl.constexpr,
    SCALED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    d = tl.arange(0, DIM_PADDED)
    is_d = d < DIM
    other = (d + DIM // 2) % DIM  # its partner in the rotation
    at_key = new_keys + token * key_stride + kv_head * DIM
    key = tl.load(at_key + d, mask=is_d, other=0.0).to(tl.float32)
    if ROTATES:
        position = tl.load(positions + token)
        cos = tl.load(cos_table + position * DIM + d, mask=is_d, other=0.0)
        sin = tl.load(sin_table + position * DIM + d, mask=is_d, other=0.0)
        key = turn(key, tl.load(at_key + other, mask=is_d, other=0.0), cos, sin)
        g = tl.arange(0, GROUP_PADDED)
        mask = (g < GROUP)[:, None] & is_d[None, :]
        at_query = query + token * query_stride + (kv_head * GROUP + g)[:, None] * DIM
        q = tl.load(at_query + d[None, :], mask=mask, other=0.0)
        partner = tl.load(at_query + other[None, :], mask=mask, other=0.0)
        q = turn(q, partner, cos[None, :], sin[None, :])
        at_out = out + (token * KV_HEADS * GROUP + kv_head * GROUP + g)[:, None] * DIM + d[None, :]
        tl.store(at_out, q.to(out.dtype.element_ty), mask=mask)
    slot = tl.load(slots + token)
    if slot >= 0:  # padding of a captured graph has none
        value = tl.load(new_values + token * value_stride + kv_head * DIM + d, mask=is_d, other=0.0).to(tl.float32)
        at = ((slot // BLOCK_SIZE) * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
        _put(key, keys, key_scales, at, d, DIM, SCALED)
        _put(value, values, value_scales, at, d, DIM, SCALED)
