"""What a library promises: documents in, found again, replaced and removed whole, held by one process."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retrieval import (
    Library,
    RetrievalSettings,
    StoreError,
    StoreInUse,
    UnknownCollection,
    UnknownDocument,
    UnreadableFile,
)
from retrieval.embedding import SharedEmbedder
from retrieval.pooling import passage_text
from retrieval.stored import NewDocument, NewPassage
from tests.retrieval.conftest import SETTINGS, open_files, with_vectors
from tests.retrieval.hashing import HashingEmbedder
from tests.retrieval.making import zipped

pytestmark = pytest.mark.every_place


def test_a_folder_goes_in_and_is_found_again(library: Library, folder: Path):
    report = library.ingest_paths([folder])
    assert [Path(source).name for source in report.added] == ["leave.md", "news.html", "safety.txt", "travel.md"]
    assert report.failed == []
    found = library.whole.search("how many days of leave do staff have each year")
    best = found.passages[0]
    assert (best.title, found.relevant) == ("Leave", True)
    document = library.whole.document(best.document_id)
    assert document.text[best.start : best.end] == best.text
    assert document.document.source == str(folder / "leave.md")
    assert library.whole.passage(best.passage_id).text == best.text
    assert set(found.timings) == {"embed", "vectors", "text", "fuse"}
    assert found.facets["media_type"]["text/markdown"] == 2
    assert all(earlier.score >= later.score for earlier, later in zip(found.passages, found.passages[1:], strict=False))
    assert library.health() is None


def test_a_second_run_skips_what_has_not_changed(library: Library, folder: Path, embedder: HashingEmbedder):
    library.ingest_paths([folder])
    encoded = embedder.encoded
    report = library.ingest_paths([folder])
    assert (len(report.unchanged), report.added, report.updated, report.passages) == (4, [], [], 0)
    assert embedder.encoded == encoded


def test_a_changed_file_replaces_its_document_and_keeps_the_id(library: Library, folder: Path):
    library.ingest_paths([folder])
    old = library.whole.search("fire exits east wing").passages[0]
    (folder / "safety.txt").write_text("The fire exits are in the west tower.")
    report = library.ingest_paths([folder])
    assert [Path(source).name for source in report.updated] == ["safety.txt"]
    new = library.whole.search("fire exits west tower").passages[0]
    assert (new.document_id, new.text) == (old.document_id, "The fire exits are in the west tower.")
    assert not any("east wing" in p.text for p in library.whole.search("fire exits east wing", top_k=20).passages)
    with pytest.raises(UnknownDocument):
        library.whole.passage(old.passage_id)


def test_uploads_are_the_same_document_by_name(library: Library):
    first = library.ingest_bytes("a.txt", b"The north gate closes at nine.")
    same = library.ingest_bytes("a.txt", b"The north gate closes at nine.")
    assert same == first
    other = library.ingest_bytes("a.txt", b"The north gate closes at ten.")
    assert other.document_id == first.document_id
    assert other.content_hash != first.content_hash
    assert library.whole.documents()[1] == 1
    assert "ten" in library.whole.search("when does the north gate close").passages[0].text


def test_a_removed_document_is_gone_from_every_index(library: Library, folder: Path):
    library.ingest_paths([folder])
    best = library.whole.search("thirty days of leave").passages[0]
    library.whole.remove(best.document_id)
    assert all(passage.title != "Leave" for passage in library.whole.search("thirty days of leave", top_k=50).passages)
    for gone in (library.whole.document, library.whole.remove):
        with pytest.raises(UnknownDocument, match=best.document_id):
            gone(best.document_id)
    library.ingest_paths([folder])
    assert library.whole.search("thirty days of leave").passages[0].title == "Leave"


def test_a_source_named_twice_is_one_document(library: Library):
    names = [("a", "A", "Zebras live in Africa.", "text/plain"), ("a", "A", "Copper melts.", "text/plain")]
    report = library.ingest_documents([*names, names[1]])
    assert (report.added, report.updated, report.unchanged, report.passages) == (["a"], ["a"], ["a"], 2)
    assert with_vectors(library) == 1
    assert [passage.text for passage in library.whole.search("zebras in africa").passages] == ["Copper melts."]


def test_a_change_that_replaces_its_own_document_leaves_no_vector(library: Library, embedder: HashingEmbedder):
    library.ingest_documents([("b", "B", "Tin is soft.", "text/plain")])
    document = NewDocument("default", "a", "A", "text/plain", "", "", None, "one", [NewPassage(0, 3, None, "", "one")])
    shared = library._indexes.embedder
    embedded = shared.encode_passages([passage_text("A", "", "one")])
    assert library._commit([(document, embedded), (document, embedded)], shared, True)
    assert with_vectors(library) == 2 == library._store.counts()[1]


def test_documents_are_listed_by_page_and_collection(library: Library):
    library.ingest_documents(
        [(f"n{i}", f"Title {i:02}", f"text number {i}", "text/plain") for i in range(12)], "numbers"
    )
    library.ingest_documents([("x", "Other", "some other text", "text/plain")])
    page, total = library.whole.documents(collection="numbers", offset=10, limit=5)
    assert ([document.title for document in page], total) == (["Title 10", "Title 11"], 12)
    assert library.whole.documents(limit=0) == ([], 13)
    assert library.whole.collections() == ["default", "numbers"]
    assert {p.source for p in library.whole.search("text number", collection="default", top_k=9).passages} == {"x"}
    for call in (
        lambda: library.whole.search("x", collection="none"),
        lambda: library.whole.documents(collection="none"),
    ):
        with pytest.raises(UnknownCollection, match="default, numbers"):
            call()


def test_one_bad_file_never_stops_the_rest(library: Library, folder: Path, tmp_path: Path):
    (folder / "empty.md").write_text("   \n")
    (folder / "fake.pdf").write_bytes(b"not a pdf")
    (folder / "picture.png").write_bytes(b"\x89PNG....")
    (folder / ".hidden.md").write_text("secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "readme.md").write_text("secret")
    (folder / "circle").symlink_to(folder, target_is_directory=True)
    report = library.ingest_paths([folder, tmp_path / "absent.txt", folder / "picture.png"])
    assert len(report.added) == 4
    reasons = {Path(source).name: reason for source, reason in report.failed}
    assert set(reasons) == {"empty.md", "fake.pdf", "absent.txt", "picture.png"}
    assert "no text" in reasons["empty.md"]
    assert "does not exist" in reasons["absent.txt"]
    assert "PNG" in reasons["picture.png"]
    assert library.ingest_paths([folder]).skipped == 1
    with pytest.raises(UnreadableFile, match="no text"):
        library.ingest_bytes("x.txt", b"  ")


def test_what_is_not_read_of_an_archive_is_told(library: Library, tmp_path: Path):
    (tmp_path / "all.zip").write_bytes(zipped({"a.md": "# A\n\nHello there.", "b.png": b"\x89PNG..."}))
    report = library.ingest_paths([tmp_path / "all.zip"])
    assert [Path(source).name for source in report.added] == ["all.zip"]
    assert [(Path(source).name, reason[:19]) for source, reason in report.unread] == [
        ("all.zip", "b.png: it is a PNG ")
    ]


def test_a_reader_that_fails_costs_one_file(library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch):
    def stumble(text, *rest):
        raise RecursionError("too deep")

    monkeypatch.setattr("retrieval.formats.reading.read_html", stumble)
    report = library.ingest_paths([folder])
    assert len(report.added) == 3
    assert "too deep" in report.failed[0][1]


def test_progress_counts_every_source_once(library: Library, folder: Path):
    (folder / "bad.pdf").write_bytes(b"no")
    events = []
    library.ingest_paths([folder], progress=events.append)
    settled = [event for event in events if event.state not in ("parsing", "embedding")]
    assert [event.done for event in settled] == [1, 2, 3, 4, 5]
    assert {event.total for event in events} == {5}
    assert {event.state for event in settled} == {"added", "failed"}


@pytest.mark.parametrize(
    "query",
    [
        '"',
        "fire AND",
        "NEAR(",
        "a* OR",
        "-x ^y {z}:",
        "title:fire",
        "'; DROP TABLE documents; --",
        "日本語",
        "\0\ud800",
        "(",
    ],
)
def test_any_string_is_a_query(library: Library, folder: Path, query: str):
    library.ingest_paths([folder])
    library.whole.search(query)
    assert library.whole.search(f"fire exits {query}").passages[0].title == "safety"


def test_empty_and_huge_queries(library: Library, folder: Path):
    assert library.whole.search("anything").passages == []
    assert not library.whole.search("anything").relevant
    library.ingest_paths([folder])
    assert library.whole.search(" \n ").passages == []
    assert library.whole.search("fire " * 10_000).passages
    assert library.whole.search("fire", top_k=10_000).passages
    assert library.whole.search("fire", top_k=0).passages == []


def test_text_that_is_there_twice_is_shown_once(library: Library):
    library.ingest_documents([(f"copy {i}", "Rules", "The  gate closes at nine.", "text/plain") for i in range(3)])
    assert len(library.whole.search("gate").passages) == 1


@pytest.mark.sqlite
def test_only_one_process_holds_a_data_directory(open_library: Callable[..., Library], tmp_path: Path):
    first = open_library()
    with pytest.raises(StoreInUse, match=str(tmp_path / "data")):
        open_library()
    first.close()
    open_library()


def test_close_lets_everything_go(open_library: Callable[..., Library], tmp_path: Path, folder: Path):
    library = open_library()
    library.ingest_paths([folder])
    library.whole.search("fire")
    library.close()
    library.close()
    assert open_files(tmp_path) == []
    assert library.health() == "the library is closed"
    for call in (
        lambda: library.whole.search("fire"),
        lambda: library.ingest_bytes("a.txt", b"text"),
        library.whole.collections,
    ):
        with pytest.raises(StoreError) as refused:
            call()
        assert refused.value.code == "closed_store"


@pytest.mark.sqlite
def test_a_store_of_a_newer_program_is_refused(open_library: Callable[..., Library], tmp_path: Path):
    open_library().close()
    with sqlite3.connect(tmp_path / "data" / "library.sqlite3") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreError, match="newer") as refused:
        open_library()
    assert refused.value.code == "newer_store"
    assert open_files(tmp_path) == []


@pytest.mark.sqlite
def test_a_damaged_store_says_so(open_library: Callable[..., Library], tmp_path: Path, folder: Path):
    library = open_library()
    library.ingest_paths([folder])
    library.close()
    (tmp_path / "data" / "library.sqlite3").write_bytes(b"nonsense" * 1000)
    with pytest.raises(StoreError, match="damaged") as refused:
        open_library()
    assert refused.value.code == "damaged_store"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_directory_that_cannot_be_written_says_so(open_library: Callable[..., Library], tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="may write"):
        open_library(tmp_path / "locked" / "data")


def test_other_passage_sizes_make_the_passages_anew(open_library: Callable[..., Library], folder: Path):
    (folder / "long.txt").write_text("A sentence about the archive in the cellar. " * 40)
    library = open_library()
    library.ingest_paths([folder])
    library.close()
    smaller = RetrievalSettings(passage_tokens=50, max_passage_tokens=60)
    report = open_library(settings=smaller).ingest_paths([folder])
    assert len(report.updated) == 5


@pytest.mark.parametrize("bad", ["nan", "shape"])
def test_bad_vectors_never_get_in(open_library: Callable[..., Library], bad: str):
    class Broken(HashingEmbedder):
        def encode(self, texts):
            vectors = super().encode(texts)
            return vectors * np.nan if bad == "nan" else vectors[:, :7]

    library = open_library(embedder=Broken())
    with pytest.raises(StoreError) as refused:
        library.ingest_bytes("a.txt", b"some text")
    assert refused.value.code == "bad_embedder"
    assert library.whole.documents()[1] == 0


def test_encoding_by_length_keeps_the_order(embedder: HashingEmbedder):
    texts = [f"word{i} " * (1 + i * 7 % 13) for i in range(50)]
    shared = SharedEmbedder(embedder)
    np.testing.assert_allclose(shared.encode(texts), embedder.encode(texts), atol=1e-6)
    passages = shared.encode_passages([passage_text("", "", text) for text in texts])
    np.testing.assert_allclose([each.vector for each in passages], embedder.encode(texts), atol=1e-6)
    assert shared.encode([]).shape == (0, 64)
    assert SETTINGS.passage_tokens == 180


def test_what_is_added_takes_no_answer_its_known_sentences_and_what_is_replaced_does(
    library: Library, folder: Path, embedder: HashingEmbedder
):
    library.ingest_paths([folder])
    found = library.whole.search("how many days of leave").passages

    def encoded_to_quote() -> int:
        before = embedder.encoded
        assert library.whole.quotes("how many days of leave", found)
        return embedder.encoded - before

    assert encoded_to_quote() > 0
    library.ingest_bytes("new.txt", b"The north gate closes at nine.")
    assert encoded_to_quote() == 0
    library.ingest_bytes("new.txt", b"The north gate closes at ten.")
    assert encoded_to_quote() > 0, "text that is gone does not stay in memory"
