"""From a plan of the scheduler to the tensors of one flat batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from inference.engine.scheduler import Scheduled
from kernels import AttentionPlan


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` [tokens] int64; `wanted` [samples] int64: the rows whose logits are sampled, 1 + len(drafts) for each
    of `sampled`, in its order."""

    tokens: torch.Tensor
    attention: AttentionPlan
    wanted: torch.Tensor
    sampled: list[Scheduled]


def build(plan: list[Scheduled], block_size: int) -> Batch:
    lengths = np.array([s.tokens for s in plan], dtype=np.int32)
    query_start = np.zeros(len(plan) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start[1:])
    contexts = np.array([s.start + s.tokens for s in plan], dtype=np.int32)
    tables = np.zeros((len(plan), max(len(s.sequence.blocks) for s in plan)), dtype=np.int32)
    tokens = np.empty(query_start[-1], dtype=np.int64)
    positions = np.empty(query_start[-1], dtype=np.int64)
    for i, s in enumerate(plan):
        tables[i, : len(s.sequence.blocks)] = s.sequence.blocks
        rows = slice(query_start[i], query_start[i + 1])
        known = s.start + s.tokens - len(s.drafts)
        tokens[rows] = s.sequence.tokens[s.start : known] + list(s.drafts)
        positions[rows] = np.arange(s.start, s.start + s.tokens)
    sequence_of = np.repeat(np.arange(len(plan)), lengths)
    slots = tables[sequence_of, positions // block_size].astype(np.int64) * block_size + positions % block_size
    sampled = [s for s in plan if s.samples]
    ends = ((query_start[i + 1], 1 + len(s.drafts)) for i, s in enumerate(plan) if s.samples)
    wanted = np.array([end - count + row for end, count in ends for row in range(count)], dtype=np.int64)
    return Batch(
        tokens=torch.from_numpy(tokens),
        attention=AttentionPlan(
            query_start=torch.from_numpy(query_start),
            context_lens=torch.from_numpy(contexts),
            block_tables=torch.from_numpy(tables),
            slot_mapping=torch.from_numpy(slots),
            positions=torch.from_numpy(positions),
            decode_only=bool((lengths == 1).all()),
        ),
        wanted=torch.from_numpy(wanted),
        sampled=sampled,
    )
