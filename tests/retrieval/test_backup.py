"""A library copied while it is used, and brought back elsewhere."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from retrieval import Library, Principal, StoreError, StoreInUse
from retrieval.sqlite.backup import back_up, restore

ADA = Principal.of("ada")


@pytest.fixture
def used(open_library: Callable[..., Library], folder: Path) -> Library:
    library = open_library()
    library.ingest_paths([folder])
    library.ingest_bytes("wages.md", b"# Wages\n\nWages rise in May.", readers=["user:ada"], tags=["pay"])
    return library


def told(library: Library) -> list:
    return [
        [(p.title, p.text, p.score) for p in library.seen_by(ADA).search(query, top_k=3).passages]
        for query in ("fire exits", "wages in May", "thirty days of leave")
    ]


def test_what_was_copied_comes_back_whole(used: Library, open_library: Callable[..., Library], tmp_path: Path):
    expected = told(used)
    assert back_up(tmp_path / "data", tmp_path / "copy") == 5, "while it is open"
    used.ingest_bytes("later.md", b"Wages fall in May.", readers=["user:ada"])
    assert restore(tmp_path / "copy", tmp_path / "elsewhere") == 5
    library = open_library(tmp_path / "elsewhere")
    assert told(library) == expected
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["copy"]
    (wages,) = [document for document in library.seen_by(ADA).documents()[0] if document.title == "Wages"]
    assert (wages.tags, wages.readers) == (["pay"], ["user:ada"])


def test_nothing_is_overwritten(used: Library, open_library: Callable[..., Library], tmp_path: Path):
    data, copy = tmp_path / "data", tmp_path / "copy"
    back_up(data, copy)
    before = copy.read_bytes()
    with pytest.raises(StoreError, match="there already"):
        back_up(data, copy)
    assert copy.read_bytes() == before
    with pytest.raises(StoreInUse):
        restore(copy, data, replace=True)
    used.whole.remove(used.whole.search("fire exits").passages[0].document_id)
    used.close()
    with pytest.raises(StoreError, match="holds a library already"):
        restore(copy, data)
    assert restore(copy, data, replace=True) == 5
    assert open_library().whole.search("fire exits").passages[0].title == "safety"
    with sqlite3.connect(data / "library.sqlite3.before-restore") as kept:
        assert kept.execute("SELECT count(*) FROM documents").fetchone() == (4,)
    kept.close()


@pytest.mark.parametrize("what", ["absent", "no database", "damaged", "another program's", "newer"])
def test_what_is_no_backup_is_refused(used: Library, tmp_path: Path, what: str):
    copy = tmp_path / "copy"
    back_up(tmp_path / "data", copy)
    if what == "absent":
        copy.unlink()
    elif what == "no database":
        copy.write_bytes(b"hello " * 1000)
    elif what == "damaged":
        data = bytearray(copy.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 20_000] = b"\xff" * 20_000
        copy.write_bytes(data)
    else:
        with sqlite3.connect(copy) as db:
            db.execute(f"PRAGMA user_version = {99 if what == 'newer' else 0}")
        db.close()
    with pytest.raises(StoreError):
        restore(copy, tmp_path / "new")
    assert not (tmp_path / "new" / "library.sqlite3").exists()
    with pytest.raises(StoreError, match="no library in"):
        back_up(tmp_path / "empty", tmp_path / "x")
