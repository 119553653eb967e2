"""What Locust loads: `locust -f loadtests/locustfile.py --host http://127.0.0.1:8080`.

With `LOAD_OUT` set, every response time is written there as JSON at the end, for `loadtests.run`: Locust's own
percentiles are rounded to two digits.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

from locust import LoadTestShape, events

from loadtests.shapes import Spikes
from loadtests.users import Asker

__all__ = ["Asker", "SpikyShape"]

_times_ms: defaultdict[str, list[float]] = defaultdict(list)
_failures: defaultdict[str, int] = defaultdict(int)
_tokens: defaultdict[str, int] = defaultdict(int)


class SpikyShape(LoadTestShape):
    spikes = Spikes.from_environment()

    def tick(self) -> tuple[int, float] | None:
        users = self.spikes.users_at(self.get_run_time())
        return None if users is None else (users, max(users, 1))


@events.request.add_listener
def _record(name: str, response_time: float, exception: object, context: dict, **_: object) -> None:
    if exception is not None:
        _failures[f"{name}: {exception}"] += 1
        return
    _times_ms[name].append(response_time)
    if seen := (context or {}).get("seen"):
        for field in ("prompt_tokens", "cached_tokens", "completion_tokens"):
            _tokens[field] += getattr(seen, field)


@events.quitting.add_listener
def _write(**_: object) -> None:
    if out := os.environ.get("LOAD_OUT"):
        record = {"times_ms": _times_ms, "failures": _failures, "tokens": _tokens}
        Path(out).write_text(json.dumps(record), encoding="utf-8")
