"""What is wrong with a library, in words, and the repair of what can be made again from the rest.

SQLite notices pages that make no sense, not letters that have changed.  Those are found because a document's text is
stored twice, whole and in passages; which of the two is right nobody can tell, so the document is named, to be added
again.  Full text, indexes, words and embeddings are made again from the passages (the last two when the library is
opened next).  Where it isn't sure any more who may read a document, only its owner may.

The saved index of vectors has a checksum and isn't looked at here: it is made again when that doesn't fit (`vectors`).
"""

from __future__ import annotations

import re
import secrets
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from retrieval import lexical
from retrieval.access import checked
from retrieval.errors import StoreError
from retrieval.files import DirectoryLock
from retrieval.ingest import Into
from retrieval.records import ProgressEvent
from retrieval.sqlite import schema
from retrieval.sqlite.change import access_row
from retrieval.sqlite.database import DATABASE_FILE

_RESTORE = "bring back a backup by `refdesk restore FILE --replace`, or move it away and ingest again"
_ADD_AGAIN = "add it again, or remove it by `refdesk documents remove`"

# Of what PRAGMA integrity_check says, these are about indexes and full text, which are made again.
_INDEX = re.compile(r"(row \d+ missing from|wrong # of entries in|non-unique entry in) index ")
_FULL_TEXT = re.compile(r"FTS5 table")
_LENGTH_TOLERANCE = 1e-3  # of an embedding, which is a unit vector in float32

Progress = Callable[[ProgressEvent], None]


class Checked(msgspec.Struct):
    """What was `found` to be wrong, and what is `left` of it (all where nothing was to be repaired)."""

    documents: int
    found: list[str]
    left: list[str]


class _Finding(msgspec.Struct):
    what: str
    repair: Callable[[sqlite3.Connection], object] | None = None


def check(data_dir: Path, repair: bool = False, progress: Progress = lambda event: None) -> Checked:
    """Look at all of the library in `data_dir`, with `repair` make it right as far as that can be done.  Raises
    StoreInUse, and StoreError where there is none, a newer program's, or one that can't be read."""
    path = data_dir / DATABASE_FILE
    if not path.is_file():
        raise StoreError(f"there is no library in {data_dir}: name its directory by --data", code="no_store")
    lock = DirectoryLock(data_dir)
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous = FULL")
            schema.prepare(db, str(path))
            found = left = list(_findings(db, progress))
            if repair and any(each.repair for each in found):
                _repair(db, found)
                left = list(_findings(db, progress))
            (documents,) = db.execute("SELECT count(*) FROM documents").fetchone()
        return Checked(documents, [each.what for each in found], [each.what for each in left])
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter of SQLite's message
        if not _is_damage(error):
            raise StoreError(f"{path} can't be used: {error}", code="unwritable_store") from error
        damaged = [f"the database is damaged ({error}): {_RESTORE}"]
        return Checked(0, damaged, damaged)
    finally:
        lock.release()


def _is_damage(error: Exception) -> bool:
    """Not a full disk or missing permission, which are operational errors of other codes than the plain one."""
    plain = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) == sqlite3.SQLITE_ERROR
    return plain or not isinstance(error, sqlite3.OperationalError)


def _findings(db: sqlite3.Connection, progress: Progress) -> Iterator[_Finding]:
    (total,) = db.execute("SELECT count(*) FROM documents").fetchone()
    progress(ProgressEvent(0, total, "the database", "checking"))
    said = [line for (line,) in db.execute("PRAGMA integrity_check") if line != "ok"]
    wrong = [line for line in said if not _INDEX.match(line) and not _FULL_TEXT.search(line)]
    if wrong:
        yield _Finding(f"the database is damaged ({' '.join(wrong[0].split())}): {_RESTORE}")
        return  # whatever else is read from it means nothing
    if any(_INDEX.match(line) for line in said):
        yield _Finding("an index of the database doesn't fit its table", partial(_run, statement="REINDEX"))
    if changed := _changed_tables(db):
        yield _Finding(f"the database is damaged (its {', '.join(changed)} isn't what it was made as): {_RESTORE}")
        return
    # Text that is none must not end the look at the rest.
    db.text_factory = _lenient
    yield from _full_text(db)
    yield from _orphans(db)
    yield from _meta(db)
    yield from _readers(db)
    yield from _documents(db, total, progress)
    yield from _embeddings(db)
    yield from _jobs(db)


