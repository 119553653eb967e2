"""Which requests run, and how any of them is stopped from any thread.

The backends that need no queue of their own (scripted, remote) register a request here when
`generate` is called, not when its stream is first read: an abort that comes in between counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable


class Run:
    """One request: `aborted` turns true once, at once, and the loop that serves it is told."""

    __slots__ = ("__weakref__", "_loop", "_on_abort", "aborted")

    def __init__(self) -> None:
        self.aborted = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_abort: Callable[[], object] | None = None

    def attach(self, on_abort: Callable[[], object]) -> None:
        """Have `on_abort` called in the running loop after an abort; look at `aborted` once after this."""
        self._on_abort = on_abort
        self._loop = asyncio.get_running_loop()

    def abort(self) -> None:
        """Stop this request.  Never waits, never raises; a second call does nothing."""
        if self.aborted:
            return
        self.aborted = True  # before the loop is read: `attach` sets the loop before it reads this
        loop, on_abort = self._loop, self._on_abort
        if loop is not None and on_abort is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the stream with it
                loop.call_soon_threadsafe(on_abort)


class Running:
    """The live requests by id.  Held weakly: a stream that is dropped, read or unread, leaves by itself."""

    def __init__(self) -> None:
        self._runs: weakref.WeakValueDictionary[str, Run] = weakref.WeakValueDictionary()

    def open(self, request_id: str) -> Run:
        run = Run()
        self._runs[request_id] = run
        return run

    def abort(self, request_id: str) -> None:
        run = self._runs.get(request_id)
        if run is not None:
            run.abort()

    def abort_all(self) -> None:
        for run in list(self._runs.values()):
            run.abort()
