"""Keys and values that move within a cache, and what a question attends to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from inference.models.rotary import Rotary
from kernels import BLOCK_SIZE, AttentionPlan, LayerCache, attend, attention_received, copy, reference, splice
from kernels.cache import FP8

HEADS, KV_HEADS, DIM = 4, 2, 16
ROTARY = Rotary(SimpleNamespace(rope={"rope_theta": 1e4}, head_dim=DIM, max_context_tokens=512), torch.float32)


def moved(dtype: torch.dtype, by: int) -> tuple[torch.Tensor, ...]:
    """Keys and values that were moved by so many positions, and those that were computed there."""
    torch.manual_seed(0)
    keys, values = torch.randn(40, KV_HEADS, DIM), torch.randn(40, KV_HEADS, DIM)
    cache, other = (LayerCache.empty(12, KV_HEADS, DIM, dtype) for _ in range(2))
    source, target = torch.arange(40) + 1 * BLOCK_SIZE, torch.arange(40).flip(0) + 6 * BLOCK_SIZE + 3
    at = torch.arange(40) + 5
    reference.write(cache, reference.rotate(keys, ROTARY.cos[at], ROTARY.sin[at]), values, source)
    reference.write(other, reference.rotate(keys, ROTARY.cos[at + by], ROTARY.sin[at + by]), values, target)
    splice(cache, source, target, *ROTARY.turn(torch.full((40,), by)))
    return tuple(
        torch.stack(
            [
                reference._read(x, scales, torch.tensor([[t // BLOCK_SIZE]]), torch.float32)[0, :, t % BLOCK_SIZE]
                for t in target.tolist()
            ]
        )
        for each in (cache, other)
        for x, scales in ((each.keys, each.key_scales), (each.values, each.value_scales))
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.bfloat16, 0.04), (FP8, 0.4)])
@pytest.mark.parametrize("by", [0, 1, 300])
def test_what_is_moved_is_as_if_computed_there(dtype: torch.dtype, tolerance: float, by: int):
    keys, values, wanted_keys, wanted_values = moved(dtype, by)
    torch.testing.assert_close(keys, wanted_keys, atol=tolerance, rtol=0)
    torch.testing.assert_close(values, wanted_values, atol=tolerance / 10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_a_copy_is_the_same_to_the_bit(dtype: torch.dtype):
    torch.manual_seed(2)
    cache = LayerCache.empty(6, KV_HEADS, DIM, dtype)
    source, target = torch.arange(5) + BLOCK_SIZE, torch.arange(5) + 4 * BLOCK_SIZE
    reference.write(cache, torch.randn(5, KV_HEADS, DIM), torch.randn(5, KV_HEADS, DIM), source)
    copy(cache, source, target)
    for each in cache:
        if each is not None:
            raw = each.view(torch.uint8) if dtype == FP8 and each.dtype == FP8 else each
            assert torch.equal(raw[4, :, :5], raw[1, :, :5])


def test_a_turn_the_wrong_way_is_noticed():
    right, _, wanted, _ = moved(torch.float32, 7)
    assert (right - wanted).abs().max() < 1e-5
    cos, sin = ROTARY.turn(torch.tensor([7]))
    there = reference.rotate(wanted[:1], cos, -sin)
    assert (there - wanted[:1]).abs().max() > 0.1


def test_what_is_attended_to_adds_up_and_weighs_the_values():
    torch.manual_seed(1)
    context, rows = 37, 5
    cache = LayerCache.empty(8, KV_HEADS, DIM, torch.float32)
    blocks = torch.tensor([3, 6, 1], dtype=torch.int32)
    at = torch.arange(context)
    slots = blocks.long()[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
    keys = torch.randn(context, KV_HEADS, DIM)
    values = torch.zeros(context, KV_HEADS, DIM)
    values[11] = 1.0
    reference.write(cache, keys, values, slots)
    query = torch.randn(rows, HEADS, DIM)
    received = attention_received(query, cache, blocks, context, DIM**-0.5)
    assert received.sum() == pytest.approx(rows * HEADS, rel=1e-5)
    plan = AttentionPlan.of([rows], [context], blocks.numpy()[None])
    out = attend(query, cache, plan, DIM**-0.5)
    assert received[11] == pytest.approx(float(out[..., 0].sum()), rel=1e-4)
    alone = attention_received(query[:1], cache, blocks, context - rows + 1, DIM**-0.5)
    assert len(alone) == context - rows + 1  # nobody sees what comes later
    assert received[-1] < received.sum() / 4
