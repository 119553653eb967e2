"""What a replica's prefix cache holds, as far as one gateway can know: what it was sent, corrected by what it says.

Servers with OpenAI's API don't tell what they hold, but most tell of each request how many of its tokens were cached.
So the record is an LRU of the prompts' beginnings, bounded by the size of the cache: what is known of it, and what is
learned where a server finds less than the record promised.  What it didn't find it has computed again and holds now;
what is gone is that which was used longer ago.  (An approximate index of prefixes, as llm-d's and Dynamo's without
events.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence

from inference.routing.path import Name

MOST = 16_384  # beginnings of prompts, a few megabytes
DOUBT = 0.7  # of what was promised must be found: caches hold whole blocks, and lengths are estimated
SMALLER, LARGER = 0.9, 1.002  # the cache is than was thought, where that much isn't found, and where it is


class Record:
    """`capacity`: how many tokens the replica's cache holds, None where unknown; `tokens`: those of what is in here."""

    def __init__(self, capacity: float | None = None):
        self.capacity = capacity
        self._held: OrderedDict[Name, float] = OrderedDict()
        self._settled: set[Name] = set()
        self.tokens = 0.0
        self._learned = float("inf")

    def __contains__(self, name: Name) -> bool:
        return name in self._held

    def held_of(self, names: Sequence[tuple[int, Name]]) -> list[int]:
        """The ranks of those that are held."""
        held = self._held
        return [rank for rank, name in names if name in held]

    def __len__(self) -> int:
        return len(self._held)

    def overlap(self, along: Sequence[tuple[Name, float]]) -> float:
        """Tokens of the longest beginning of `along` that is held, or will be: it was sent already."""
        return _length(along, self._held)

    def promised(self, along: Sequence[tuple[Name, float]]) -> float:
        """Tokens of the longest beginning that has been computed for somebody."""
        return _length(along, self._settled)

    def note(self, along: Sequence[tuple[Name, float]]) -> None:
        """The replica was sent `along`.  What is nearer to the beginning outlives what stands behind it."""
        for name, tokens in reversed(along):
            if name not in self._held:
                self.tokens += tokens
            self._held[name] = tokens
            self._held.move_to_end(name)
        self._trim()

    def settle(self, along: Sequence[tuple[Name, float]]) -> None:
        """The replica has computed what it was sent as `along`."""
        self._settled.update(name for name, _ in along if name in self._held)

    def correct(self, along: Sequence[tuple[Name, float]], promised: float, found: float) -> None:
        """The cache held `found` of `along`, where the record had `promised` so many: both shares of all of it."""
        if found < DOUBT * promised:
            whole = sum(tokens for _, tokens in along)
            self._learned = max(2 * whole, SMALLER * min(self._learned, self.tokens))
            self._trim()
        elif promised:
            self._learned *= LARGER

    def forget(self, along: Sequence[tuple[Name, float]]) -> None:
        """What was sent as `along` may never have been computed."""
        for name, _ in along:
            if name in self._held and name not in self._settled:
                self._drop(name)

    def _trim(self) -> None:
        most_tokens = min(self._learned, self.capacity or self._learned)
        while self._held and (len(self._held) > MOST or self.tokens > most_tokens):
            self._drop(next(iter(self._held)))

    def _drop(self, name: Name) -> None:
        self.tokens -= self._held.pop(name)
        self._settled.discard(name)


def _length(along: Sequence[tuple[Name, float]], names: Container[Name]) -> float:
    found = 0.0
    for name, tokens in along:
        if name not in names:
            break
        found += tokens
    return found
