"""OpenAI's wire format, byte for byte where clients depend on it."""

from __future__ import annotations

import json

import msgspec
import pytest

from gateway.openai_shapes import ChatShape, Piece, TextShape
from inference import Constraint, GenerationFailed, Overloaded, TextPrompt, TokenLogprob

CHAT = {"model": "refdesk", "messages": [{"role": "user", "content": "When must the pump be primed?"}]}
BARE = {"model": "fake", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
TEXT = {"model": "fake", "prompt": "Once upon"}


def chunks(body: str) -> list[dict]:
    """The chunks of a stream, which must be `data: …\\n\\n` each and end with [DONE]."""
    assert body.endswith("data: [DONE]\n\n")
    blocks = body.split("\n\n")[:-2]
    assert all(block.startswith("data: {") and "\n" not in block for block in blocks)
    return [json.loads(block[6:]) for block in blocks]


def test_models(client):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [m["id"] for m in listed["data"]] == ["refdesk", "fake"]
    assert client.get("/v1/models/fake").json()["object"] == "model"


def test_a_plain_completion(client, backend):
    reply = client.post("/v1/completions", json=TEXT).json()
    assert reply["id"].startswith("cmpl-")
    assert reply["object"] == "text_completion"
    assert reply["choices"] == [{"index": 0, "text": "".join(backend.reply), "logprobs": None, "finish_reason": "stop"}]
    assert reply["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 6,
        "total_tokens": 16,
        "prompt_tokens_details": {
            "cached_tokens": 4,
            "kv_mode": "exact",
            "approximate_tokens": 0,
            "recomputed_tokens": 0,
        },
    }
    assert "refdesk" not in reply
    assert backend.requests[0].prompt == TextPrompt("Once upon")
    assert backend.requests[0].sampling.max_tokens == 16


def test_a_streamed_completion(client, backend):
    body = client.post("/v1/completions", json=TEXT | {"stream": True}).text
    *parts, last = chunks(body)
    assert [p["choices"][0]["text"] for p in parts] == backend.reply
    assert all(p["choices"][0]["finish_reason"] is None and "usage" not in p for p in parts)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert {p["id"] for p in (*parts, last)} == {last["id"]}


def test_usage_in_the_stream_when_asked(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for path, request in [("/v1/completions", TEXT), ("/v1/chat/completions", BARE)]:
        *parts, last = chunks(client.post(path, json=request | options).text)
        assert last["choices"] == []
        assert last["usage"]["total_tokens"] == 16
        assert all(part["usage"] is None for part in parts)


def test_the_bare_model_does_not_look_at_documents(client, backend, library):
    reply = client.post("/v1/chat/completions", json=BARE).json()
    assert reply["object"] == "chat.completion"
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "".join(backend.reply)}
    assert library.searches == []
    messages = backend.requests[0].prompt.messages
    assert [(m.role, m.text) for m in messages] == [("system", "Be brief."), ("user", "Hi")]
    assert backend.requests[0].sampling.temperature == 1.0


def test_a_streamed_chat_begins_with_the_role(client, backend):
    first, *parts, last = chunks(client.post("/v1/chat/completions", json=BARE | {"stream": True}).text)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["choices"][0]["delta"]["content"] for p in parts) == "".join(backend.reply)
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "stop"


def test_refdesk_answers_from_documents(client):
    reply = client.post("/v1/chat/completions", json=CHAT).json()
    content = reply["choices"][0]["message"]["content"]
    assert content.startswith("> The pump must be primed before starting. [")
    assert "According to the document, The pump must be primed" in content
    assert "\n\nSources:\n[1] " in content
    assert "[7]" not in content
    about = reply["refdesk"]
    assert about["answer"] in content
    assert about["citations"][0]["quote"] == "The pump must be primed before starting."
    first, *parts = chunks(client.post("/v1/chat/completions", json=CHAT | {"stream": True}).text)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts) == content
    assert parts[-1]["refdesk"]["quotes"] == about["quotes"]


def test_refdesk_refuses_without_a_model_call(client, backend):
    nonsense = {"role": "user", "content": "Do zebras dream of elephants?"}
    reply = client.post("/v1/chat/completions", json=CHAT | {"messages": [nonsense]}).json()
    assert reply["choices"][0]["message"]["content"] == "Nothing in the documents answers this."
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["refdesk"]["refused"]
    assert backend.requests == []


