"""Documents in PostgreSQL with pgvector, for several servers over one database: see POSTGRES.md."""

from __future__ import annotations

from psycopg import Cursor

from retrieval.lexical import WORDS_RECIPE
from retrieval.postgres import schema
from retrieval.postgres.change import count_words
from retrieval.postgres.database import Database
from retrieval.postgres.finder import Finder
from retrieval.postgres.jobs import Incoming, JobStore
from retrieval.postgres.store import Store

__all__ = ["Finder", "Incoming", "JobStore", "Store", "open_database"]


def open_database(url: str) -> Database:
    """The database at that address with refdesk's tables in it.  Raises StoreError (bad_database, unreachable_store,
    newer_store, unwritable_store)."""

    def prepare(db: Cursor, name: str) -> None:
        if schema.prepare(db, name, WORDS_RECIPE) is not None:
            for (row,) in db.execute("SELECT id FROM documents").fetchall():
                count_words(db, row)
            db.execute("UPDATE refdesk SET words_recipe = %s", [WORDS_RECIPE])

    return Database(url, prepare)
