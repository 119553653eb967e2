"""Whether a replica may be asked now: its circuit, and how many requests it bears at once.

Neither has a clock of its own: `now` is seconds on the caller's.
"""

from __future__ import annotations

from typing import Literal

State = Literal["closed", "open", "half_open"]


class Circuit:
    """Opens after `opens_after` failures in a row, and then nothing is sent.  After a while, which doubles with each
    time in a row, a look at the replica may half-open it: one request at a time tries, and its outcome decides
    (Nygard, *Release It!*, 2007)."""

    def __init__(self, opens_after: int = 3, open_seconds: float = 1.0, most_seconds: float = 5.0):
        self.state: State = "closed"
        self._opens_after = opens_after
        self._open_seconds = open_seconds
        self._most_seconds = most_seconds
        self._failures = 0
        self._opened = 0
        self._tried = False
        self.until = 0.0  # while open: when to look at the replica

    @property
    def admits(self) -> bool:
        """Whether a request may be sent."""
        return self.state == "closed" or (self.state == "half_open" and not self._tried)

    def sent(self) -> bool:
        """A request is sent; whether it is the one that tries, of which `tried` must tell."""
        self._tried = self.state == "half_open"
        return self._tried

    def tried(self) -> None:
        """The request that tried has left, whatever came of it."""
        self._tried = False

    def looked(self, ready: bool, now: float) -> None:
        """Somebody looked while it was open."""
        if self.state != "open":
            return
        if ready:
            self.state = "half_open"
        else:
            self._open(now)

    def failed(self, now: float) -> None:
        self._failures += 1
        if self.state == "half_open" or (self.state == "closed" and self._failures >= self._opens_after):
            self._open(now)

    def answered(self) -> None:
        """A first token came.  What was sent before it opened may still be answered: that closes nothing."""
        if self.state == "half_open":
            self.state = "closed"

    def succeeded(self) -> None:
        """An answer came to its end."""
        if self.state == "closed":
            self._failures = self._opened = 0

    def _open(self, now: float) -> None:
        self.state = "open"
        self.until = now + min(self._most_seconds, self._open_seconds * 2**self._opened)
        self._opened = min(self._opened + 1, 16)


class Limit:
    """How many requests at once: halved where the replica says that it is too many, and one more for each so many that
    ended well while it was reached (additive increase, multiplicative decrease; Chiu and Jain 1989)."""

    def __init__(self, most: int, pause_seconds: float = 1.0):
        self.most = most
        self._now = float(most)
        self._pause_seconds = pause_seconds
        self._halved = float("-inf")

    @property
    def value(self) -> int:
        return int(self._now)

    def refused(self, running: int, now: float) -> None:
        """The replica refused a request for its load, beside `running` others: those sent with it don't count again."""
        if now - self._halved >= self._pause_seconds:
            self._now = max(1.0, min(self._now, running + 1) / 2)
            self._halved = now

    def ended_well(self, running: int) -> None:
        """A request ended, of `running`."""
        if running >= self.value:
            self._now = min(float(self.most), self._now + 1 / self._now)
