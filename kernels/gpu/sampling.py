"""Logits to tokens in Triton, without a word from the host: constraint mask, temperature, top-k, top-p, min-p, draw.

One program takes a row.  Instead of sorting the vocabulary it looks for the least logit that may still be drawn, by
bisection over the bits of a float, which order as the floats do (as radix selection does; FlashInfer's samplers avoid
the sort by rejection).  The draw is the Gumbel-max trick over Philox (Salmon et al. 2011) numbers of (seed, position,
token), so it depends on nothing else in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.sampling import SamplingRows

BLOCK = 8192


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """As `kernels.reference.sample`, in float32; of equal logits at an edge all are kept."""
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    vocab = logits.shape[1]
    _sample[(len(logits),)](
        logits,
        out,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        rows.seed,
        rows.position,
        out if rows.allowed is None else rows.allowed,
        logits.stride(0),
        0 if rows.allowed is None else rows.allowed.stride(0),
        VOCAB=vocab,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
        MASKED=rows.allowed is not None,
        num_warps=16,
    )
    return out


@triton.jit
def _read(logits, allowed, i, VOCAB: tl.constexpr, MASKED: tl.constexpr):
    """A tile of logits, -inf past the end and where the mask forbids."""
    x = tl.load(logits + i, mask=i < VOCAB, other=float("-inf")).to(tl.float32)
    if MASKED:
        word = tl.load(allowed + i // 32, mask=i < VOCAB, other=0)
        x = tl.where(((word >> (i % 32)) & 1) == 1, x, float("-inf"))
    return x


@triton.jit
def _float_of(order):
    """The float whose place in the order of all floats is `order`, an int64 of 32 bits: both grow together."""
    bits = tl.where(order >= 0, order, order ^ 0x7FFFFFFF)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _order_of(x):
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)  # the distance of two may not fit 32 bits


@triton.jit(
    do_not_specialize_on_alignment=["temperatures", "top_ks", "top_ps", "min_ps", "seeds", "positions"],
)
def _sample(
    logits,
    out,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    allowed,
    logits_stride,
    allowed_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * logits_stride
    allowed += row.to(tl.int64) * allowed_stride
    tile = tl.arange(0, BLOCK)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)

    best = float("-inf")
    token = 0
    least = float("inf")
    broken = 0
    for start in range(0, VOCAB, BLOCK):
        i = start + tile
        x = _read(logits, allowed, i, VOCAB, MASKED)
        broken += tl.sum((x != x).to(tl.int32), 0)
        high = tl.max(x, 0)
        if high > best:
            best = high
            token = start + tl.argmax(x, 0)
        least = tl.minimum(least, tl.min(tl.where(x == float("-inf"), float("inf"), x), 0))

    if temperature > 0:
        floor = least  # the least logit that may be drawn
        if (top_k > 0) & (top_k < VOCAB):
            low = _order_of(least)  # at least top_k are no less than it, unless there are fewer in all
            high_end = _order_of(best) + 1
            while high_end - low > 1:
                middle = low + (high_end - low) // 2
                edge = _float_of(middle)
                counts = tl.zeros([BLOCK], tl.int32)
                for start in range(0, VOCAB, BLOCK):
                    x = _read(logits, allowed, start + tile, VOCAB, MASKED)
                    counts += (x >= edge).to(tl.int32)
                if tl.sum(counts, 0) >= top_k:
                    low = middle
                else:
                    high_end = middle
            floor = _float_of(low)
        if top_p < 1:
            masses = tl.zeros([BLOCK], tl.float32)
            for start in range(0, VOCAB, BLOCK):
                x = _read(logits, allowed, start + tile, VOCAB, MASKED)
                masses += tl.where(x >= floor, tl.exp((x - best) / temperature), 0.0)
            mass = tl.sum(masses, 0)
            low = _order_of(floor) - 1  # what is better than `high_end` alone has less than top_p
            high_end = _order_of(best)
            while high_end - low > 1:
                middle = low + (high_end - low) // 2
                edge = _float_of(middle)
                masses = tl.zeros([BLOCK], tl.float32)
                for start in range(0, VOCAB, BLOCK):
                    x = _read(logits, allowed, start + tile, VOCAB, MASKED)
                    masses += tl.where(x > edge, tl.exp((x - best) / temperature), 0.0)
                if tl.sum(masses, 0) < top_p * mass:
                    high_end = middle
                else:
                    low = middle
            floor = _float_of(high_end)
        if min_p > 0:
            floor = tl.maximum(floor, best + tl.log(min_p) * temperature)
        floor = tl.minimum(floor, best)

        seed = tl.load(seeds + row)
        position = tl.load(positions + row)
        won = float("-inf")
        for start in range(0, VOCAB, BLOCK):
            i = start + tile
            x = _read(logits, allowed, i, VOCAB, MASKED)
            counter = i.to(tl.uint32)
            zero = counter * 0
            number, _, _, _ = tl.philox(seed, counter, zero + position.to(tl.uint32), zero, zero)
            uniform = tl.uint_to_uniform_float(number)
            gumbel = -tl.log(-tl.log(tl.maximum(uniform, 1e-30)))
            score = tl.where(x >= floor, (x - best) / temperature + gumbel, float("-inf"))
            high = tl.max(score, 0)
            if high > won:
                won = high
                token = start + tl.argmax(score, 0)
    tl.store(out + row, tl.where((broken > 0) | (best == float("-inf")), -1, token).to(tl.int64))
