"""The C++ kernel against the torch reference, and the reference against plain softmax attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import BLOCK_SIZE, AttentionPlan, LayerCache, native, reference

BLOCKS = 64
SHAPES = [(9, 3, 64), (4, 1, 32), (8, 8, 128), (8, 1, 16), (2, 2, 80)]
BATCHES = {
    "one token": [(1, 1)],
    "mixed": [(5, 5), (1, 17), (40, 100)],
    "decodes": [(1, 33), (1, 16), (1, 240), (1, 64)],
    "long chunk": [(130, 300)],
}


def plan_for(sequences: list[tuple[int, int]], seed: int = 0) -> AttentionPlan:
    """(query tokens, context) of each sequence, over shuffled blocks."""
    free = (torch.randperm(BLOCKS - 1, generator=torch.Generator().manual_seed(seed)) + 1).tolist()
    tables = np.zeros((len(sequences), max(-(-c // BLOCK_SIZE) for _, c in sequences)), dtype=np.int32)
    for table, (_, context) in zip(tables, sequences, strict=True):
        for i in range(-(-context // BLOCK_SIZE)):
            table[i] = free.pop()
    return AttentionPlan.of([queries for queries, _ in sequences], [context for _, context in sequences], tables)


def filled(heads: int, kv_heads: int, dim: int, plan: AttentionPlan, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    cache = LayerCache(
        torch.randn(BLOCKS, kv_heads, dim, BLOCK_SIZE, generator=generator).to(dtype).transpose(2, 3),
        torch.randn(BLOCKS, kv_heads, BLOCK_SIZE, dim, generator=generator).to(dtype),
    )
    return torch.randn(len(plan.positions), heads, dim, generator=generator).to(dtype), cache


def plain(query, cache, plan, scale, window):
    """Softmax attention of each query over its own keys, gathered one by one, in float64."""
    out = []
    for s in range(len(plan.context_lens)):
        context = int(plan.context_lens[s])
        at = [(int(plan.block_tables[s, p // BLOCK_SIZE]), p % BLOCK_SIZE) for p in range(context)]
        keys = torch.stack([cache.keys[b, :, o] for b, o in at]).double()
        values = torch.stack([cache.values[b, :, o] for b, o in at]).double()
        first, last = int(plan.query_start[s]), int(plan.query_start[s + 1])
        group = query.shape[1] // keys.shape[1]
        for i in range(first, last):
            position = context - (last - i)
            begin = 0 if window is None else max(0, position - window + 1)
            k = keys[begin : position + 1].repeat_interleave(group, 1)
            v = values[begin : position + 1].repeat_interleave(group, 1)
            weights = (torch.einsum("hd,khd->hk", query[i].double(), k) * scale).softmax(-1)
            out.append(torch.einsum("hk,khd->hd", weights, v))
    return torch.stack(out)


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


@pytest.mark.parametrize("window", [None, 7, 64])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_softmax_attention(shape, batch, window):
    plan = plan_for(BATCHES[batch])
    query, cache = filled(*shape, plan, torch.float64)
    got = reference.attend(query, cache, plan, 0.125, window)
    assert worst(got, plain(query, cache, plan, 0.125, window)) < 1e-12


@pytest.mark.parametrize("window", [None, 7, 64])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)], ids=str)
def test_kernel_equals_reference(library, shape, batch, window, dtype, tolerance):
    plan = plan_for(BATCHES[batch])
    query, cache = filled(*shape, plan, dtype)
    exact = reference.attend(
        query.double(), LayerCache(cache.keys.double(), cache.values.double()), plan, 0.125, window
    )
    assert worst(native.attend(library, query, cache, plan, 0.125, window), exact) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_store_writes_the_same_slots(library, dtype):
    plan = plan_for(BATCHES["mixed"])
    _, cache = filled(9, 3, 64, plan, dtype)
    twin = LayerCache(cache.keys.clone(), cache.values.clone())
    fused = torch.randn(len(plan.positions), 15, 64).to(dtype)
    keys, values = fused[:, 9:12], fused[:, 12:]  # strided, as they come out of the fused projection
    native.store(library, cache, keys, values, plan)
    reference.store(twin, keys, values, plan)
    assert torch.equal(cache.keys, twin.keys)
    assert torch.equal(cache.values, twin.values)


def test_what_lies_past_the_context_is_never_read(library):
    plan = plan_for([(1, 17), (3, 20)])
    query, cache = filled(9, 3, 64, plan, torch.float32)
    before = native.attend(library, query, cache, plan, 0.125, None)
    kept = reference.attend(query, cache, plan, 0.125)
    for s, context in enumerate([17, 20]):
        last = int(plan.block_tables[s, 1])
        cache.keys[last, :, context % BLOCK_SIZE :] = float("nan")
        cache.values[last, :, context % BLOCK_SIZE :] = float("nan")
    cache.keys[0].fill_(float("nan"))
    cache.values[0].fill_(float("nan"))
    assert torch.equal(native.attend(library, query, cache, plan, 0.125, None), before)
    assert torch.equal(reference.attend(query, cache, plan, 0.125), kept)


@pytest.mark.parametrize("bug", ["swapped blocks", "slot off by one", "last token dropped", "window off by one"])
def test_the_tolerance_catches_planted_bugs(library, bug):
    plan = plan_for([(40, 100)])
    query, cache = filled(9, 3, 64, plan, torch.float32)
    window = 64
    exact = reference.attend(query, cache, plan, 0.125, window)
    if bug == "swapped blocks":
        plan.block_tables[0, [3, 4]] = plan.block_tables[0, [4, 3]]
    elif bug == "slot off by one":
        cache = LayerCache(cache.keys.transpose(2, 3).roll(1, -1).transpose(2, 3), cache.values)
    elif bug == "last token dropped":
        plan.context_lens -= 1
    else:
        window += 1
    assert worst(native.attend(library, query, cache, plan, 0.125, window), exact) > 100 * 1e-5


def test_plain_torch_serves_without_a_compiler(monkeypatch):
    import kernels

    monkeypatch.setattr(native, "load", lambda: None)
    plan = plan_for(BATCHES["mixed"])
    query, cache = filled(9, 3, 64, plan, torch.float32)
    assert torch.equal(kernels.attend(query, cache, plan, 0.125), reference.attend(query, cache, plan, 0.125))
