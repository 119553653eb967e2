"""Which of the blocks that nobody holds is given away first.

`Eviction` of `inference.config`:

    lru    the one that was held longest ago
    gdsf   the one of the least frequency x cost, on a clock that lets what is no longer asked for grow old
           (Greedy-Dual-Size-Frequency, Cherkasova 1998; for trees of documents RAGCache's PGDSF, Jin et al. 2024)

Blocks are of one size, so cost is what it takes to compute one at its place.  How often it was asked for is remembered
beyond its eviction: a document that comes back is not a stranger.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush

NOTHING_TO_FIND = -1.0  # the priority of a block without a name
DEBOUNCE_SECONDS = 0.05


class Popularity:
    """How often names were asked for, each request weighing half as much when `half_life` others have come since.

    The `most` that were asked for last are remembered, resident or not.  A burst counts once: what comes within
    `DEBOUNCE_SECONDS` of the request that was counted before says nothing about the next hour.
    """

    def __init__(self, most: int, half_life: int = 5000):
        self._most = most
        self._half_life = half_life
        self._requests = 0
        self._seen: OrderedDict[bytes, tuple[float, int, float]] = OrderedDict()  # count, as of request, at second

    def note(self, names: Iterable[bytes], now: float) -> None:
        """A request asks for `names` at the time `now`, in seconds."""
        self._requests += 1
        for name in names:
            count, then, at = self._seen.get(name, (0.0, self._requests, float("-inf")))
            if now - at >= DEBOUNCE_SECONDS:
                self._seen[name] = (1.0 + self._decayed(count, then), self._requests, now)
                self._seen.move_to_end(name)
        while len(self._seen) > self._most:
            self._seen.popitem(last=False)

    def of(self, name: bytes) -> float:
        """0 where it was never asked for."""
        count, then, _ = self._seen.get(name, (0.0, self._requests, 0.0))
        return self._decayed(count, then)

    def _decayed(self, count: float, then: int) -> float:
        return count * 0.5 ** ((self._requests - then) / self._half_life)


class FreeBlocks:
    """The blocks that nobody holds: the one of the least priority goes first, among equals the one that came first."""

    def __init__(self, blocks: Iterable[int]):
        self._came: dict[int, int] = {block: at for at, block in enumerate(blocks)}
        self._heap = [(NOTHING_TO_FIND, at, block) for block, at in self._came.items()]
        self._count = len(self._came)

    def __len__(self) -> int:
        return len(self._came)

    def __iter__(self) -> Iterator[int]:
        return iter(self._came)

    def __contains__(self, block: int) -> bool:
        return block in self._came

    def add(self, block: int, priority: float) -> None:
        self._came[block] = self._count
        heappush(self._heap, (priority, self._count, block))
        self._count += 1
        if len(self._heap) > 64 + 2 * len(self._came):  # most of it has been taken since
            self._heap = [entry for entry in self._heap if self._came.get(entry[2]) == entry[1]]
            heapify(self._heap)

    def remove(self, block: int) -> None:
        del self._came[block]

    def pop(self) -> tuple[int, float]:
        """(block, its priority); IndexError when there is none."""
        while True:
            priority, came, block = heappop(self._heap)
            if self._came.get(block) == came:
                del self._came[block]
                return block, priority
