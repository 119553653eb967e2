"""Paged attention in Triton: one kernel for prefill chunks and decodes, launched once for each kind.

A program takes BLOCK_Q query tokens of one sequence with all the heads that share a KV head, packed as the rows of one
matrix (GQA packing, as FlashAttention's and vLLM's unified Triton kernel do), and walks the keys with a running softmax
(Milakov and Gimelshein 2018; FlashAttention, Dao 2022).

The few query tokens of a decode don't fill a GPU, so SPLITS programs share their context (Flash-Decoding, Dao 2023):
program i takes the chunks i, i + SPLITS, ... of SPLIT tokens, and `_merge` weighs the parts by their log-sum-exp.
Chunks are counted from the start of the context and their number is fixed, so what a token reads is summed in the same
order whatever else is in the batch, and grids depend on shapes alone, as CUDA graphs need it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.cache import LayerCache
from kernels.gpu import stages
from kernels.plan import BLOCK_SIZE, AttentionPlan

SPLITS = 16
SPLIT = 128  # tokens
TILE = 64  # tokens that a program reads at a time
LONG_BLOCK_M = 64  # rows of a program: query tokens times heads of a group
LOG2_E = tl.constexpr(1.4426950408889634)


def attend(
    query: torch.Tensor, cache: LayerCache, plan: AttentionPlan, scale: float, window: int | None = None
) -> torch.Tensor:
    """As `kernels.reference.attend`, with float32 sums; a sequence without context gives zeros."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    sequences, tokens = plan.few_sequences, plan.few_tokens
    if sequences:
        heads, dim = query.shape[1:]
        parts = torch.empty(tokens, heads, SPLITS, dim, dtype=torch.float32, device=query.device)
        lse = torch.empty(tokens, heads, SPLITS, dtype=torch.float32, device=query.device)
        launch(query, cache, plan, slice(0, sequences), tokens, scale, window, parts, lse)
        merge(parts, lse, out[:tokens])
    if sequences < len(plan.context_lens):
        rest = slice(sequences, len(plan.context_lens))
        launch(query, cache, plan, rest, len(query), scale, window, out, None)  # a replayed plan has fewer decodes
    return out


