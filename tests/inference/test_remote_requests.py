"""What each kind of server is asked, and what it is never asked; what is read off it before and beside the answers."""

from __future__ import annotations

from contextlib import asynccontextmanager

import msgspec
import pytest

from inference import (
    ChatPrompt,
    Constraint,
    OpenAIConfig,
    RequestRefused,
    TextPrompt,
    Unavailable,
    UnknownModel,
    open_backend,
)
from inference.remote.breaker import Breaker
from inference.remote.stops import StopStrings
from tests.inference.conformance import ask, chat, collect
from tests.inference.fake_servers import TRTLLM, VLLM, Faithful, LlamaCpp, SGLang
from tests.inference.fake_upstream import FakeUpstream, Request, Wire
from tests.inference.tiny import save_tokenizer

FAKES = {"generic": Faithful, "vllm": VLLM, "trtllm": TRTLLM, "sglang": SGLang, "llamacpp": LlamaCpp}
OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@asynccontextmanager
async def openai(dialect: str, answer=None, **settings):
    answer = answer or FAKES[dialect]()
    async with FakeUpstream(answer) as server:
        backend = open_backend(OpenAIConfig(**{"base_url": server.url, "model": "fake", "dialect": dialect} | settings))
        yield backend, server
        await backend.close()


async def asked(backend, server, request) -> dict:
    """The body of the POST that `request` became."""
    await collect(backend, request)
    return next(each.json() for each in reversed(server.requests) if b"max_tokens" in each.body)


def scoped(scope: str, **more):
    return msgspec.structs.replace(ask(), scope=scope, **more)


# ---- OpenAI's API -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "off"),
    [
        ("generic", {}),
        ("vllm", OFF),
        ("trtllm", OFF),
        ("sglang", OFF | {"top_k": -1}),
        ("llamacpp", {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}),
    ],
)
async def test_filters_that_servers_have_of_their_own_are_switched_off(dialect: str, off: dict):
    async with openai(dialect) as (backend, server):
        body = await asked(backend, server, ask())
        core = {"model", "messages", "max_tokens", "temperature", "stream", "stream_options"}
        assert {name: value for name, value in body.items() if name not in core} == off


async def test_llamacpp_samples_with_what_was_asked_for_and_nothing_else():
    answer = LlamaCpp()
    async with openai("llamacpp", answer) as (backend, _):
        await collect(backend, ask(repetition_penalty=1.3, min_p=0.2))
    wanted = {"top_k": 0, "top_p": 1.0, "min_p": 0.2, "repeat_penalty": 1.3, "temperature": 0.0}
    assert answer.filters == wanted


@pytest.mark.parametrize(
    ("dialect", "fields"),
    [
        ("generic", {"structured_outputs": {"regex": "a+"}}),
        ("vllm", {"structured_outputs": {"regex": "a+"}}),
        ("trtllm", {"response_format": {"type": "regex", "regex": "a+"}}),
        ("sglang", {"regex": "a+"}),
    ],
)
async def test_a_regular_expression_is_asked_for_in_each_dialect(dialect: str, fields: dict):
    async with openai(dialect) as (backend, server):
        body = await asked(backend, server, ask(constraint=Constraint("regex", "a+")))
        assert fields.items() <= body.items()


async def test_what_llamacpp_would_ignore_is_refused():
    async with openai("llamacpp") as (backend, _):
        with pytest.raises(RequestRefused, match="stop_token_ids"):
            await collect(backend, ask(stop_token_ids=(3,)))
        with pytest.raises(RequestRefused, match="JSON schema"):
            await collect(backend, ask(constraint=Constraint("regex", "a+")))


@pytest.mark.parametrize("dialect", ["vllm", "trtllm", "sglang"])
async def test_scopes_send_salts_of_their_own_and_the_public_one_none(dialect: str):
    async with openai(dialect) as (backend, server):
        for scope in ("public", "a" * 3000, "b", "b"):
            await collect(backend, scoped(scope))
        public, first, second, again = server._answer.salts
        assert public is None
        assert first != second == again
        assert 1 <= len(first) <= 1024
        assert second != "b"


async def test_trtllm_takes_no_salt_with_raw_text():
    async with openai("trtllm") as (backend, server):
        await collect(backend, scoped("a", prompt=TextPrompt("x y")))
        assert server._answer.salts == [None]


@pytest.mark.parametrize("dialect", ["generic", "llamacpp"])
async def test_no_salt_where_there_is_none_to_take(dialect: str):
    async with openai(dialect) as (backend, server):
        assert "cache_salt" not in await asked(backend, server, scoped("a"))


@pytest.mark.parametrize(("dialect", "urgent", "later"), [("vllm", 0, 1), ("trtllm", 0.5, 0.0), ("sglang", 1, 0)])
async def test_priorities_go_in_the_direction_of_each_server(dialect: str, urgent: float, later: float):
    answer = VLLM(by_priority=True) if dialect == "vllm" else None
    async with openai(dialect, answer, priority=True) as (backend, server):
        assert (await asked(backend, server, scoped("public")))["priority"] == urgent
        assert (await asked(backend, server, scoped("public", priority="batch")))["priority"] == later


