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
    """The batch of `plan`, in its order: decodes come before longer chunks, as the scheduler puts them."""
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
    attention = AttentionPlan.of([s.tokens for s in plan], [s.start + s.tokens for s in plan], tables, block_size)
    return Batch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        attention=attention,
        wanted=torch.tensor(wanted, dtype=torch.int64),
        sampled=sampled,
        unfinished=unfinished,
    )
