"""Who asks: two people of two groups at every door, and doors that nobody forgot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from litestar.datastructures import Headers
from litestar.testing import TestClient

from gateway.app import create_app
from gateway.auth import principals
from gateway.config import AccessConfig, AnswersConfig, Config, ConfigError
from gateway.errors import ApiError
from retrieval import Library, Principal, RetrievalSettings
from retrieval.formats import reading
from tests.gateway.fakes import FakeBackend
from tests.retrieval.hashing import HashingEmbedder

# What needs to know nobody: it gives no document away.
OPEN_TO_ALL = {"/", "/page/{name}", "/health/live", "/health/ready", "/metrics", "/v1/models", "/v1/models/{model}"}
ADA = {"X-Forwarded-User": "ada", "X-Forwarded-Groups": "hr, staff"}
BOB = {"X-Forwarded-User": "bob", "X-Forwarded-Groups": "it"}
EVE = {"X-Forwarded-User": "eve", "X-Forwarded-Groups": "keepers"}
SECRET = "The wages of the pump crew rise to ninety in May."


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    settings = RetrievalSettings(relevance_floor=0.05)
    with Library.open(tmp_path, embedder=HashingEmbedder(), settings=settings, reader=reading) as library:
        library.ingest_bytes("news.md", b"# News\n\nA new pump crew arrives in May.")
        yield library


@pytest.fixture
def client(library: Library) -> Iterator[TestClient]:
    config = Config(access=AccessConfig(mode="headers", stewards=["group:keepers"]), answers=AnswersConfig(reads=4))
    backend = FakeBackend(["It says so."])
    with TestClient(create_app(config, library=library, backend=backend), raise_server_exceptions=False) as client:
        client.model = backend
        yield client


def upload(client: TestClient, who: dict, name: str = "wages.md", text: str = f"# Wages\n\n{SECRET}", **fields: str):
    return client.post("/v1/documents", headers=who, files={"file": (name, text.encode())}, data=fields)


def test_no_route_forgets_to_ask_who(client: TestClient):
    """A new route asks for the principal, or is on the list above."""
    forgetful = {
        route.path_format
        for route in client.app.routes
        for handler in getattr(route, "route_handlers", [])
        if set(handler.http_methods) != {"OPTIONS"} and "principal" not in handler.parsed_fn_signature.parameters
    }
    assert {path for path in forgetful if not path.startswith("/schema")} == OPEN_TO_ALL
    assert [file for file in Path("gateway/routes").glob("*.py") if ".whole" in file.read_text()] == []


def ways_to_read(client: TestClient, who: dict, document_id: str, passage_id: str) -> dict[str, object]:
    """Everything that is told at every door that could tell of a document."""
    found = {
        "search": client.post("/v1/search", headers=who, json={"query": "wages of the pump crew", "top_k": 50}),
        "filtered": client.post(
            "/v1/search", headers=who, json={"query": "pump", "filters": {"sources": ["wages"], "tags": ["pay"]}}
        ),
        "phrase": client.post("/v1/search", headers=who, json={"query": '"rise to ninety" pump'}),
        "in its collection": client.post("/v1/search", headers=who, json={"query": "pump", "collection": "pay"}),
        "answer": client.post("/v1/answers", headers=who, json={"question": "What do the pump crew's wages rise to?"}),
        "follow-up": client.post(
            "/v1/answers",
            headers=who,
            json={"question": "And then?", "history": [{"role": "user", "content": "The wages of the pump crew?"}]},
        ),
        "stream": client.post(
            "/v1/answers", headers=who, json={"question": "What are the pump crew's wages?", "stream": True}
        ),
        "chat": client.post(
            "/v1/chat/completions",
            headers=who,
            json={"model": "refdesk", "messages": [{"role": "user", "content": "The wages of the pump crew?"}]},
        ),
        "list": client.get("/v1/documents", headers=who),
        "list of its collection": client.get("/v1/documents?collection=pay", headers=who),
        "document": client.get(f"/v1/documents/{document_id}", headers=who),
        "jobs": client.get("/v1/jobs", headers=who),
    }
    return {name: (response.status_code, response.text) for name, response in found.items()}


def test_what_one_may_read_the_other_never_sees(client: TestClient, library: Library):
    made = upload(client, ADA, collection="pay", tags="pay, may", readers="group:hr")
    assert made.status_code == 201, made.text
    document_id = made.json()["document_id"]
    job = made.headers["Link"].partition(">")[0][1:]
    assert client.get(job, headers=ADA).json()["document_id"] == document_id
    (passage,) = [p for p in library.whole.search("wages").passages if p.document_id == document_id]
    ada = ways_to_read(client, ADA, document_id, passage.passage_id)
    assert {name for name, (status, text) in ada.items() if status == 200 and "ages" in text} == set(ada)
    for who in (BOB, EVE, {}):
        client.model.requests.clear()
        seen = ways_to_read(client, who, document_id, passage.passage_id)
        for name, (_, text) in seen.items():
            for word in ("ninety", document_id, passage.passage_id, "wages.md"):
                assert word not in text or (name == "document" and word == document_id), (name, who)
        assert [request for request in client.model.requests if "ninety" in str(request.prompt)] == []
        assert {seen[name][0] for name in ("in its collection", "list of its collection", "document")} == {404}
        absent = client.get(f"/v1/documents/{'0' * 16}", headers=who)
        alike = json.loads(seen["document"][1].replace(document_id, "0" * 16))
        assert {**alike, "request_id": ""} == {**absent.json(), "request_id": ""}, "as if it had never been there"
        for change in (
            client.delete(f"/v1/documents/{document_id}", headers=who),
            client.put(f"/v1/documents/{document_id}/readers", headers=who, json={"readers": ["public"]}),
            client.get(job, headers=who),
            client.post(f"{job}/cancel", headers=who),
            client.post(f"{job}/retry", headers=who),
        ):
            assert change.status_code == 404
            assert "ninety" not in change.text
            assert "wages.md" not in change.text
    assert library.whole.documents()[1] == 2


def test_sharing_and_taking_back(client: TestClient):
    document_id = upload(client, ADA).json()["document_id"]
    assert client.get(f"/v1/documents/{document_id}", headers=BOB).status_code == 404, "theirs alone, if not said"
    readers = f"/v1/documents/{document_id}/readers"
    assert client.put(readers, headers=ADA, json={"readers": ["group:it", "user:ada"]}).status_code == 200
    assert client.get(f"/v1/documents/{document_id}", headers=BOB).status_code == 200
    for refused in (
        client.put(readers, headers=BOB, json={"readers": ["public"]}),
        client.delete(f"/v1/documents/{document_id}", headers=BOB),
    ):
        assert (refused.status_code, refused.json()["code"]) == (403, "not_allowed")
    wrong = client.put(readers, headers=ADA, json={"readers": ["it"]})
    assert (wrong.status_code, wrong.json()["param"]) == (400, "readers")
    assert client.put(readers, headers=ADA, json={"readers": ["user:ada"]}).status_code == 200
    assert client.get(f"/v1/documents/{document_id}", headers=BOB).status_code == 404
    assert client.delete(f"/v1/documents/{document_id}", headers=ADA).status_code == 204


def test_stewards_change_what_they_may_read(client: TestClient, library: Library):
    (news,) = library.whole.documents()[0]
    assert client.delete(f"/v1/documents/{news.document_id}", headers=BOB).status_code == 403
    assert client.delete(f"/v1/documents/{news.document_id}").status_code == 403
    assert client.delete(f"/v1/documents/{news.document_id}", headers=EVE).status_code == 204


def test_nobody_adds_nothing_and_odd_names_are_refused(client: TestClient):
    refused = upload(client, {})
    assert (refused.status_code, refused.json()["code"]) == (403, "not_allowed")
    odd = client.post("/v1/search", headers={"X-Forwarded-User": "a" * 300}, json={"query": "pump"})
    assert (odd.status_code, odd.json()["code"]) == (400, "invalid_identity")
    inside = {"url": "http://127.0.0.1:8080/metrics"}
    assert client.post("/v1/documents/url", json=inside).status_code == 403
    forbidden = client.post("/v1/documents/url", headers=ADA, json=inside)
    assert (forbidden.status_code, forbidden.json()["code"]) == (422, "url_forbidden")
    assert client.post("/v1/documents/url", headers=ADA, json={**inside, "tags": ["a\nb"]}).json()["param"] == "tags"
    many = {"query": "pump", "filters": {"sources": ["x"] * 101}}
    assert client.post("/v1/search", headers=ADA, json=many).status_code == 400
    assert upload(client, ADA, name="e.md", readers="").json()["readers"] == ["user:ada"], "an empty field says nothing"
    assert upload(client, ADA, readers="group:hr,everyone").json()["param"] == "readers"
    assert upload(client, ADA, readers=",".join(f"group:g{i}" for i in range(200))).status_code == 400


def test_a_tenant_is_a_world_of_its_own(client: TestClient):
    acme = {**ADA, "X-Forwarded-Tenant": "acme"}
    other = {**ADA, "X-Forwarded-Tenant": "other"}
    document_id = upload(client, acme, readers="group:hr").json()["document_id"]
    assert client.get(f"/v1/documents/{document_id}", headers=acme).json()["document"]["readers"] == [
        "group:acme/hr",
        "user:acme/ada",
    ]
    for who in (other, ADA):
        assert client.get(f"/v1/documents/{document_id}", headers=who).status_code == 404
    assert upload(client, acme, name="b.md").json()["readers"] == ["tenant:acme", "user:acme/ada"]
    shown = client.get(f"/v1/documents/{document_id}", headers=acme).json()["document"]["readers"]
    again = client.put(f"/v1/documents/{document_id}/readers", headers=acme, json={"readers": shown})
    assert again.json()["readers"] == shown
    keeper = {**EVE, "X-Forwarded-Tenant": "acme"}
    (news,) = [d for d in client.get("/v1/documents", headers=keeper).json()["documents"] if d["title"] == "News"]
    assert client.delete(f"/v1/documents/{news['document_id']}", headers=keeper).status_code == 403, "of another tenant"
    assert upload(client, acme, name="c.md", readers="tenant:other").status_code == 400


def test_computed_documents_are_shared_by_those_who_may_read_the_same(client: TestClient):
    upload(client, ADA, readers="group:hr")

    def scope(who: dict) -> str:
        client.model.requests.clear()
        answered = client.post("/v1/answers", headers=who, json={"question": "When does the new pump crew arrive?"})
        assert answered.status_code == 200
        return client.model.requests[0].scope

    assert scope(BOB) == scope({}) == "public"
    assert scope(ADA) == scope({**ADA, "X-Forwarded-User": "amy"}) != "public"
    assert "hr" not in scope(ADA)


def test_open_to_all_reads_what_is_public_only(library: Library):
    library.ingest_bytes("wages.md", SECRET.encode(), readers=["group:hr"])
    with TestClient(create_app(Config(), library=library, backend=FakeBackend())) as client:
        assert [p["title"] for p in client.post("/v1/search", json={"query": "pump"}).json()["passages"]] == ["News"]
        made = upload(client, {}, name="more.md", text="More pumps.")
        assert made.json()["readers"] == ["public"]
        assert client.delete(f"/v1/documents/{made.json()['document_id']}").status_code == 204


def test_principals_are_what_the_headers_say():
    headers = Headers({"X-Forwarded-User": "ada", "X-Forwarded-Groups": "hr,, keepers"})
    told = principals(AccessConfig(mode="headers", stewards=["group:keepers"]))(SimpleNamespace(headers=headers))
    assert told == Principal(frozenset(("public", "user:ada", "group:hr", "group:keepers")), "user:ada", True)
    andre = Headers([(b"x-forwarded-user", "andré".encode())])
    assert principals(AccessConfig(mode="headers"))(SimpleNamespace(headers=andre)).name == "user:andré"
    twice = Headers([(b"x-forwarded-user", b"ada"), (b"x-forwarded-user", b"bob")])
    with pytest.raises(ApiError, match="more than once"):  # one of them may be the client's own
        principals(AccessConfig(mode="headers"))(SimpleNamespace(headers=twice))
    with pytest.raises(ConfigError, match="access.stewards: 'keepers'"):
        principals(AccessConfig(stewards=["keepers"]))
