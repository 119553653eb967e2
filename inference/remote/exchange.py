"""One POST, and its answer read to the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator

import httpx
import msgspec

from inference.errors import BackendError, BadUpstream
from inference.remote.incoming import GRACE_SECONDS, Incoming
from inference.remote.refusals import error_for, read_error
from inference.remote.wire import Call, Reader, Wire
from inference.sse import EventReader, EventTooLarge

log = logging.getLogger(__name__)

_DONE = b"[DONE]"
_ERROR_BODY_BYTES = 64 << 10
_ANSWER_BODY_BYTES = 16 << 20


async def exchange(client: httpx.AsyncClient, wire: Wire, call: Call, stream: Incoming, token_timeout: float) -> None:
    """Send `call` and put what comes of it into `stream`.  Raises BackendError or httpx.HTTPError."""
    headers = {"Content-Type": "application/json"}
    async with client.stream("POST", call.url, content=call.body, headers=headers) as response:
        stream.answering = True
        expected = "text/event-stream" if call.streams else "application/json"
        kind = response.headers.get("Content-Type", expected).partition(";")[0].strip().lower()
        if response.status_code != 200 or kind != expected:
            raise await _refusal(response, kind, wire, stream)
        answer = _Answer(wire, stream, token_timeout)
        if call.streams:
            await answer.follow(response.aiter_raw())
        else:
            await answer.take_whole(response.aiter_raw())


class _Answer:
    """The body of a response on its way into `stream`."""

    def __init__(self, wire: Wire, stream: Incoming, token_timeout: float):
        self._wire = wire
        self._read: Reader = wire.reader()
        self._stream = stream
        self._token_timeout = token_timeout

    async def follow(self, body: AsyncGenerator[bytes, None]) -> None:
        """Server-sent events, to `[DONE]`, the end of the body or a stop string."""
        stream, events = self._stream, EventReader()
        async for piece in body:
            try:
                complete = events.feed(piece)
            except EventTooLarge as error:
                raise BadUpstream(f"the inference server's answer can't be read: {error}") from None
            for event in complete:
                if not event.data.strip():  # a sign of life
                    continue
                if event.data == _DONE and not self._wire.ends_with_body:
                    if not stream.end(done=True):
                        raise BadUpstream("the inference server said it was done without an answer")
                    stream.allow(None)
                    await _finish(body)
                    return
                self._take(event.data)
                if stream.cut_short:  # leaving the body unread closes the connection: the server may stop
                    stream.end()
                    return
                if stream.full:
                    await self._wait_for_reader()
        last = events.flush()
        done = self._wire.ends_with_body
        if last is not None and last.data == _DONE:
            done = True
        elif last is not None:
            with contextlib.suppress(_NotAChunk):  # half an event: what follows tells whether it mattered
                self._take(last.data)
        if not stream.end(done=done):
            raise cut(stream.tokens)

    async def take_whole(self, body: AsyncGenerator[bytes, None]) -> None:
        """An answer that comes as one piece of JSON."""
        whole = await _read(body, _ANSWER_BODY_BYTES)
        if len(whole) > _ANSWER_BODY_BYTES:
            raise BadUpstream(f"the inference server's answer is longer than {_ANSWER_BODY_BYTES} bytes")
        self._take(whole)
        if not self._stream.end(done=True):
            raise BadUpstream("the inference server was done without an answer")

    def _take(self, data: bytes) -> None:
        """Raises BackendError for an error event and for what is no chunk."""
        stream = self._stream
        try:
            chunk = self._read(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            if stream.reason is not None:  # the answer is whole, and only its usage can't be read
                return
            raise _NotAChunk(f"the inference server sent an event that is no completion chunk: {error}") from None
        if chunk.error is not None:
            if stream.tokens:
                raise BadUpstream(f"the inference server broke off after {stream.tokens} tokens: {chunk.error.message}")
            raise error_for(chunk.error, self._wire.model, stream.max_tokens, None)
        stream.take(chunk, self._token_timeout)

    async def _wait_for_reader(self) -> None:
        """A slow reader is no fault of the server's: its clock stands still meanwhile."""
        stream = self._stream
        stream.allow(None)
        while stream.full:
            stream.drained.clear()
            await stream.drained.wait()
        stream.allow(self._token_timeout)


class _NotAChunk(BadUpstream):
    pass


async def _refusal(response: httpx.Response, kind: str, wire: Wire, stream: Incoming) -> BackendError:
    body = b""
    with contextlib.suppress(TimeoutError, httpx.HTTPError):  # the status says enough
        async with asyncio.timeout(GRACE_SECONDS):
            body = await _read(response.aiter_raw(), _ERROR_BODY_BYTES)
    error = read_error(response.status_code, body[:_ERROR_BODY_BYTES])
    log.warning("inference server: status %s: %s", response.status_code, error.message)
    if response.status_code == 200 and error.status == 200 and b'"error"' not in body:
        return BadUpstream(f"the inference server answered with {kind or 'nothing'} instead of a stream of events")
    return error_for(error, wire.model, stream.max_tokens, response.headers.get("Retry-After"))


async def _read(body: AsyncGenerator[bytes, None], most: int) -> bytes:
    """All of it, or a little more than `most` bytes."""
    pieces, size = [], 0
    async for piece in body:
        pieces.append(piece)
        size += len(piece)
        if size > most:
            break
    return b"".join(pieces)


async def _finish(body: AsyncGenerator[bytes, None]) -> None:
    """Read the end of the body, so that the connection can serve the next request."""
    with contextlib.suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(GRACE_SECONDS):
            async for _ in body:
                pass


def cut(tokens: int) -> BadUpstream:
    return BadUpstream(f"the inference server's stream was cut after {tokens} tokens, before the answer's end")
