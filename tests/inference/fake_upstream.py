"""A server over bare sockets, which misbehaves byte by byte when told to; what it says stands in `fake_servers`.

Raw asyncio streams, no HTTP library: a test decides where the bytes are cut, and sees the client leave.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """The server's end of one connection."""

    def __init__(self, writer: asyncio.StreamWriter):
        self._writer = writer

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def head(self, status: int = 200, **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} Status"] + [f"{k.replace('_', '-')}: {v}" for k, v in headers.items()]
        await self.raw("\r\n".join([*lines, "", ""]).encode())

    async def stream_head(self) -> None:
        await self.head(Content_Type="text/event-stream; charset=utf-8", Transfer_Encoding="chunked")

    async def chunk(self, data: bytes) -> None:
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def event(self, value: Any) -> None:
        await self.chunk(event_bytes(value))

    async def done(self) -> None:
        await self.chunk(b"data: [DONE]\n\n")
        await self.end()

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")

    async def reply(self, status: int, value: Any, content_type: str = "application/json", **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        await self.head(status, Content_Type=content_type, Content_Length=str(len(body)), **headers)
        await self.raw(body)

    def close(self) -> None:
        """An orderly end of the connection, whatever was promised."""
        self._writer.close()

    def reset(self) -> None:
        self._writer.transport.abort()


Answer = Callable[[Wire, Request], Awaitable[None]]


def event_bytes(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


class FakeUpstream:
    """`async with FakeUpstream(answer) as server`: answers every request with `answer(wire, request)`."""

    def __init__(self, answer: Answer):
        self._answer = answer
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.requests: list[Request] = []
        self.connections_made = 0
        self.left_early = 0  # connections that the client closed in the middle of an answer
        self.gone = asyncio.Condition()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def busy(self) -> int:
        return len(self._connections)

    async def client_left(self, times: int = 1) -> None:
        """Wait until the client has closed `times` connections in the middle of an answer."""
        async with self.gone:
            await self.gone.wait_for(lambda: self.left_early >= times)

    async def __aenter__(self) -> FakeUpstream:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.connections_made += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._serve(reader, writer)
        finally:
            writer.close()
            self._connections.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(1)
        while first and not writer.is_closing():
            request = await _read_request(first, reader)
            self.requests.append(request)
            answering = asyncio.create_task(self._answer_quietly(Wire(writer), request))
            watching = asyncio.create_task(reader.read(1))
            try:
                await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
                if not answering.done():
                    async with self.gone:
                        self.left_early += 1
                        self.gone.notify_all()
                    return
                await answering
                if writer.is_closing():
                    return
                first = await watching
            finally:
                for task in (answering, watching):
                    task.cancel()
                await asyncio.gather(answering, watching, return_exceptions=True)

    async def _answer_quietly(self, wire: Wire, request: Request) -> None:
        with contextlib.suppress(ConnectionError):
            await self._answer(wire, request)


async def _read_request(first: bytes, reader: asyncio.StreamReader) -> Request:
    head = first + await reader.readuntil(b"\r\n\r\n")
    start, *lines = head.decode().split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
    method, path, _ = start.split(" ")
    return Request(method, path, headers, await reader.readexactly(int(headers.get("content-length", 0))))
