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


def form(*parts: tuple[bytes, bytes]) -> dict:
    """A form out of raw headers and bodies, with what libraries would not send."""
    body = b"".join(b"--B\r\n%s\r\n\r\n%s\r\n" % part for part in parts) + b"--B--\r\n"
    return {"content": body, "headers": {"content-type": "multipart/form-data; boundary=B"}}


FILE = (b'Content-Disposition: form-data; name="file"; filename="a.txt"', b"Words.")
FIELD = b'Content-Disposition: form-data; name="collection"'
CHARSET = b"\r\nContent-Type: text/plain; charset="


@pytest.mark.parametrize(
    ("parts", "field", "says"),
    [
        ([FILE, (FIELD, b"\xff")], "collection", "not valid UTF-8"),
        ([FILE, (FIELD + CHARSET + b"nosuch", b"a")], "collection", "'nosuch'"),
        ([FILE, (FIELD + CHARSET + b"zlib", b"a")], "collection", "'zlib'"),
        ([FILE, (FIELD + CHARSET + b"unicode_escape", b"\\ud800")], "collection", "1 to 200"),
        ([FILE, (FIELD, b"a\0b")], "collection", "1 to 200"),
        ([FILE, (FIELD, b" ")], "collection", "1 to 200"),
        ([FILE, (FIELD, b"a" * 201)], "collection", "1 to 200"),
        ([FILE, (FIELD, b"a"), (FIELD, b"b")], "collection", "one per request"),
        ([FILE, FILE], "file", "one per request"),
        ([(FIELD, b"a")], "file", "file is missing"),
        ([(b'Content-Disposition: form-data; name="file"', b"Words.")], "file", "without a file name"),
        ([(b'Content-Disposition: form-data; name="file"; filename=""', b"")], "file", "1 to 255"),
        ([(b'Content-Disposition: form-data; name="file"; filename="a/"', b"")], "file", "1 to 255"),
        ([(b"Content-Disposition: form-data; name=\"file\"; filename*=nosuch''a", b"")], "file", "without a file name"),
    ],
)
def test_what_is_wrong_with_a_form_is_named(client, library, parts, field, says):
    before = len(library.texts)
    response = client.post("/v1/documents", **form(*parts))
    assert (response.status_code, response.json()["param"]) == (400, field)
    assert response.headers["content-type"] == "application/problem+json"
    assert says in response.json()["detail"]
    assert len(library.texts) == before


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (b"filename*=UTF-8''%C3%BCber.txt", "über.txt"),
        (b"filename*=iso-8859-1'de'%FCber.txt", "über.txt"),
        (b"filename*=utf-8''%2Fetc%2Fpasswd", "passwd"),
        (b"filename*=utf-8''a%ff.txt", "a\ufffd.txt"),
        (b"filename=\"plain.txt\"; filename*=UTF-8''%C3%BCber.txt", "plain.txt"),
        ('filename="über.txt"'.encode(), "über.txt"),
    ],
)
def test_a_name_in_either_form(client, names, kept):
    response = client.post(
        "/v1/documents", **form((b'Content-Disposition: form-data; name="file"; ' + names, b"Words."))
    )
    assert (response.status_code, response.json()["source"]) == (201, kept)


def test_a_part_whose_head_is_no_text(client):
    detail = client.post("/v1/documents", **form((FIELD + b"\xff", b"a"))).json()["detail"]
    assert detail.startswith("the form cannot be read (Segment header failed to decode): send a multipart")


def test_a_form_may_hold_more_than_is_read(client):
    other = (b'Content-Disposition: form-data; name="other"', b"\xff" * 100)
    latin = (FIELD + CHARSET + b"iso-8859-1", b"B\xfccher")
    response = client.post("/v1/documents", **form(other, FILE, other, latin))
    assert (response.status_code, response.json()["collection"]) == (201, "Bücher")


def test_the_form_is_in_the_schema(client):
    route = client.get("/schema/openapi.json").json()["paths"]["/v1/documents"]["post"]
    schema = route["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert (schema["required"], set(schema["properties"])) == (["file"], {"file", "collection", "readers", "tags"})


def test_a_broken_store_says_nothing_of_its_inside(client, library, monkeypatch):
    def broken(*_, **__):
        raise StoreError("/srv/secret.db is damaged")

    monkeypatch.setattr(library, "documents", broken)
    response = client.get("/v1/documents")
    assert (response.status_code, response.json()["code"]) == (503, "damaged_store")
    assert "secret" not in response.text
