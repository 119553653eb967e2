"""The outbox between a fast producer and a slow client."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from gateway.answering import Delta, Done, merge_deltas
from gateway.config import Config, ServerConfig
from gateway.desk import Desk
from gateway.disconnect import CUT, ClientGone, unless_disconnected
from gateway.streams import HEARTBEAT, EventStream, Outbox


async def test_what_waits_is_merged_and_nothing_is_lost():
    outbox = Outbox(merge_deltas)
    for letter in "abc":
        outbox.put(Delta(letter))
    outbox.put(Done("id", "stop"))
    outbox.end()
    assert len(outbox) == 2
    assert [await outbox.get() for _ in range(3)] == [Delta("abc"), Done("id", "stop"), None]


async def test_an_error_comes_after_the_events_before_it():
    outbox = Outbox(merge_deltas)
    outbox.put(Delta("a"))
    outbox.end(RuntimeError("broken"))
    outbox.end(None)
    assert await outbox.get() == Delta("a")
    with pytest.raises(RuntimeError, match="broken"):
        await outbox.get()


async def test_a_cut_drops_what_waits():
    outbox = Outbox(merge_deltas)
    outbox.put(Delta("a"))
    outbox.cut(ClientGone())
    with pytest.raises(ClientGone):
        await outbox.get()


async def forever() -> dict:
    await asyncio.Event().wait()
    raise AssertionError


class Stream:
    """An EventStream with everything around it in view."""

    def __init__(self, events, **server):
        self.desk = Desk(Config(server=ServerConfig(**server)))
        self.sent: list[dict] = []
        self.aborted: list[str] = []
        self._news = asyncio.Event()
        self.response = EventStream(
            events,
            desk=self.desk,
            request_id="r1",
            encode=msgspec.json.encode,
            encode_error=lambda error: b"E:" + type(error).__name__.encode(),
            merge=merge_deltas,
            abort=self.aborted.append,
            closing=b"closed",
        )

    async def send(self, message: dict) -> None:
        self.sent.append(message)
        self._news.set()
        await asyncio.sleep(0)  # else a stream that never ends could not be timed out

    async def says(self, what: bytes) -> None:
        while what not in self.body:
            self._news.clear()
            await self._news.wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def run(self, receive=forever, send=None, scope=None) -> None:
        await self.response.to_asgi_response()(scope or {}, receive, send or self.send)


async def test_a_quiet_stream_has_heartbeats():
    release = asyncio.Event()

    async def events():
        yield Delta("a")
        await release.wait()
        yield Delta("b")

    stream = Stream(events(), heartbeat_seconds=0.01)
    task = asyncio.create_task(stream.run())
    await stream.says(HEARTBEAT)
    release.set()
    await task
    assert stream.body.replace(HEARTBEAT, b"") == b'{"text":"a"}{"text":"b"}closed'
    assert stream.aborted == []


async def test_a_producer_that_never_waits_does_not_keep_the_disconnect_from_being_heard():
    """Measured: such a generator kept the whole server busy for ever after its client had gone."""
    gone = asyncio.Event()

    async def events():
        while True:
            yield Delta("x")

    async def receive():
        await gone.wait()
        return {"type": "http.disconnect"}

    stream = Stream(events())

    async def send(message):
        stream.sent.append(message)
        if len(stream.sent) == 5:
            gone.set()

    await asyncio.wait_for(stream.run(receive, send), 10)
    assert stream.aborted == ["r1"]
    assert stream.sent[-1]["more_body"]


@pytest.mark.parametrize("stuck_at", [b"", b'{"text":"a"}', b"E:RuntimeError", b"closed"])
async def test_a_client_that_stops_reading_is_cut_off_wherever_the_stream_is(stuck_at):
    """Only what was said in the middle had a limit: a client that left the end unread was waited for for ever."""
    cut = asyncio.Event()

    async def events():
        yield Delta("a")
        raise RuntimeError("broken")

    async def receive():
        await cut.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.body" and message["body"] == stuck_at:
            await forever()
        stream.sent.append(message)

    stream = Stream(events(), slow_reader_seconds=0.01)
    await asyncio.wait_for(stream.run(receive, send, {"state": {CUT: cut.set}}), 10)
    assert cut.is_set()
    assert stream.aborted == ["r1"]


async def test_a_producer_that_timed_out_is_an_error_and_no_silence():
    async def events():
        yield Delta("a")
        raise TimeoutError("the database")

    stream = Stream(events())
    await asyncio.wait_for(stream.run(), 10)
    assert stream.body == b'{"text":"a"}E:TimeoutErrorclosed'


async def test_the_drain_deadline_ends_a_stream_with_an_error_event():
    async def events():
        yield Delta("a")
        await asyncio.Event().wait()

    stream = Stream(events())
    task = asyncio.create_task(stream.run())
    await stream.says(b"a")
    stream.desk.drain.expire()
    await task
    assert stream.body == b'{"text":"a"}E:ShuttingDownclosed'
    assert stream.aborted == ["r1"]


async def test_a_cancelled_response_still_aborts():
    """uvicorn cancels what is left at its own deadline; nothing that awaits may be relied on then."""

    async def events():
        yield Delta("a")
        await asyncio.Event().wait()

    stream = Stream(events())
    task = asyncio.create_task(stream.run())
    await stream.says(b"a")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stream.aborted == ["r1"]


async def test_work_that_finishes_first_wins():
    async def work():
        return 5

    assert await unless_disconnected(forever, work()) == 5


async def test_a_client_that_goes_cancels_the_work():
    cancelled = asyncio.Event()

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def receive():
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGone):
        await unless_disconnected(receive, work())
    await asyncio.wait_for(cancelled.wait(), 5)
