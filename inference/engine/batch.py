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
    of `sampled`, in its order.  The prompts of the `unfinished` go on in another step."""

    tokens: torch.Tensor
    attention: AttentionPlan
    wanted: torch.Tensor
    sampled: list[Scheduled]
    unfinished: list[Scheduled]


def build(plan: list[Scheduled], block_size: int) -> Batch:
    lengths = np.array([s.tokens for s in plan], dtype=np.int32)
    starts = np.array([s.start for s in plan], dtype=np.int32)
    query_start = np.zeros(len(plan) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start[1:])
    contexts = starts + lengths
    tables = np.zeros((len(plan), max(len(s.sequence.blocks) for s in plan)), dtype=np.int32)
    tokens: list[int] = []
    sampled: list[Scheduled] = []
    unfinished: list[Scheduled] = []
    wanted: list[int] = []
    for i, s in enumerate(plan):
        sequence, drafts = s.sequence, s.drafts
        tables[i, : len(sequence.blocks)] = sequence.blocks
        known = s.start + s.tokens - len(drafts)
        tokens += sequence.tokens[s.start : known]
        tokens += drafts
        if known == len(sequence.tokens):
            sampled.append(s)
            wanted += range(len(tokens) - 1 - len(drafts), len(tokens))
        else:
            unfinished.append(s)
    sequence_of = np.repeat(np.arange(len(plan)), lengths)
    positions = np.arange(len(tokens)) + (starts - query_start[:-1])[sequence_of]
    slots = tables[sequence_of, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return Batch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        attention=AttentionPlan(
            query_start=torch.from_numpy(query_start),
            context_lens=torch.from_numpy(contexts),
            block_tables=torch.from_numpy(tables),
            slot_mapping=torch.from_numpy(slots),
            positions=torch.from_numpy(positions),
            decode_only=bool((lengths == 1).all()),
        ),
        wanted=torch.tensor(wanted, dtype=torch.int64),
        sampled=sampled,
        unfinished=unfinished,
    )
