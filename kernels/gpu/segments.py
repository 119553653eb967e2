"""Attention over shared segments in Triton: each is read once for all of its members, whose heads are the rows of one
matrix, and the parts are merged with what every sequence has for itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.cache import LayerCache
from kernels.gpu import attention, stages
from kernels.gpu.attention import SPLITS, absorb, put_part, sequence_of
from kernels.gpu.writing import turn
from kernels.plan import BLOCK_SIZE, AttentionPlan
from kernels.segments import SharedPlan

SEGMENT_SPLITS = 8  # programs that share the tokens of a segment
SEGMENT_SPLIT = 128  # tokens that one of them takes at a time
BLOCK_M = 64  # members times heads of a group


def attend_shared(
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: LayerCache,
    plan: AttentionPlan,
    shared: SharedPlan,
    scale: float,
) -> torch.Tensor:
    """As `kernels.reference.attend_shared`, with float32 sums."""
    assert plan.few_sequences == len(plan.context_lens), "only decodes share segments"
    tokens, heads, dim = query.shape
    kv_heads = cache.keys.shape[1]
    group = heads // kv_heads
    count = SPLITS + shared.most * SEGMENT_SPLITS
    parts = torch.empty(tokens, heads, count, dim, dtype=torch.float32, device=query.device)
    lse = torch.full((tokens, heads, count), float("-inf"), device=query.device)
    turned = torch.empty_like(query, memory_format=torch.contiguous_format)
    _turn_all[(tokens, heads)](
        query, turned, cos, sin, plan.positions, query.stride(0), DIM=dim, DIM_PADDED=triton.next_power_of_2(dim)
    )
    everything = slice(0, len(plan.context_lens))
    attention.launch(turned, cache, plan, everything, tokens, scale, None, parts, lse)
    rows = max(BLOCK_M, triton.next_power_of_2(group))
    scaled = cache.key_scales is not None
    grid = (len(shared.tokens) // (rows // group) + len(shared.lengths), kv_heads, SEGMENT_SPLITS)
    _attend_segments[grid](
        query,
        cos,
        sin,
        cache.keys,
        cache.values,
        cache.key_scales if scaled else query,
        cache.value_scales if scaled else query,
        parts,
        lse,
        plan.positions,
        shared.member_start,
        shared.tokens,
        shared.shifts,
        shared.orders,
        shared.lengths,
        shared.tables,
        len(shared.lengths),
        scale,
        query.stride(0),
        shared.tables.stride(0),
        count,
        KV_HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        DIM_PADDED=max(16, triton.next_power_of_2(dim)),
        BLOCK_SIZE=BLOCK_SIZE,
        BLOCK_M=rows,
        TILE=attention.TILE,
        SPLIT=SEGMENT_SPLIT,
        SPLITS=SEGMENT_SPLITS,
        FIRST=SPLITS,
        SCALED=scaled,
        num_warps=4,
        num_stages=stages(2),
    )
    out = torch.empty_like(turned)
    attention.merge(parts, lse, out)
    return out


@triton.jit
def _turn_all(query, out, cos_table, sin_table, positions, stride, DIM: tl.constexpr, DIM_PADDED: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, DIM_PADDED)
    mask = d < DIM
    at = query + token * stride + head * DIM
    position = tl.load(positions + token)
    cos = tl.load(cos_table + position * DIM + d, mask=mask, other=0.0)
    sin = tl.load(sin_table + position * DIM + d, mask=mask, other=0.0)
    x = tl.load(at + d, mask=mask, other=0.0)
    partner = tl.load(at + (d + DIM // 2) % DIM, mask=mask, other=0.0)
    to = out + (token * tl.num_programs(1) + head) * DIM + d
    tl.store(to, turn(x, partner, cos, sin).to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["segments", "table_stride", "count"],
    do_not_specialize_on_alignment=["positions", "member_start", "tokens", "shifts", "orders", "lengths", "tables"],
)
def _attend_segments(
    query,
    cos_table,
    sin_table,
    keys,
    values,
    key_scales,
    value_scales,
    parts,
    lse,
    positions,
    member_start,
    tokens,
    shifts,
    orders,
    lengths,
    tables,
    segments,
    scale,
    query_stride,
    table_stride,
    count,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    FIRST: tl.constexpr,
    SCALED: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    TILES: tl.constexpr = SPLIT // TILE
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    segment = sequence_of(member_start, block, segments, BLOCK_Q)
    first = tl.load(member_start + segment)
    members = tl.load(member_start + segment + 1) - first
    begin = (block - first // BLOCK_Q - segment) * BLOCK_Q
    length = tl.load(lengths + segment)
    chunks = tl.cdiv(tl.maximum(tl.cdiv(length, SPLIT) - split, 0), SPLITS)
    if (begin >= members) | (chunks == 0):
        return

    row = tl.arange(0, BLOCK_M)
    member = begin + row // GROUP
    is_row = (row < BLOCK_Q * GROUP) & (member < members)
    token = tl.load(tokens + first + member, mask=is_row, other=0).to(tl.int64)
    position = tl.load(positions + token, mask=is_row, other=0)
    position -= tl.load(shifts + first + member, mask=is_row, other=0)
    order = tl.load(orders + first + member, mask=is_row, other=0)
    head = kv_head * GROUP + row % GROUP
    d = tl.arange(0, DIM_PADDED)
    is_d = d < DIM
    mask = is_row[:, None] & is_d[None, :]
    at_query = (query + token * query_stride + head * DIM)[:, None]
    q = tl.load(at_query + d[None, :], mask=mask, other=0.0)
    partner = tl.load(at_query + ((d + DIM // 2) % DIM)[None, :], mask=mask, other=0.0)
    cos = tl.load(cos_table + position[:, None] * DIM + d[None, :], mask=mask, other=0.0)
    sin = tl.load(sin_table + position[:, None] * DIM + d[None, :], mask=mask, other=0.0)
    q = turn(q, partner, cos, sin).to(query.dtype.element_ty)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)
    for i in range(0, chunks * TILES):
        key = ((i // TILES) * SPLITS + split) * SPLIT + (i % TILES) * TILE + tl.arange(0, TILE)
        is_key = key < length
        where = tl.load(tables + segment * table_stride + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        slot = (where * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
        visible = is_row[:, None] & is_key[None, :]
        top, total, acc = absorb(
            q,
            top,
            total,
            acc,
            keys,
            values,
            key_scales,
            value_scales,
            slot,
            is_key,
            visible,
            scale,
            d,
            is_d,
            DIM,
            SCALED,
        )

    at_part = (token * (KV_HEADS * GROUP) + head) * count + FIRST + order * SPLITS + split
    put_part(parts, lse, at_part, top, total, acc, is_row, d, is_d, DIM)
