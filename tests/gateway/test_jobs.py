"""/v1/jobs and `refdesk jobs`: queued, told of, cancelled, tried again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from litestar.testing import TestClient

from gateway import desk as desk_module
from gateway.app import create_app
from gateway.config import Config, WatchConfig
from retrieval import OPERATOR, Library, RetrievalSettings
from retrieval.formats import reading
from tests.gateway.conftest import running, until
from tests.gateway.fakes import FakeBackend
from tests.gateway.test_cli import run
from tests.retrieval.hashing import HashingEmbedder


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    settings = RetrievalSettings(relevance_floor=0.05, incoming_mb=1)
    with Library.open(tmp_path / "data", embedder=HashingEmbedder(), settings=settings, reader=reading) as library:
        yield library


@pytest.fixture
def client(library: Library) -> Iterator[TestClient]:
    with TestClient(create_app(Config(), library=library, backend=FakeBackend()), raise_server_exceptions=False) as it:
        yield it


@pytest.fixture
def still(library: Library, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Jobs wait until the test starts them."""
    monkeypatch.setattr(library.jobs, "start", lambda: None)
    return library


def send(client: TestClient, name: str, content: bytes, wait: str = "false"):
    return client.post(f"/v1/documents?wait={wait}", files={"file": (name, content)})


def ended(client: TestClient, at: str) -> dict:
    until(lambda: client.get(at).json()["state"] in ("done", "failed", "cancelled"))
    return client.get(at).json()


def test_who_does_not_wait_gets_a_job_that_becomes_a_document(client: TestClient):
    response = send(client, "tank.md", b"# Tank\n\nIt holds ninety litres.")
    assert (response.status_code, response.json()["state"]) == (202, "queued")
    at = response.headers["location"]
    assert at == f"/v1/jobs/{response.json()['job_id']}"
    job = ended(client, at)
    assert (job["state"], job["attempts"], job["passages_embedded"], job["unread"]) == ("done", 1, 1, [])
    assert client.get(f"/v1/documents/{job['document_id']}").json()["document"]["title"] == "Tank"
    page = client.get("/v1/jobs").json()
    assert page == {"jobs": [job], "total": 1, "offset": 0, "limit": 50}


def test_who_waits_gets_the_document_and_where_its_job_is(client: TestClient):
    response = send(client, "tank.md", b"# Tank\n\nIt holds ninety litres.", wait="true")
    assert response.status_code == 201
    job = client.get(response.headers["link"].partition(">")[0][1:]).json()
    assert (job["state"], job["document_id"]) == ("done", response.json()["document_id"])


def test_an_address_may_be_queued_as_well(client: TestClient):
    response = client.post("/v1/documents/url?wait=false", json={"url": "http://127.0.0.1/metrics"})
    assert (response.status_code, response.json()["kind"]) == (202, "url")
    job = ended(client, response.headers["location"])
    assert (job["state"], job["code"]) == ("failed", "url_forbidden")


def test_jobs_are_cancelled_and_tried_again(still: Library, client: TestClient):
    at = send(client, "tank.json", b"{").headers["location"]
    other = send(client, "other.md", b"# Other").headers["location"]
    assert client.post(f"{other}/cancel").json()["state"] == "cancelled"
    again = client.post(f"{other}/retry")
    assert (again.status_code, again.json()["code"]) == (409, "job_conflict")
    assert [job["source"] for job in client.get("/v1/jobs?state=queued").json()["jobs"]] == ["tank.json"]
    two = client.get("/v1/jobs?state=queued&state=cancelled&limit=1&offset=1").json()
    assert (two["total"], [job["source"] for job in two["jobs"]]) == (2, ["tank.json"])
    type(still.jobs).start(still.jobs)
    assert ended(client, at)["code"] == "unreadable_file"
    assert client.post(f"{at}/cancel").status_code == 409
    assert client.post(f"{at}/retry").json()["state"] != "failed"
    assert ended(client, at)["attempts"] == 2


def test_what_is_asked_wrongly_is_told(client: TestClient):
    for path, code in (("/v1/jobs/none", "unknown_job"), ("/v1/jobs/none/x", "not_found")):
        response = client.get(path)
        assert (response.status_code, response.json()["code"]) == (404, code)
    for change in ("cancel", "retry"):
        assert client.post(f"/v1/jobs/none/{change}").json()["code"] == "unknown_job"
    for query in ("state=lost", "limit=0", "offset=-1"):
        assert client.get(f"/v1/jobs?{query}").status_code == 400
    assert send(client, "a.md", b"# A", wait="perhaps").status_code == 400


def test_too_much_that_waits_is_refused(still: Library, client: TestClient):
    assert send(client, "a.md", b"a" * 700_000).status_code == 202
    refused = send(client, "b.md", b"b" * 700_000)
    assert (refused.status_code, refused.json()["code"]) == (503, "queue_full")
    assert "retry-after" in refused.headers
    assert client.get("/v1/jobs").json()["total"] == 1


def test_documents_follow_a_folder_that_the_configuration_names(library: Library, tmp_path: Path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "tank.md").write_text("# Tank\n\nIt holds ninety litres.")
    os.utime(folder / "tank.md", (0, 0))
    with running(Config(watch=[WatchConfig(path=str(folder))]), library, FakeBackend()) as live:
        until(lambda: httpx.get(f"{live.url}/v1/documents").json()["total"] == 1)
        assert httpx.get(f"{live.url}/health/ready").json()["notices"] == []
        (job,) = httpx.get(f"{live.url}/v1/jobs").json()["jobs"]
        assert (job["kind"], job["source"], job["owner"]) == ("file", str(folder / "tank.md"), "")
        folder.rename(tmp_path / "away")
        until(lambda: "watched folders" in str(httpx.get(f"{live.url}/health/ready").json()["notices"]))
        assert httpx.get(f"{live.url}/health/ready").status_code == 200
        assert httpx.get(f"{live.url}/v1/documents").json()["total"] == 1


@pytest.mark.parametrize("remote", [True, False])
def test_jobs_from_a_terminal(capsys, monkeypatch, still: Library, remote: bool):
    from retrieval.ingest import Into

    for name in ("evil\x1b[31m.md", "b.md"):
        still.jobs.add_upload(name, b"# Hello", Into("default"))
    with running(Config(), still, FakeBackend()) as live:
        if remote:
            where = ["--url", live.url]
        else:
            where = []
            monkeypatch.setattr(desk_module, "open_library", lambda config, **_: still)
            monkeypatch.setattr(Library, "close", lambda self: None)
        code, out, _ = run(capsys, "jobs", "list", *where)
        assert (code, [line.split()[1:] for line in out.splitlines()]) == (
            0, [["queued", "b.md"], ["queued", "evil", "[31m.md"]]
        )  # fmt: skip
        job = json.loads(run(capsys, "jobs", "list", "--state", "queued", "--json", *where)[1].splitlines()[0])
        assert "cancelled" in run(capsys, "jobs", "cancel", job["job_id"], *where)[1]
        assert run(capsys, "jobs", "list", "--state", "cancelled", *where)[1].count("\n") == 1
        code, _, err = run(capsys, "jobs", "retry", job["job_id"], *where)
        assert (code, "send it again" in err) == (2, True)
    monkeypatch.undo()
    assert still.jobs.jobs(OPERATOR)[1] == 2
