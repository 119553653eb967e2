"""Who goes first: readers beside one writer, and people before bulk work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

REST = 4.0


class ReadWriteLock:
    """Many readers or one writer; a waiting writer goes before new readers, so that it can't starve.

    Not reentrant.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writing = False
        self._writers_waiting = 0

    @contextmanager
    def read(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._writing and not self._writers_waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        with self._changed:
            self._writers_waiting += 1
            try:
                self._changed.wait_for(lambda: not self._writing and not self._readers)
            finally:
                self._writers_waiting -= 1
                self._changed.notify_all()
            self._writing = True
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()


class PriorityLock:
    """A mutex whose bulk takers stand back while anyone urgent waits.  While people are served, also by what doesn't
    take it, bulk takers rest `REST` times as long as the last one held it: a fifth of the time is theirs at any load.

    `bulk_seconds`: how long that was, by `clock`.  `serves`: whether anybody has been served yet.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.bulk_seconds = 0.0
        self.serves = False
        self._clock = clock
        self._changed = threading.Condition()
        self._held = False
        self._urgent_waiting = 0
        self._served = 0

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Somebody is served meanwhile."""
        with self._changed:
            self.serves = True
            self._served += 1
        try:
            yield
        finally:
            with self._changed:
                self._served -= 1
                self._changed.notify_all()

    @contextmanager
    def urgent(self) -> Iterator[None]:
        with self._changed:
            self._urgent_waiting += 1
            try:
                self._changed.wait_for(lambda: not self._held)
                self._held = True
            finally:
                self._urgent_waiting -= 1
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def bulk(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._served, REST * self.bulk_seconds)
            self._changed.wait_for(lambda: not self._held and not self._urgent_waiting)
            self._held = True
        began = self._clock()
        try:
            yield
        finally:
            self.bulk_seconds = self._clock() - began
            self._release()

    def _release(self) -> None:
        with self._changed:
            self._held = False
            self._changed.notify_all()