def _changed_tables(db: sqlite3.Connection) -> list[str]:
    """Tables, indexes and triggers that are other ones than those of an empty library, or gone."""
    with closing(sqlite3.connect(":memory:")) as empty:
        schema.prepare(empty, "")
        return [name for name, made in _made(empty).items() if _made(db).get(name) != made]


def _made(db: sqlite3.Connection) -> dict[str, str]:
    """The statements that made them.  SQLite's own, for full text, differ between its releases."""
    rows = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'passage_text_%'")
    return {name: re.sub(r'["\s]+', "", sql) for name, sql in rows}


def _repair(db: sqlite3.Connection, found: Iterable[_Finding]) -> None:
    """All of it or nothing.  In the order of `_findings`: what follows may go through indexes and full text."""
    db.execute("BEGIN IMMEDIATE")
    try:
        for each in found:
            if each.repair:
                each.repair(db)
        _draw(db, "state")  # the saved index of vectors mirrors the old one
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _run(db: sqlite3.Connection, statement: str) -> None:
    db.execute(statement)


def _draw(db: sqlite3.Connection, key: str) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [key, secrets.token_hex(16)])


def _full_text(db: sqlite3.Connection) -> Iterator[_Finding]:
    db.execute("BEGIN IMMEDIATE")  # the question is asked by a write (https://sqlite.org/fts5.html, section 6.5)
    try:
        db.execute("INSERT INTO passage_text (passage_text, rank) VALUES ('integrity-check', 1)")
        return
    except sqlite3.DatabaseError as error:
        if not _is_damage(error):
            raise
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
    rebuild = "INSERT INTO passage_text (passage_text) VALUES ('rebuild')"
    yield _Finding("the full text isn't that of the passages", partial(_run, statement=rebuild))


def _orphans(db: sqlite3.Connection) -> Iterator[_Finding]:
    """Rows of what isn't there any more."""
    counts: dict[tuple[str, str, int], int] = defaultdict(int)
    for table, _, parent, key in db.execute("PRAGMA foreign_key_check"):
        counts[table, parent, key] += 1
    for (table, parent, key), count in counts.items():
        if parent == "access" and table != "access_readers":
            continue  # see `_readers`
        (column,) = (row[3] for row in db.execute(f"PRAGMA foreign_key_list({table})") if row[0] == key)
        delete = f"DELETE FROM {table} WHERE {column} NOT IN (SELECT id FROM {parent})"
        yield _Finding(f"{count} rows of the table {table} are of no {parent}", partial(_run, statement=delete))


def _meta(db: sqlite3.Connection) -> Iterator[_Finding]:
    if wrong := _wrong_meta(db):
        yield _Finding(f"what the library says of itself makes no sense ({wrong})", _say_again)


def _wrong_meta(db: sqlite3.Connection) -> str:
    try:
        with _strict(db):
            schema.read_meta(db, "it")
    except (StoreError, UnicodeDecodeError) as error:
        return str(error).partition(":")[0]
    return ""


def _say_again(db: sqlite3.Connection) -> None:
    for key in ("store", "state"):
        _draw(db, key)
    if _wrong_meta(db):  # of the embeddings, which are all made again then
        db.execute("DELETE FROM meta WHERE key NOT IN ('store', 'state')")


