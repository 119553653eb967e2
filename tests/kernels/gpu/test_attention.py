"""The Triton attention and cache kernels against the torch reference in float64; each tolerance is shown to catch
planted bugs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kernels import BLOCK_SIZE, AttentionPlan, LayerCache, reference
from kernels.cache import FP8
from kernels.gpu import attention, writing
from tests.kernels.gpu.conftest import DEVICE, empty, normal
from tests.kernels.test_paged_attention import plan_for, worst

BLOCKS = 64
SHAPES = {
    "heads alone": (2, 2, 16),
    "three share": (9, 3, 64),
    "four share": (4, 1, 128),
    "eight share, 80": (8, 1, 80),
}
BATCHES = {
    "one token": [(1, 1)],
    "decodes": [(1, 33), (1, 16), (1, 1), (1, 240)],
    "guesses": [(6, 70), (1, 129), (8, 8)],
    "mixed": [(1, 17), (3, 140), (40, 100), (13, 13)],
    "a long chunk": [(130, 301)],
}
TOLERANCE = {torch.float32: 2e-6 if DEVICE == "cpu" else 1e-5, torch.bfloat16: 1.2e-2}  # a GPU rounds exponentials


def filled(heads: int, kv_heads: int, dim: int, plan: AttentionPlan, dtype: torch.dtype) -> tuple:
    cache = LayerCache(*(normal(BLOCKS, kv_heads, BLOCK_SIZE, dim, seed=seed).to(dtype) for seed in (1, 2)))
    return normal(len(plan.positions), heads, dim).to(dtype), cache


def exactly(query, cache: LayerCache, plan: AttentionPlan, window: int | None) -> torch.Tensor:
    return reference.attend(query.double(), LayerCache(cache.keys.double(), cache.values.double()), plan, 0.125, window)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_equals_the_reference(shape: str, batch: str, window: int | None):
    plan = plan_for(BATCHES[batch]).to(DEVICE)
    query, cache = filled(*SHAPES[shape], plan, torch.float32)
    assert (
        worst(attention.attend(query, cache, plan, 0.125, window), exactly(query, cache, plan, window))
        < TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("batch", BATCHES)
def test_attention_in_bf16(batch: str):
    plan = plan_for(BATCHES[batch]).to(DEVICE)
    query, cache = filled(*SHAPES["three share"], plan, torch.bfloat16)
    difference = worst(attention.attend(query, cache, plan, 0.125), exactly(query, cache, plan, None))
    assert difference < TOLERANCE[torch.bfloat16]


def test_what_was_not_written_is_never_read():
    plan = plan_for([(1, 17), (3, 20), (9, 25)]).to(DEVICE)
    query, cache = filled(9, 3, 64, plan, torch.float32)
    before = attention.attend(query, cache, plan, 0.125)
    for s, context in enumerate([17, 20, 25]):
        last = int(plan.block_tables[s, 1])
        cache.keys[last, :, context % BLOCK_SIZE :] = float("nan")
        cache.values[last, :, context % BLOCK_SIZE :] = float("nan")
    cache.keys[0].fill_(float("nan"))
    cache.values[0].fill_(float("nan"))
    assert torch.equal(attention.attend(query, cache, plan, 0.125), before)


@pytest.mark.parametrize("queries", [1, 20])
def test_a_broken_key_is_seen(queries: int):
    """Or what a step computes over it would be taken for good."""
    plan = plan_for([(queries, 200)]).to(DEVICE)
    query, cache = filled(9, 3, 64, plan, torch.float32)
    cache.keys[int(plan.block_tables[0, 3]), 1, 5, 7] = float("nan")
    broken = attention.attend(query, cache, plan, 0.125).isnan().all(2)
    assert broken[:, 3:6].all()
    assert not broken[:, :3].any()


def test_a_sequence_without_context_gives_zeros():
    """As the padding of a captured graph does."""
    plan = plan_for([(1, 1), (1, 40)]).to(DEVICE)
    query, cache = filled(9, 3, 64, plan, torch.float32)
    plan.context_lens[0] = 0
    out = attention.attend(query, cache, plan, 0.125)
    assert (out[0] == 0).all()
    assert worst(out, exactly(query, cache, plan, None)) < TOLERANCE[torch.float32]


def test_a_decode_has_the_same_bits_whatever_else_is_in_the_batch():
    alone, together = [(1, 150)], [(1, 40), (1, 150), (2, 9), (33, 64)]
    query, cache = normal(38, 9, 64), None
    results = []
    for batch, row in ((alone, 0), (together, 1)):
        plan = plan_for(batch).to(DEVICE)
        if cache is None:
            _, cache = filled(9, 3, 64, plan, torch.float32)
            table = plan.block_tables[0].clone()
        plan.block_tables[row, : len(table)] = table
        rows = query[: len(plan.positions)].clone()
        rows[row] = query[-1]
        results.append(attention.attend(rows, cache, plan, 0.125)[row])
    assert torch.equal(*results)


@pytest.mark.parametrize("bug", ["swapped blocks", "slot off by one", "last token dropped", "window off by one"])
@pytest.mark.parametrize("queries", [1, 40])
def test_the_tolerance_catches_planted_bugs(bug: str, queries: int):
    plan = plan_for([(queries, 200)]).to(DEVICE)
    query, cache = filled(9, 3, 64, plan, torch.float32)
    window = 64
    exact = exactly(query, cache, plan, window)
    if bug == "swapped blocks":
        plan.block_tables[0, [10, 11]] = plan.block_tables[0, [11, 10]]
        window = 37  # its edge between the two, or their order would not matter
        exact = reference.attend(query, cache, plan_and_back(plan), 0.125, window)
    elif bug == "slot off by one":
        cache = LayerCache(cache.keys.roll(1, 2), cache.values)
    elif bug == "last token dropped":
        plan.context_lens -= 1
    else:
        window += 1
    assert worst(attention.attend(query, cache, plan, 0.125, window), exact) > 2e-4


def plan_and_back(plan: AttentionPlan) -> AttentionPlan:
    """The plan before its blocks were swapped."""
    tables = plan.block_tables.clone()
    tables[0, [10, 11]] = tables[0, [11, 10]]
    return dataclasses.replace(plan, block_tables=tables)


def test_parts_are_merged_by_their_weight():
    scores, values = normal(3, 40), normal(3, 40, 16, seed=1)
    parts, sums = [], []
    for piece in (slice(0, 7), slice(7, 40), slice(40, 40)):
        s = scores[:, piece]
        parts.append(
            (s.softmax(1)[:, :, None] * values[:, piece]).sum(1) if piece.start < 40 else values[:, 0] * torch.nan
        )
        sums.append(s.logsumexp(1) / torch.log(torch.tensor(2.0)))
    out = torch.empty(3, 1, 16, device=DEVICE)
    attention.merge(torch.stack(parts, 1)[:, None], torch.stack(sums, 1)[:, None], out)
    assert worst(out[:, 0], (scores.softmax(1)[:, :, None] * values).sum(1)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
def test_store_writes_the_same_slots(dtype: torch.dtype):
    plan = plan_for(BATCHES["mixed"]).to(DEVICE)
    plan.slot_mapping[[2, 30]] = -1
    ours, theirs = (empty(BLOCKS, 3, 64, dtype) for _ in range(2))
    fused = normal(len(plan.positions), 15, 64).to(torch.bfloat16 if dtype == FP8 else dtype)
    keys, values = fused[:, 9:12], fused[:, 12:]  # strided, as they come out of the fused projection
    writing.store(ours, keys, values, plan)
    reference.store(theirs, keys, values, plan)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None and other is None) or torch.equal(one.float(), other.float())


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 64), (9, 3, 32), (2, 2, 80), (8, 1, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotary_and_store(heads: int, kv_heads: int, dim: int, dtype: torch.dtype):
    plan = plan_for([(1, 17), (12, 40)]).to(DEVICE)
    qkv = normal(len(plan.positions), heads + 2 * kv_heads, dim).to(dtype)
    query, keys, values = qkv.split((heads, kv_heads, kv_heads), dim=1)
    cos, sin = normal(128, dim, seed=1).to(dtype), normal(128, dim, seed=2).to(dtype)
    ours, theirs, planted = (empty(BLOCKS, kv_heads, dim, dtype) for _ in range(3))
    result = writing.rotate_and_store(query, keys, values, cos, sin, ours, plan)
    expected = reference.rotate_and_store(query, keys, values, cos, sin, theirs, plan)
    reference.rotate_and_store(query, keys, values, cos, -sin, planted, plan)
    tolerance = 1e-5 if dtype == torch.float32 else 0.13  # numbers to 16, three roundings to 8 bits in the reference
    assert torch.equal(ours.values, theirs.values)
    assert worst(result, expected) < tolerance
    assert worst(ours.keys, theirs.keys) < tolerance
    assert worst(planted.keys, theirs.keys) > 2 * tolerance


def test_attention_over_an_fp8_cache():
    """The kernel against the reference over the same rounded cache; the rounding itself is another matter."""
    plan = plan_for([(1, 130), (2, 40), (20, 60)]).to(DEVICE)
    query, whole = filled(9, 3, 64, plan, torch.float32)
    cache = empty(BLOCKS, 3, 64, FP8)
    for start in range(0, BLOCKS * BLOCK_SIZE, 256):
        slots = torch.arange(start, start + 256, device=DEVICE)
        into = AttentionPlan(*[slots] * 5, few_sequences=0, few_tokens=0)
        keys, values = (x.transpose(1, 2).reshape(-1, 3, 64)[slots] for x in (whole.keys, whole.values))
        reference.store(cache, keys, values, into)
    ours = attention.attend(query, cache, plan, 0.125)
    assert worst(ours, reference.attend(query.double(), cache, plan, 0.125)) < 2 * TOLERANCE[torch.float32]
    rounding = worst(ours, exactly(query, whole, plan, None))
    assert 1e-3 < rounding < 0.1
    cache.value_scales.mul_(1.001)
    assert worst(attention.attend(query, cache, plan, 0.125), ours) > 2e-4


@pytest.mark.parametrize("shape", ["four share", "eight share, 80"])
def test_bf16_decodes_over_an_fp8_cache(shape: str):
    """The decodes' kernel makes bf16 of FP8 bit by bit; the smallest numbers have no exponent."""
    heads, kv_heads, dim = SHAPES[shape]
    plan = plan_for([(1, 130), (2, 40), (1, 1), (1, 700)]).to(DEVICE)
    cache = empty(BLOCKS, kv_heads, dim, FP8)
    for i, tensor in enumerate(cache[:2]):
        tensor.copy_((normal(*tensor.shape, seed=i) * 10.0 ** normal(*tensor.shape, seed=9 + i).clamp(-2, 2)).to(FP8))
    for i, scales in enumerate(cache[2:]):
        scales.copy_(normal(*scales.shape, seed=i).abs() * 0.02)
    assert (cache.keys.float().abs() < 2.0**-6).any()
    assert (cache.keys.float().abs() > 2.0**6).any()
    query = normal(len(plan.positions), heads, dim).bfloat16()
    exact = reference.attend(query.double(), cache, plan, 0.125)
    tolerance = 2e-2  # that of bf16 for values of several magnitudes
    assert worst(attention.attend(query, cache, plan, 0.125), exact) < tolerance
    cache.values.view(torch.uint8).bitwise_xor_(1)  # the last bit of the mantissa
    assert worst(attention.attend(query, cache, plan, 0.125), exact) > 2 * tolerance
    cache.value_scales[int(plan.block_tables[0, 0]), 0, 0] = float("nan")
    assert attention.attend(query, cache, plan, 0.125)[0].isnan().any()
