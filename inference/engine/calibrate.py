"""Time a few chunks of the real model at start, to know how long a step takes.  It warms the model up as well."""

from __future__ import annotations

import logging
import time

from inference.backend import Sampling
from inference.engine import batch
from inference.engine.cost import UNKNOWN, StepCost, fit, with_decodes
from inference.engine.scheduler import Scheduled
from inference.engine.sequence import Sequence

log = logging.getLogger(__name__)

REPEATS = 4  # the least of each counts: whatever else runs while a server starts only ever adds
FEW, MANY = 48, 256  # tokens
FARTHEST = 1024
STREAMS = 16


def measure_step_cost(
    model,
    cache,
    blocks: int,
    block_size: int,
    max_context_tokens: int,
    many: int = MANY,
    farthest: int = FARTHEST,
) -> StepCost:
    """The cost of `model`'s steps over `cache` of so many `blocks`, whose content it overwrites; UNKNOWN, with a
    warning, where the cache or what the model can read is too small to tell.  Chunks of FEW and of `many` tokens are
    timed, some after `farthest`, and decodes there, as many as the cache holds of STREAMS."""
    longest = min(max_context_tokens, (blocks - 1) * block_size)
    many = min(many, max(MANY, longest // 2))
    far = min(farthest, longest - max(FEW, many // 8)) // block_size * block_size
    if far < many:
        log.warning("a context of %d tokens is too short to time steps: step_ms has no effect", longest)
        return UNKNOWN

    def seconds(streams: int, start: int, tokens: int) -> float:
        each = -(-(start + tokens) // block_size)
        plan = []
        for i in range(streams):
            sequence = Sequence("calibration", [0] * (start + tokens), 1, Sampling(), b"", None, 0)  # type: ignore[arg-type]
            sequence.blocks = list(range(1 + i * each, 1 + (i + 1) * each))
            plan.append(Scheduled(sequence, start, tokens))
        step = batch.build(plan, block_size)
        taken = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            model.forward(step.tokens, step.attention, cache, step.wanted)[0, 0].item()  # a GPU has not finished before
            taken.append(time.perf_counter() - started)
        return min(taken)

    # Each is dear for another of the three terms.  Few tokens far behind don't fill a GPU: their time says little.
    chunks = (0, FEW), (0, many), (far, max(FEW, many // 8))
    cost = fit([(start, tokens, seconds(1, start, tokens)) for start, tokens in chunks])
    streams = min(STREAMS, (blocks - 1) // (far // block_size))
    return with_decodes(cost, streams, far, seconds(streams, far - 1, 1))
