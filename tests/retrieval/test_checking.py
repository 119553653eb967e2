"""A library that is damaged says how, is repaired where that can be done, and names what has to be added again."""

from __future__ import annotations

import random
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from retrieval import Library, Principal, StoreError, StoreInUse
from retrieval.ingest import Into
from retrieval.sqlite.backup import back_up, restore
from retrieval.sqlite.checking import check
from retrieval.view import View

FLIPS = 100
ADA = Principal.of("ada")
QUESTIONS = {"days of leave": "Leave", "fire exits": "safety", '"soup on"': "Canteen news", "wages in May": "Wages"}


@pytest.fixture
def data(open_library: Callable[..., Library], folder: Path, tmp_path: Path) -> Path:
    """Of a closed library of five documents, one of them Ada's."""
    library = open_library()
    library.ingest_paths([folder], tags=["handbook"])
    library.ingest_bytes("wages.md", b"# Wages\n\nWages rise in May.", readers=["user:ada"], owner="user:ada")
    library.close()
    return tmp_path / "data"


def run(data: Path, *statements: str) -> None:
    with closing(sqlite3.connect(data / "library.sqlite3")) as db, db:
        for statement in statements:
            db.execute(statement)


def answered(view: View) -> dict[str, str]:
    return {question: view.search(question).passages[0].title for question in QUESTIONS}


def test_a_sound_library_has_nothing_wrong(data: Path, open_library: Callable[..., Library]):
    with open_library() as library:
        library.ingest_bytes("wages.md", b"# Wages\n\nWages fall.", readers=["user:ada"], owner="user:ada")
        (news,) = (each for each in library.whole.documents()[0] if each.title == "Canteen news")
        library.whole.remove(news.document_id)
    events = []
    checked = check(data, repair=True, progress=events.append)
    assert (checked.documents, checked.found, checked.left) == (4, [], [])
    assert [event.done for event in events] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("INSERT INTO passage_text (passage_text) VALUES ('delete-all')", ["full text"]),
        ("UPDATE passage_text_data SET block = x'00' WHERE id > 10", ["full text"]),
        ("DELETE FROM passage_text_docsize WHERE id = 2", ["full text"]),
        ("UPDATE embeddings SET vector = zeroblob(256) WHERE passage = 2", ["embeddings of 1"]),
        ("UPDATE embeddings SET vector = 'text' WHERE passage > 2", ["embeddings of 3"]),
        ("UPDATE embeddings SET passage = 99 WHERE passage = 1", ["1 rows of the table embeddings"]),
        ("UPDATE words SET length = 1 WHERE passage = 2", ["words of 1"]),
        ("UPDATE words SET codes = x'0102030405'", ["words of 5"]),
        ("UPDATE words SET passage = 99 WHERE passage = 2", ["1 rows of the table words"]),
        ("INSERT INTO tags VALUES ('new', 99)", ["1 rows of the table tags"]),
        ("DELETE FROM meta WHERE key = 'state'", ["lacks the entry 'state'"]),
        ("UPDATE meta SET value = 'many' WHERE key = 'dim'", ["vectors have 'many' numbers"]),
        ("UPDATE meta SET value = CAST(x'ff' AS TEXT) WHERE key = 'store'", ["makes no sense"]),
        ("INSERT INTO access_readers VALUES ('group:x', 99)", ["1 rows of the table access_readers"]),
    ],
)
def test_what_can_be_made_again_is(data: Path, open_library: Callable[..., Library], damage: str, found: list[str]):
    run(data, damage)
    seen = check(data)
    assert len(seen.found) == len(found)
    assert all(words in each for words, each in zip(found, seen.found, strict=True))
    assert seen.left == seen.found, "nothing is changed unasked"
    assert check(data).found == seen.found
    assert check(data, repair=True).left == []
    with open_library() as library:
        assert answered(library.seen_by(ADA)) == QUESTIONS
    assert check(data).found == []


