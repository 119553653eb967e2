"""Server-sent events to a client that may be slow, or go away.

    events ──pump──▶ Outbox ──sender──▶ client          heartbeat when nothing was said for a while
                       ▲
       disconnect, drain deadline, error

The pump never waits for the client: what the client hasn't taken yet is merged in the outbox, so a
slow reader holds at most one answer's text here and nothing at all in the engine.  One that takes
nothing for `slow_reader_seconds` is let go, connection and all.  However it ends, `abort` is called,
synchronously.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from litestar import Request, Response
from litestar.types import Message, Receive, Scope, Send

from gateway.desk import Desk
from gateway.disconnect import ClientGone, cut, disconnected, unless_disconnected
from gateway.errors import ShuttingDown

logger = logging.getLogger(__name__)
E = TypeVar("E")
T = TypeVar("T")

HEARTBEAT = b": still here\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class SlowReader(Exception):
    """The client took nothing for `slow_reader_seconds`."""


class Outbox(Generic[E]):
    """Events that the client hasn't taken yet.  `merge` joins two neighbours into one, or gives None."""

    def __init__(self, merge: Callable[[E, E], E | None]):
        self._merge = merge
        self._events: deque[E] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: E) -> None:
        if self._events and (merged := self._merge(self._events[-1], event)) is not None:
            self._events[-1] = merged
        else:
            self._events.append(event)
        self._news.set()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come.  The first call counts."""
        if not self._ended:
            self._ended, self._error = True, error
        self._news.set()

    def cut(self, error: BaseException) -> None:
        """End now: what wasn't taken yet is dropped."""
        self._events.clear()
        self._ended, self._error = True, error
        self._news.set()

    async def get(self) -> E | None:
        """The next event; None at the end; raises the error that it ended with, after the events before it."""
        while not self._events:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return None
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()


class EventStream(Response[Any], Generic[E]):
    """A response that streams `events`.  An error before the first event becomes an ordinary error response,
    a later one the bytes of `encode_error`; `closing` ends every stream that wasn't cut off."""

    def __init__(
        self,
        events: AsyncGenerator[E, None],
        *,
        desk: Desk,
        request_id: str,
        encode: Callable[[E], bytes],
        encode_error: Callable[[Exception], bytes],
        merge: Callable[[E, E], E | None],
        abort: Callable[[str], None],
        closing: bytes = b"",
    ):
        super().__init__(content=None, status_code=200)
        self._events = events
        self._desk = desk
        self._request_id = request_id
        self._encode = encode
        self._encode_error = encode_error
        self._abort = abort
        self._closing = closing
        self._outbox: Outbox[E] = Outbox(merge)

    def to_asgi_response(self, *args: Any, headers: dict[str, str] | None = None, **kwargs: Any) -> Any:
        return self._respond

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        outbox = self._outbox
        pump = asyncio.create_task(self._pump())
        watch = asyncio.create_task(disconnected(receive))
        watch.add_done_callback(lambda task: None if task.cancelled() else outbox.cut(ClientGone()))
        unlisten = self._desk.drain.listen(lambda: outbox.cut(ShuttingDown()))
        completed = False
        try:
            completed = await self._send_all(send)
            if not completed:
                self._desk.metrics.aborted.inc()
        except SlowReader:
            logger.warning("request %s: the client takes nothing; connection cut", self._request_id)
            self._desk.metrics.aborted.inc()
            await cut(scope, watch)
        finally:
            unlisten()
            watch.cancel()
            pump.cancel()
            if not completed:
                self._abort(self._request_id)

    async def _pump(self) -> None:
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    self._outbox.put(event)
                    # A producer that never waits must not keep the loop from hearing a disconnect.
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            self._outbox.end(ClientGone())
            raise
        except Exception as error:
            self._outbox.end(error)
        else:
            self._outbox.end()

    async def _send_all(self, send: Send) -> bool:
        """True when the stream came to its own end, error events included.  Raises SlowReader."""
        try:
            event = await self._outbox.get()
        except ClientGone:
            return False
        headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        own_end = True
        try:
            while event is not None:
                await self._say(send, self._encode(event))
                event = await self._next(send)
        except ClientGone:
            return False
        except SlowReader:
            raise
        except Exception as error:
            own_end = not isinstance(error, ShuttingDown)
            await self._say(send, self._encode_error(error))
        if self._closing:
            await self._say(send, self._closing)
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})
        return own_end

    async def _next(self, send: Send) -> E | None:
        while True:
            quiet = asyncio.timeout(self._desk.config.server.heartbeat_seconds)
            try:
                async with quiet:
                    return await self._outbox.get()
            except TimeoutError:
                if not quiet.expired():
                    raise  # the producer's own
            await self._say(send, HEARTBEAT)

    async def _say(self, send: Send, data: bytes) -> None:
        await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})

    async def _send(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._desk.config.server.slow_reader_seconds):
                await send(message)
        except TimeoutError:
            raise SlowReader from None


def server_sent_event(name: str, data: bytes) -> bytes:
    """One named event; `data` is JSON and so has no line breaks of its own."""
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


async def whole(
    request: Request[Any, Any, Any],
    desk: Desk,
    request_id: str,
    abort: Callable[[str], None],
    work: Coroutine[Any, Any, T],
) -> T:
    """The plain counterpart of an EventStream: the result of `work`, ended and aborted just as early."""
    task = asyncio.ensure_future(unless_disconnected(request.receive, work))
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    unlisten = desk.drain.listen(expire)
    completed = False
    try:
        result = await task
        completed = True
        return result
    except ClientGone:
        desk.metrics.aborted.inc()
        raise
    except asyncio.CancelledError:
        if not expired:
            task.cancel()
            raise
        desk.metrics.aborted.inc()
        raise ShuttingDown from None
    finally:
        unlisten()
        if not completed:
            abort(request_id)
