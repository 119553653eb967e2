"""Bad input is the caller's fault: a 4xx problem that names it, never a 500, and the server goes on."""

from __future__ import annotations

import json

import pytest

JSON = {"content-type": "application/json"}
DEEP = b"[" * 200_000
ASKING = ["/v1/answers", "/v1/search", "/v1/completions", "/v1/chat/completions"]


def answers(client, body: bytes, **headers):
    return client.post("/v1/answers", content=body, headers=JSON | headers)


@pytest.mark.parametrize(
    ("body", "code", "names"),
    [
        (b"", "invalid_request", "empty"),
        (b"{", "malformed_json", ""),
        (b'{"question": "\xff"}', "malformed_json", "utf-8"),
        (b'{"question": "\\ud800"}', "malformed_json", ""),
        (b'{"question": "a", "temperature": NaN}', "malformed_json", ""),
        (b'{"question": "a", "temperature": 1e400}', "invalid_value", "temperature"),
        (b'{"question": "a", "max_tokens": ' + b"9" * 5000 + b"}", "invalid_value", "max_tokens"),
        (b"[]", "invalid_value", "object"),
        (b"{}", "missing_field", "question"),
        (b'{"question": "a", "top_K": 4}', "unknown_field", "top_K"),
        (b'{"question": "a", "scope": "b"}', "unknown_field", "scope"),
        (b'{"question": "a", "top_k": "4"}', "invalid_value", "top_k"),
        (b'{"question": "a", "top_k": 4.0}', "invalid_value", "top_k"),
        (b'{"question": "a", "top_k": true}', "invalid_value", "top_k"),
        (b'{"question": "a", "top_k": 0}', "invalid_value", "top_k"),
        (b'{"question": "a", "top_k": 1000000}', "invalid_value", "top_k"),
        (b'{"question": "a", "stream": 1}', "invalid_value", "stream"),
        (b'{"question": ["a"]}', "invalid_value", "question"),
        (b'{"question": ""}', "invalid_value", "question"),
        (b'{"question": " \\n "}', "empty_question", "question"),
        (b'{"question": "a\\u0000b"}', "invalid_value", "NUL"),
        (b'{"question": "' + b"a" * 201 + b'"}', "question_too_long", "200"),
        (b'{"question": "a", "history": [{"role": "god", "content": "b"}]}', "invalid_value", "history"),
        (b'{"question": "a", "history": [{"role": "user", "content": "b", "x": 1}]}', "unknown_field", "history"),
        (b'{"question": "a", "history": ' + DEEP, "invalid_value", "history"),
        (b'{"x": ' + DEEP, "unknown_field", "x"),
        (DEEP, "invalid_value", ""),
    ],
)
def test_a_wrong_body_is_named(client, backend, body, code, names):
    response = answers(client, body)
    problem = response.json()
    assert (response.status_code, problem["code"]) == (400, code), problem
    assert names in problem["detail"]
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["request_id"] == response.headers["x-request-id"]
    assert set(problem) <= {"type", "title", "status", "detail", "code", "request_id", "param"}
    assert "Traceback" not in response.text
    assert backend.requests == []
    assert answers(client, b'{"question": "When must the pump be primed?"}').status_code == 200


@pytest.mark.parametrize("path", ASKING)
@pytest.mark.parametrize(
    "body", [b"", b"\xff", DEEP, b'{"model": ' + DEEP, b'{"tools": ' + DEEP + b"]" * 200_000 + b"}"]
)
def test_no_body_makes_a_500(client, path, body):
    assert client.post(path, content=body, headers=JSON).status_code == 400


@pytest.mark.parametrize("path", ASKING)
def test_another_media_type(client, path):
    response = client.post(path, content=b'question="a"', headers={"content-type": "text/plain"})
    assert response.status_code == 415
    assert "application/json" in response.text


@pytest.mark.parametrize("path", ASKING)
def test_a_body_that_is_too_large(client, path):
    response = client.post(path, content=b'{"question": "' + b"a" * (1 << 20) + b'"}', headers=JSON)
    assert response.status_code == 413


def test_framework_errors_are_problems_too(client):
    for response, status, code in [
        (client.get("/nowhere"), 404, "not_found"),
        (client.get("/v1/answers"), 405, "method_not_allowed"),
        (client.get("/v1/documents?limit=many"), 400, "invalid_request"),
        (client.get("/v1/documents?limit=0"), 400, "invalid_request"),
        (client.get("/page/%2e%2e%2fapp.py"), 404, "not_found"),
        (client.get("/page/app.py"), 404, "not_found"),
    ]:
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert response.headers["content-type"] == "application/problem+json"
    assert "POST" in client.get("/v1/answers").headers["allow"]


def test_openai_routes_speak_their_own_envelope(client):
    for response, status, code in [
        (client.get("/v1/models/nobody"), 404, "model_not_found"),
        (client.get("/v1/chat/completions"), 405, "method_not_allowed"),
        (client.post("/v1/completions", json={"model": "fake"}), 400, "missing_field"),
        (client.post("/v1/completions", json={"model": "fake", "prompt": "a", "x": 1}), 400, "unknown_field"),
    ]:
        assert response.status_code == status
        assert set(response.json()) == {"error"}
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == code
        assert response.headers["content-type"] == "application/json"


def test_the_clients_own_id_is_only_logged(client, caplog):
    caplog.set_level("INFO", logger="gateway.access")
    given = {"X-Request-Id": "mine\x1b[31m"}
    ids = {client.get("/health/live", headers=given).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert "mine" not in "".join(ids)
    assert "\x1b" not in caplog.text
    assert "client='mine" in caplog.text


def test_nobody_chooses_a_scope(client):
    for path in ASKING:
        assert client.post(path, json={"scope": "other", "question": "a", "query": "a"}).status_code == 400
    assert json.loads(client.get("/health/live").text) == {"status": "live"}