def test_an_index_that_misses_a_row_is_made_again(data: Path):
    run(
        data,
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET type = 'table', tbl_name = name, sql = 'CREATE TABLE passages_of_document (document, "
        "ordinal, id, PRIMARY KEY (document, ordinal, id)) WITHOUT ROWID' WHERE name = 'passages_of_document'",
    )
    run(
        data,
        "DELETE FROM passages_of_document WHERE document = 1",
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET type = 'index', tbl_name = 'passages', sql = 'CREATE INDEX passages_of_document "
        "ON passages (document, ordinal)' WHERE name = 'passages_of_document'",
    )
    assert check(data, repair=True).found[0] == "an index of the database doesn't fit its table"
    assert check(data).found == []


def test_passages_of_a_document_that_is_gone_go(data: Path, open_library: Callable[..., Library]):
    run(data, "DELETE FROM documents WHERE title = 'safety'")
    assert "of no documents" in check(data, repair=True).found[0]
    assert check(data).found == []
    with open_library() as library:
        assert answered(library.seen_by(ADA))["fire exits"] != "safety"


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE documents SET text = replace(text, 'thirty', 'twenty') WHERE title = 'Leave'",
        "UPDATE documents SET text = CAST(x'4c65' || x'ff' AS TEXT) WHERE title = 'Leave'",
        "UPDATE documents SET characters = 'many' WHERE title = 'Leave'",
        "UPDATE passages SET text = replace(text, 'thirty', 'twenty') WHERE title = 'Leave'",
        "UPDATE passages SET text = CAST(text || x'ff' AS TEXT) WHERE title = 'Leave'",
        'UPDATE passages SET "start" = "start" + 1 WHERE title = \'Leave\'',
        "UPDATE passages SET title = 'Leaves' WHERE title = 'Leave'",
        "DELETE FROM passages WHERE title = 'Leave'",
        "UPDATE tags SET tag = CAST(x'ff' AS TEXT) WHERE document = (SELECT id FROM documents WHERE title = 'Leave')",
    ],
)
def test_what_can_not_be_trusted_is_named_and_added_again(
    data: Path, open_library: Callable[..., Library], folder: Path, damage: str
):
    run(data, damage)
    checked = check(data, repair=True)
    assert len(checked.left) == 1
    assert checked.left[0].startswith(f"{folder / 'leave.md'} (")
    assert "add it again" in checked.left[0]
    with open_library() as library:
        assert library.whole.documents()[1] == 5, "what can't be read breaks no list"
        assert library.ingest_paths([folder]).updated == [str(folder / "leave.md")]
        assert answered(library.seen_by(ADA)) == QUESTIONS
    assert check(data).found == []


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE access SET readers = 'public' WHERE readers = 'user:ada'",
        "UPDATE access SET readers = 'user:ida' WHERE readers = 'user:ada'",
        "UPDATE access_readers SET reader = 'user:ida' WHERE reader = 'user:ada'",
        "UPDATE access_readers SET access = (SELECT access FROM documents WHERE title = 'Wages')",
        "UPDATE documents SET access = 99 WHERE title = 'Wages'",
        "UPDATE access SET readers = x'00' WHERE readers = 'user:ada'",
    ],
)
def test_where_it_is_not_sure_who_may_read_only_the_owner_may(
    data: Path, open_library: Callable[..., Library], damage: str
):
    run(data, "UPDATE access SET readers = 'everyone' WHERE readers = 'public'", damage)
    checked = check(data, repair=True)
    assert any("who may read wages.md" in each for each in checked.found)
    assert checked.left == []
    with open_library() as library:
        assert [each.title for each in library.seen_by(ADA).documents()[0]] == ["Wages"]
        for other in (Principal.of("ida"), Principal.of()):
            assert library.seen_by(other).documents()[1] == 0
        assert library.whole.documents()[1] == 5


@pytest.mark.parametrize(
    ("damage", "words", "jobs"),
    [
        ("UPDATE jobs SET wanted = '{'", "what was to be done with sent.txt can't be read", 0),
        ("UPDATE jobs SET unread = 7", "what was to be done with sent.txt can't be read", 0),
        ("UPDATE jobs SET reason = CAST(x'ff' AS TEXT)", "what was to be done with sent.txt can't be read", 0),
        ("UPDATE jobs SET access = 99", "who may read what is to be read of sent.txt isn't sure", 1),
    ],
)
def test_what_is_to_be_read_is_looked_at_too(
    data: Path, open_library: Callable[..., Library], damage: str, words: str, jobs: int
):
    with open_library() as library:
        library.jobs.add_upload("sent.txt", b"Bread is warm.", Into("default", ("group:hr",), "user:ada"))
    run(data, damage)
    checked = check(data, repair=True)
    assert (len(checked.found), checked.left) == (1, [])
    assert words in checked.found[0]
    with open_library() as library:
        assert library.jobs.jobs(ADA)[1] == jobs


