"""The truth: documents, passages, embeddings and full text in one SQLite file.

One writer at a time, readers beside it on connections of their own (WAL).  A commit is on the disk when it
returns (synchronous=FULL).  Whatever else retrieval keeps can be rebuilt from here.  Another database would
stand behind the same methods.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from msgspec import Struct

from retrieval import schema
from retrieval.errors import StoreError, UnknownDocument, UnknownPassage
from retrieval.records import Document, DocumentText, Passage

DATABASE_FILE = "library.sqlite3"
_IDLE_READERS = 8


class NewPassage(Struct):
    start: int
    end: int
    page: int | None
    heading: str
    text: str


class NewDocument(Struct):
    """What a writer hands in; `recipe` names how the passages were made (so that a change makes them anew)."""

    collection: str
    source: str
    title: str
    media_type: str
    content_hash: str
    recipe: str
    pages: int | None
    text: str
    passages: list[NewPassage]


class StoredVersion(Struct):
    document_id: str
    content_hash: str
    recipe: str


class PassageRow(Struct):
    """A passage with what search needs to know of its document."""

    passage: Passage
    collection: str
    media_type: str


class Store:
    """An open SQLite store.  All methods may be called from any thread."""

    def __init__(self, data_dir: Path):
        """Creates the store if there is none.  Raises StoreError (damaged, newer, unwritable)."""
        self._path = data_dir / DATABASE_FILE
        self._write_lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._idle_lock = threading.Lock()
        self._closed = False
        with self._translated():
            self._writer = self._connect()
            try:
                self._writer.execute("PRAGMA journal_mode = WAL")
                self._writer.execute("PRAGMA synchronous = FULL")
                schema.prepare(self._writer, str(self._path))
                self._meta = schema.read_meta(self._writer, str(self._path))
            except BaseException:
                self._writer.close()
                raise

    def close(self) -> None:
        with self._idle_lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        with self._write_lock:
            self._writer.close()

    @property
    def store_id(self) -> str:
        return self._meta["store"]

    @property
    def state(self) -> str:
        """A token drawn anew by each committed write: equal tokens mean equal contents."""
        return self._meta["state"]

    @property
    def embedder(self) -> str | None:
        """The name of the model whose vectors are stored; None while there are none."""
        return self._meta.get("embedder")

    @property
    def dim(self) -> int | None:
        return int(self._meta["dim"]) if "dim" in self._meta else None

    # reading

    def counts(self) -> tuple[int, int]:
        """(documents, passages)"""
        with self._reader() as db:
            return db.execute("SELECT (SELECT count(*) FROM documents), (SELECT count(*) FROM passages)").fetchone()

    def collections(self) -> list[str]:
        with self._reader() as db:
            return [name for (name,) in db.execute("SELECT DISTINCT collection FROM documents ORDER BY collection")]

    def documents(self, collection: str | None, offset: int, limit: int) -> tuple[list[Document], int]:
        where, values = ("WHERE collection = ?", [collection]) if collection is not None else ("", [])
        with self._reader() as db:
            (total,) = db.execute(f"SELECT count(*) FROM documents {where}", values).fetchone()
            rows = db.execute(
                f"SELECT {_DOCUMENT} FROM documents {where} ORDER BY title COLLATE NOCASE, id LIMIT ? OFFSET ?",
                [*values, limit, offset],
            ).fetchall()
        return [Document(*row) for row in rows], total

    def document(self, document_id: str) -> DocumentText:
        with self._reader() as db:
            row = db.execute(f"SELECT {_DOCUMENT}, text FROM documents WHERE document_id = ?", [document_id]).fetchone()
        if row is None:
            raise UnknownDocument(document_id)
        return DocumentText(Document(*row[:-1]), row[-1])

    def version(self, collection: str, source: str) -> StoredVersion | None:
        """Which version of a source is stored, if any."""
        with self._reader() as db:
            row = db.execute(
                "SELECT document_id, content_hash, recipe FROM documents WHERE collection = ? AND source = ?",
                [collection, source],
            ).fetchone()
        return StoredVersion(*row) if row else None

    def passage(self, passage_id: str) -> Passage:
        number = passage_number(passage_id)
        found = self.passages([number]) if number is not None else {}
        if number not in found:
            raise UnknownPassage(passage_id)
        return found[number].passage

    def passages(self, numbers: Sequence[int]) -> dict[int, PassageRow]:
        """The passages that are there, by number."""
        found: dict[int, PassageRow] = {}
        with self._reader() as db:
            for start in range(0, len(numbers), 500):
                some = list(numbers[start : start + 500])
                marks = ",".join("?" * len(some))
                for number, *fields, collection, media_type in db.execute(
                    'SELECT p.id, d.document_id, d.title, d.source, p.heading, p.page, p."start", p."end", p.text, '
                    "d.collection, d.media_type FROM passages p JOIN documents d ON d.id = p.document "
                    f"WHERE p.id IN ({marks})",
                    some,
                ):
                    passage = Passage(f"p{number}", *fields, 0.0)
                    found[number] = PassageRow(passage, collection, media_type)
        return found

    def numbers_of(self, collection: str | None = None) -> np.ndarray:
        """The passages of a collection, or (None) all: int64 [n]."""
        where, values = ("WHERE d.collection = ?", [collection]) if collection is not None else ("", [])
        with self._reader() as db:
            rows = db.execute(f"SELECT p.id FROM passages p JOIN documents d ON d.id = p.document {where}", values)
            return np.fromiter((row[0] for row in rows), dtype=np.int64)

    def match_text(self, match: str, collection: str | None, limit: int) -> list[tuple[int, float]]:
        """(passage number, BM25 score, higher is better), best first.  `match` is FTS5 syntax, made safe already."""
        only, values = "", []
        if collection is not None:
            # The plus keeps SQLite from walking the collection and matching the text row by row.
            only = (
                "AND +passage_text.rowid IN (SELECT p.id FROM passages p JOIN documents d ON d.id = p.document "
                "WHERE d.collection = ?)"
            )
            values = [collection]
        with self._reader() as db:
            rows = db.execute(
                "SELECT rowid, bm25(passage_text, 2.0, 1.5, 1.0) AS badness FROM passage_text "
                f"WHERE passage_text MATCH ? {only} ORDER BY badness, rowid LIMIT ?",
                [match, *values, limit],
            ).fetchall()
        return [(number, -badness) for number, badness in rows]

    def vectors(self, batch: int = 4096) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All sound embeddings in order of number: int64 [n], float32 [n, dim].  What was damaged (another length,
        not finite) is left out."""
        length = (self.dim or 0) * 4
        last = -1
        while True:
            with self._reader() as db:
                rows = db.execute(
                    "SELECT passage, vector FROM embeddings WHERE passage > ? ORDER BY passage LIMIT ?", [last, batch]
                ).fetchall()
            if not rows:
                return
            last = rows[-1][0]
            whole = [(number, data) for number, data in rows if isinstance(data, bytes) and len(data) == length]
            numbers = np.array([number for number, _ in whole], dtype=np.int64)
            vectors = np.frombuffer(b"".join(data for _, data in whole), dtype="<f4").reshape(len(whole), length // 4)
            finite = np.isfinite(vectors).all(axis=1)
            yield numbers[finite], vectors[finite]

    # writing

    @contextmanager
    def write(self) -> Iterator[Change]:
        """A change that takes effect at its `commit()`, all of it or nothing; without one it is undone."""
        with self._write_lock, self._translated():
            if self._closed:
                raise _closed()
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield Change(self._writer, self._meta)
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")

    # connections

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=30, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        with self._translated():
            with self._idle_lock:
                if self._closed:
                    raise _closed()
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = self._connect()
                connection.execute("PRAGMA query_only = ON")
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            with self._idle_lock:
                keep = not self._closed and len(self._idle) < _IDLE_READERS
                if keep:
                    self._idle.append(connection)
            if not keep:
                connection.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            # A plain "SQL error" is a table or column that isn't there, or text that is none.
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) == sqlite3.SQLITE_ERROR:
                raise self._damaged(error) from error
            raise StoreError(
                f"{self._path} can't be used: {error}; check free space and permissions", code="unwritable_store"
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> StoreError:
        return StoreError(
            f"{self._path} is damaged ({error}): restore it from a backup, or move it away and ingest again"
        )


_DOCUMENT = "document_id, title, source, media_type, collection, content_hash, characters, passages, pages, added_at"


class Change:
    """One write transaction, and what the vector index must do to follow it."""

    def __init__(self, db: sqlite3.Connection, meta: dict[str, str]):
        self._db = db
        self._meta = meta
        self._new_meta: dict[str, str] = {}
        self.removed: list[int] = []
        self.added: dict[int, np.ndarray] = {}  # passage number → vector

    def describe_embedder(self, name: str, dim: int) -> None:
        self._new_meta |= {"embedder": name, "dim": str(dim)}

    def put(self, document: NewDocument, vectors: np.ndarray) -> tuple[str, bool]:
        """Add a document or replace the one of the same collection and source: (document id, was there before).
        `vectors` float32 [passages, dim]."""
        old = self._db.execute(
            "SELECT id, document_id FROM documents WHERE collection = ? AND source = ?",
            [document.collection, document.source],
        ).fetchone()
        fields = {
            "collection": document.collection,
            "source": document.source,
            "title": document.title,
            "media_type": document.media_type,
            "content_hash": document.content_hash,
            "recipe": document.recipe,
            "characters": len(document.text),
            "passages": len(document.passages),
            "pages": document.pages,
            "added_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "text": document.text,
        }
        if old:
            row, document_id = old
            self._drop_passages(row)
            self._db.execute(
                f"UPDATE documents SET {', '.join(f'{name} = :{name}' for name in fields)} WHERE id = :id",
                {**fields, "id": row},
            )
        else:
            document_id = secrets.token_hex(8)
            fields["document_id"] = document_id
            row = self._db.execute(
                f"INSERT INTO documents ({', '.join(fields)}) VALUES ({', '.join(f':{name}' for name in fields)})",
                fields,
            ).lastrowid
        for ordinal, (passage, vector) in enumerate(zip(document.passages, vectors, strict=True)):
            number = self._db.execute(
                'INSERT INTO passages (document, ordinal, "start", "end", page, title, heading, text) '
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [row, ordinal, passage.start, passage.end, passage.page, document.title, passage.heading, passage.text],
            ).lastrowid
            self._db.execute("INSERT INTO embeddings VALUES (?, ?)", [number, vector.astype("<f4").tobytes()])
            self.added[number] = vector
        return document_id, old is not None

    def remove(self, document_id: str) -> None:
        row = self._db.execute("SELECT id FROM documents WHERE document_id = ?", [document_id]).fetchone()
        if row is None:
            raise UnknownDocument(document_id)
        self._drop_passages(row[0])
        self._db.execute("DELETE FROM documents WHERE id = ?", row)

    def set_vectors(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        """Replace stored embeddings, or put those that are missing."""
        rows = [(int(n), v.astype("<f4").tobytes()) for n, v in zip(numbers, vectors, strict=True)]
        self._db.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", rows)

    def commit(self) -> None:
        self._new_meta["state"] = secrets.token_hex(16)
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", self._new_meta.items())
        self._db.execute("COMMIT")
        self._meta.update(self._new_meta)

    def _drop_passages(self, row: int) -> None:
        for (number,) in self._db.execute("SELECT id FROM passages WHERE document = ?", [row]):
            self.removed.append(number)
            self.added.pop(number, None)  # put by this very change
        # The embedding goes by trigger after the passage; the reference is checked when the statement ends.
        self._db.execute("DELETE FROM passages WHERE document = ?", [row])


def passage_number(passage_id: str) -> int | None:
    """The number in "p123"; None for anything else."""
    digits = passage_id[1:]
    if passage_id[:1] != "p" or not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        return None
    return int(digits)


def _closed() -> StoreError:
    return StoreError("the library has been closed: open it again", code="closed_store")
