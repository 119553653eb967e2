"""The remote backend against a server that is faithful, and against ones that break in every way we know."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing, asynccontextmanager

import pytest

from inference import (
    BadUpstream,
    ChatPrompt,
    OpenAIConfig,
    Overloaded,
    PromptTooLong,
    RequestRefused,
    TextPrompt,
    TimedOut,
    Unavailable,
    UnknownModel,
    Usage,
    open_backend,
)
from inference.remote.openai import normalise_base_url
from inference.remote.refusals import read_error, retry_after_seconds
from tests.inference.conformance import (
    ask,
    chat,
    collect,
    eventually,
    nothing_runs,
    rest_of,
    split,
    text_of,
)
from tests.inference.fake_servers import WORDS, Faithful
from tests.inference.fake_upstream import FakeUpstream, Request, Wire, event_bytes

ANSWER = " ".join(WORDS)


def remote(server: FakeUpstream, **knobs):
    return open_backend(OpenAIConfig(**{"base_url": server.url, "model": "fake"} | knobs))


@asynccontextmanager
async def serving(answer, **knobs):
    """A backend in front of a server that answers so; both are idle again at the end."""
    async with FakeUpstream(answer) as server:
        backend = remote(server, **knobs)
        try:
            yield backend, server
        finally:
            await backend.close()
        assert backend.metrics()["requests_running"] == 0


# ---- what we send -------------------------------------------------------------------------------


async def test_sends_only_what_the_request_needs():
    async with serving(Faithful(), api_key="secret") as (backend, server):
        await collect(backend, ask(max_tokens=4))
        (request,) = server.requests
        assert request.path == "/v1/chat/completions"
        assert request.headers["authorization"] == "Bearer secret"
        assert request.json() == {
            "model": "fake",
            "messages": [{"role": m.role, "content": m.text} for m in chat().messages],
            "max_tokens": 4,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def test_sends_sampling_and_raw_prompts_to_completions():
    async with serving(Faithful()) as (backend, server):
        request = ask(prompt=TextPrompt("a b"), max_tokens=4, top_p=0.5, top_k=7, seed=1, stop=("x",), ignore_eos=True)
        _, finished = await collect(backend, request)
        body = server.requests[0].json()
        assert server.requests[0].path == "/v1/completions"
        assert body["prompt"] == "a b"
        assert [body[key] for key in ("top_p", "top_k", "seed", "stop", "ignore_eos")] == [0.5, 7, 1, ["x"], True]
        assert finished.usage == Usage(2, 4, None)


@pytest.mark.parametrize("continues", [True, False])
async def test_a_reply_prefix_is_sent_only_where_the_server_continues_it(continues: bool):
    async with serving(Faithful(), continues_reply=continues) as (backend, server):
        assert backend.capabilities.continues_reply is continues
        await collect(backend, ask(prompt=ChatPrompt(chat().messages, reply_prefix="According to")))
        body = server.requests[0].json()
        if continues:
            assert body["messages"][-1] == {"role": "assistant", "content": "According to"}
            assert (body["add_generation_prompt"], body["continue_final_message"]) == (False, True)
        else:
            assert body["messages"][-1]["role"] == "user"
            assert not {"add_generation_prompt", "continue_final_message"} & body.keys()


async def test_cached_tokens_come_through():
    async with serving(Faithful(cached_tokens=11)) as (backend, _):
        _, finished = await collect(backend, ask())
        assert finished.usage.cached_tokens == 11
        assert backend.metrics()["cached_tokens_total"] == 11


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h:1/v1", "http://h:1/v1"),
        ("https://h/api/v3/", "https://h/api/v3"),
        ("https://h/v1beta/openai", "https://h/v1beta/openai"),
        ("https://h/proxy", "https://h/proxy/v1"),
    ],
)
def test_base_url_with_or_without_its_version(given: str, used: str):
    assert normalise_base_url(given) == used


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://h/v1", "http://", "http://h:99999/v1", "http://h:abc", "http://[::1"]
)
def test_a_base_url_that_is_none_is_refused_at_the_start(url: str):
    with pytest.raises(Unavailable, match="base_url"):
        open_backend(OpenAIConfig(base_url=url, model="m"))


@pytest.mark.parametrize("key", ["é", "a\nb"])
def test_a_key_that_no_header_can_hold_is_refused_at_the_start(key: str):
    with pytest.raises(Unavailable, match="api_key"):
        open_backend(OpenAIConfig(base_url="http://127.0.0.1:1", model="m", api_key=key))


# ---- bytes cut anywhere ---------------------------------------------------------------------------


def chunk(text: str | None = None, reason: str | None = None) -> dict:
    delta = {} if text is None else {"content": text}
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


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


# ---- errors ---------------------------------------------------------------------------------------

NESTED = {"error": {"message": "no luck", "type": "BadRequestError", "param": None, "code": 400}}
FLAT = {"object": "error", "message": "no luck", "type": "BadRequestError", "param": None, "code": 400}


@pytest.mark.parametrize(
    ("status", "value", "headers", "raises", "says"),
    [
        (400, NESTED, {}, RequestRefused, "no luck"),
        (400, FLAT, {}, RequestRefused, "no luck"),
        (400, {"error": "no luck"}, {}, RequestRefused, "no luck"),
        (422, {"detail": [{"msg": "no luck"}]}, {}, RequestRefused, "no luck"),
        (400, {"error": {"message": "x", "code": "context_length_exceeded"}}, {}, RequestRefused, "x"),
        (401, NESTED, {}, Unavailable, "api_key"),
        (404, {"error": {"message": "The model `fake` does not exist."}}, {}, UnknownModel, "'fake'"),
        (404, {"detail": "Not Found"}, {}, BadUpstream, "base_url"),
        (404, b"<html>", {"content_type": "text/html"}, BadUpstream, "base_url"),
        (302, b"", {"Location": "http://127.0.0.1:9/v1"}, BadUpstream, "redirects"),
        (429, NESTED, {"Retry_After": "7"}, Overloaded, "busy"),
        (429, NESTED, {}, Overloaded, "busy"),
        (503, b"", {"Retry_After": "7"}, Overloaded, "busy"),
        (503, b"starting", {}, Unavailable, "starting"),
        (502, b"<h1>Bad Gateway</h1>", {"content_type": "text/html"}, Unavailable, "Bad Gateway"),
        (504, b"", {}, TimedOut, "time"),
        (500, NESTED, {}, BadUpstream, "no luck"),
        (200, NESTED, {}, RequestRefused, "no luck"),
        (200, {"error": "no luck"}, {}, BadUpstream, "no luck"),
        (200, b"<html>hello", {"content_type": "text/html"}, BadUpstream, "text/html"),
        (200, {"choices": [{"message": {"content": "whole"}}]}, {}, BadUpstream, "application/json"),
    ],
)
async def test_every_status_becomes_the_error_that_says_what_to_do(status, value, headers, raises, says):
    async def answer(wire: Wire, request: Request) -> None:
        await wire.reply(status, value, **headers)

    async with serving(answer) as (backend, server):
        for n in range(3):  # an error leaves the pool as it was
            with pytest.raises(raises, match=says) as raised:
                await collect(backend, ask(f"r{n}"))
            assert type(raised.value) is raises
            if raises is Overloaded:
                assert raised.value.retry_after_seconds == (7 if headers else 1)
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 300 tokens. However, you requested 450 tokens (430 in the messages, "
        "20 in the completion).",
        "This model's maximum context length is 300 tokens. However, your request has 430 input tokens.",
        "Requested token count exceeds the model's maximum context length of 300 tokens. You requested a total of 450 "
        "tokens: 430 tokens from the input messages and 20 tokens for the completion.",
        "The input (450 tokens) is longer than the model's context length (300 tokens).",
        "request (450 tokens) exceeds the available context size (300 tokens), try increasing it",
    ],
)
async def test_the_numbers_of_a_context_error_are_found(message: str):
    async def answer(wire: Wire, request: Request) -> None:
        await wire.reply(400, {"error": {"message": message, "code": 400}})

    async with serving(answer) as (backend, _):
        with pytest.raises(PromptTooLong) as raised:
            await collect(backend, ask(max_tokens=20))
        assert raised.value.limit_tokens == 300
        assert raised.value.needed_tokens in (430, 450)


async def test_an_error_event_under_200_fails_the_stream():
    texts: list[str] = []

    async def answer(wire: Wire, request: Request) -> None:
        await wire.stream_head()
        for text in texts:
            await wire.event(chunk(text))
        await wire.event({"error": {"message": "no luck", "type": "BadRequestError", "code": 400}})
        await wire.done()

    async with serving(answer) as (backend, _):
        with pytest.raises(RequestRefused, match="no luck"):
            await collect(backend, ask())
        texts.append("one")
        with pytest.raises(BadUpstream, match="broke off after 1 tokens: no luck"):
            await collect(backend, ask())


async def test_the_key_is_in_no_message(caplog):
    async def answer(wire: Wire, request: Request) -> None:
        await wire.reply(500, b"")

    async with serving(answer, api_key="s3cr3t") as (backend, _):
        with pytest.raises(BadUpstream) as raised:
            await collect(backend, ask())
        assert "s3cr3t" not in str(raised.value) + caplog.text + repr(backend.metrics())


def test_retry_after_in_all_its_forms():
    assert retry_after_seconds("3") == 3
    assert retry_after_seconds(" 0.5 ") == 0.5
    assert retry_after_seconds("999999") == 3600
    assert retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert [retry_after_seconds(value) for value in (None, "", "soon", "-3", "nan", "inf")] == [None] * 6


def test_an_error_text_is_bounded():
    assert len(read_error(500, b"x" * 1_000_000).message) <= 300
    assert len(read_error(500, json.dumps({"error": "x" * 1_000_000}).encode()).message) <= 300


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


# ---- health ---------------------------------------------------------------------------------------


async def test_health_names_the_models_that_there_are():
    async with serving(Faithful(), model="other") as (backend, _):
        health = await backend.health()
        assert not health.ready
        assert "'other'" in health.detail
        assert "fake" in health.detail


@pytest.mark.parametrize(("status", "value", "ready"), [(404, {}, True), (500, {}, False), (200, b"hi", False)])
async def test_health_where_models_are_not_listed(status: int, value, ready: bool):
    async def answer(wire: Wire, request: Request) -> None:
        await wire.reply(status, value)

    async with serving(answer) as (backend, _):
        health = await backend.health()
        assert health.ready is ready
        assert health.detail
