"""The queue of documents to be read, shared by the servers of one database, and what was sent to them.

Each server holds a number of its own as an advisory lock for as long as it lives.  A job is taken by one server at a
time; what a server that is gone was reading is taken again by another one.  A file in a folder is read where it lies,
and what somebody waits for by the server that they wait at.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from psycopg import Cursor

from retrieval import job_store
from retrieval.errors import StoreError
from retrieval.incoming import make_room
from retrieval.job_store import KEPT, RUNNING, Kept, kept_of, moment
from retrieval.postgres.change import access_row
from retrieval.postgres.database import Database

LOOK_SECONDS = 2.0  # from one look at what other servers have added, or left undone, to the next
GRACE_SECONDS = 30
_LARGEST = 256 * 1024 * 1024  # bytes of one upload: four times that are in memory while it is sent to the database


class _Marked:
    """A cursor for SQL with the marks that SQLite has."""

    def __init__(self, cursor: Cursor):
        self._cursor = cursor

    def execute(self, query: str, values: Sequence[Any] = ()) -> Cursor:
        return self._cursor.execute(query.replace("?", "%s"), values)  # type: ignore[arg-type]


class _Marking:
    def __init__(self, database: Database):
        self._database = database

    @contextmanager
    def reading(self) -> Iterator[_Marked]:
        with self._database.reading() as cursor:
            yield _Marked(cursor)

    @contextmanager
    def transaction(self) -> Iterator[_Marked]:
        with self._database.write() as cursor:
            yield _Marked(cursor)


class JobStore(job_store.JobStore):
    _access_row = staticmethod(access_row)

    def __init__(self, database: Database):
        super().__init__(_Marking(database))  # type: ignore[arg-type]
        self._database = database
        self._number = secrets.randbits(62)
        self._most_attempts = 1

    def take(self, kinds: Collection[str], now: float) -> Kept | None:
        """Of one source the versions are read in the order in which they came, one at a time."""
        self._database.hold(self._number)
        with self._database.write() as db:
            self._recover(_Marked(db), self._most_attempts, f"AND {_gone('runner')}")
            row = db.execute(
                "UPDATE jobs SET state = 'parsing', attempts = attempts + 1, runner = %(me)s, updated_at = %(moment)s "
                "WHERE id = (SELECT j.id FROM jobs j CROSS JOIN LATERAL (SELECT min(s.id) AS first, "
                "max(s.urgency) AS urgency, min(s.due) AS due, bool_or(s.state <> 'queued') AS running, "
                "(array_agg(s.id ORDER BY s.urgency DESC, s.id))[1] AS urgent FROM jobs s "
                "WHERE s.source = j.source AND s.collection = j.collection AND s.owner = j.owner "
                "AND (s.state = 'queued' OR s.state = ANY(%(running)s))) same "
                "WHERE j.state = 'queued' AND j.kind = ANY(%(kinds)s) AND (j.home = %(me)s OR (j.kind <> 'file' "
                f"AND (j.urgency < %(waited_for)s OR {_gone('j.home')}))) "
                "AND j.id = same.first AND NOT same.running AND same.due <= %(now)s "
                f"ORDER BY same.urgency DESC, same.urgent LIMIT 1) RETURNING {KEPT}",
                {
                    "me": self._number,
                    "moment": moment(),
                    "running": list(RUNNING),
                    "kinds": list(kinds),
                    "waited_for": job_store.WAITED_FOR,
                    "now": now,
                },
            ).fetchone()
        return kept_of(row) if row else None

    def next_due(self, kinds: Collection[str]) -> float | None:
        return time.time() + LOOK_SECONDS

    def cancel_elsewhere(self, job_id: str) -> bool:
        """Where it is read is noticed at the next page or batch."""
        with self._database.write() as db:
            found = db.execute(
                "UPDATE jobs SET state = 'cancelled', size = 0, updated_at = %s "
                "WHERE job_id = %s AND state = ANY(%s) AND runner <> %s",
                [moment(), job_id, list(RUNNING), self._number],
            )
            return found.rowcount == 1

    def recover(self, most_attempts: int) -> None:
        self._most_attempts = most_attempts
        self._database.hold(self._number)
        with self._database.write() as db:
            self._recover(_Marked(db), most_attempts, f"AND {_gone('runner')}")

    def _insert(self, db: Any, **fields: Any) -> None:
        super()._insert(db, **fields, home=self._number)


def _gone(server: str) -> str:
    """A condition: that server is gone.  When PostgreSQL has just started, those that live have yet to say so."""
    return (
        f"{server} NOT IN (SELECT number FROM servers) "
        f"AND pg_postmaster_start_time() <= now() - interval '{GRACE_SECONDS} seconds'"
    )


class Incoming:
    """Uploads in the database; `most_mb` bounds what all of them take."""

    def __init__(self, database: Database, store: JobStore, most_mb: int):
        self._database = database
        self._store = store
        self._most_mb = most_mb

    def keep(self, job_id: str, data: bytes) -> None:
        if len(data) > _LARGEST:
            raise StoreError(
                f"a file of {len(data) / 2**20:.0f} MB is too large to be queued in PostgreSQL, the most is "
                f"{_LARGEST // 2**20} MB: add it by refdesk ingest",
                code="unwritable_store",
            )
        make_room(self._store, self._most_mb, len(data), self.discard)
        with self._database.write() as db:
            db.execute("INSERT INTO incoming (job_id, data) VALUES (%s, %s)", [job_id, data])

    def read(self, job_id: str) -> bytes:
        row = self._database.read(
            lambda db: db.execute("SELECT data FROM incoming WHERE job_id = %s", [job_id]).fetchone()
        )
        if row is None:
            raise FileNotFoundError(job_id)
        return row[0]

    def discard(self, job_id: str) -> None:
        with self._database.write() as db:
            db.execute("DELETE FROM incoming WHERE job_id = %s", [job_id])

    def clean(self) -> None:
        """What was sent within the last hour may be another server's that is about to write its row."""
        with self._database.write() as db:
            db.execute(
                "DELETE FROM incoming i WHERE kept_at < now() - interval '1 hour' "
                "AND NOT EXISTS (SELECT FROM jobs j WHERE j.job_id = i.job_id AND j.size > 0)"
            )
