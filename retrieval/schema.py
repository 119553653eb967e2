"""The tables, and how an older store becomes this one."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Mapping

from retrieval.errors import StoreError

SCHEMA_VERSION = 1

# Passage ids are never used again (AUTOINCREMENT): a citation never comes to mean other text.
# Full text is external content: it reads title, heading and text from `passages`, and the triggers keep it in
# the same transaction.  Embeddings lie apart so that reading passages doesn't page through them.
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    document_id TEXT NOT NULL UNIQUE,
    collection TEXT NOT NULL,
    source TEXT NOT NULL,
    title TEXT NOT NULL,
    media_type TEXT NOT NULL,
    content_hash TEXT NOT NULL,
    recipe TEXT NOT NULL,
    characters INTEGER NOT NULL,
    passages INTEGER NOT NULL,
    pages INTEGER,
    added_at TEXT NOT NULL,
    text TEXT NOT NULL,
    UNIQUE (collection, source)
);
CREATE TABLE passages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    document INTEGER NOT NULL REFERENCES documents (id),
    ordinal INTEGER NOT NULL,
    "start" INTEGER NOT NULL,
    "end" INTEGER NOT NULL,
    page INTEGER,
    title TEXT NOT NULL,
    heading TEXT NOT NULL,
    text TEXT NOT NULL
);
CREATE INDEX passages_of_document ON passages (document, ordinal);
CREATE TABLE embeddings (
    passage INTEGER PRIMARY KEY REFERENCES passages (id),
    vector BLOB NOT NULL
);
CREATE VIRTUAL TABLE passage_text USING fts5 (
    title, heading, text,
    content = 'passages', content_rowid = 'id', tokenize = 'porter unicode61 remove_diacritics 2'
);
CREATE TRIGGER passages_inserted AFTER INSERT ON passages BEGIN
    INSERT INTO passage_text (rowid, title, heading, text) VALUES (new.id, new.title, new.heading, new.text);
END;
CREATE TRIGGER passages_deleted AFTER DELETE ON passages BEGIN
    INSERT INTO passage_text (passage_text, rowid, title, heading, text)
    VALUES ('delete', old.id, old.title, old.heading, old.text);
    DELETE FROM embeddings WHERE passage = old.id;
END;
"""


def prepare(connection: sqlite3.Connection, where: str) -> None:
    """Create the tables in an empty database; refuse one from a newer program (StoreError, newer_store)."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{where} was written by a newer refdesk (schema {version}, this one knows {SCHEMA_VERSION}): "
            "upgrade refdesk, or choose another data directory",
            code="newer_store",
        )
    if version == SCHEMA_VERSION:
        return
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise StoreError(f"{where} is an SQLite database, but not one of refdesk: choose another data directory")
    connection.executescript(
        f"BEGIN IMMEDIATE; {_TABLES} "
        f"INSERT INTO meta VALUES ('store', '{secrets.token_hex(16)}'), ('state', '{secrets.token_hex(16)}');"
        f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
    )


def read_meta(connection: sqlite3.Connection, where: str) -> dict[str, str]:
    """What the store says of itself: `store`, `state`, and `embedder` with `dim` once there are vectors.  Raises
    StoreError (damaged_store) when that makes no sense."""
    meta = dict(connection.execute("SELECT key, value FROM meta"))
    if wrong := _wrong(meta):
        raise StoreError(f"{where} is damaged ({wrong}): restore it from a backup, or move it away and ingest again")
    return meta


def _wrong(meta: Mapping[str, object]) -> str:
    for key, value in meta.items():
        if not isinstance(key, str) or not isinstance(value, str) or not value:
            return f"the entry {key!r} of its table meta holds no text"
    for key in ("store", "state"):
        if key not in meta:
            return f"its table meta lacks the entry {key!r}"
    if ("embedder" in meta) != ("dim" in meta):
        return "its table meta names an embedder without the size of its vectors, or the other way round"
    dim = str(meta.get("dim", "1"))
    if not (dim.isascii() and dim.isdigit() and len(dim) < 7 and int(dim)):
        return f"its table meta says that vectors have {dim!r} numbers"
    return ""
