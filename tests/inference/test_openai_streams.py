"""Streams of a server with OpenAI's API that break in every way we know: cut, garbled, silent, left."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from inference import (
    BadUpstream,
    TimedOut,
    Unavailable,
    Usage,
)
from tests.inference.conformance import (
    ask,
    collect,
    eventually,
    nothing_runs,
    rest_of,
    split,
    text_of,
)
from tests.inference.fake_servers import WORDS, Faithful
from tests.inference.fake_upstream import FakeUpstream, Request, Wire, event_bytes
from tests.inference.test_openai_remote import chunk, remote, serving

ANSWER = " ".join(WORDS)

# ---- bytes cut anywhere ---------------------------------------------------------------------------


USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
PLAIN = event_bytes(chunk("漢")) + event_bytes(chunk("🙂é", "stop")) + event_bytes(USAGE) + b"data: [DONE]\n\n"
NOTHING = b"data:\n\n" + event_bytes({}) + event_bytes({"choices": None})
NO_USAGE = event_bytes({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": None}})
VARIANTS = {
    "plain": PLAIN,
    "events that hold nothing": NOTHING + PLAIN,
    "usage as floats": PLAIN.replace(b'"prompt_tokens": 9', b'"prompt_tokens": 9.0'),
    "no usage in the usage": PLAIN.replace(event_bytes(USAGE), NO_USAGE),
    "no usage that can be read": PLAIN.replace(event_bytes(USAGE), b'data: {"usage": "plenty"}\n\n'),
    "crlf": PLAIN.replace(b"\n", b"\r\n"),
    "cr": PLAIN.replace(b"\n", b"\r"),
    "no space": PLAIN.replace(b"data: ", b"data:"),
    "comments": b": ping\n\n" + PLAIN.replace(b"\n\n", b"\n\n: ping\n\nid: 7\nretry: 10\n\n"),
    "byte order mark": b"\xef\xbb\xbf" + PLAIN,
    "no done": PLAIN.removesuffix(b"data: [DONE]\n\n"),
    "no last empty line": PLAIN.removesuffix(b"\n\n"),
    "no usage, no last empty line": PLAIN[: PLAIN.index(b'data: {"choices": []')].removesuffix(b"\n\n"),
}


@pytest.mark.parametrize("name", VARIANTS)
async def test_the_stream_reads_the_same_wherever_it_is_cut(name: str):
    data, at = VARIANTS[name], 0

    async def answer(wire: Wire, request: Request) -> None:
        await wire.stream_head()
        for piece in (data[:at], data[at:]) if at else [data[n : n + 1] for n in range(len(data))]:
            if piece:
                await wire.chunk(piece)
                await asyncio.sleep(0)
        await wire.end()

    async with serving(answer) as (backend, server):
        for at in range(len(data)):  # noqa: B007  (answer reads it)
            deltas, finished = await collect(backend, ask())
            assert text_of(deltas) == "漢🙂é"
            assert finished.reason == "stop"
            assert finished.usage == (Usage(None, 2) if "no usage" in name else Usage(9, 2))
            await nothing_runs(backend)
        assert server.connections_made == 1  # read to its end, a connection serves the next request


@pytest.mark.parametrize("orderly", [True, False])
async def test_a_stream_that_ends_early_is_never_an_answer(orderly: bool):
    """Cut at every byte: before the finish reason arrived it is BadUpstream, after it an answer."""
    whole_at = PLAIN.index(b'"stop"') + len(b'"stop"}]}')
    at = 0

    async def answer(wire: Wire, request: Request) -> None:
        await wire.stream_head()
        if at:
            await wire.chunk(PLAIN[:at])
        if orderly:
            await wire.end()
        wire.close()

    async with serving(answer) as (backend, _):
        for at in range(len(PLAIN)):
            if at < whole_at:
                with pytest.raises(BadUpstream, match="cut"):
                    await collect(backend, ask())
            elif orderly or at >= whole_at + 2:
                _, finished = await collect(backend, ask())
                assert finished.reason == "stop"


async def test_a_reset_after_some_tokens_is_not_retried():
    async def answer(wire: Wire, request: Request) -> None:
        await wire.stream_head()
        await wire.event(chunk("one"))
        await wire.event(chunk(" two"))
        await asyncio.sleep(0.01)  # let the bytes out before the reset drops what is unsent
        wire.reset()

    async with serving(answer) as (backend, server):
        with pytest.raises(BadUpstream, match="cut after"):
            await collect(backend, ask())
        assert len(server.requests) == 1


async def test_done_without_a_finish_reason_ends_an_answer_but_not_an_empty_one():
    texts = ["one", " two"]

    async def answer(wire: Wire, request: Request) -> None:
        await wire.stream_head()
        for text in texts:
            await wire.event(chunk(text))
        await wire.done()

    async with serving(answer) as (backend, _):
        assert (await collect(backend, ask(max_tokens=8)))[1].reason == "stop"
        assert (await collect(backend, ask(max_tokens=2)))[1].reason == "length"
        texts.clear()
        with pytest.raises(BadUpstream, match="without an answer"):
            await collect(backend, ask())


# ---- garbage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"data: {not json}\n\n", "no completion chunk"),
        (b"data: \xff\xfe\n\n", "no completion chunk"),
        (b'data: {"choices": 3}\n\n', "no completion chunk"),
        (b'data: {"choices": [{"delta": {"content": ["a"]}}]}\n\n', "no completion chunk"),
        (b"data: null\n\n", "no completion chunk"),
        (b'data: {"hello": 1}\n\n', "cut after 0"),
        (b"data: " + b"x" * (10 << 20), "longer than"),
        (b"data: x\n" * (1 << 20), "longer than"),
        (b"no events at all\n\n", "cut after 0"),
    ],
)
async def test_garbage_in_the_stream_is_bad_upstream(data: bytes, says: str):
    async def answer(wire: Wire, request: Request) -> None:
        await wire.stream_head()
        await wire.chunk(data)
        await wire.end()

    async with serving(answer) as (backend, _):
        with pytest.raises(BadUpstream, match=says):
            await collect(backend, ask())


async def test_garbage_instead_of_http_is_bad_upstream():
    async def answer(wire: Wire, request: Request) -> None:
        await wire.raw(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")
        wire.close()

    async with serving(answer) as (backend, _):
        with pytest.raises(BadUpstream, match="HTTP"):
            await collect(backend, ask())


# ---- time -----------------------------------------------------------------------------------------


async def test_a_refused_connection_is_unavailable_after_one_retry():
    async with FakeUpstream(Faithful()) as server:
        backend = remote(server)
    with pytest.raises(Unavailable, match="can't be reached"):
        await collect(backend, ask())
    assert backend.metrics()["retries_total"] == 1
    health = await backend.health()
    assert not health.ready
    assert "does not answer" in health.detail
    await backend.close()


async def test_a_connection_dropped_before_any_answer_is_tried_once_more():
    faithful = Faithful()

    async def answer(wire: Wire, request: Request) -> None:
        if len(server.requests) == 1:
            wire.close()
        else:
            await faithful(wire, request)

    async with serving(answer) as (backend, server):
        deltas, _ = await collect(backend, ask(max_tokens=99))
        assert text_of(deltas) == ANSWER
        assert len(server.requests) == 2


async def test_silence_before_the_first_token_times_out_and_closes_the_connection():
    async with serving(Faithful(hold_first=asyncio.Event()), first_token_timeout=0.05) as (backend, server):
        with pytest.raises(TimedOut, match="first token"):
            await collect(backend, ask())
        await server.client_left()


async def test_silence_before_the_head_times_out():
    async def answer(wire: Wire, request: Request) -> None:
        await asyncio.Event().wait()

    async with serving(answer, first_token_timeout=0.05) as (backend, server):
        with pytest.raises(TimedOut, match="first token"):
            await collect(backend, ask())
        await server.client_left()


async def test_silence_between_tokens_times_out_though_the_server_pings():
    async def answer(wire: Wire, request: Request) -> None:
        await wire.stream_head()
        await wire.event(chunk("one"))
        while True:
            await wire.chunk(b": ping\n\n")
            await asyncio.sleep(0.01)

    async with serving(answer, token_timeout=0.05) as (backend, server):
        with pytest.raises(TimedOut, match="after 1 tokens"):
            await collect(backend, ask())
        await server.client_left()


async def test_an_answer_that_is_whole_does_not_wait_for_ever_for_its_usage():
    async def answer(wire: Wire, request: Request) -> None:
        await wire.stream_head()
        await wire.event(chunk("one", "stop"))
        await asyncio.Event().wait()

    async with serving(answer, token_timeout=0.05) as (backend, server):
        _, finished = await collect(backend, ask())
        assert (finished.reason, finished.usage) == ("stop", Usage(None, 1))
        await server.client_left()


async def test_a_slow_reader_holds_the_server_back_and_loses_nothing():
    words = tuple(f"w{n}" for n in range(5000))
    async with serving(Faithful(words=words, max_context=1 << 20), token_timeout=0.05) as (backend, _):
        stream = backend.generate(ask(max_tokens=9999))
        first = await anext(stream)
        await asyncio.sleep(0.2)  # longer than the token timeout, which is the server's, not the reader's
        deltas, finished = split([first, *await rest_of(stream)])
        assert text_of(deltas) == " ".join(words)
        assert finished.usage.completion_tokens == 5000


# ---- leaving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("how", ["abort", "aclose", "cancel"])
async def test_the_server_sees_us_leave(how: str, after: int):
    hold = {"hold_after_first" if after else "hold_first": asyncio.Event()}
    async with serving(Faithful(**hold)) as (backend, server):
        stream = backend.generate(ask())
        for _ in range(after):
            await anext(stream)
        reading = asyncio.create_task(anext(stream))
        await eventually(lambda: server.requests)
        if how == "abort":
            backend.abort("r1")  # nobody need read on for the connection to close
            await server.client_left()
            assert (await reading).reason == "abort"
            await stream.aclose()
        else:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            if how == "aclose":
                await stream.aclose()
            await server.client_left()


async def test_a_stream_left_unread_is_closed_by_abort_alone():
    async with serving(Faithful(words=WORDS * 1000, max_context=1 << 20)) as (backend, server):
        stream = backend.generate(ask(max_tokens=99999))
        await anext(stream)
        backend.abort("r1")
        await nothing_runs(backend)
        await eventually(lambda: not server.busy)
        await stream.aclose()


async def test_a_hundred_cancelled_streams_leave_nothing_behind():
    async with serving(Faithful(hold_after_first=asyncio.Event())) as (backend, server):

        async def one(n: int) -> None:
            async with aclosing(backend.generate(ask(f"r{n}"))) as stream:
                await anext(stream)

        for start in range(0, 100, 20):
            await asyncio.gather(*map(one, range(start, start + 20)))
        await server.client_left(100)
        await nothing_runs(backend)
        assert not backend._client._transport._pool.connections
        await eventually(lambda: not server.busy)
