"""Vectors of another model, made beside the searches: the database's next generation.

One process makes them (an advisory lock, which the server gives back when that process is gone), others that want the
same model wait and go on where it ends.  Who wants another one follows: the settings of the process that was opened
last decide.
"""

from __future__ import annotations

import logging
import threading
import time

from psycopg import Cursor

from retrieval.embedding import SharedEmbedder
from retrieval.errors import StoreError
from retrieval.pooling import passage_text
from retrieval.postgres.change import Change
from retrieval.postgres.database import REINDEXING, Database
from retrieval.postgres.schema import State

log = logging.getLogger(__name__)

_PASSAGES = 64  # embedded and written together
_AGAIN_SECONDS = 0.5  # between two looks at whether another process is done, or the server back


class Reindexing:
    """One thread while there is something to make."""

    def __init__(self, database: Database, embedder: SharedEmbedder, opened_by: str):
        """`embedder` is the one whose vectors are wanted, opened by that name."""
        self._database = database
        self._embedder = embedder
        self._opened_by = opened_by
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        self._thread = threading.Thread(target=self._run, name="library-reindex", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def stop(self) -> None:
        self._stopped.set()
        self.wait()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                with self._database.held(REINDEXING) as ours:
                    if not ours:
                        log.debug("another process makes vectors anew")
                    elif self._embed_all():
                        return
            except StoreError as error:
                if error.code not in ("unreachable_store", "closed_store", "busy_store"):
                    log.error("vectors can't be made anew: %s", error)
                    return
            except Exception:
                log.exception("vectors can't be made anew; searches go on with what there is")
                return
            self._stopped.wait(_AGAIN_SECONDS)

    def _embed_all(self) -> bool:
        """Whether nothing is left to do."""
        embedder = self._embedder
        started, count = time.monotonic(), 0
        with self._database.write() as db:
            change = Change(db)
            if not differs(change.state, embedder):
                change.sweep()  # what its maker had no time for
                return True
            if change.state.next_embedder != maker_of(embedder):
                change.begin_generation(maker_of(embedder), embedder.dim)
            generation = change.state.generation + 1
        while not self._stopped.is_set():
            lacking = self._database.read(lambda db: _lacking(db, generation))
            if lacking:
                count += self._embed(lacking, generation)
            elif self._change(generation):
                log.info("%d passages embedded by %s in %.0f s", count, embedder.name, time.monotonic() - started)
                return True
        return False

    def _embed(self, lacking: list[tuple], generation: int) -> int:
        embedded = self._embedder.encode_passages([passage_text(*texts) for _, _, *texts in lacking])
        with self._database.write() as db:
            still = db.execute(
                "SELECT id FROM passages p WHERE id = ANY(%s::bigint[]) AND NOT EXISTS "
                "(SELECT FROM embeddings e WHERE e.passage = p.id AND e.generation = %s)",
                [[number for number, *_ in lacking], generation],
            )
            there = {number for (number,) in still}
            rows = [(n, row, each) for (n, row, *_), each in zip(lacking, embedded, strict=True) if n in there]
            Change(db).set_embeddings(rows, generation)
        return len(rows)

    def _change(self, generation: int) -> bool:
        """Whether it serves now: nobody has added a document meanwhile."""
        with self._database.write() as db:
            if _lacking(db, generation):
                return False
            Change(db).change_generation(self._embedder.identity, self._embedder.dim, self._opened_by)
        with self._database.write() as db:
            Change(db).sweep()
        return True


def differs(state: State, embedder: SharedEmbedder) -> bool:
    """Whether the stored vectors are of another model than this one."""
    made = (state.embedder, state.dim)
    return state.filled and made != (embedder.identity, embedder.dim_at_hand or state.dim)


def maker_of(embedder: SharedEmbedder) -> str:
    return f"{embedder.identity}, {embedder.dim} numbers"


def _lacking(db: Cursor, generation: int) -> list[tuple]:
    """(number, document, title, heading, text) of the first passages that have no embedding of this generation."""
    return db.execute(
        "SELECT p.id, p.document, p.title, p.heading, p.text FROM passages p WHERE NOT EXISTS "
        "(SELECT FROM embeddings e WHERE e.passage = p.id AND e.generation = %s) ORDER BY p.id LIMIT %s",
        [generation, _PASSAGES],
    ).fetchall()
