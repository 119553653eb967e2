"""Logits to tokens: greedy, or temperature with top-k and top-p, by the exponential race.

A draw depends on (seed, position) alone, so batching, chunking and preemption never change it.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from inference.engine.sequence import Sequence

COLDEST = 1e-5  # below it the division overflows, and the best token is all there is to draw


def sample(logits: torch.Tensor, rows: Rows[Sequence]) -> list[int | None]:
    """The next token of each row of logits [rows, vocab] float32; None for a row that holds NaN or no finite value.

    argmax(p / Exponential(1)) draws from p without a cumulative sum (the Gumbel-max trick, as an exponential race).
    """
    best, tokens = logits.max(-1)
    chosen: list[int | None] = [
        token if finite else None for token, finite in zip(tokens.tolist(), best.isfinite().tolist(), strict=True)
    ]
    for i, sequence in enumerate(rows):
        if sequence.sampling.temperature >= COLDEST and chosen[i] is not None:
            chosen[i] = _draw(logits[i], sequence)
    return chosen


def _draw(logits: torch.Tensor, sequence: Sequence) -> int:
    sampling = sequence.sampling
    values, ids = _filter(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    generator = torch.Generator().manual_seed((sequence.seed * 1_000_003 + len(sequence.tokens)) % 2**63)
    race = torch.empty_like(values).exponential_(generator=generator)
    winner = int((values.softmax(-1) / race).argmax())
    return int(ids[winner]) if ids is not None else winner


def _filter(logits: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logits that may be drawn, best first, and their ids; (logits, None) where nothing is filtered.

    top_p keeps the smallest set of best tokens whose probability reaches it, always at least one.
    """
    if top_k <= 0 and top_p >= 1:
        return logits, None
    values, ids = logits.topk(min(top_k, len(logits))) if top_k > 0 else logits.sort(descending=True)
    if top_p < 1:
        probabilities = values.softmax(-1)
        kept = int(((probabilities.cumsum(-1) - probabilities) < top_p).sum())
        values, ids = values[: max(kept, 1)], ids[: max(kept, 1)]
    return values, ids
