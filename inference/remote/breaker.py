"""A server that can't be reached is not asked by everybody: after some failures only one in a while tries."""

from __future__ import annotations

from collections.abc import Callable

from inference.errors import Unavailable


class Breaker:
    """Counts failures to reach a server in a row.  From `opens_after` of them on, a request is admitted every
    `open_seconds` and the others are refused at once, until one gets through (Nygard, *Release It!*, 2007)."""

    def __init__(self, clock: Callable[[], float], opens_after: int = 5, open_seconds: float = 2.0):
        self._clock = clock
        self._opens_after = opens_after
        self._open_seconds = open_seconds
        self._failures = 0
        self._next_try = 0.0

    @property
    def is_open(self) -> bool:
        return self._failures >= self._opens_after

    def admit(self) -> None:
        """Raises Unavailable with the time to wait."""
        if not self.is_open:
            return
        wait = self._next_try - self._clock()
        if wait > 0:
            error = Unavailable("the inference server can't be reached: start it, or correct its base_url")
            error.retry_after_seconds = wait
            raise error
        self._next_try = self._clock() + self._open_seconds

    def failed(self) -> None:
        self._failures += 1
        if self.is_open:
            self._next_try = self._clock() + self._open_seconds

    def succeeded(self) -> None:
        self._failures = 0
