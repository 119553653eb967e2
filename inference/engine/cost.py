"""How long a step takes: fixed + per_token · tokens + per_pair · pairs + per_read · keys, in seconds.

A pair is one query token of a prefill chunk with one key that it attends to: T tokens from position s have about
T · (s + T/2).  A decode's few tokens read the keys of their context once, which takes longer than to multiply them.
Fitted at start on the machine that runs it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kernels import FEW_TOKENS


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds.  All zero: unknown, and then every chunk is within any time."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_pair: float = 0.0
    per_read: float = 0.0

    def chunk(self, start: int, tokens: int) -> float:
        """What a chunk of `tokens` from position `start` adds to a step."""
        if tokens <= FEW_TOKENS and self.per_read:
            return self.per_token * tokens + self.per_read * (start + tokens)
        return self.per_token * tokens + self.per_pair * tokens * (start + (tokens + 1) / 2)

    @property
    def pair_over_token(self) -> float:
        """What a token costs for each one before it, over what it costs alone; 0 while unknown."""
        return self.per_pair / self.per_token if self.per_token else 0.0

    def tokens_within(self, seconds: float, start: int, most: int) -> int:
        """The longest chunk from `start`, at most `most` tokens, that adds no more than `seconds`."""
        if self.chunk(start, most) <= seconds:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.chunk(start, middle) <= seconds else (low, middle)
        return low


UNKNOWN = StepCost()


def fit(samples: list[tuple[int, int, float]]) -> StepCost:
    """From (start, tokens, seconds) of chunks that were timed alone: least squares, nothing below zero.

    Needs three that differ in both; raises ValueError otherwise.
    """
    import numpy as np

    rows = np.array([[1.0, tokens, tokens * (start + (tokens + 1) / 2)] for start, tokens, _ in samples])
    seconds = np.array([taken for _, _, taken in samples])
    if np.linalg.matrix_rank(rows) < 3:
        raise ValueError("the cost of a step needs chunks of several lengths and starts")
    solved, *_ = np.linalg.lstsq(rows / seconds[:, None], np.ones(len(samples)), rcond=None)
    return StepCost(*(float(max(value, 0.0)) for value in solved))


def with_decodes(cost: StepCost, streams: int, context: int, seconds: float) -> StepCost:
    """`cost` with what it takes to read keys, from a step of so many `streams` at `context` tokens each."""
    rest = seconds - cost.fixed - cost.per_token * streams
    return replace(cost, per_read=max(rest / (streams * context), cost.per_pair))
