"""Attention over segments of the cache that several requests hold at once, a document's blocks say: read once for all
of them, and merged with what each has for itself by the log-sum-exp of both parts (Hydragen, Juravsky et al. 2024;
FlashInfer's cascade).

A segment may stand at another position than the one its keys were computed at.  The difference belongs to the query,
which is turned by as much less, so one block serves any position (rotary embedding is relative: Su et al. 2021).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from kernels import gpu, reference
from kernels.cache import LayerCache
from kernels.plan import AttentionPlan


class SharedPlan(NamedTuple):
    """Which query tokens attend to which segments, all of it: a segment lies before its queries.

    tables        [segments, width] int32    the blocks of each segment in order
    lengths       [segments] int32           its tokens
    member_start  [segments + 1] int32       segment s has the members member_start[s] : member_start[s + 1]
    tokens        [members] int32            a query token of the step
    shifts        [members] int32            how much further on the segment stands for it than it was computed at
    orders        [members] int32            the how manieth segment of its token this is
    most                                     the most segments of a token
    """

    tables: torch.Tensor
    lengths: torch.Tensor
    member_start: torch.Tensor
    tokens: torch.Tensor
    shifts: torch.Tensor
    orders: torch.Tensor
    most: int

    @classmethod
    def of(cls, segments: list[tuple[list[int], int, list[tuple[int, int]]]]) -> SharedPlan:
        """From (blocks, tokens, members as (query token, shift)) of each segment."""
        tables = np.zeros((len(segments), max(len(blocks) for blocks, _, _ in segments)), dtype=np.int32)
        starts, tokens, shifts, orders = [0], [], [], []
        seen: dict[int, int] = {}
        for table, (blocks, _, members) in zip(tables, segments, strict=True):
            table[: len(blocks)] = blocks
            for token, shift in members:
                tokens.append(token)
                shifts.append(shift)
                orders.append(seen.get(token, 0))
                seen[token] = orders[-1] + 1
            starts.append(len(tokens))
        lengths = [length for _, length, _ in segments]
        columns = (torch.tensor(column, dtype=torch.int32) for column in (lengths, starts, tokens, shifts, orders))
        return cls(torch.from_numpy(tables), *columns, most=max(seen.values()))

    def to(self, device: torch.device | str) -> SharedPlan:
        return SharedPlan(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in self))


def attend_shared(
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: LayerCache,
    plan: AttentionPlan,
    shared: SharedPlan,
    scale: float,
) -> torch.Tensor:
    """Attention of query [tokens, heads, head_dim], not turned yet, over the segments of `shared` and over each
    sequence's own blocks; same shape and dtype back.

    All sequences of `plan` have few tokens; its tables and context_lens are of what each has for itself, its positions
    those in the whole context.  cos and sin as for `rotate_and_store`.
    """
    if gpu.serves(query):
        from kernels.gpu import segments

        return segments.attend_shared(query, cos, sin, cache, plan, shared, scale)
    return reference.attend_shared(query, cos, sin, cache, plan, shared, scale)
