"""The tables, and how an older store becomes this one."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Mapping

from retrieval.errors import MEND, StoreError

SCHEMA_VERSION = 3

# Documents with the same readers share a row of `access`.  A source is one document for each owner: who may not change
# somebody's file doesn't replace it by sending another of that name.
# Passage ids are never used again (AUTOINCREMENT): a citation never comes to mean other text.
# Full text is external content: it reads title, heading and text from `passages`, and the triggers keep it in
# the same transaction.  Embeddings and the words' codes (`lexical`) lie apart so that reading passages doesn't page
# through them.  Embeddings of two generations lie side by side while a new model's are made and the old one's serve.
_ACCESS = """
CREATE TABLE access (
    id INTEGER PRIMARY KEY,
    readers TEXT NOT NULL UNIQUE
);
CREATE TABLE access_readers (
    reader TEXT NOT NULL,
    access INTEGER NOT NULL REFERENCES access (id),
    PRIMARY KEY (reader, access)
) WITHOUT ROWID;
CREATE TABLE tags (
    tag TEXT NOT NULL,
    document INTEGER NOT NULL REFERENCES documents (id) ON DELETE CASCADE,
    PRIMARY KEY (tag, document)
) WITHOUT ROWID;
CREATE INDEX tags_of_document ON tags (document);
CREATE TABLE words (
    passage INTEGER PRIMARY KEY REFERENCES passages (id),
    recipe INTEGER NOT NULL,
    length INTEGER NOT NULL,
    codes BLOB NOT NULL
);
CREATE TRIGGER words_deleted AFTER DELETE ON passages BEGIN
    DELETE FROM words WHERE passage = old.id;
END;
"""
# A job says by `access` who may read what comes of it, by `wanted` (JSON) what was asked for.
_JOBS = """
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    source TEXT NOT NULL,
    collection TEXT NOT NULL,
    owner TEXT NOT NULL,
    access INTEGER NOT NULL REFERENCES access (id),
    wanted TEXT NOT NULL,
    urgency INTEGER NOT NULL,
    size INTEGER NOT NULL,
    due REAL NOT NULL DEFAULT 0,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    parts_read INTEGER NOT NULL DEFAULT 0,
    parts INTEGER,
    passages_embedded INTEGER NOT NULL DEFAULT 0,
    passages INTEGER,
    reason TEXT,
    code TEXT,
    unread TEXT NOT NULL DEFAULT '[]',
    document_id TEXT,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
);
CREATE INDEX jobs_by_state ON jobs (state, urgency DESC, id);
CREATE INDEX jobs_by_source ON jobs (source, collection, owner);
CREATE INDEX documents_by_content ON documents (content_hash);
CREATE TRIGGER passages_retitled AFTER UPDATE OF title ON passages BEGIN
    INSERT INTO passage_text (passage_text, rowid, title, heading, text)
    VALUES ('delete', old.id, old.title, old.heading, old.text);
    INSERT INTO passage_text (rowid, title, heading, text) VALUES (new.id, new.title, new.heading, new.text);
END;
"""
_DOCUMENTS = """
CREATE TABLE {name} (
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
    owner TEXT NOT NULL DEFAULT '',
    access INTEGER NOT NULL REFERENCES access (id),
    modified_at TEXT,
    UNIQUE (collection, source, owner)
);
"""
_PAGE_BOXES = """
CREATE TABLE page_boxes (
    document INTEGER NOT NULL REFERENCES documents (id) ON DELETE CASCADE,
    page INTEGER NOT NULL,
    width REAL NOT NULL,
    height REAL NOT NULL,
    "start" INTEGER NOT NULL,
    "end" INTEGER NOT NULL,
    boxes BLOB NOT NULL,
    PRIMARY KEY (document, page)
);
"""
_EMBEDDINGS = """
CREATE TABLE {name} (
    passage INTEGER NOT NULL REFERENCES passages (id),
    generation INTEGER NOT NULL,
    vector BLOB NOT NULL,
    sentences BLOB NOT NULL,
    PRIMARY KEY (passage, generation)
);
"""
_DELETED = """
CREATE TRIGGER passages_deleted AFTER DELETE ON passages BEGIN
    INSERT INTO passage_text (passage_text, rowid, title, heading, text)
    VALUES ('delete', old.id, old.title, old.heading, old.text);
    DELETE FROM embeddings WHERE passage = old.id;
