"""Stop working when nobody waits for the result any more.

A client that goes away is heard only by someone who listens: Litestar's own streams do, its plain
handlers don't.  Here both do, with plain asyncio tasks: each is cancelled at most once, so that
clean-up which awaits runs too, while what must happen (`Backend.abort`) is synchronous anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from litestar.types import Receive, Scope

T = TypeVar("T")

# Where a connection's own `abort` is in the state that comes with its requests, see `gateway.serving`.
CUT = "refdesk_cut"


class ClientGone(Exception):
    """The client closed the connection before its response."""


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone.  The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cut(scope: Scope, watch: asyncio.Task[None]) -> None:
    """End the connection now, with what its client left unread; `watch` is what waits for its disconnect.

    Returning is not enough: a server closes only after the last byte was taken.  Where it isn't ours, that is all."""
    abort = scope.get("state", {}).get(CUT)
    if abort is not None:
        abort()
        # A response that ends before its connection does is a fault to uvicorn.
        await asyncio.wait((watch,))


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancels it and raises ClientGone when the client goes first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            # Not awaited when we are being cancelled ourselves: the task cleans up on its own.
            task.add_done_callback(_retrieve)


def _retrieve(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()