def test_the_conversation_and_the_system_message_reach_the_prompt(client, backend):
    messages = [
        {"role": "system", "content": "Answer in verse."},
        {"role": "user", "content": "When is the pump primed?"},
        {"role": "assistant", "content": "Before starting."},
        {"role": "user", "content": [{"type": "text", "text": "And the valve?"}]},
    ]
    client.post("/v1/chat/completions", json=CHAT | {"messages": messages})
    text = backend.requests[0].prompt.messages[1].text
    assert text.index("primed before") < text.index("Assistant: Before starting.") < text.index("Answer in verse.")
    assert text.endswith("Question: And the valve?")


def test_sampling_fields(client, backend):
    extra = {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 7,
        "stop": "END",
        "ignore_eos": True,
    }
    client.post("/v1/completions", json=TEXT | extra)
    client.post("/v1/chat/completions", json=BARE | {"max_completion_tokens": 6, "stop": ["a", "b"], "top_k": -1})
    first, second = (r.sampling for r in backend.requests)
    assert (first.max_tokens, first.temperature, first.top_p, first.top_k) == (5, 0.5, 0.9, 3)
    assert (first.seed, first.stop, first.ignore_eos) == (7, ("END",), True)
    assert (second.max_tokens, second.stop, second.top_k) == (6, ("a", "b"), 0)


def test_documents_given_by_the_client_share_their_segments(client, backend):
    documents = [{"title": "One", "text": "First."}, {"id": 7, "text": "Second."}]
    for question in ("Why?", "When?"):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
        request = {"model": "fake", "messages": messages, "documents": documents}
        assert client.post("/v1/chat/completions", json=request).status_code == 200
    first, second = (r.prompt.messages[1].segments for r in backend.requests)
    assert [s.kind for s in first] == ["document", "document", "question"]
    assert first[:2] == second[:2]
    assert first[0].text == "One\nFirst.\n\n"
    assert backend.requests[0].document_order is None


@pytest.mark.parametrize(("field", "value"), [("document_order", "planned"), ("document_reuse", "prefix")])
def test_how_documents_are_shared_is_the_clients_to_choose(client, backend, field: str, value: str):
    documents = {"documents": [{"text": "First."}, {"text": "Second."}]}
    assert client.post("/v1/chat/completions", json=BARE | documents | {field: value}).status_code == 200
    assert getattr(backend.requests[0], field) == value
    wrong = client.post("/v1/chat/completions", json=BARE | documents | {field: "best"})
    assert wrong.status_code == 400
    assert field in wrong.json()["error"]["message"]
    ours = client.post("/v1/chat/completions", json=BARE | {"model": "refdesk", field: value})
    assert ours.status_code == 400


