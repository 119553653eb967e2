"""/v1/documents: in, listed, read, out."""

from __future__ import annotations

import pytest

from retrieval import StoreError


def test_the_life_of_a_document(client):
    text = "Größe: the tank holds ninety litres. 🚰"
    added = client.post("/v1/documents", files={"file": ("tank.txt", text.encode())}, data={"collection": "site"})
    assert added.status_code == 201
    document = added.json()
    assert added.headers["location"] == f"/v1/documents/{document['document_id']}"
    assert (document["title"], document["collection"], document["passages"]) == ("tank", "site", 1)
    listed = client.get("/v1/documents?collection=site").json()
    assert (listed["total"], listed["documents"]) == (1, [document])
    assert client.get(added.headers["location"]).json() == {"document": document, "text": text}
    assert client.delete(added.headers["location"]).status_code == 204
    for gone in (client.get(added.headers["location"]), client.delete(added.headers["location"])):
        assert (gone.status_code, gone.json()["code"]) == (404, "unknown_document")


def test_the_list_is_paged(client, library):
    for number in range(5):
        library.add(f"extra {number}", "Words.")
    first = client.get("/v1/documents?limit=4").json()
    second = client.get("/v1/documents?limit=4&offset=4").json()
    assert (first["total"], len(first["documents"]), len(second["documents"])) == (7, 4, 3)
    assert not {d["document_id"] for d in first["documents"]} & {d["document_id"] for d in second["documents"]}
    assert client.get("/v1/documents?collection=nowhere").status_code == 404


def test_an_unreadable_file_is_named(client):
    response = client.post("/v1/documents", files={"file": ("odd.bin", b"\xff\xfe")})
    assert (response.status_code, response.json()["code"]) == (422, "unreadable_file")
    assert response.json()["detail"].startswith("odd.bin: ")


@pytest.mark.parametrize("size", [(1 << 20) + 1, (1 << 20) + 70_000, 3 << 20])
def test_a_file_that_is_too_large(client, library, size):
    before = len(library.texts)
    response = client.post("/v1/documents", files={"file": ("big.txt", b"a" * size)})
    assert (response.status_code, response.json()["code"]) == (413, "too_large")
    assert len(library.texts) == before


@pytest.mark.parametrize(
    ("name", "kept"), [("../../etc/passwd", "passwd"), ("C:\\docs\\a.txt", "a.txt"), ("ordinary.txt", "ordinary.txt")]
)
def test_a_name_is_only_a_name(client, name, kept):
    assert client.post("/v1/documents", files={"file": (name, b"Words.")}).json()["source"] == kept


@pytest.mark.parametrize(
    "request_",
    [
        {"data": {"collection": "a"}},
        {"files": {"other": ("a.txt", b"Words.")}},
        {"files": {"file": ("a.txt", b"Words.")}, "data": {"collection": " "}},
        {"content": b"nonsense", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"content": b"nonsense", "headers": {"content-type": "multipart/form-data"}},
        {"json": {"file": "a"}},
        {},
    ],
)
def test_a_form_that_is_none(client, request_):
    response = client.post("/v1/documents", **request_)
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"


def test_a_broken_store_says_nothing_of_its_inside(client, library, monkeypatch):
    def broken(*_, **__):
        raise StoreError("/srv/secret.db is damaged")

    monkeypatch.setattr(library, "documents", broken)
    response = client.get("/v1/documents")
    assert (response.status_code, response.json()["code"]) == (503, "damaged_store")
    assert "secret" not in response.text
