"""Segments that several requests share, wherever they stand, against the same tokens computed where they stand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kernels import BLOCK_SIZE, AttentionPlan, LayerCache, SharedPlan, reference
from kernels.cache import FP8
from kernels.gpu import segments
from tests.kernels.gpu.conftest import DEVICE, empty, normal
from tests.kernels.test_paged_attention import worst

KV_HEADS, DIM, BLOCKS = 2, 32, 64
DOCUMENTS = {"a": 150, "b": 33, "c": 16}  # tokens
HELD = [("a", "b"), ("b", "a", "c"), ("a",), ()]  # by each sequence, in its order
QUERIES, OWN = [1, 3, 1, 2], [5, 20, 17, 40]


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sign-folded sin of rotary embedding."""
    frequencies = 1.0 / 100.0 ** (torch.arange(0, DIM, 2) / DIM)
    angles = torch.outer(torch.arange(300), torch.cat([frequencies, frequencies]))
    sin = angles.sin()
    sin[:, : DIM // 2].neg_()
    return angles.cos().to(DEVICE), sin.to(DEVICE)


def scene(group: int, dtype: torch.dtype = torch.float32):
    """(query, cache, plan of what each has for itself, shared plan, and of the whole contexts: a cache that holds the
    same keys turned to where they stand, and the plan over it)"""
    cos, sin = tables()
    free = iter(range(1, BLOCKS))
    cache, whole = empty(BLOCKS, KV_HEADS, DIM, dtype), empty(2 * BLOCKS, KV_HEADS, DIM, dtype)
    raw = {
        name: (normal(n, KV_HEADS, DIM, seed=ord(name)), normal(n, KV_HEADS, DIM, seed=1))
        for name, n in DOCUMENTS.items()
    }
    blocks = {name: [next(free) for _ in range(-(-n // BLOCK_SIZE))] for name, n in DOCUMENTS.items()}
    own = [[next(free) for _ in range(-(-n // BLOCK_SIZE))] for n in OWN]

    def write(into: LayerCache, table: list[int], begin: int, at: int, keys, values) -> None:
        """Keys turned to the positions from `at` on, into the slots from `begin` of `table` on."""
        slots = [table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(begin, begin + len(keys))]
        positions = torch.arange(at, at + len(keys), device=DEVICE)
        plan = AttentionPlan(*[positions] * 3, torch.tensor(slots, device=DEVICE), positions, 0, 0)
        reference.store(into, reference.rotate(keys, cos[positions], sin[positions]), values, plan)

    compiled_at = {"a": 0, "b": 7, "c": 100}
    for name, (keys, values) in raw.items():
        write(cache, blocks[name], 0, compiled_at[name], keys, values)
    members: dict[str, list[tuple[int, int]]] = {name: [] for name in DOCUMENTS}
    free = iter(range(1, BLOCKS * 2))
    starts, contexts, whole_tables, query_positions = np.cumsum([0, *QUERIES]), [], [], []
    for s, held in enumerate(HELD):
        before = sum(DOCUMENTS[name] for name in held)
        context = before + OWN[s]
        table = [next(free) for _ in range(-(-context // BLOCK_SIZE))]
        at = 0
        for name in held:
            write(whole, table, at, at, *raw[name])
            members[name] += [(int(token), at - compiled_at[name]) for token in range(starts[s], starts[s + 1])]
            at += DOCUMENTS[name]
        keys, values = normal(OWN[s], KV_HEADS, DIM, seed=50 + s), normal(OWN[s], KV_HEADS, DIM, seed=60 + s)
        write(cache, own[s], 0, before, keys, values)
        write(whole, table, before, before, keys, values)
        contexts.append(context)
        whole_tables.append(table)
        query_positions += range(context - QUERIES[s], context)

    def padded(rows: list[list[int]]) -> np.ndarray:
        out = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
        for into, row in zip(out, rows, strict=True):
            into[: len(row)] = row
        return out

    private = AttentionPlan.of(QUERIES, OWN, padded(own))
    private = dataclasses.replace(private, positions=torch.tensor(query_positions)).to(DEVICE)
    shared = SharedPlan.of([(blocks[name], DOCUMENTS[name], members[name]) for name in DOCUMENTS]).to(DEVICE)
    query = normal(sum(QUERIES), KV_HEADS * group, DIM, seed=9)
    return query, cache, private, shared, (whole, AttentionPlan.of(QUERIES, contexts, padded(whole_tables)).to(DEVICE))


def test_the_reference_is_attention_over_the_whole_context():
    query, cache, private, shared, (whole, plan) = scene(3)
    cos, sin = tables()
    ours = reference.attend_shared(query, cos, sin, cache, private, shared, 0.2)
    turned = reference.rotate(query, cos[plan.positions], sin[plan.positions])
    assert worst(ours, reference.attend(turned, whole, plan, 0.2)) < 1e-5


@pytest.mark.parametrize("group", [1, 3, 4])
def test_the_kernel_equals_the_reference(group: int):
    query, cache, private, shared, _ = scene(group)
    ours = segments.attend_shared(query, *tables(), cache, private, shared, 0.2)
    wide = LayerCache(cache.keys.double(), cache.values.double())
    exact = reference.attend_shared(query.double(), *tables(), wide, private, shared, 0.2)
    assert worst(ours, exact) < 2e-5
    late = shared._replace(shifts=shared.shifts + 1)
    assert worst(segments.attend_shared(query, *tables(), cache, private, late, 0.2), exact) > 1e-3
    short = shared._replace(lengths=shared.lengths - 1)
    assert worst(segments.attend_shared(query, *tables(), cache, private, short, 0.2), exact) > 1e-4


def test_over_an_fp8_cache():
    query, cache, private, shared, _ = scene(4, FP8)
    ours = segments.attend_shared(query, *tables(), cache, private, shared, 0.2)
    assert worst(ours, reference.attend_shared(query, *tables(), cache, private, shared, 0.2)) < 2e-5
