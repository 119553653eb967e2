"""A TCP proxy that does to a server's answers what networks do: cut, reset, slice, stall, refuse."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Literal


@dataclass(slots=True, kw_only=True)
class Toxics:
    """What happens to the bytes from the server, on each connection.

    `after`: how many of them pass before `then` happens: an orderly "close", a "reset", or a "stall" that lasts until
    the client goes away.  `slices`: the sizes of the first writes.  `refuse`: connections are dropped as they come."""

    after: int | None = None
    then: Literal["close", "reset", "stall"] = "close"
    slices: tuple[int, ...] = ()
    refuse: bool = False


class FaultProxy:
    """`async with FaultProxy(port) as proxy`: `proxy.url` leads to that port, through `proxy.toxics`."""

    def __init__(self, port: int, host: str = "127.0.0.1"):
        self._port = port
        self._host = host
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.toxics = Toxics()
        self.connections = 0
        self.passed = 0  # bytes of the last connection that reached the client
        self.left = asyncio.Condition()
        self.clients_left = 0

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def open_connections(self) -> int:
        return len(self._tasks)

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def client_left(self, times: int = 1) -> None:
        """Wait until clients have closed `times` connections."""
        async with self.left:
            await self.left.wait_for(lambda: self.clients_left >= times)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            if self.toxics.refuse:
                writer.transport.abort()
                return
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await self._join(reader, writer)
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
        asking = asyncio.create_task(self._upstream(reader, up_writer))
        answering = asyncio.create_task(self._downstream(up_reader, writer))
        try:
            await asyncio.wait({asking, answering}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (asking, answering):
                task.cancel()
            await asyncio.gather(asking, answering, return_exceptions=True)
            up_writer.close()

    async def _upstream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        async with self.left:
            self.clients_left += 1
            self.left.notify_all()

    async def _downstream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        toxics, slices = self.toxics, list(self.toxics.slices)
        self.passed = 0
        while data := await reader.read(slices.pop(0) if slices else 1 << 16):
            if toxics.after is not None and self.passed + len(data) >= toxics.after:
                writer.write(data[: toxics.after - self.passed])
                await writer.drain()
                self.passed = toxics.after
                if toxics.then == "stall":
                    await asyncio.Event().wait()
                if toxics.then == "reset":
                    writer.transport.abort()
                return
            writer.write(data)
            await writer.drain()
            self.passed += len(data)
