"""Where a library keeps its documents: SQLite in its data directory, or a PostgreSQL database that several share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from retrieval import contracts
from retrieval.embedding import Embedder, SharedEmbedder
from retrieval.errors import RetrievalError, StoreError
from retrieval.files import DirectoryLock
from retrieval.incoming import Incoming
from retrieval.job_store import JobStore
from retrieval.settings import RetrievalSettings
from retrieval.sqlite.indexes import Indexes
from retrieval.sqlite.store import Store

log = logging.getLogger(__name__)

Opener = Callable[[str], Embedder]


class Place(NamedTuple):
    """`incoming` keeps uploads until they are read.  `close` is for when all else has ended."""

    store: contracts.Store
    finder: contracts.Finder
    jobs: contracts.JobStore
    incoming: contracts.Incoming
    close: Callable[[], None]


def open_place(data_dir: Path, settings: RetrievalSettings, embedder: SharedEmbedder, opener: Opener) -> Place:
    """`opener` finds a model by its name in the settings, where stored vectors are of another one than `embedder`.
    Raises StoreInUse, StoreError."""
    if settings.database:
        return _in_postgres(data_dir, settings, embedder, opener)
    with ExitStack() as opened:
        lock = DirectoryLock(data_dir)
        opened.callback(lock.release)
        store = Store(data_dir)
        opened.callback(store.close)
        finder = Indexes(
            data_dir,
            store,
            embedder,
            settings.embedder,
            lambda identity: _earlier(embedder, opener, identity, store.opened_by),
            settings.lists_from,
            settings.vectors_on,
        )
        jobs = JobStore(store)
        incoming = Incoming(data_dir / "incoming", jobs, settings.incoming_mb)
        return Place(store, finder, jobs, incoming, opened.pop_all().close)


def _in_postgres(data_dir: Path, settings: RetrievalSettings, embedder: SharedEmbedder, opener: Opener) -> Place:
    try:
        from retrieval import postgres
    except ImportError as error:
        raise StoreError(
            f"documents in PostgreSQL need {error.name}, which is not installed: pip install 'refdesk[postgres]'",
            code="bad_database",
        ) from error
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the data directory {data_dir} can't be used: {error.strerror or error}", code="unwritable_store"
        ) from error
    with ExitStack() as opened:
        database = postgres.open_database(settings.database)
        opened.callback(database.close)
        earlier = lambda identity, name: _earlier(embedder, opener, identity, name)  # noqa: E731
        finder = postgres.Finder(database, embedder, settings.embedder, earlier)
        jobs = postgres.JobStore(database)
        incoming = postgres.Incoming(database, jobs, settings.incoming_mb)
        return Place(postgres.Store(database), finder, jobs, incoming, opened.pop_all().close)


def _earlier(wanted: SharedEmbedder, opener: Opener, identity: str, name: str | None) -> SharedEmbedder | None:
    """The model that stored vectors of this identity are of, opened by that name, if it can still be."""
    if wanted.gives(identity):
        return wanted
    try:
        found = SharedEmbedder(opener(name)) if name else None
    except RetrievalError as error:
        log.warning("%s, whose vectors are stored, can't be opened: %s", identity, error)
        return None
    return found if found is not None and found.gives(identity) else None
