"""POST /v1/answers: sources before the first token, a cited answer, or a refusal without a model call."""

from __future__ import annotations

import json

import msgspec
import pytest
from litestar.testing import TestClient

from gateway.app import create_app
from gateway.config import AnswersConfig, Config
from inference import Capabilities, GenerationFailed, Overloaded, PromptTooLong, Unavailable
from tests.gateway.fakes import FakeBackend

QUESTION = {"question": "When must the pump be primed?"}
NONSENSE = {"question": "Do zebras dream of elephants?"}


def events(body: str) -> list[tuple[str, dict]]:
    blocks = [block for block in body.split("\n\n") if block and not block.startswith(":")]
    return [(block.split("\n")[0][len("event: ") :], json.loads(block.split("\ndata: ")[1])) for block in blocks]


def test_the_whole_answer(client, backend):
    response = client.post("/v1/answers", json=QUESTION)
    assert response.status_code == 200
    answer = response.json()
    assert answer["answer"] == (
        "According to the document, The pump must be primed before starting [1]. Ice cream tastes wonderful."
    )
    assert (answer["refused"], answer["finish_reason"]) == (False, "stop")
    assert answer["sources"][0]["text"].startswith("The pump must be primed")
    assert answer["quotes"][0]["text"] == "The pump must be primed before starting."
    (citation,) = answer["citations"]
    source = answer["sources"][citation["marker"] - 1]
    assert (citation["passage_id"], citation["document_id"]) == (source["passage_id"], source["document_id"])
    assert answer["answer"][citation["answer_start"] : citation["answer_end"]].endswith("starting [1].")
    assert [u["text"].strip() for u in answer["unsupported"]] == ["Ice cream tastes wonderful."]
    assert answer["usage"] == {
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 6,
        "kv_mode": "exact",
        "approximate_tokens": 0,
        "recomputed_tokens": 0,
    }
    assert answer["timings"]["first_token_ms"] >= answer["timings"]["retrieval_ms"] > 0
    assert answer["request_id"] == response.headers["x-request-id"] == backend.requests[0].request_id


def test_the_stream_says_the_same_in_order(client):
    whole = client.post("/v1/answers", json=QUESTION).json()
    response = client.post("/v1/answers", json=QUESTION | {"stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    got = events(response.text)
    names = [name for name, _ in got]
    assert names[0] == "sources"
    assert names[-3:] == ["citations", "usage", "done"]
    assert set(names[1:-3]) == {"delta"}
    content = dict(got)
    assert "".join(data["text"] for name, data in got if name == "delta") == whole["answer"]
    for key in ("quotes", "sources", "refused"):
        assert content["sources"][key] == whole[key]
    assert content["citations"] == {key: whole[key] for key in ("citations", "unsupported")}
    assert content["usage"]["usage"] == whole["usage"]
    assert content["done"]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_asks_no_model(client, backend, stream):
    response = client.post("/v1/answers", json=NONSENSE | {"stream": stream})
    assert backend.requests == []
    if stream:
        got = dict(events(response.text))
        assert got["sources"]["refused"]
        assert got["sources"]["sources"]
        assert got["sources"]["quotes"] == []
        assert "Nothing in the documents" in got["delta"]["text"]
        assert got["done"]["finish_reason"] == "refused"
    else:
        answer = response.json()
        assert answer["refused"]
        assert "Nothing in the documents" in answer["answer"]
        assert answer["sources"]
        assert answer["citations"] == answer["quotes"] == []
        assert answer["usage"]["completion_tokens"] == 0


def test_an_empty_library_says_so(client, library, backend):
    library.texts.clear()
    answer = client.post("/v1/answers", json=QUESTION).json()
    assert answer["refused"]
    assert "no documents" in answer["answer"]
    assert backend.requests == []


def test_a_looping_model_is_stopped_and_its_usage_kept(client, backend):
    backend.reply = ["The pump must be primed before starting.", "\n"]
    backend.endless = True
    answer = client.post("/v1/answers", json=QUESTION).json()
    assert answer["answer"] == "According to the document, The pump must be primed before starting."
    assert answer["finish_reason"] == "repetition"
    assert answer["usage"]["completion_tokens"] >= 3
    assert backend.aborted == [answer["request_id"]]


def test_sampling_comes_from_the_request_else_from_the_settings(client, backend):
    client.post("/v1/answers", json=QUESTION)
    client.post("/v1/answers", json=QUESTION | {"max_tokens": 7, "temperature": 0.5, "seed": 3, "top_k": 1})
    first, second = (r.sampling for r in backend.requests)
    assert (first.max_tokens, first.temperature, first.seed) == (256, 0.0, None)
    assert (second.max_tokens, second.temperature, second.seed) == (7, 0.5, 3)
    documents = [s for m in backend.requests[1].prompt.messages for s in m.segments if s.kind == "document"]
    assert len(documents) == 1


def test_a_follow_up_is_searched_with_the_question_before_it(client, library):
    history = [{"role": "user", "content": "When is the pump primed?"}, {"role": "assistant", "content": "Before."}]
    client.post("/v1/answers", json={"question": "And the valve?", "history": history})
    assert library.searches == ["When is the pump primed?\nAnd the valve?"]


def test_another_subject_is_searched_alone(client, library):
    history = [{"role": "user", "content": "When is the pump primed?"}, {"role": "assistant", "content": "Before."}]
    client.post("/v1/answers", json={"question": "How often are ladders inspected?", "history": history})
    assert library.searches == ["How often are ladders inspected?"]


@pytest.mark.parametrize(
    ("said", "sought"),
    [
        (["When is the ", "valve primed?"], "When is the valve primed?"),
        (["Sure!\n", "When is it?"], "When is the pump primed?\nAnd the valve?"),
        ([], "When is the pump primed?\nAnd the valve?"),
    ],
)
def test_a_model_may_rewrite_a_follow_up(library, backend, said: list[str], sought: str):
    history = [{"role": "user", "content": "When is the pump primed?"}, {"role": "assistant", "content": "Before."}]
    backend.reply = said
    settings = AnswersConfig(follow_ups="rewritten")
    with TestClient(create_app(Config(answers=settings), library=library, backend=backend)) as client:
        client.post("/v1/answers", json={"question": "And the valve?", "history": history})
    assert library.searches == [sought]
    asked = backend.requests[0].prompt.messages[-1].text
    assert "When is the pump primed?" in asked
    assert "And the valve?" in asked


def test_the_model_reads_what_stands_around_a_passage(library, backend):
    library.add("Rules", "The crane is green.\n\nThe crane lifts nine tons.\n\nThe crane rests on Sundays.")
    settings = AnswersConfig(neighbours=1, prompt="plain")
    with TestClient(create_app(Config(answers=settings), library=library, backend=backend)) as client:
        answer = client.post("/v1/answers", json={"question": "How many tons lifts the crane?"}).json()
    (prompt,) = [request.prompt for request in backend.requests]
    read = [s.text for m in prompt.messages for s in m.segments if s.kind == "document"]
    assert [text.split("crane ")[1].strip() for text in read] == ["is green.", "lifts nine tons.", "rests on Sundays."]
    assert [source["text"] for source in answer["sources"][:3]] == [text.split("\n", 1)[1].strip() for text in read]


def test_only_as_many_passages_as_the_context_holds(library, backend):
    backend.capabilities = Capabilities(model="fake", counts_tokens=True, max_context_tokens=140)
    settings = AnswersConfig(max_tokens=50, prompt="plain", reads=4)
    with TestClient(create_app(Config(answers=settings), library=library, backend=backend)) as client:
        question = {"question": "primed pump valve pressure ladders inspected"}
        client.post("/v1/answers", json=question)
        backend.capabilities = msgspec.structs.replace(backend.capabilities, max_context_tokens=100)
        client.post("/v1/answers", json=question)
        read = [[s for m in r.prompt.messages for s in m.segments if s.kind == "document"] for r in backend.requests]
        assert [len(documents) for documents in read] == [3, 1]


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (Overloaded("busy", 7.2), 503, "overloaded", "8"),
        (Unavailable("gone"), 503, "backend_unavailable", "5"),
        (PromptTooLong(9, 8), 400, "prompt_too_long", None),
        (GenerationFailed("the step failed"), 500, "generation_failed", None),
        (RuntimeError("secret of the inside"), 500, "internal_error", None),
    ],
)
def test_a_failing_backend(client, backend, error, status, code, retry):
    backend.error = error
    response = client.post("/v1/answers", json=QUESTION)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers.get("retry-after") == retry
    assert "secret" not in response.text
    assert backend.running == set()
    name, problem = events(client.post("/v1/answers", json=QUESTION | {"stream": True}).text)[-1]
    assert (name, problem["code"], problem["status"]) == ("error", code, status)
    assert "secret" not in json.dumps(problem)


