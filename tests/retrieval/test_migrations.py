"""A library that an older refdesk wrote is brought up to date when it is opened: nothing is lost, nothing is half."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from retrieval import Library, Principal, StoreError
from retrieval.sqlite.backup import restore
from retrieval.sqlite.checking import check
from retrieval.sqlite.schema import SCHEMA_VERSION

OLDER = sorted((Path(__file__).parent / "schemas").glob("*.sql"))  # what it took to make one


def made(older: Path, database: Path) -> None:
    database.parent.mkdir()
    with closing(sqlite3.connect(database)) as db, db:
        db.executescript(older.read_text())


def test_each_older_schema_is_here():
    assert [path.stem for path in OLDER] == [str(version) for version in range(1, SCHEMA_VERSION)]


@pytest.mark.parametrize("older", OLDER, ids=lambda path: path.stem)
def test_an_older_library_is_all_there_and_sound(older: Path, open_library: Callable[..., Library], tmp_path: Path):
    made(older, tmp_path / "data" / "library.sqlite3")
    with open_library() as library:
        for text, title in (("Soup is hot.", "Soup"), ("Bread is warm.", "Bread")):
            found = library.whole.search(f'"{text}"', top_k=1)
            assert [each.title for each in found.passages] == [title]
            assert found.relevant, "its vectors, too"
            assert text in library.whole.document(found.passages[0].document_id).text
        documents = {each.title: each for each in library.whole.documents()[0]}
        if older.stem == "1":
            assert documents["Bread"].readers == ["public"]
        else:
            bread = documents["Bread"]
            assert (bread.readers, bread.owner, bread.tags) == (["group:hr", "user:ada"], "user:ada", ["baked"])
            assert library.seen_by(Principal.of("ida")).documents()[1] == 1
        library.ingest_bytes("tea.md", b"# Tea\n\nTea is hot.")
        library.whole.remove(documents["Soup"].document_id)
    assert check(tmp_path / "data").found == []


@pytest.mark.parametrize("older", OLDER, ids=lambda path: path.stem)
def test_a_backup_of_an_older_library_is_restored(older: Path, open_library: Callable[..., Library], tmp_path: Path):
    made(older, tmp_path / "backups" / "copy")
    assert restore(tmp_path / "backups" / "copy", tmp_path / "data") == 2
    assert check(tmp_path / "data").found == []
    with open_library() as library:
        assert library.whole.search("hot soup").passages[0].title == "Soup"


@pytest.mark.parametrize("older", OLDER, ids=lambda path: path.stem)
def test_a_step_that_fails_is_undone(older: Path, open_library: Callable[..., Library], tmp_path: Path):
    database = tmp_path / "data" / "library.sqlite3"
    made(older, database)
    with closing(sqlite3.connect(database)) as db:
        db.execute("CREATE TABLE jobs (id)")  # a name that the last step wants
    with pytest.raises(StoreError, match="jobs"):
        open_library()
    with closing(sqlite3.connect(database)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
        assert not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'page_boxes'").fetchall()
        db.execute("DROP TABLE jobs")
    with open_library() as library:
        assert library.whole.documents()[1] == 2
