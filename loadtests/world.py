"""An engine on a clock that only its steps move, and what those who ask it would have felt."""

from __future__ import annotations

import time
from itertools import count
from typing import NamedTuple

from inference import Sampling
from inference.engine.cost import StepCost
from inference.engine.ordering import Parts
from loadtests.free import Free, core_over
from loadtests.sharing import HEAD


class Seen(NamedTuple):
    """Seconds from arrival to admission and to the first token; tokens of the documents that were cached, without
    those that were computed for it as segments."""

    waited: float
    first: float
    cached: int


class World:
    """An engine with so many `blocks`, over `model` if there is one.  A step takes what `cost` says, or where it is
    `measured` what it takes, which may change between calls of `serve`."""

    def __init__(self, blocks: int, cost: StepCost, model=None, cache=None, order: str = "planned", **policy):
        self.now = 0.0
        self.measured = False
        self.core = core_over(
            Free() if model is None else model,
            blocks,
            order,
            clock=lambda: self.now,
            cache=cache,
            **{"cost": cost, "step_seconds": 0.17, "max_tokens": 512, **policy},
        )
        self._names = count()
        schedule = self.core.scheduler.schedule

        def priced(now: float):
            plan = schedule(now)
            self._cost = cost.fixed + sum(cost.chunk(s.start, s.tokens) for s in plan)
            return plan

        self.core.scheduler.schedule = priced

    def serve(self, arrivals: list[tuple[float, Parts]], answer: int) -> list[Seen]:
        """Those who arrive so many seconds from now, answered with `answer` tokens each; in the order in which they
        end."""
        seen, came, first, running, awaited = [], {}, {}, {}, {}
        began, queue = self.now, list(arrivals)
        while queue or self.core.has_work:
            if not self.core.has_work:
                self.now = max(self.now, began + queue[0][0])
            while queue and began + queue[0][0] <= self.now:
                at, parts = queue.pop(0)
                name = f"{next(self._names)}"
                before = time.perf_counter()
                self.core.add(name, parts, Sampling(max_tokens=answer, ignore_eos=True), "", 0)
                self.now += (time.perf_counter() - before) * self.measured
                running[name] = sequence = self.core._sequences[name]
                reuse = sequence.reuse
                compiled = (
                    [span for span in reuse.spans if span.request_id in reuse.awaits] if reuse is not None else ()
                )
                awaited[name] = sum(span.end - span.start for span in compiled)
                came[name] = began + at
            before = time.perf_counter()
            outputs = self.core.step()
            self.now += time.perf_counter() - before if self.measured else self._cost
            for name, sequence in running.items():
                if sequence.generated and name not in first:
                    first[name] = self.now
            for output in outputs:
                assert output.error is None, output.error
                if output.finish is not None:
                    sequence = running.pop(output.request_id)
                    at = came[output.request_id]
                    cached = max(0, sequence.cached_tokens - HEAD - awaited[output.request_id])
                    seen.append(Seen(sequence.scheduled - at, first[output.request_id] - at, cached))
        return seen


def percentile(values: list[float], p: int) -> float:
    return sorted(values)[min(len(values) - 1, int(p / 100 * len(values)))] if values else float("nan")