def test_a_stream_that_breaks_ends_with_an_error_and_never_with_done(client, backend):
    backend.error, backend.error_after = GenerationFailed("broken"), 3
    names = [name for name, _ in events(client.post("/v1/answers", json=QUESTION | {"stream": True}).text)]
    assert names == ["sources", "delta", "delta", "error"]


def test_an_error_before_the_first_event_keeps_its_status(client):
    response = client.post("/v1/answers", json=QUESTION | {"stream": True, "collection": "nowhere"})
    assert (response.status_code, response.json()["code"]) == (404, "unknown_collection")
    assert "nowhere" in response.json()["detail"]


def test_without_a_continued_reply_the_answer_has_no_prefix(config, library):
    backend = FakeBackend(["Before starting."], continues_reply=False)
    with TestClient(create_app(config, library=library, backend=backend)) as client:
        assert client.post("/v1/answers", json=QUESTION).json()["answer"] == "Before starting."


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (["Prime it."], "According to the document, Prime it."),
        (["  ", " Prime it."], "According to the document, Prime it."),
        (["\n", "- Prime it."], "- Prime it."),
        ([" \n\nPrime", " it."], "Prime it."),
        ([" "], ""),
        ([], ""),
    ],
)
def test_how_the_begun_reply_is_joined(client, backend, reply, answer):
    backend.reply = reply
    assert client.post("/v1/answers", json=QUESTION).json()["answer"] == answer


def test_search_needs_no_model(client, backend):
    found = client.post("/v1/search", json={"query": "pump primed", "top_k": 1}).json()
    assert [p["text"] for p in found["passages"]] == ["The pump must be primed before starting."]
    assert found["relevant"]
    assert set(found) == {"request_id", "passages", "relevant", "facets", "timings"}
    assert backend.requests == []


def test_the_model_reads_the_best_passages_and_only_what_it_was_given_is_cited(library, backend):
    settings = AnswersConfig(prompt="plain", reads=1)
    with TestClient(create_app(Config(answers=settings), library=library, backend=backend)) as client:
        answer = client.post("/v1/answers", json=QUESTION).json()
    [prompt] = [request.prompt for request in backend.requests]
    documents = [s.document_id for m in prompt.messages for s in m.segments if s.kind == "document"]
    assert documents == [answer["sources"][0]["passage_id"]]
    assert len(answer["sources"]) > 1
    assert {citation["passage_id"] for citation in answer["citations"]} <= set(documents)
    assert all(citation["marker"] == 1 for citation in answer["citations"])