def launch(query, cache, plan, which: slice, tokens: int, scale, window, out, lse) -> None:
    """The sequences `which` of `plan`, with at most `tokens` in all.  With `lse` [tokens, heads, parts] float32: SPLITS
    parts of each to out [tokens, heads, parts, head_dim] float32 and there, as `merge` reads them."""
    heads, dim = query.shape[1:]
    kv_heads = cache.keys.shape[1]
    group = heads // kv_heads
    split = lse is not None
    rows = max(16 if split else LONG_BLOCK_M, triton.next_power_of_2(group))
    sequences = which.stop - which.start
    scaled = cache.key_scales is not None
    paired = scaled and split and query.dtype == torch.bfloat16
    keys, values = (x.view(torch.int16) if paired else x for x in (cache.keys, cache.values))
    _attend[(tokens // (rows // group) + sequences, kv_heads, SPLITS if split else 1)](
        query,
        keys,
        values,
        cache.key_scales if scaled else query,
        cache.value_scales if scaled else query,
        out,
        lse if split else out,
        plan.query_start[which.start :],
        plan.context_lens[which],
        plan.block_tables[which],
        sequences,
        scale,
        query.stride(0),
        plan.block_tables.stride(0),
        lse.shape[2] if split else 1,
        WINDOW=window or 0,
        KV_HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        DIM_PADDED=max(16, triton.next_power_of_2(dim)),
        BLOCK_SIZE=BLOCK_SIZE,
        BLOCK_M=rows,
        TILE=TILE,
        SPLIT=SPLIT if split else TILE,
        SPLITS=SPLITS if split else 1,
        SCALED=scaled,
        PAIRED=paired,
        num_warps=2 if paired else 4,
        num_stages=stages(3 if paired else 2),
    )


def merge(parts: torch.Tensor, lse: torch.Tensor, out: torch.Tensor) -> None:
    """Attention over the union of what `parts` [tokens, heads, parts, head_dim] float32 attended to, into
    out [tokens, heads, head_dim]; `lse` [tokens, heads, parts] are the logarithms to base 2 of their sums of
    exponentials, -inf for an empty part, whose values aren't read."""
    tokens, heads, count, dim = parts.shape
    _merge[(tokens * heads,)](
        parts,
        lse,
        out,
        count,
        DIM=dim,
        DIM_PADDED=triton.next_power_of_2(dim),
        PARTS=triton.next_power_of_2(count),
        num_warps=4,
    )


@triton.jit
def sequence_of(query_start, block, sequences, BLOCK_Q: tl.constexpr):
    """The sequence that a block of queries belongs to.  Sequence s owns the blocks from (query_start[s] -
    query_start[0]) // BLOCK_Q + s on, which leaves room for each one's last, partly filled block."""
    base = tl.load(query_start)
    low = 0
    high = sequences
    while low < high:
        middle = (low + high) // 2
        if (tl.load(query_start + middle) - base) // BLOCK_Q + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def absorb(
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
    DIM: tl.constexpr,
    SCALED: tl.constexpr,
):
    """A tile of keys and values at the places `slot` of the cache, taken into the running softmax: its largest score to
    base 2, the sum of exponentials, and the weighted sum of values, of each row of q."""
    at = slot[:, None] * DIM + d[None, :]
    mask = is_key[:, None] & is_d[None, :]
    # what lies past the context may be anything, NaN included, and 0 * NaN is NaN
    k = tl.load(keys + at, mask=mask, other=0.0).to(q.dtype)
    v = tl.load(values + at, mask=mask, other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
    if SCALED:
        scores *= tl.load(key_scales + slot, mask=is_key, other=0.0)[None, :]
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf is NaN
    weights = tl.exp2(scores - anchor[:, None])
    decay = tl.exp2(top - anchor)
    total = total * decay + tl.sum(weights, 1)
    if SCALED:
        weights *= tl.load(value_scales + slot, mask=is_key, other=0.0)[None, :]
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _even(pairs):
    """The first of two FP8 numbers in an int16, as a bf16 of 2 ** -120 of it: their exponents are biased by 7 and by
    127, and all the rest of the bits is the same, for the smallest numbers as well."""
    return (((pairs & 0x80) << 8) | ((pairs & 0x7F) << 4)).to(tl.bfloat16, bitcast=True)


@triton.jit
def _odd(pairs):
    return ((pairs & -0x8000) | ((pairs >> 4) & 0x7F0)).to(tl.bfloat16, bitcast=True)


@triton.jit
def absorb_pairs(
    q_even,
    q_odd,
    top,
    total,
    acc_even,
    acc_odd,
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
    HALF: tl.constexpr,
):
    """As `absorb`, for an FP8 cache read as int16 and queries in bf16 times 2 ** 100, both by even and odd dimensions:
    tensor cores want numbers of 16 bits, and bytes could only be brought into their order one by one.  The sums of
    values are 2 ** -20 of what they are."""
    at = slot[:, None] * HALF + d[None, :]
    mask = is_key[:, None] & is_d[None, :]
    k = tl.load(keys + at, mask=mask, other=0)
    v = tl.load(values + at, mask=mask, other=0)
    scores = tl.dot(q_even, tl.trans(_even(k)))
    scores = tl.dot(q_odd, tl.trans(_odd(k)), scores) * (scale * LOG2_E * 1048576.0)
    scores *= tl.load(key_scales + slot, mask=is_key, other=0.0)[None, :]
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - anchor[:, None])
    decay = tl.exp2(top - anchor)
    total = total * decay + tl.sum(weights, 1)
    weights *= tl.load(value_scales + slot, mask=is_key, other=0.0)[None, :]
    large = (weights * 1.2676506002282294e30).to(tl.bfloat16)  # 2 ** 100
    acc_even = tl.dot(large, _even(v), acc_even * decay[:, None])
    acc_odd = tl.dot(large, _odd(v), acc_odd * decay[:, None])
    return new_top, total, acc_even, acc_odd