@pytest.mark.parametrize(
    "harmless",
    [{"n": 1}, {"presence_penalty": 0}, {"frequency_penalty": 0.0}, {"logit_bias": None}, {"logprobs": False}]
    + [{"user": "me"}, {"tools": []}, {"response_format": {"type": "text"}}, {"stream": None}, {"seed": None}],
)
def test_fields_without_effect_are_accepted(client, harmless):
    assert client.post("/v1/chat/completions", json=BARE | harmless).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 17), ("n", True), ("presence_penalty", 3), ("logit_bias", {"x": 1}), ("top_logprobs", 2), ("tools", [{}])]
    + [("response_format", {"type": "json_schema"}), ("structured_outputs", {"regex": "a", "json": {}})]
    + [
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("logprobs", 5),
        ("priority", "now"),
        ("nonsense", 1),
        ("messages", []),
        ("temperature", 3),
    ]
    + [("max_tokens", 0), ("top_p", 0), ("stop", ["x"] * 17), ("stream_options", {"include_usage": True})],
)
def test_what_cannot_be_honoured_is_named(client, backend, field, value):
    response = client.post("/v1/chat/completions", json=BARE | {field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert backend.requests == []


def test_unknown_and_wrong_models(client):
    assert client.post("/v1/completions", json=TEXT | {"model": "gpt-9"}).status_code == 404
    response = client.post("/v1/completions", json=TEXT | {"model": "refdesk"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


def test_an_error_before_the_first_token_keeps_its_status(client, backend):
    backend.error = Overloaded("busy", 3)
    response = client.post("/v1/chat/completions", json=BARE | {"stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert response.json()["error"]["code"] == "overloaded"


@pytest.mark.parametrize(
    ("path", "request_"),
    [("/v1/completions", TEXT), ("/v1/chat/completions", BARE), ("/v1/chat/completions", CHAT)],
)
@pytest.mark.parametrize(("draining", "code"), [(False, "backend_unavailable"), (True, "shutting_down")])
def test_an_answer_that_was_broken_off_is_an_error(client, backend, path, request_, draining, code):
    """`finish_reason` "abort" is none of OpenAI's: strict clients fail to read it, others take the answer as whole."""
    backend.ends = "abort"
    client.app.state.desk.drain.begun = draining
    response = client.post(path, json=request_)
    assert (response.status_code, response.json()["error"]["code"]) == (503, code)
    *parts, last = chunks(client.post(path, json=request_ | {"stream": True}).text)
    assert last["error"]["code"] == code
    assert all(part["choices"][0]["finish_reason"] is None for part in parts)


def test_an_error_in_the_stream_comes_before_done(client, backend):
    backend.error, backend.error_after = GenerationFailed("broken"), 2
    *_, last = chunks(client.post("/v1/completions", json=TEXT | {"stream": True}).text)
    assert last["error"]["code"] == "generation_failed"


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices(client, backend, stream):
    response = client.post("/v1/chat/completions", json=BARE | {"n": 3, "seed": 5, "stream": stream})
    said: dict[int, str] = {}
    for part in chunks(response.text) if stream else [response.json()]:
        for choice in part["choices"]:
            text = choice.get("delta" if stream else "message").get("content", "")
            said[choice["index"]] = said.get(choice["index"], "") + text
    assert len(said) == 3
    assert len(set(said.values())) == 1
    assert [request.sampling.seed for request in backend.requests] == [5, 6, 7]
    assert len({request.request_id for request in backend.requests}) == 3
    assert backend.running == set()


def test_a_choice_that_fails_ends_all(client, backend):
    backend.error, backend.error_after = GenerationFailed("broken"), 1
    response = client.post("/v1/chat/completions", json=BARE | {"n": 3})
    assert response.status_code == 500
    assert backend.running == set()


def test_what_sampling_is_asked_of_the_engine(client, backend):
    asked = {
        "min_p": 0.1,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"7": -100},
        "stop_token_ids": [9],
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}},
        "priority": "batch",
    }
    client.post("/v1/chat/completions", json=BARE | asked)
    request = backend.requests[-1]
    sampling = request.sampling
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -1, 0.5)
    assert (sampling.repetition_penalty, sampling.logit_bias, sampling.stop_token_ids) == (1.2, {7: -100.0}, (9,))
    assert sampling.logprobs == 2
    assert sampling.constraint == Constraint("json_schema", '{"type":"array"}')
    assert request.priority == "batch"
    client.post("/v1/completions", json=TEXT | {"structured_outputs": {"regex": "[a-z]+"}, "logprobs": 3})
    sampling = backend.requests[-1].sampling
    assert (sampling.constraint, sampling.logprobs) == (Constraint("regex", "[a-z]+"), 3)


def test_logprobs_in_both_formats():
    best = TokenLogprob(7, -0.1, " é", (TokenLogprob(7, -0.1, " é"), TokenLogprob(8, -3.0, "x")))
    piece = Piece(" é", logprobs=(best,))
    text = msgspec.to_builtins(TextShape("id", "m").part(piece))["logprobs"]
    assert text == {"tokens": [" é"], "token_logprobs": [-0.1], "top_logprobs": [{" é": -0.1, "x": -3.0}]}
    chat = msgspec.to_builtins(ChatShape("id", "m").part(piece))["logprobs"]["content"]
    assert chat[0]["bytes"] == list(" é".encode())
    assert [other["token"] for other in chat[0]["top_logprobs"]] == [" é", "x"]


@pytest.mark.parametrize("more", [{"n": 2}, {"logprobs": True}, {"response_format": {"type": "json_object"}}])
def test_refdesk_gives_one_answer_in_plain_text(client, more):
    response = client.post("/v1/chat/completions", json=CHAT | more)
    assert response.status_code == 400
    assert next(iter(more)) in response.json()["error"]["message"]