def _readers(db: sqlite3.Connection) -> Iterator[_Finding]:
    listed: dict[object, set[str]] = defaultdict(set)
    for reader, access in db.execute("SELECT reader, access FROM access_readers"):
        listed[access].add(reader)
    sound, unsound = set(), set()
    for access, readers in db.execute("SELECT id, readers FROM access"):
        (sound if _are_readers(readers) and listed[access] == _lines(readers) else unsound).add(access)
    named: dict[object, list[str]] = defaultdict(list)
    for access, name in db.execute(
        "SELECT access, source || ' (' || document_id || ')' FROM documents "
        "UNION ALL SELECT access, 'what is to be read of ' || source FROM jobs"
    ):
        if access not in sound:
            named[access].append(name)
    for access in unsound | named.keys():
        yield _Finding(
            f"who may read {', '.join(named[access]) or 'no document'} isn't sure; repaired, only the owner may: "
            "then add it again with its readers",
            partial(_close, access=access),
        )


def _lines(text: str) -> set[str]:
    return set(text.split("\n")) - {""}


def _are_readers(text: object) -> bool:
    try:
        return isinstance(text, str) and all(checked(each) for each in _lines(text))
    except ValueError:
        return False


def _close(db: sqlite3.Connection, access: object) -> None:
    """Documents and jobs of this row of `access` are their owners' alone."""
    db.execute("DELETE FROM access_readers WHERE access = ?", [access])
    db.execute("DELETE FROM access WHERE id = ?", [access])
    for table in ("documents", "jobs"):
        for row, owner in db.execute(f"SELECT id, owner FROM {table} WHERE access = ?", [access]).fetchall():
            own = access_row(db, [owner] if owner and _are_readers(owner) else [])
            db.execute(f"UPDATE {table} SET access = ? WHERE id = ?", [own, row])


class _Document(msgspec.Struct, array_like=True):
    """As it must be stored: text is text, numbers are numbers."""

    document_id: str
    collection: str
    source: str
    title: str
    media_type: str
    content_hash: str
    recipe: str
    characters: int
    passages: int
    pages: int | None
    added_at: str
    text: str
    owner: str
    modified_at: str | None


class _Passage(msgspec.Struct, array_like=True):
    id: int
    ordinal: int
    start: int
    end: int
    page: int | None
    title: str
    heading: str
    text: str


_DOCUMENT, _PASSAGE = (", ".join(f'"{name}"' for name in kind.__struct_fields__) for kind in (_Document, _Passage))
_TEXTS = [name for name, kind in _Document.__annotations__.items() if kind.startswith("str")]


def _documents(db: sqlite3.Connection, total: int, progress: Progress) -> Iterator[_Finding]:
    wrong_words: list[tuple[int]] = []
    for done, (row,) in enumerate(db.execute("SELECT id FROM documents ORDER BY id").fetchall(), 1):
        source, document_id = db.execute("SELECT source, document_id FROM documents WHERE id = ?", [row]).fetchone()
        progress(ProgressEvent(done, total, str(source), "checked"))
        try:
            with _strict(db):
                document, passages = _stored(db, row)
        except (UnicodeDecodeError, msgspec.ValidationError):
            what, repair = "what is stored of it can't be read", _make_readable
        else:
            wrong_words += _wrong_words(db, passages)
            what, repair = "its text isn't that of its passages", _forget_hash
            if _fit(document, passages):
                continue
        yield _Finding(f"{source} ({document_id}): {what}; {_ADD_AGAIN}", partial(repair, row=row))
    if wrong_words:
        yield _Finding(
            f"the words of {len(wrong_words)} passages aren't those of their text",
            lambda db: db.executemany("DELETE FROM words WHERE passage = ?", wrong_words),
        )


def _stored(db: sqlite3.Connection, row: int) -> tuple[_Document, list[_Passage]]:
    """Raises UnicodeDecodeError and ValidationError for what can't be read."""
    document = db.execute(f"SELECT {_DOCUMENT} FROM documents WHERE id = ?", [row]).fetchone()
    passages = db.execute(f"SELECT {_PASSAGE} FROM passages WHERE document = ? ORDER BY ordinal", [row])
    db.execute("SELECT tag FROM tags WHERE document = ?", [row]).fetchall()
    return msgspec.convert(document, _Document), msgspec.convert(passages.fetchall(), list[_Passage])