@triton.jit
def put_part(parts, lse, at_part, top, total, acc, is_row, d, is_d, DIM: tl.constexpr):
    """What a running softmax came to, as `merge` reads it."""
    some = is_row & (total != 0)  # NaN is something, and has to be seen
    acc = acc / tl.where(some, total, 1.0)[:, None]
    tl.store(parts + at_part[:, None] * DIM + d[None, :], acc, mask=some[:, None] & is_d[None, :])
    tl.store(lse + at_part, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf")), mask=is_row)


# What changes from step to step must not make another kernel of it, which would be compiled while requests wait.
@triton.jit(
    do_not_specialize=["sequences", "table_stride", "parts"],
    do_not_specialize_on_alignment=["query_start", "context_lens", "block_tables"],
)
def _attend(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    out,
    lse,
    query_start,
    context_lens,
    block_tables,
    sequences,
    scale,
    query_stride,
    table_stride,
    parts,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    PAIRED: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    TILES: tl.constexpr = SPLIT // TILE
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = sequence_of(query_start, block, sequences, BLOCK_Q)
    first = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - first
    begin = (block - (first - tl.load(query_start)) // BLOCK_Q - sequence) * BLOCK_Q
    if begin >= queries:
        return
    context = tl.load(context_lens + sequence)
    before = context - queries  # tokens before the first query
    last = tl.maximum(before + tl.minimum(begin + BLOCK_Q, queries), 0)  # no query of this block sees further

    row = tl.arange(0, BLOCK_M)
    token = begin + row // GROUP
    is_row = (row < BLOCK_Q * GROUP) & (token < queries)
    position = before + token
    head = kv_head * GROUP + row % GROUP
    at_out = (first + token).to(tl.int64) * (KV_HEADS * GROUP) + head
    reach = 0
    if WINDOW > 0:
        reach = tl.maximum(before + begin - WINDOW + 1, 0)
    low = tl.cdiv(tl.maximum(reach // SPLIT - split, 0), SPLITS) * TILES
    high = tl.cdiv(tl.maximum(tl.cdiv(last, SPLIT) - split, 0), SPLITS) * TILES
    if SPLITS > 1:  # noqa: SIM102  (known when it is compiled; the next one isn't)
        if low >= high:  # the context is too short for this part
            tl.store(lse + at_out * parts + split, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=is_row)
            return

    d = tl.arange(0, DIM_PADDED)
    is_d = d < DIM
    at_query = ((first + token).to(tl.int64) * query_stride + head * DIM)[:, None]
    q_mask = is_row[:, None] & is_d[None, :]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)
    if PAIRED:
        half = tl.arange(0, DIM_PADDED // 2)
        is_half = half < DIM // 2
        h_mask = is_row[:, None] & is_half[None, :]
        q_even = tl.load(query + at_query + 2 * half[None, :], mask=h_mask, other=0.0)
        q_odd = tl.load(query + at_query + 2 * half[None, :] + 1, mask=h_mask, other=0.0)
        q_even = (q_even.to(tl.float32) * 1.2676506002282294e30).to(tl.bfloat16)
        q_odd = (q_odd.to(tl.float32) * 1.2676506002282294e30).to(tl.bfloat16)
        acc_even = tl.zeros([BLOCK_M, DIM_PADDED // 2], tl.float32)
        acc_odd = tl.zeros([BLOCK_M, DIM_PADDED // 2], tl.float32)
    else:
        q = tl.load(query + at_query + d[None, :], mask=q_mask, other=0.0)
    for i in range(low, high):
        key = ((i // TILES) * SPLITS + split) * SPLIT + (i % TILES) * TILE + tl.arange(0, TILE)
        is_key = key < last
        where = tl.load(block_tables + sequence * table_stride + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        slot = (where * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
        visible = is_row[:, None] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            visible &= key[None, :] > position[:, None] - WINDOW
        if PAIRED:
            top, total, acc_even, acc_odd = absorb_pairs(
                q_even,
                q_odd,
                top,
                total,
                acc_even,
                acc_odd,
                keys,
                values,
                key_scales,
                value_scales,
                slot,
                is_key,
                visible,
                scale,
                half,
                is_half,
                DIM // 2,
            )
        else:
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
    if PAIRED:
        acc = tl.interleave(acc_even, acc_odd) * 1048576.0

    if SPLITS == 1:
        acc = acc / tl.where(is_row & (total != 0), total, 1.0)[:, None]
        tl.store(out + at_out[:, None] * DIM + d[None, :], acc.to(out.dtype.element_ty), mask=q_mask)
    else:
        put_part(out, lse, at_out * parts + split, top, total, acc, is_row, d, is_d, DIM)


@triton.jit
def _merge(parts, lse, out, count, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    d = tl.arange(0, DIM_PADDED)
    sums = tl.load(lse + row * count + part, mask=part < count, other=float("-inf"))
    top = tl.max(sums, 0)
    weights = tl.exp2(sums - tl.where(top == float("-inf"), 0.0, top))
    mask = (sums > float("-inf"))[:, None] & (d < DIM)[None, :]
    each = tl.load(parts + (row * count + part)[:, None] * DIM + d[None, :], mask=mask, other=0.0)
    total = tl.sum(weights, 0)
    merged = tl.sum(each * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * DIM + d, merged.to(out.dtype.element_ty), mask=d < DIM)
