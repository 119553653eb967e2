"""What is made anew beside the searches: vectors of another model, lists for many passages."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retrieval import OPERATOR, Library, RetrievalSettings
from retrieval.sqlite.indexes import Indexes
from retrieval.sqlite.vectors import VectorIndex
from tests.retrieval.conftest import with_vectors
from tests.retrieval.hashing import HashingEmbedder

QUESTIONS = {"how many days of leave": "Leave", "fire exits": "safety", "soup on mondays": "Canteen news"}


@pytest.fixture
def filled(open_library: Callable[..., Library], folder: Path) -> Path:
    """Four pages embedded by "hashing", and closed."""
    library = open_library()
    library.ingest_paths([folder])
    library.close()
    return folder


def generations(library: Library) -> int:
    """Of how many there are vectors."""
    query = "SELECT DISTINCT generation FROM embeddings"
    if isinstance(library._indexes, Indexes):
        with library._store.reading() as database:
            return len(database.execute(query).fetchall())
    return len(library._store._rows(query))


def finds(library: Library) -> bool:
    return all(library.whole.search(query).passages[0].title == title for query, title in QUESTIONS.items())


class Held(HashingEmbedder):
    """Embeds passages only once it is let to; questions at any time."""

    def __init__(self, **options):
        super().__init__(**options)
        self.let, self.asked = threading.Event(), threading.Event()
        self.before_encode = self.wait

    def wait(self, texts):
        if any("\n" in text for text in texts):
            self.asked.set()
            assert self.let.wait(30)


@pytest.mark.every_place
def test_the_old_model_serves_until_the_new_one_has_embedded_everything(
    filled: Path, open_library: Callable[..., Library], embedder: HashingEmbedder
):
    new = Held(dim=48, name="other")
    library = open_library(embedder=new, open_embedder=lambda name: embedder)
    assert new.asked.wait(30)
    assert library._indexes.embedder.name == "hashing"
    assert finds(library)
    library.ingest_bytes("bicycles.txt", b"Bicycles are parked\nbehind the library.")  # by the old one
    assert library.whole.search("where are bicycles parked").passages[0].title == "bicycles"
    new.let.set()
    library.settle()
    assert library._indexes.embedder.name == "other"
    assert finds(library)
    assert library.whole.search("where are bicycles parked").passages[0].title == "bicycles"
    library.close()
    again = HashingEmbedder(dim=48, name="other")
    library = open_library(embedder=again)
    library.settle()
    assert finds(library)
    assert again.encoded == len(QUESTIONS), "all was embedded before"


@pytest.mark.every_place
def test_after_the_last_document_of_the_old_model_the_new_one_begins_afresh(
    filled: Path, open_library: Callable[..., Library]
):
    new = Held(dim=48, name="other")
    library = open_library(embedder=new, open_embedder=lambda name: new)
    assert new.asked.wait(30)
    for document in library.whole.documents()[0]:
        library.whole.remove(document.document_id)
    new.let.set()
    library.settle()
    library.ingest_paths([filled])
    library.settle()
    assert library._indexes.embedder.name == "other"
    assert finds(library)
    assert library.notices() == []
    library.close()
    again = HashingEmbedder(dim=48, name="other")
    assert finds(open_library(embedder=again))
    assert again.encoded == len(QUESTIONS)


@pytest.mark.every_place
def test_words_serve_where_the_old_model_is_gone(filled: Path, open_library: Callable[..., Library]):
    new = Held(dim=48, name="other")
    library = open_library(embedder=new, open_embedder=lambda name: new)
    assert new.asked.wait(30)
    assert library._indexes.embedder is None
    assert finds(library)
    assert library.whole.search("fire exits").relevant, "nothing is refused that nobody can judge"
    assert library.health() is None
    assert "words alone" in library.notices()[0]
    new.let.set()
    library.ingest_bytes("bicycles.txt", b"Bicycles are parked behind the library.")  # by the new one
    library.settle()
    assert library._indexes.embedder.name == "other"
    assert with_vectors(library) == 5
    assert finds(library)


@pytest.mark.every_place
def test_words_serve_where_a_model_of_the_same_name_gives_other_vectors(
    filled: Path, open_library: Callable[..., Library]
):
    new = Held(dim=48)
    library = open_library(embedder=new, open_embedder=lambda name: new)
    assert new.asked.wait(30)
    assert library._indexes.embedder is None
    assert finds(library)
    new.let.set()
    library.settle()
    assert library._indexes.embedder is not None
    assert finds(library)


@pytest.mark.every_place
def test_what_was_embedded_before_a_restart_is_kept(
    filled: Path, open_library: Callable[..., Library], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in ("retrieval.sqlite.reindexing", "retrieval.postgres.reindexing"):
        monkeypatch.setattr(f"{module}._PASSAGES", 1)
    new = Held(dim=48, name="other")
    library = open_library(embedder=new, open_embedder=lambda name: new)
    assert new.asked.wait(30)
    closing = threading.Thread(target=library.close)
    closing.start()
    while not library._indexes._reindexing._stopped.is_set():
        threading.Event().wait(0.001)
    new.let.set()
    closing.join()
    assert new.encoded == 1
    again = HashingEmbedder(dim=48, name="other")
    library = open_library(embedder=again, open_embedder=lambda name: again)
    library.settle()
    assert again.encoded == 3
    assert finds(library)


class Pooling(HashingEmbedder):
    """Gives vectors of sentences, too."""

    pools_sentences = True

    def encode_passages(self, passages):
        vectors = self.encode([passage.text for passage in passages])
        return vectors, [self.encode([text[start:end] for start, end in spans]) for text, spans in passages]


def test_a_store_from_before_sentences_gets_them(filled: Path, open_library: Callable[..., Library], tmp_path: Path):
    path = tmp_path / "data" / "library.sqlite3"
    with sqlite3.connect(path) as database:
        (trigger,) = database.execute("SELECT sql FROM sqlite_master WHERE name = 'passages_deleted'").fetchone()
        # What schema 2 was.
        database.executescript(
            "CREATE TABLE old AS SELECT passage, vector FROM embeddings; DROP TRIGGER passages_deleted;"
            "DROP TABLE page_boxes; DROP TABLE embeddings;"
            "CREATE TABLE embeddings (passage INTEGER PRIMARY KEY, vector BLOB NOT NULL);"
            f"INSERT INTO embeddings SELECT * FROM old; DROP TABLE old; {trigger};"
            "DROP TABLE jobs; DROP TRIGGER passages_retitled; DROP INDEX documents_by_content;"
            "DELETE FROM meta WHERE key = 'opened_by'; PRAGMA user_version = 2;"
        )
    database.close()
    library = open_library(embedder=Pooling())
    assert finds(library)
    library.settle()
    assert finds(library)
    found = library._store.found(OPERATOR, [1, 2, 3, 4])
    assert all(each.sentences for each in found.values())
    library.whole.remove(library.whole.documents()[0][0].document_id)
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM embeddings").fetchone() == (3,)
    database.close()


@pytest.mark.every_place
def test_removed_and_changed_meanwhile(filled: Path, open_library: Callable[..., Library], embedder: HashingEmbedder):
    new = Held(dim=48, name="other")
    library = open_library(embedder=new, open_embedder=lambda name: embedder)
    assert new.asked.wait(30)
    by_title = {document.title: document for document in library.whole.documents()[0]}
    library.whole.remove(by_title["Travel"].document_id)
    (filled / "leave.md").write_text("# Leave\n\nStaff have forty days of leave each year.\n")
    library.ingest_paths([filled / "leave.md"])
    new.let.set()
    library.settle()
    assert with_vectors(library) == library._store.counts()[1]
    assert "forty" in library.whole.search("how many days of leave").passages[0].text
    assert generations(library) == 1


def test_many_passages_are_put_in_lists(open_library: Callable[..., Library]):
    settings = RetrievalSettings(relevance_floor=0, lists_from=100)
    library = open_library(settings=settings)
    texts = [(f"{n}.md", f"number {n}", f"about key{n} and word{n % 7}", "text/plain") for n in range(250)]
    library.ingest_documents(texts)
    library.settle()
    assert library._indexes.vectors.lists
    documents = library.whole.documents(limit=1000)[0]
    library.whole.remove(documents[0].document_id)
    library.ingest_bytes("new.txt", b"about key777")
    assert sorted(library._indexes.vectors.numbers()) == sorted(library._indexes.table.numbers)
    assert library.whole.search("about key777").passages[0].title == "new"
    library.close()
    library = open_library(settings=settings)
    saved = library._indexes.vectors
    library.settle()
    assert library._indexes.vectors is saved, "its lists are not made again"
    assert saved.lists
    assert library.whole.search("key33").passages[0].title == "number 33"


@pytest.mark.parametrize("lists", [0, 40])
def test_few_who_may_be_seen_are_all_compared(lists: int):
    """Recall 1 among one in a hundred, whatever the lists; and what is removed is not found."""
    rng = np.random.default_rng(6)
    vectors = rng.standard_normal((4000, 48)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = np.arange(4000) * 3 + 1
    index = VectorIndex.in_lists(48, vectors, lists) if lists else VectorIndex(48)
    index.add(ids, vectors)
    among = ids[::100]
    for query in vectors[:50]:
        exact = among[np.argsort(-(vectors[::100] @ query))[:10]]
        assert set(exact) <= set(index.search(query, 20, among))
    index.remove(among[:20])
    assert not set(among[:20]) & set(index.search(vectors[0], 4000))
    assert sorted(index.numbers()) == sorted(set(ids) - set(among[:20]))