def _fit(document: _Document, passages: list[_Passage]) -> bool:
    return (len(document.text), len(passages)) == (document.characters, document.passages) and all(
        each.ordinal == ordinal
        and each.title == document.title
        and each.text == document.text[each.start : each.end] != ""
        for ordinal, each in enumerate(passages)
    )


def _wrong_words(db: sqlite3.Connection, passages: list[_Passage]) -> list[tuple[int]]:
    """The passages whose stored words aren't theirs.  Those of another recipe are counted again anyway."""
    query = f"SELECT length, codes FROM words WHERE passage = ? AND recipe = {lexical.WORDS_RECIPE}"
    return [
        (each.id,)
        for each in passages
        for words in db.execute(query, [each.id])
        if words != lexical.encode(each.title, each.heading, each.text)
    ]


def _forget_hash(db: sqlite3.Connection, row: int) -> None:
    """So that it isn't taken for unchanged when it is added again."""
    db.execute("UPDATE documents SET content_hash = '' WHERE id = ?", [row])


def _make_readable(db: sqlite3.Connection, row: int) -> None:
    """What can't be read would break every list that it is in.  Its passages and tags go."""
    _forget_hash(db, row)
    db.execute("DELETE FROM passages WHERE document = ?", [row])
    db.execute("DELETE FROM tags WHERE document = ?", [row])
    for name in _TEXTS:
        (value,) = db.execute(f"SELECT {name} FROM documents WHERE id = ?", [row]).fetchone()
        readable = value.decode(errors="replace") if isinstance(value, bytes) else value
        db.execute(f"UPDATE documents SET {name} = ? WHERE id = ?", [readable, row])


def _embeddings(db: sqlite3.Connection) -> Iterator[_Finding]:
    rows = db.execute("SELECT passage, vector, sentences FROM embeddings")
    wrong = [(number,) for number, vector, sentences in rows if not _is_embedding(vector, sentences)]
    if wrong:
        yield _Finding(
            f"the embeddings of {len(wrong)} passages are no vectors of length 1",
            lambda db: db.executemany("DELETE FROM embeddings WHERE passage = ?", wrong),
        )


def _jobs(db: sqlite3.Connection) -> Iterator[_Finding]:
    for row, source in db.execute("SELECT id, source FROM jobs").fetchall():
        try:
            with _strict(db):
                stored = db.execute("SELECT *, wanted, unread FROM jobs WHERE id = ?", [row]).fetchone()
            msgspec.json.decode(stored[-2], type=Into)
            msgspec.json.decode(stored[-1], type=list[str])
        except (UnicodeDecodeError, msgspec.MsgspecError, TypeError):
            yield _Finding(
                f"what was to be done with {source} can't be read; repaired, it is forgotten: add it again",
                partial(_run, statement=f"DELETE FROM jobs WHERE id = {row}"),
            )


def _is_embedding(vector: object, sentences: object) -> bool:
    """A unit vector as float32, and int8 vectors of as many numbers."""
    if not (isinstance(vector, bytes) and isinstance(sentences, bytes) and vector and len(vector) % 4 == 0):
        return False
    length = np.linalg.norm(np.frombuffer(vector, dtype="<f4").astype(np.float64))
    return bool(abs(length - 1) < _LENGTH_TOLERANCE) and len(sentences) % (len(vector) // 4) == 0


@contextmanager
def _strict(db: sqlite3.Connection) -> Iterator[None]:
    """Text that is none raises UnicodeDecodeError."""
    db.text_factory = bytes.decode
    try:
        yield
    finally:
        db.text_factory = _lenient


def _lenient(raw: bytes) -> str:
    return raw.decode(errors="replace")