def test_damaged_pages_ask_for_a_backup(data: Path, open_library: Callable[..., Library], tmp_path: Path):
    back_up(data, tmp_path / "copy")
    database = data / "library.sqlite3"
    damaged = bytearray(database.read_bytes())
    for page in range(3, len(damaged) // 4096, 2):
        damaged[4096 * page : 4096 * page + 2000] = b"\xff" * 2000
    for content in (bytes(damaged), b"nothing of a database" * 1000, database.read_bytes()[:10_000]):
        database.write_bytes(content)
        checked = check(data, repair=True)
        assert len(checked.left) == 1
        assert "database is damaged" in checked.left[0]
        assert "`refdesk restore FILE --replace`" in checked.left[0]
        assert database.read_bytes() == content
        restore(tmp_path / "copy", data, replace=True)
        assert (data / "library.sqlite3.before-restore").read_bytes() == content
        assert check(data).found == []
        with open_library() as library:
            assert answered(library.seen_by(ADA)) == QUESTIONS


@pytest.mark.parametrize(
    "damage",
    [
        "DROP TABLE meta",
        "DROP TABLE documents",
        "DROP TABLE embeddings",
        "DROP TABLE passage_text",
        "DROP INDEX tags_of_document",
        "DROP TRIGGER passages_deleted",
        "ALTER TABLE passages RENAME COLUMN document TO gone",
    ],
)
def test_tables_that_are_gone_ask_for_a_backup(data: Path, damage: str):
    run(data, damage)
    (left,) = check(data, repair=True).left
    assert "database is damaged" in left
    assert "`refdesk restore FILE --replace`" in left


def test_a_message_of_sqlite_that_is_no_text_is_damage_like_any(data: Path, open_library: Callable[..., Library]):
    run(
        data,
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET name = CAST(x'ff' AS TEXT), sql = 'CREATE INDE' WHERE name = 'tags_of_document'",
    )
    assert "database is damaged" in check(data).found[0]
    with pytest.raises(StoreError, match="is damaged"):
        open_library()


def test_a_bit_that_falls_over_is_found_where_it_matters(
    data: Path, open_library: Callable[..., Library], folder: Path
):
    def told() -> list:
        with open_library() as library:
            listed = library.whole.documents()[0]
            texts = {each.title: library.whole.document(each.document_id).text for each in listed}
            words = {title: re.findall(r"\w+", text) for title, text in texts.items()}  # no copy of what is between
            return [words, [each.readers for each in listed], answered(library.seen_by(ADA))]

    expected = told()
    database, rng = data / "library.sqlite3", random.Random(7)
    sound = database.read_bytes()
    used = [at for at, byte in enumerate(sound) if byte]
    counts = {"nothing": 0, "repaired": 0, "named": 0, "lost": 0}
    for _ in range(FLIPS):
        content = bytearray(sound)
        content[rng.choice(used)] ^= 1 << rng.randrange(8)
        database.write_bytes(content)
        try:
            checked = check(data, repair=True)
        except StoreError:
            counts["lost"] += 1
            continue
        if any("refdesk restore" in each for each in checked.left):
            counts["lost"] += 1
        elif checked.left:
            counts["named"] += 1
            with open_library() as library:
                library.ingest_paths([folder])
        elif checked.found:
            counts["repaired"] += 1
            with open_library() as library:
                assert answered(library.whole) == QUESTIONS, "whoever may read it now"
        else:
            counts["nothing"] += 1
            assert told() == expected
    print(counts)
    assert min(counts.values()) > 0


def test_what_can_not_be_checked_is_refused(data: Path, open_library: Callable[..., Library], tmp_path: Path):
    with pytest.raises(StoreError, match="no library in"):
        check(tmp_path / "nowhere")
    with open_library(), pytest.raises(StoreInUse):
        check(data)
    run(data, "PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="newer refdesk"):
        check(data)
