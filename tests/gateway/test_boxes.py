"""/v1/documents/{id}/boxes: where a piece of a document's text stands, for those who may read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from litestar.testing import TestClient

from gateway.app import create_app
from gateway.config import AccessConfig, Config
from loadtests.long_pdf import A4, MARGIN, pdf_of
from retrieval import Library
from retrieval.formats import reading
from tests.gateway.fakes import FakeBackend
from tests.retrieval.hashing import HashingEmbedder

ADA = {"X-Forwarded-User": "ada", "X-Forwarded-Groups": "hr"}
BOB = {"X-Forwarded-User": "bob", "X-Forwarded-Groups": "it"}
LINES = ["The wages of the crew rise.", "They rise in May."]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    config = Config(access=AccessConfig(mode="headers"))
    with (
        Library.open(tmp_path, embedder=HashingEmbedder(), reader=reading) as library,
        TestClient(create_app(config, library=library, backend=FakeBackend())) as client,
    ):
        yield client


def test_a_passage_is_marked_where_it_stands(client: TestClient):
    pdf = {"file": ("wages.pdf", pdf_of([["About wages."], LINES]))}
    made = client.post("/v1/documents", headers=ADA, files=pdf, data={"readers": "group:hr"})
    where = f"/v1/documents/{made.json()['document_id']}"
    text = client.get(where, headers=ADA).json()["text"]
    start = text.index("crew")
    span = f"{where}/boxes?start={start}&end={text.index('in May')}"
    first, second = client.get(span, headers=ADA).json()["boxes"]
    assert set(first) == {"page", "x0", "y0", "x1", "y1", "page_width", "page_height"}
    assert (first["page"], first["page_width"], first["page_height"]) == (2, *A4)
    assert first["x0"] > second["x0"]
    assert abs(second["x0"] - MARGIN) < 1
    assert first["y1"] < second["y1"] < A4[1] / 4, "from the top"
    unknown = client.get(f"/v1/documents/{'0' * 16}/boxes?start=0&end=9", headers=ADA)
    for nothing in (client.get(span, headers=BOB), client.get(span), unknown):
        assert (nothing.status_code, nothing.json()["code"]) == (404, "unknown_document")
    for wrong in ("", "?start=0", "?start=-1&end=2", "?start=a&end=2", f"?start=0&end={10**30}"):
        assert client.get(f"{where}/boxes{wrong}", headers=ADA).status_code == 400


def test_other_formats_have_nothing_to_mark(client: TestClient):
    made = client.post("/v1/documents", headers=ADA, files={"file": ("wages.md", b"# Wages\n\nThey rise.")})
    answer = client.get(f"/v1/documents/{made.json()['document_id']}/boxes?start=0&end=20", headers=ADA)
    assert (answer.status_code, answer.json()) == (200, {"boxes": []})