async def test_no_priority_is_sent_unasked():
    async with openai("vllm") as (backend, server):
        assert "priority" not in await asked(backend, server, scoped("public", priority="batch"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dialect": "trtllm", "continues_reply": True}, "continues no reply"),
        ({"dialect": "llamacpp", "priority": True}, "no priorities"),
        ({"dialect": "vllm", "tokenizer": "/nowhere"}, "tokenizer"),
    ],
)
def test_settings_that_a_server_can_not_follow_are_refused_at_the_start(settings: dict, says: str):
    with pytest.raises(Unavailable, match=says):
        open_backend(OpenAIConfig(**{"base_url": "http://127.0.0.1:1", "model": "m"} | settings))


@pytest.mark.parametrize(
    ("dialect", "fields"),
    [
        ("vllm", {"add_generation_prompt": False, "continue_final_message": True}),
        ("sglang", {"continue_final_message": True}),
        ("llamacpp", {"add_generation_prompt": False, "continue_final_message": True}),
    ],
)
async def test_a_reply_is_continued_in_each_dialect(dialect: str, fields: dict):
    async with openai(dialect, continues_reply=True) as (backend, server):
        prompt = ChatPrompt(chat().messages, reply_prefix="According to")
        body = await asked(backend, server, ask(prompt=prompt))
        assert body["messages"][-1] == {"role": "assistant", "content": "According to"}
        sent = {name: body[name] for name in ("add_generation_prompt", "continue_final_message") if name in body}
        assert sent == fields
        assert await backend.count_tokens(prompt) == len(" ".join(m["content"] for m in body["messages"]).split())


@pytest.mark.parametrize("dialect", FAKES)
async def test_the_model_and_its_context_are_found_out(dialect: str):
    async with openai(dialect, model="") as (backend, server):
        assert (await asked(backend, server, ask()))["model"] == "fake"
        assert backend.capabilities.model == "fake"
        known = dialect in ("vllm", "sglang", "llamacpp")
        assert backend.capabilities.max_context_tokens == (4096 if known else None)
        listed = sum(each.path == "/v1/models" for each in server.requests)
        await collect(backend, ask())
        assert sum(each.path == "/v1/models" for each in server.requests) == listed  # asked once


async def test_where_there_are_several_models_one_must_be_chosen():
    async def answer(wire: Wire, request: Request) -> None:
        await wire.reply(200, {"data": [{"id": "a"}, {"id": "b"}]})

    async with openai("generic", answer, model="") as (backend, _):
        with pytest.raises(UnknownModel, match="choose.*a, b"):
            await collect(backend, ask())


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llamacpp", "trtllm"])
async def test_a_server_that_still_loads_is_not_ready(dialect: str):
    async def answer(wire: Wire, request: Request) -> None:
        await wire.reply(503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}})

    async with openai(dialect, answer) as (backend, _):
        health = await backend.health()
        assert not health.ready
        assert "503" in health.detail


async def test_a_server_without_the_route_counts_nothing():
    async def answer(wire: Wire, request: Request) -> None:
        await wire.reply(404, {"detail": "Not Found"})

    async with openai("vllm", answer) as (backend, _):
        assert await backend.count_tokens(chat()) is None


@pytest.mark.parametrize("dialect", ["generic", "trtllm"])
async def test_a_tokenizer_of_our_own_counts_where_the_server_can_not(dialect: str, tokenizer: str):
    async with openai(dialect, tokenizer=tokenizer) as (backend, server):
        assert backend.capabilities.counts_tokens
        assert await backend.count_tokens(chat()) > len(" ".join(m.text for m in chat().messages).split())
        assert not server.requests


@pytest.mark.parametrize(
    ("usage", "prompt_tokens"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 5000}, None),
        ({"prompt_tokens": -1, "completion_tokens": 8}, None),
        ({"prompt_tokens": 9, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 10}}, None),
        ({"prompt_tokens": 9, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 9}}, 9),
    ],
)
async def test_a_usage_that_can_not_be_is_not_believed(usage: dict, prompt_tokens: int | None):
    class Liar(Faithful):
        def usage(self, *_):
            return usage

    async with openai("generic", Liar()) as (backend, _):
        _, finished = await collect(backend, ask(max_tokens=8))
        assert finished.usage.prompt_tokens == prompt_tokens
        assert finished.usage.completion_tokens == 8
        assert backend.metrics()["usage_corrected_total"] == (prompt_tokens is None)


# ---- pieces -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "stop", "shown"),
    [
        (["ab", "cd", "ef"], ("cd",), "ab"),
        (["a", "b", "c", "d"], ("bcx", "cd"), "ab"),
        (["aab"], ("ab",), "a"),
        (["abc"], ("bc", "abcd"), "a"),
        (["ab", "c"], ("", "xyz"), "abc"),
        (["ab", "x"], ("xy",), "abx"),
    ],
)
def test_stop_strings_end_the_text_wherever_it_is_cut(pieces: list[str], stop: tuple[str, ...], shown: str):
    for cut in (pieces, list("".join(pieces))):
        stops = StopStrings(stop)
        said = "".join(map(stops.feed, cut))
        assert said + ("" if stops.hit else stops.flush()) == shown


def test_the_breaker_lets_one_try_in_a_while_and_closes_when_it_gets_through():
    now = 0.0
    breaker = Breaker(lambda: now, opens_after=2, open_seconds=3.0)
    breaker.failed()
    breaker.admit()
    breaker.failed()
    with pytest.raises(Unavailable) as raised:
        breaker.admit()
    assert raised.value.retry_after_seconds == 3.0
    now = 3.0
    breaker.admit()
    with pytest.raises(Unavailable):
        breaker.admit()
    breaker.succeeded()
    breaker.admit()
