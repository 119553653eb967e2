"""One SQLite file: its connections, its writes, and what it says of itself.

One writer at a time, readers beside it on connections of their own (WAL).  A commit is on the disk when it
returns (synchronous=FULL).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from retrieval.errors import MEND, StoreError
from retrieval.sqlite import schema
from retrieval.sqlite.change import Change

DATABASE_FILE = "library.sqlite3"
_IDLE_READERS = 8


class Database:
    """Open.  All methods may be called from any thread."""

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
        """The identity of the model whose vectors serve; None while there are none."""
        return self._meta.get("embedder")

    @property
    def opened_by(self) -> str | None:
        """The name in the settings by which that model was opened."""
        return self._meta.get("opened_by")

    @property
    def next_embedder(self) -> str | None:
        """The identity of the model that makes the next generation of vectors, if any does."""
        return self._meta.get("next_embedder")

    @property
    def generation(self) -> int:
        """That of the vectors that serve."""
        return int(self._meta.get("generation", "1"))

    @property
    def dim(self) -> int | None:
        return int(self._meta["dim"]) if "dim" in self._meta else None

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

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction on what is no document, so that `state` stays: committed at the end, undone by an error."""
        with self._write_lock, self._translated():
            if self._closed:
                raise _closed()
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
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
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to read by, beside whoever writes."""
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
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter where SQLite's message is no text
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> StoreError:
        return StoreError(f"{self._path} is damaged ({error}): {MEND}")


def marks(values: Collection) -> str:
    return ",".join("?" * len(values))


def _closed() -> StoreError:
    return StoreError("the library has been closed: open it again", code="closed_store")
