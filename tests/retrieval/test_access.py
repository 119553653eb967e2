"""Who may read what: the answer to somebody over all documents is the answer over those that they may read."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrieval import ANYBODY, Library, NotAllowed, Principal, UnknownCollection, UnknownDocument, UnknownPassage, View
from retrieval.access import qualified
from tests.retrieval.hashing import HashingEmbedder

pytestmark = pytest.mark.every_place

ADA = Principal.of("ada", ["hr"])
BOB = Principal.of("bob", ["it"])


def test_who_is_what():
    ada = Principal.of("ada", ["hr", "staff"], "acme")
    assert ada.readers == {"public", "tenant:acme", "group:acme/hr", "group:acme/staff", "user:acme/ada"}
    assert ada.name == "user:acme/ada"
    assert not ada.may_read(["group:hr", "group:other/hr", "tenant:other", "user:ada"])
    assert not ada.may_read([])
    assert ada.may_read(["group:other/hr", "group:acme/hr"])
    assert ANYBODY.may_read(["public"])
    assert not ANYBODY.may_change("")
    assert Principal.of().readers == {"public"}
    for name in ("", "everyone", "group:", "team:x", "group:a\nb", "user: x"):
        with pytest.raises(ValueError, match="no reader"):
            qualified(name, "")
    for tenant in ("acme", ""):
        with pytest.raises(ValueError, match="tenant"):
            qualified("tenant:other", tenant)
    with pytest.raises(ValueError, match="no reader"):
        Principal.of("u" * 150, [], "t" * 150)


def test_no_name_is_somebody_elses():
    people = [("c", "a/b"), ("b/c", "a"), ("a/b/c", ""), ("a%2Fb/c", ""), ("c", "a%2Fb")]
    names = {Principal.of(user, [], tenant).name for user, tenant in people}
    assert len(names) == len(people)
    assert Principal.of("ada", ["/hr"]).readers == {"public", "user:ada", "group:%2Fhr"}, "as Keycloak names groups"
    for who, tenant in ((Principal.of("ada", ["/hr", "a%b"], "x/y"), "x%2Fy"), (Principal.of("ada", ["/hr"]), "")):
        assert who.tenant == tenant
        for reader in who.readers - {"public"}:
            assert qualified(reader, tenant) == reader, "what is shown can be sent back"
    assert qualified("group:hr", "acme") == "group:acme/hr" == qualified("group:acme/hr", "acme")


def test_what_is_not_said_again_stays(library: Library, tmp_path: Path):
    (tmp_path / "a.md").write_text("# Pay\n\nPay rises.")
    library.ingest_paths([tmp_path / "a.md"], readers=["group:hr"], tags=["pay"])
    assert library.ingest_paths([tmp_path / "a.md"]).unchanged
    (tmp_path / "a.md").write_text("# Pay\n\nPay falls.")
    assert library.ingest_paths([tmp_path / "a.md"]).updated
    (document,) = library.whole.documents()[0]
    assert (document.readers, document.tags) == (["group:hr"], ["pay"])
    library.whole.share(document.document_id, ["group:it"])
    library.ingest_paths([tmp_path / "a.md"], tags=["money", "pay"])
    (document,) = library.whole.documents()[0]
    assert (document.readers, document.tags) == (["group:it"], ["money", "pay"])
    for wrong in ("", " ", "a\nb", "x" * 300):
        with pytest.raises(ValueError, match="no tag"):
            library.ingest_paths([tmp_path / "a.md"], tags=[wrong])


def test_an_owner_reads_what_is_theirs(library: Library):
    made = library.ingest_bytes("a.md", b"Pumps.", readers=["group:it"], owner="user:eve")
    eve = library.seen_by(Principal.of("eve"))
    assert eve.document(made.document_id).document.readers == ["group:it", "user:eve"]
    assert eve.share(made.document_id, []).readers == ["user:eve"]
    eve.remove(made.document_id)
    with pytest.raises(ValueError, match="no reader"):
        Principal.of("a\nb")


@pytest.fixture
def shared(library: Library) -> dict[str, str]:
    """Document ids by title, of three readers."""
    texts = {
        "Wages": ("The wages of the pump crew rise in May.", ["group:hr"], "user:ada"),
        "Servers": ("The pump server restarts in May.", ["group:it"], ""),
        "News": ("A new pump arrives in May.", ["public"], ""),
        "Nobody": ("The secret pump is red.", [], ""),
    }
    return {
        title: library.ingest_bytes(
            f"{title}.md", f"# {title}\n\n{text}".encode(), readers=readers, owner=owner, collection=title.lower()
        ).document_id
        for title, (text, readers, owner) in texts.items()
    }


def titles(view: View, **how: object) -> set[str]:
    return {passage.title for passage in view.search("pump in May", top_k=50, **how).passages}


def test_every_way_to_read_asks_who(library: Library, shared: dict[str, str]):
    ada, bob, anybody = (library.seen_by(who) for who in (ADA, BOB, ANYBODY))
    assert titles(ada) == {"Wages", "News"}
    assert titles(bob) == {"Servers", "News"}
    assert titles(anybody) == {"News"}
    assert titles(library.whole) == {"Wages", "Servers", "News", "Nobody"}
    assert (ada.collections(), bob.collections()) == (["news", "wages"], ["news", "servers"])
    assert [document.title for document in bob.documents()[0]] == ["News", "Servers"]
    assert bob.documents()[1] == 2
    passage = next(p for p in ada.search("wages").passages if p.title == "Wages")
    assert ada.passage(passage.passage_id).text == passage.text
    for call, error in (
        (lambda: bob.passage(passage.passage_id), UnknownPassage),
        (lambda: bob.document(shared["Wages"]), UnknownDocument),
        (lambda: bob.remove(shared["Wages"]), UnknownDocument),
        (lambda: bob.share(shared["Wages"], ["public"]), UnknownDocument),
        (lambda: bob.search("pump", collection="wages"), UnknownCollection),
        (lambda: bob.documents(collection="wages"), UnknownCollection),
    ):
        with pytest.raises(error) as refused:
            call()
        assert "wages'; there is wages" not in str(refused.value)
        absent = {shared["Wages"]: "0" * 16, passage.passage_id: "p999999", "'wages'": "'none'"}
        assert any(name in str(refused.value) for name in absent)


def test_who_may_change(library: Library, shared: dict[str, str]):
    ada, bob = library.seen_by(ADA), library.seen_by(BOB)
    with pytest.raises(NotAllowed):
        bob.remove(shared["News"])
    with pytest.raises(ValueError, match="no reader"):
        ada.share(shared["Wages"], ["hr"])
    ada.share(shared["Wages"], ["group:it", "user:ada"])
    assert titles(bob) == {"Wages", "Servers", "News"}
    with pytest.raises(NotAllowed):
        bob.share(shared["Wages"], [])
    ada.share(shared["Wages"], ["user:ada"])
    assert titles(bob) == {"Servers", "News"}
    assert titles(ada) == {"Wages", "News"}
    ada.remove(shared["Wages"])
    assert titles(library.whole) == {"Servers", "News", "Nobody"}


def test_nobody_replaces_somebody_elses_file(library: Library):
    first = library.ingest_bytes("a.md", b"Ada wrote this.", readers=["user:ada"], owner="user:ada")
    second = library.ingest_bytes("a.md", b"Bob wrote this.", readers=["public"], owner="user:bob")
    assert first.document_id != second.document_id
    assert library.whole.document(first.document_id).text.strip() == "Ada wrote this."
    again = library.ingest_bytes("a.md", b"Bob wrote more.", readers=["public"], owner="user:bob")
    assert again.document_id == second.document_id
    # The same content for other readers is a change.
    library.ingest_bytes("a.md", b"Bob wrote more.", readers=["user:bob"], owner="user:bob")
    assert library.seen_by(ANYBODY).documents()[1] == 0


def test_forbidden_neighbours_do_not_crowd_out_what_may_be_read(library: Library):
    for i in range(120):
        library.ingest_bytes(f"{i}.md", f"# Pump {i}\n\nThe pump runs at {i}.".encode(), readers=["group:it"])
    library.ingest_bytes("far.md", b"# Garden\n\nRoses need water, and a pump now and then.")
    assert [p.title for p in library.seen_by(ANYBODY).search("the pump runs", top_k=1).passages] == ["Garden"]


WORDS = ["pump", "valve", "gate", "rose", "water", "red"]
READERS = ["public", "group:hr", "group:it", "user:ada"]
document = st.tuples(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=8), st.lists(st.sampled_from(READERS), unique=True)
)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(document, min_size=1, max_size=12),
    query=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3),
    removed=st.sets(st.integers(0, 11), max_size=3),
)
def test_the_answer_over_all_is_the_answer_over_what_may_be_read(
    documents: list,
    query: list[str],
    removed: set[int],
    tmp_path_factory: pytest.TempPathFactory,
    open_library: Callable[..., Library],
):
    """Ids (by what they hold), order, scores, relevance, facets and quotes."""

    def filled(given: list) -> Library:
        library = open_library(tmp_path_factory.mktemp("data"), embedder=HashingEmbedder())
        ids = [
            library.ingest_bytes(f"{i}.txt", f"{' '.join(words)} {i}.".encode(), readers=readers).document_id
            for i, (words, readers) in given
        ]
        for (i, _), document_id in zip(given, ids, strict=True):
            if i in removed:
                library.whole.remove(document_id)
        return library

    def seen(who: Principal, library: Library) -> tuple:
        view = library.seen_by(who)
        found = view.search(" ".join(query), top_k=5)
        quotes = view.quotes(" ".join(query), found.passages, 2)
        return (
            [(p.source, p.text, p.score) for p in found.passages],
            found.relevance,
            found.facets,
            [(quote.text, quote.similarity) for quote in quotes],
            [each.source for each in view.documents()[0]],
        )

    given = list(enumerate(documents))
    with filled(given) as whole:
        for who in (ADA, ANYBODY):
            with filled([(i, each) for i, each in given if who.may_read(each[1])]) as part:
                assert seen(who, whole) == seen(who, part)


@pytest.mark.sqlite
def test_an_older_store_stays_everybodys(tmp_path: Path, open_library: Callable[..., Library]):
    library = open_library()
    library.ingest_bytes("a.md", b"# Soup\n\nSoup is hot.")
    library.close()
    database = tmp_path / "data" / "library.sqlite3"
    with sqlite3.connect(database) as db:
        # What schema 1 was: no readers, owners, dates, tags; no words.
        db.executescript(
            "DROP TABLE jobs; DROP TRIGGER passages_retitled;"
            "PRAGMA foreign_keys = OFF; DROP TRIGGER words_deleted; DROP TABLE words; DROP TABLE tags;"
            "DROP TABLE page_boxes; CREATE TABLE old AS SELECT * FROM documents; DROP TABLE documents;"
            "CREATE TABLE documents (id INTEGER PRIMARY KEY AUTOINCREMENT, document_id TEXT NOT NULL UNIQUE, "
            "collection TEXT NOT NULL, source TEXT NOT NULL, title TEXT NOT NULL, media_type TEXT NOT NULL, "
            "content_hash TEXT NOT NULL, recipe TEXT NOT NULL, characters INTEGER NOT NULL, passages INTEGER NOT NULL, "
            "pages INTEGER, added_at TEXT NOT NULL, text TEXT NOT NULL, UNIQUE (collection, source));"
            "INSERT INTO documents SELECT id, document_id, collection, source, title, media_type, content_hash, "
            "recipe, characters, passages, pages, added_at, text FROM old; DROP TABLE old; DROP TABLE access_readers; "
            "DROP TABLE access; PRAGMA user_version = 1;"
        )
    db.close()
    library = open_library()
    (passage,) = library.seen_by(ANYBODY).search("is the soup hot").passages
    assert passage.title == "Soup"
    assert library.whole.document(passage.document_id).document.readers == ["public"]
    library.whole.remove(passage.document_id)
    newer = library.ingest_bytes("b.md", b"# Bread\n\nBread is warm.", readers=["user:ada"])
    assert titles(library.seen_by(ANYBODY)) == set()
    assert library.seen_by(ADA).document(newer.document_id).document.owner == ""
