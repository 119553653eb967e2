"""From a plan of the scheduler to the tensors of one flat batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from inference.engine.scheduler import Scheduled
from kernels import FEW_TOKENS, AttentionPlan


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
    """The batch of `plan`.  Who computes tokens that don't stand side by side becomes a row of the attention's plan for
    each run of them: all keys and values of a layer are written before it attends."""
    tables = np.zeros((len(plan), max(len(s.sequence.blocks) for s in plan)), dtype=np.int32)
    runs: list[tuple[int, int, int]] = []  # (which of the plan, start, end)
    last = [s.end for s in plan]
    for i, s in enumerate(plan):
        table = s.sequence.table()
        tables[i, : len(table)] = table
        runs += ((i, start, end) for start, end in s.sequence.runs(s.start, last[i]))
    runs.sort(key=lambda run: run[2] - run[1] > FEW_TOKENS)  # who has few tokens comes first, as kernels want it
    tokens: list[int] = []
    ends: dict[int, int] = {}  # the row behind the last of each
    for i, start, end in runs:
        s = plan[i]
        known = min(end, last[i] - len(s.drafts))
        tokens += s.sequence.tokens[start:known]
        if end == last[i]:
            tokens += s.drafts
            ends[i] = len(tokens)
    sampled: list[Scheduled] = []
    unfinished: list[Scheduled] = []
    wanted: list[int] = []
    for i, s in enumerate(plan):
        if last[i] - len(s.drafts) == len(s.sequence.tokens):
            sampled.append(s)
            wanted += range(ends[i] - 1 - len(s.drafts), ends[i])
        else:
            unfinished.append(s)
    which = [i for i, _, _ in runs]
    attention = AttentionPlan.of(
        [end - start for _, start, end in runs], [end for _, _, end in runs], tables[which], block_size
    )
    return Batch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        attention=attention,
        wanted=torch.tensor(wanted, dtype=torch.int64),
        sampled=sampled,
        unfinished=unfinished,
    )
