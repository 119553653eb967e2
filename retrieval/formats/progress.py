"""How far the reading of one file is, told while it is read.

Whoever has a file read listens; a reader hands its parts (pages, slides, sheets, files of an archive) through `each`.
In the process that reads files (`worker`) they are told over the channel, and the sandbox tells them on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Tell = Callable[[int, int], None]  # parts done, of how many

_listener: ContextVar[Tell | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Tell | None) -> Iterator[None]:
    """What is told within goes to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(done: int, parts: int) -> None:
    if (listener := _listener.get()) is not None:
        listener(done, parts)


def each(parts: Sequence[T]) -> Iterator[T]:
    """The parts of a file one after the other, telling how many are done.  A part's own parts are not told: there is
    one count for a file."""
    for done, part in enumerate(parts):
        tell(done, len(parts))
        with listening(None):
            yield part
    tell(len(parts), len(parts))
