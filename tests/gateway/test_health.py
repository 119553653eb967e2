"""Live at once, ready only when everything is; an orderly end."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest
from litestar.testing import TestClient

from gateway import desk as desk_module
from gateway.app import create_app
from inference import Health
from tests.gateway.conftest import running, until
from tests.gateway.fakes import FakeBackend


def test_live_at_once_and_ready_when_loaded(config, library, monkeypatch):
    loaded = threading.Event()

    def slowly(_config):
        loaded.wait(10)
        return FakeBackend()

    monkeypatch.setattr(desk_module, "open_backend", slowly)
    with TestClient(create_app(config, library=library), raise_server_exceptions=False) as client:
        try:
            assert client.get("/health/live").json() == {"status": "live"}
            response = client.get("/health/ready")
            assert response.status_code == 503
            assert response.json() == {"status": "unready", "lacking": ["model: still loading"], "notices": []}
            response = client.post("/v1/answers", json={"question": "When?"})
            assert (response.status_code, response.json()["code"]) == (503, "not_ready")
            assert int(response.headers["retry-after"]) >= 1
            assert client.post("/v1/search", json={"query": "pump"}).status_code == 200
            assert client.get("/metrics").status_code == 200
        finally:
            loaded.set()
        until(lambda: client.get("/health/ready").status_code == 200)


def test_a_model_that_cannot_be_loaded_is_remembered(config, library, monkeypatch):
    def broken(_config):
        raise RuntimeError("no such model")

    monkeypatch.setattr(desk_module, "open_backend", broken)
    app = create_app(config, library=library)
    failed = threading.Event()
    app.state.desk.on_failure = failed.set
    with TestClient(app):
        assert failed.wait(5)
        assert "no such model" in str(app.state.desk.failure)


def test_not_ready_when_a_part_is_not(client, backend, library):
    backend.ready = Health(False, "the engine thread has died")
    library.trouble = "the index is gone"
    response = client.get("/health/ready")
    assert response.status_code == 503
    assert response.json()["lacking"] == ["document library: the index is gone", "model: the engine thread has died"]
    assert client.get("/health/live").status_code == 200


def test_metrics(client):
    client.post("/v1/answers", json={"question": "When must the pump be primed?"})
    client.post("/v1/answers", json={"question": "Do zebras dream?"})
    client.get("/nowhere")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    for line in [
        'refdesk_http_requests_total{method="POST",route="/v1/answers",status="200"} 2.0',
        'refdesk_http_requests_total{method="GET",route="unmatched",status="404"} 1.0',
        'refdesk_answers_total{outcome="refused"} 1.0',
        "refdesk_time_to_first_token_seconds_count 1.0",
        "refdesk_prompt_tokens_total 10.0",
        "refdesk_cached_tokens_total 4.0",
        "refdesk_completion_tokens_total 6.0",
        "refdesk_backend_kv_blocks_free 7.0",
    ]:
        assert line in lines
    assert "pump" not in response.text


def test_the_schema_is_served_without_foreign_assets(client):
    schema = client.get("/schema/openapi.json").json()
    assert schema["openapi"].startswith("3.1")
    assert {"/v1/answers", "/v1/search", "/v1/documents", "/v1/chat/completions"} <= set(schema["paths"])
    assert set(schema["components"]["schemas"]["AnswerRequest"]["properties"]) >= {"question", "stream", "top_k"}
    assert client.get("/schema").json() == schema
    assert client.get("/schema/openapi.yaml").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_sigterm_ends_what_runs_at_the_deadline(config, library, stream):
    backend = FakeBackend()
    backend.gate = asyncio.Event()  # the answer never comes
    request = {"question": "When must the pump be primed?", "stream": stream}
    with running(config, library, backend) as live, httpx.Client(base_url=live.url, timeout=10) as client:
        if stream:
            with client.stream("POST", "/v1/answers", json=request) as response:
                lines = response.iter_lines()
                assert next(lines) == "event: sources"
                live.stop()
                rest = "\n".join(lines)
            assert "event: error" in rest
            assert '"code":"shutting_down"' in rest
        else:
            stopper = threading.Thread(target=lambda: (until(lambda: backend.running), live.stop()))
            stopper.start()
            response = client.post("/v1/answers", json=request)
            stopper.join()
            assert (response.status_code, response.json()["code"]) == (503, "shutting_down")
        until(lambda: not backend.running)


def test_what_was_handed_in_is_left_open(config, library, backend):
    with TestClient(create_app(config, library=library, backend=backend)):
        pass
    assert not library.closed
    assert not backend.closed
