"""Time a few chunks of the real model at start, to know how long a step takes.  It warms the model up as well."""

from __future__ import annotations

import time

from inference.backend import Sampling
from inference.engine import batch
from inference.engine.cost import UNKNOWN, StepCost, fit
from inference.engine.scheduler import Scheduled
from inference.engine.sequence import Sequence

CHUNKS = ((0, 32), (0, 192), (512, 192))  # start, tokens
REPEATS = 2


def measure_step_cost(model, cache, blocks: int, block_size: int) -> StepCost:
    """The cost of `model`'s steps over `cache` of so many `blocks`, whose content it overwrites; UNKNOWN where the
    cache is too small to tell."""
    samples = []
    for start, tokens in CHUNKS:
        needed = -(-(start + tokens) // block_size)
        if needed >= blocks:
            return UNKNOWN
        sequence = Sequence("calibration", [0] * (start + tokens), 1, Sampling(), b"", None, 0)  # type: ignore[arg-type]
        sequence.blocks = list(range(1, needed + 1))
        step = batch.build([Scheduled(sequence, start, tokens)], block_size)
        taken = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            model.forward(step.tokens, step.attention, cache, step.wanted)
            taken.append(time.perf_counter() - started)
        samples.append((start, tokens, min(taken)))
    return fit(samples)