END;
"""
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
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
CREATE VIRTUAL TABLE passage_text USING fts5 (
    title, heading, text,
    content = 'passages', content_rowid = 'id', tokenize = 'porter unicode61 remove_diacritics 2'
);
CREATE TRIGGER passages_inserted AFTER INSERT ON passages BEGIN
    INSERT INTO passage_text (rowid, title, heading, text) VALUES (new.id, new.title, new.heading, new.text);
END;
"""


def prepare(connection: sqlite3.Connection, where: str) -> None:
    """Create the tables in an empty database, bring those of an older program up to date; refuse one from a newer one
    (StoreError, newer_store)."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{where} was written by a newer refdesk (schema {version}, this one knows {SCHEMA_VERSION}): "
            "upgrade refdesk, or choose another data directory",
            code="newer_store",
        )
    if version == SCHEMA_VERSION:
        return
    if version:
        if version == 1:
            _from_1(connection)
        _from_2(connection)
        return
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise StoreError(f"{where} is an SQLite database, but not one of refdesk: choose another data directory")
    connection.executescript(
        f"BEGIN IMMEDIATE; {_DOCUMENTS.format(name='documents')} "
        f"{_EMBEDDINGS.format(name='embeddings')} {_TABLES} {_DELETED} {_ACCESS} {_PAGE_BOXES} {_JOBS} "
        f"INSERT INTO meta VALUES ('store', '{secrets.token_hex(16)}'), ('state', '{secrets.token_hex(16)}');"
        f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
    )


def _from_1(connection: sqlite3.Connection) -> None:
    """Documents get readers, an owner, a date and tags; all that were there stay everybody's.  The table is made anew,
    since its key changes (https://sqlite.org/lang_altertable.html, section 7)."""
    columns = (
        "id, document_id, collection, source, title, media_type, content_hash, recipe, characters, passages, pages, "
        "added_at, text"
    )
    connection.execute("PRAGMA foreign_keys = OFF")
    try:
        connection.executescript(
            f"BEGIN IMMEDIATE; {_ACCESS} INSERT INTO access VALUES (1, 'public');"
            "INSERT INTO access_readers VALUES ('public', 1);"
            f"{_DOCUMENTS.format(name='documents_new')}"
            f"INSERT INTO documents_new ({columns}, access) SELECT {columns}, 1 FROM documents;"
            "UPDATE sqlite_sequence SET seq = (SELECT seq FROM sqlite_sequence WHERE name = 'documents')"
            " WHERE name = 'documents_new';"
            "DROP TABLE documents; ALTER TABLE documents_new RENAME TO documents;"
            "PRAGMA user_version = 2; COMMIT;"
        )
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    finally:
        connection.execute("PRAGMA foreign_keys = ON")


def _from_2(connection: sqlite3.Connection) -> None:
    """Embeddings get generations and vectors of sentences, which those that are there lack until they are made anew, as
    boxes are; and there are jobs."""
    connection.executescript(
        f"BEGIN IMMEDIATE; {_EMBEDDINGS.format(name='embeddings_new')}"
        "INSERT INTO embeddings_new SELECT passage, 1, vector, x'' FROM embeddings;"
        "DROP TRIGGER passages_deleted; DROP TABLE embeddings;"
        f"ALTER TABLE embeddings_new RENAME TO embeddings; {_DELETED} {_PAGE_BOXES} {_JOBS}"
        f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
    )


def read_meta(connection: sqlite3.Connection, where: str) -> dict[str, str]:
    """What the store says of itself: `store`, `state`, and once there are vectors `embedder` with `dim`, of which
    `generation` they are (1 where it isn't said), and `next_embedder` while those of another are being made.  Raises
    StoreError (damaged_store) when that makes no sense."""
    meta = dict(connection.execute("SELECT key, value FROM meta"))
    if wrong := _wrong(meta):
        raise StoreError(f"{where} is damaged ({wrong}): {MEND}")
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
    for key, what in (("dim", "that vectors have {!r} numbers"), ("generation", "that they are of generation {!r}")):
        value = str(meta.get(key, "1"))
        if not (value.isascii() and value.isdigit() and len(value) < 7 and int(value)):
            return f"its table meta says {what.format(value)}"
    return ""
