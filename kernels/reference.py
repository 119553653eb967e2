"""Every kernel in plain torch: the definition that the faster ones are checked against, and the fallback where
none can be built."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels.cache import LayerCache
from kernels.plan import BLOCK_SIZE, AttentionPlan

if TYPE_CHECKING:
    from kernels.sampling import SamplingRows
    from kernels.segments import SharedPlan


FP8_MAX = 448.0  # of float8_e4m3fn


def store(cache: LayerCache, keys: torch.Tensor, values: torch.Tensor, plan: AttentionPlan) -> None:
    """Write this step's keys and values ([tokens, kv_heads, head_dim]) into their slots, if they have any."""
    has_slot = plan.slot_mapping >= 0
    write(cache, keys[has_slot], values[has_slot], plan.slot_mapping[has_slot])


def write(cache: LayerCache, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    """Keys and values [tokens, kv_heads, head_dim] into `slots` [tokens] int64."""
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    for new, into, scales in ((keys, cache.keys, cache.key_scales), (values, cache.values, cache.value_scales)):
        if scales is None:
            into[block, :, offset] = new.to(into.dtype)
        else:
            scale = (new.float().abs().amax(-1) / torch.full((), FP8_MAX, device=new.device)).clamp(min=1e-12)
            scales[block, :, offset] = scale
            rounded = (new.float() / scale[..., None]).to(into.dtype)
            into.view(torch.uint8)[block, :, offset] = rounded.view(torch.uint8)


def _read(cached: torch.Tensor, scales: torch.Tensor | None, tables: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[seqs, kv_heads, width * BLOCK_SIZE, head_dim] of what the blocks `tables` [seqs, width] hold."""
    if scales is not None:
        values = cached.view(torch.uint8)[tables].view(cached.dtype).to(dtype) * scales[tables][..., None].to(dtype)
    else:
        values = cached[tables].to(dtype)
    return values.transpose(1, 2).flatten(2, 3)


def attend(
    query: torch.Tensor, cache: LayerCache, plan: AttentionPlan, scale: float, window: int | None = None
) -> torch.Tensor:
    """Causal attention of query [tokens, heads, head_dim] over each sequence's blocks; same shape and dtype back.

    `window`: a query sees itself and the window - 1 tokens before it (Mistral's sliding window).
    Scores and sums are float32 (float64 for float64 input).  A sequence without context gives zeros.
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
    keys = _read(cache.keys, cache.key_scales, tables, wide).transpose(2, 3)
    values = _read(cache.values, cache.value_scales, tables, wide)
    folded = query.view(seqs, q, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(seqs, kv_heads, group * q, dim)
    scores = (folded.to(wide) @ keys) * scale
    key_position = torch.arange(keys.shape[-1], device=query.device)
    query_position = context_lens.long()[:, None] - q + torch.arange(q, device=query.device)
    visible = key_position[None, None, :] <= query_position[:, :, None]
    if window is not None:
        visible &= key_position[None, None, :] > query_position[:, :, None] - window
    mask = visible[:, None, None].expand(seqs, 1, group, q, -1).reshape(seqs, 1, group * q, -1)
    weights = torch.where(mask, scores.masked_fill(~mask, float("-inf")).softmax(-1), 0)  # zeros where nothing is seen
    # a block past the context may hold anything, NaN included, and 0 * NaN is NaN
    values = torch.where(mask.any(2)[..., None], values, values.new_zeros(()))
    out = weights @ values
    return out.view(seqs, kv_heads, group, q, dim).permute(0, 3, 1, 2, 4).reshape(seqs, q, heads, dim).to(query.dtype)


def attend_shared(
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: LayerCache,
    plan: AttentionPlan,
    shared: SharedPlan,
    scale: float,
) -> torch.Tensor:
    """One query token after the other over all that it sees, its segments first."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // cache.keys.shape[1]
    starts, members = plan.query_start.tolist(), shared.member_start.tolist()
    out = torch.empty_like(query)

    def rows(table: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
        read = (_read(cached, scales, table[None].long(), wide)[0, :, :count] for cached, scales in pairs)
        return tuple(x.repeat_interleave(group, 0) for x in read)

    for s in range(len(starts) - 1):
        for token in range(starts[s], starts[s + 1]):
            position = int(plan.positions[token])
            seen = int(plan.context_lens[s]) - (starts[s + 1] - 1 - token)
            parts = [(rows(plan.block_tables[s], seen), 0)]
            for segment in range(len(members) - 1):
                for member in range(members[segment], members[segment + 1]):
                    if int(shared.tokens[member]) == token:
                        length = int(shared.lengths[segment])
                        parts.append((rows(shared.tables[segment], length), int(shared.shifts[member])))
            scores, values = [], []
            for (k, v), shift in parts:
                at = slice(position - shift, position - shift + 1)
                q = rotate(query[token : token + 1].to(wide), cos[at].to(wide), sin[at].to(wide))[0]
                scores.append(torch.einsum("hd,hkd->hk", q, k) * scale)
                values.append(v)
            weights = torch.cat(scores, 1).softmax(1)
            out[token] = torch.einsum("hk,hkd->hd", weights, torch.cat(values, 1)).to(query.dtype)
    return out


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


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """The arithmetic is float64; of equal logits at an edge all are kept."""
    vocab = logits.shape[1]
    x = logits.double()
    if rows.allowed is not None:
        bits = rows.allowed[:, :, None] >> torch.arange(32, device=x.device, dtype=torch.int32) & 1
        x = x.masked_fill(bits.flatten(1)[:, :vocab] == 0, float("-inf"))
    best, token = x.max(1)
    broken = x.isnan().any(1) | (best == float("-inf"))
    ordered = x.sort(1, descending=True).values
    scaled = (x - best[:, None]) / rows.temperature.double().clamp(min=1e-30)[:, None]
    for row in ((rows.temperature > 0) & ~broken).nonzero().flatten().tolist():
        top_k, top_p, min_p = int(rows.top_k[row]), float(rows.top_p[row]), float(rows.min_p[row])
        kept = x[row] >= ordered[row, top_k - 1] if 0 < top_k < vocab else x[row] > float("-inf")
        if top_p < 1:
            weights = torch.where(kept, scaled[row].exp(), 0)
            descending, order = weights.sort(descending=True)
            better = torch.empty_like(descending)
            better[order] = descending.cumsum(0) - descending
            edge = x[row][kept & (better < top_p * weights.sum())].min()
            kept &= x[row] >= edge
        if min_p > 0:
            kept &= scaled[row] >= math.log(min_p)
        uniform = philox_uniform(int(rows.seed[row]), vocab, int(rows.position[row])).to(x.device)
        gumbel = -(-uniform.clamp(min=1e-30).log()).log()
        token[row] = torch.where(kept, scaled[row] + gumbel, float("-inf")).argmax()
    return torch.where(broken, -1, token)


def philox_uniform(seed: int, count: int, position: int) -> torch.Tensor:
    """Numbers in [0, 1), [count] float32: number i is the first word of Philox 4x32-10 (Salmon et al. 2011) under the
    key `seed` for the counter (i, position, 0, 0)."""
    word = 0xFFFFFFFF
    counter = [torch.arange(count), torch.full((count,), position & word), torch.zeros(count), torch.zeros(count)]
    c0, c1, c2, c3 = (c.to(torch.int64) for c in counter)
    k0, k1 = seed & word, (seed >> 32) & word
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply_words(c0, 0xD2511F53), _multiply_words(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    signed = torch.where(c0 >= 2**31, c0 - 2**32, c0)
    return torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10


def _multiply_words(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(high, low) words of the products of 32-bit words, in int64 without overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high << 16 | low & 0xFFFF) & 0xFFFFFFFF
