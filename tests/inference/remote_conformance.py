"""What every remote backend promises when the network or the server breaks, through a proxy that breaks them.

A test module subclasses `RemoteConformance` and gives a `remote` fixture: an object whose `serve()` is an async context
manager of the port and host of a server that answers, and whose `connect(url, **knobs)` opens a backend for it.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import pytest

from inference import Backend, BackendError, BadUpstream, GenerationRequest, TimedOut, Unavailable
from tests.inference.conformance import ask, collect, eventually, nothing_runs, text_of
from tests.inference.fault_proxy import FaultProxy, Toxics

SHORT = 2  # tokens of an answer that is cut at each of its bytes
LONG = 24  # of one that breaks off in its middle
SOON = 0.05  # seconds of the timeouts that are to run out


class Remote(Protocol):
    def serve(self) -> AbstractAsyncContextManager[tuple[int, str]]: ...

    def connect(self, url: str, **knobs) -> Backend: ...


class RemoteConformance:
    """`every`: an answer is cut at each of its bytes, or at each so many-th: the dialects read their events alike."""

    lacks: frozenset[str] = frozenset()
    every = 1

    def asking(self, request_id: str = "r1", max_tokens: int = SHORT) -> GenerationRequest:
        wanted = {"max_tokens": max_tokens, "ignore_eos": True}
        return ask(request_id, **{name: value for name, value in wanted.items() if name not in self.lacks})

    @asynccontextmanager
    async def through(self, remote: Remote, **knobs):
        """A backend behind a proxy; at the end nothing of it is left."""
        async with remote.serve() as address, FaultProxy(*address) as proxy:
            backend = remote.connect(proxy.url, **knobs)
            await backend.health()  # what is asked once is asked before anything breaks
            try:
                yield backend, proxy
            finally:
                await backend.close()
            await eventually(lambda: not proxy.open_connections)
            await nothing_runs(backend)

    async def whole_answer(self, backend: Backend, proxy: FaultProxy, tokens: int = SHORT) -> tuple[str, int]:
        """The text of an undisturbed answer, and the bytes that it came in."""
        await hang_up(backend)
        deltas, _ = await collect(backend, self.asking(max_tokens=tokens))
        await hang_up(backend)
        return text_of(deltas), proxy.passed

    @pytest.mark.parametrize(("then", "sparser"), [("close", 1), ("reset", 7)])
    async def test_cut_at_any_byte_it_is_a_whole_answer_or_an_error(self, remote: Remote, then: str, sparser: int):
        async with self.through(remote) as (backend, proxy):
            text, size = await self.whole_answer(backend, proxy)
            whole = 0
            for after in range(0, size, self.every * sparser):
                await hang_up(backend)
                proxy.toxics = Toxics(after=after, then=then)
                try:
                    deltas, finished = await collect(backend, self.asking())
                except (BadUpstream, Unavailable) as error:
                    assert str(error)  # noqa: PT017
                else:
                    whole += 1
                    assert (text_of(deltas), finished.reason) == (text, "length")
            assert whole < size // (2 * self.every * sparser)
            proxy.toxics = Toxics()
            await hang_up(backend)
            assert (await self.whole_answer(backend, proxy))[0] == text

    async def test_sliced_at_any_byte_it_is_the_same_answer(self, remote: Remote):
        async with self.through(remote) as (backend, proxy):
            text, size = await self.whole_answer(backend, proxy)
            for at in range(1, size, self.every):
                await hang_up(backend)
                proxy.toxics = Toxics(slices=(at,))
                deltas, finished = await collect(backend, self.asking())
                assert (text_of(deltas), finished.reason) == (text, "length")
            await hang_up(backend)
            proxy.toxics = Toxics(slices=(1,) * size)
            assert text_of((await collect(backend, self.asking()))[0]) == text

    @pytest.mark.parametrize("where", [0, 5, 0.3, 0.6])
    async def test_silence_times_out_and_closes_the_connection(self, remote: Remote, where: float):
        """`where`: bytes, or the share of the answer that has come."""
        async with self.through(remote, first_token_timeout=30.0) as (backend, proxy):
            _, size = await self.whole_answer(backend, proxy, LONG)
            after = int(where * size) if isinstance(where, float) else where
        async with self.through(remote, first_token_timeout=SOON, token_timeout=SOON) as (backend, proxy):
            await hang_up(backend)
            left = proxy.clients_left
            proxy.toxics = Toxics(after=after, then="stall")
            with pytest.raises(TimedOut):
                await collect(backend, self.asking(max_tokens=LONG))
            await proxy.client_left(left + 1)

    async def test_what_breaks_off_after_a_token_is_never_asked_again(self, remote: Remote):
        async with self.through(remote) as (backend, proxy):
            _, size = await self.whole_answer(backend, proxy, LONG)
            await hang_up(backend)
            before = proxy.connections
            proxy.toxics = Toxics(after=size // 2, then="reset")
            with pytest.raises(BackendError):
                await collect(backend, self.asking(max_tokens=LONG))
            assert proxy.connections == before + 1

    async def test_a_server_that_drops_connections_is_unavailable_after_one_retry(self, remote: Remote):
        async with self.through(remote) as (backend, proxy):
            await hang_up(backend)
            before = proxy.connections
            proxy.toxics = Toxics(refuse=True)
            with pytest.raises(Unavailable):
                await collect(backend, self.asking())
            assert proxy.connections == before + 2
            assert not (await backend.health()).ready
            proxy.toxics = Toxics()
            assert (await backend.health()).ready
            await collect(backend, self.asking())

    async def test_nobody_waits_for_a_server_that_is_gone(self, remote: Remote):
        async with self.through(remote) as (backend, proxy):
            await hang_up(backend)
            await proxy.__aexit__()
            for n in range(5):
                with pytest.raises(Unavailable):
                    await collect(backend, self.asking(f"r{n}"))
            assert backend.metrics()["unreachable"] == 1
            retries = backend.metrics()["retries_total"]
            with pytest.raises(Unavailable) as raised:
                await collect(backend, self.asking("refused at once"))
            assert raised.value.retry_after_seconds > 0
            assert backend.metrics()["retries_total"] == retries

    async def test_two_hundred_failures_leave_the_connections_free(self, remote: Remote):
        async with self.through(remote) as (backend, proxy):
            _, size = await self.whole_answer(backend, proxy, LONG)
            proxy.toxics = Toxics(after=size // 2)
            await hang_up(backend)

            async def one(n: int) -> None:
                with pytest.raises(BackendError):
                    await collect(backend, self.asking(f"r{n}", max_tokens=LONG))

            for start in range(0, 200, 20):
                await asyncio.gather(*(one(n) for n in range(start, start + 20)))
            assert not backend._client._transport._pool.connections
            proxy.toxics = Toxics()
            await collect(backend, self.asking())


async def hang_up(backend: Backend) -> None:
    """Close the idle connections, so that what `proxy.toxics` says holds for the next request from its start."""
    pool = backend._client._transport._pool
    for connection in list(pool.connections):
        await connection.aclose()
        pool._connections.remove(connection)
