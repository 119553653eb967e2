"""Jobs as they are kept: a row each, beside the documents.

The SQL is what SQLite and PostgreSQL both understand: `postgres.jobs` is this one for several servers.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Struct

from retrieval.access import Principal
from retrieval.ingest import Into
from retrieval.records import Job, JobState
from retrieval.sqlite.change import access_row
from retrieval.sqlite.database import marks
from retrieval.sqlite.store import Store

FOUND, SENT, WAITED_FOR = 0, 1, 2  # how urgent: in a folder; by somebody; by somebody who waits
RUNNING: tuple[JobState, ...] = ("parsing", "embedding")
ENDED: tuple[JobState, ...] = ("done", "failed", "cancelled")

_JOB = (
    "job_id, kind, source, collection, owner, state, attempts, parts_read, parts, passages_embedded, passages, "
    "reason, code, document_id, created_at, updated_at, unread"
)
KEPT = f"{_JOB}, wanted, urgency, size"


class Kept(Struct):
    """A job with what it takes to do it: `into` as it was asked for, `urgency` (the highest goes first), and how many
    bytes are kept for it."""

    job: Job
    into: Into
    urgency: int
    size: int


class JobStore:
    """All methods may be called from any thread."""

    _access_row = staticmethod(access_row)

    def __init__(self, store: Store):
        self._store = store

    def add(self, kept: Kept, readers: Sequence[str]) -> None:
        """On the disk when it returns.  `readers` may read what comes of it."""
        job = kept.job
        with self._store.transaction() as db:
            self._insert(
                db,
                job_id=job.job_id,
                kind=job.kind,
                source=job.source,
                collection=job.collection,
                owner=job.owner,
                access=self._access_row(db, readers),
                wanted=msgspec.json.encode(kept.into).decode(),
                urgency=kept.urgency,
                size=kept.size,
                state=job.state,
                created_at=job.created_at,
                updated_at=job.updated_at,
            )

    def take(self, kinds: Collection[str], now: float) -> Kept | None:
        """The next one of these kinds that is due (`now` in seconds since 1970), which is being read from here on."""
        queued = f"state = 'queued' AND kind IN ({marks(kinds)})"
        with self._store.transaction() as db:
            first = db.execute(
                f"SELECT collection, source, owner FROM jobs WHERE {queued} AND due <= ? "
                "ORDER BY urgency DESC, id LIMIT 1",
                [*kinds, now],
            ).fetchone()
            if first is None:
                return None
            # Versions of one source are read in the order in which they came, whoever waits for the last one.
            row = db.execute(
                "UPDATE jobs SET state = 'parsing', attempts = attempts + 1, updated_at = ? WHERE id = (SELECT min(id) "
                f"FROM jobs WHERE {queued} AND collection = ? AND source = ? AND owner = ?) RETURNING {KEPT}",
                [moment(), *kinds, *first],
            ).fetchone()
        return kept_of(row)

    def next_due(self, kinds: Collection[str]) -> float | None:
        """When the next one may be taken, in seconds since 1970."""
        with self._store.reading() as db:
            return db.execute(
                f"SELECT min(due) FROM jobs WHERE state = 'queued' AND kind IN ({marks(kinds)})", list(kinds)
            ).fetchone()[0]

    def change(self, job_id: str, among: Collection[JobState], **fields: Any) -> bool:
        """Set fields of a job whose state is `among` these; whether it was."""
        if "unread" in fields:
            fields["unread"] = msgspec.json.encode(fields["unread"]).decode()
        fields["updated_at"] = moment()
        with self._store.transaction() as db:
            found = db.execute(
                f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in fields)} "
                f"WHERE job_id = ? AND state IN ({marks(among)})",
                [*fields.values(), job_id, *among],
            )
            return found.rowcount == 1

    def cancel_elsewhere(self, job_id: str) -> bool:
        """Cancel a job that another server reads; whether it is one.  Nobody else reads what is in a data directory."""
        return False

    def recover(self, most_attempts: int) -> None:
        """After a crash: what was being read is queued again, but what was so often has failed."""
        with self._store.transaction() as db:
            self._recover(db, most_attempts)

    def _recover(self, db: Any, most_attempts: int, lost: str = "", values: Sequence[Any] = ()) -> None:
        """`lost`: a condition more on those that were being read, with its values."""
        running = f"state IN ({marks(RUNNING)}) {lost}"
        db.execute(
            "UPDATE jobs SET state = 'failed', code = 'interrupted', updated_at = ?, "
            f"reason = 'the server ended each time while it was read' WHERE {running} AND attempts >= ?",
            [moment(), *RUNNING, *values, most_attempts],
        )
        db.execute(
            "UPDATE jobs SET state = 'queued', due = 0, parts_read = 0, passages_embedded = 0, updated_at = ? "
            f"WHERE {running}",
            [moment(), *RUNNING, *values],
        )

    def _insert(self, db: Any, **fields: Any) -> None:
        db.execute(f"INSERT INTO jobs ({', '.join(fields)}) VALUES ({marks(fields)})", list(fields.values()))

    def prune(self, most: int, before: str) -> list[str]:
        """Forget those that ended before that moment (ISO 8601), and all but the newest of those that ended; which."""
        ended = f"state IN ({marks(ENDED)})"
        with self._store.transaction() as db:
            rows = db.execute(
                f"DELETE FROM jobs WHERE {ended} AND (updated_at < ? OR id <= (SELECT id FROM jobs WHERE {ended} "
                "ORDER BY id DESC LIMIT 1 OFFSET ?)) RETURNING job_id",
                [*ENDED, before, *ENDED, most],
            )
            return [job_id for (job_id,) in rows]

    # reading

    def job(self, principal: Principal, job_id: str) -> Kept | None:
        """None for one that is not there or not theirs to see."""
        seen, values = _seen_by(principal)
        with self._store.reading() as db:
            row = db.execute(f"SELECT {KEPT} FROM jobs WHERE job_id = ? AND {seen}", [job_id, *values]).fetchone()
        return kept_of(row) if row else None

    def jobs(
        self, principal: Principal, states: Collection[JobState], offset: int, limit: int
    ) -> tuple[list[Job], int]:
        """Newest first, and how many there are; of any state where none is named."""
        where, values = _seen_by(principal)
        if states:
            where, values = f"{where} AND state IN ({marks(states)})", [*values, *states]
        with self._store.reading() as db:
            (total,) = db.execute(f"SELECT count(*) FROM jobs WHERE {where}", values).fetchone()
            rows = db.execute(
                f"SELECT {_JOB} FROM jobs WHERE {where} ORDER BY id DESC LIMIT ? OFFSET ?", [*values, limit, offset]
            )
            return [_job(row) for row in rows], total

    def of_source(self, collection: str, source: str, owner: str) -> list[Job]:
        """All of them, in the order in which they came."""
        with self._store.reading() as db:
            rows = db.execute(
                f"SELECT {_JOB} FROM jobs WHERE collection = ? AND source = ? AND owner = ? ORDER BY id",
                [collection, source, owner],
            )
            return [_job(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """How many are in each state."""
        with self._store.reading() as db:
            return dict(db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())

    def with_bytes(self) -> list[tuple[str, JobState, int]]:
        """(job id, state, bytes) of those for which bytes are kept, the oldest first."""
        with self._store.reading() as db:
            return db.execute("SELECT job_id, state, size FROM jobs WHERE size > 0 ORDER BY id").fetchall()


def moment() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _seen_by(principal: Principal) -> tuple[str, list[str]]:
    """Whose jobs somebody may see: their own, a steward also those of documents that they may read."""
    if principal.readers is None:
        return "true", []
    seen, values = "(owner = ? AND owner <> '')", [principal.name]
    if principal.steward:
        readers = sorted(principal.readers)
        seen = (
            f"({seen} OR coalesce((SELECT d.access FROM documents d WHERE d.document_id = jobs.document_id), access) "
            f"IN (SELECT access FROM access_readers WHERE reader IN ({marks(readers)})))"
        )
        values += readers
    return seen, values


def _job(row: Sequence[Any] | sqlite3.Row) -> Job:
    *fields, unread = row
    return Job(*fields, msgspec.json.decode(unread, type=list[str]))


def kept_of(row: Sequence[Any]) -> Kept:
    *fields, wanted, urgency, size = row
    return Kept(_job(fields), msgspec.json.decode(wanted, type=Into), urgency, size)
