"""The remote backend and a server with OpenAI's API: what it is asked, what its errors mean, how it is."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

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
)
from tests.inference.fake_servers import Faithful
from tests.inference.fake_upstream import FakeUpstream, Request, Wire


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


def chunk(text: str | None = None, reason: str | None = None) -> dict:
    delta = {} if text is None else {"content": text}
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


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
