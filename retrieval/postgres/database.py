"""Connections to one PostgreSQL database, and its errors in words."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from pgvector.psycopg import register_vector
from psycopg import Connection, Cursor
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.types.string import StrDumperUnknown
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout

from retrieval.errors import StoreError

T = TypeVar("T")

CONNECTIONS = 8
WAIT_SECONDS = 5.0  # for a connection, be it that all are busy or that the server is away
# Names for advisory locks, which hold in one database.
WRITING, REINDEXING = 0x72656664_0001, 0x72656664_0002

_READ = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL jit = off"
# A process that stands still in the middle of a write keeps the others from writing for a minute at most.
_WRITE = (
    "BEGIN; SET LOCAL synchronous_commit = on; SET LOCAL idle_in_transaction_session_timeout = '60s'; "
    f"SET LOCAL lock_timeout = '60s'; SELECT pg_advisory_xact_lock({WRITING})"
)


_BUSY = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.QueryCanceled,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
)


class _Text(StrDumperUnknown):
    """PostgreSQL keeps no NUL: the mark for what can't be shown stands for it, in what is stored and what is asked."""

    def dump(self, obj: str) -> bytes:
        return obj.replace("\0", "\ufffd").encode()


class Database:
    """A pool of connections.  One writer at a time in all processes (an advisory lock), readers beside it; what is
    acknowledged is on the disk, whatever the server's defaults."""

    def __init__(self, url: str, prepare: Callable[[Cursor, str], None]):
        """`prepare` makes the tables, within one transaction, before anything else.  Raises StoreError."""
        parts = _parts(url)
        self.name = f"the PostgreSQL database {parts.get('dbname', '')!r} at {parts.get('host', 'this machine')}"
        self._closed = False
        self._holding = threading.Lock()
        self._holder: Connection | None = None
        self._settings = settings = {"autocommit": True, "prepare_threshold": None}
        usual = {"connect_timeout": 10, "application_name": "refdesk"}
        self._address = address = make_conninfo(url, **{key: usual[key] for key in usual if key not in parts})
        with self._translated(), psycopg.connect(address, **settings) as connection:
            # Two that open at once make the tables one after the other.
            with connection.cursor() as cursor:
                cursor.execute(_WRITE)
                prepare(cursor, self.name)
            connection.commit()
        self._pool = ConnectionPool(
            address,
            kwargs=settings,
            configure=_configure,
            min_size=1,
            max_size=CONNECTIONS,
            timeout=WAIT_SECONDS,
            name="postgres",
            open=True,
        )

    def close(self) -> None:
        self._closed = True
        with self._holding:
            if self._holder is not None:
                self._holder.close()
        self._pool.close()

    def read(self, work: Callable[[Cursor], T]) -> T:
        """`work` on what was committed at one moment; a second time where the connection is lost at the first."""
        try:
            with self.reading() as cursor:
                return work(cursor)
        except StoreError as error:
            if not _lost(error.__cause__):
                raise
        with self._translated():
            self._pool.check()
        with self.reading() as cursor:
            return work(cursor)

    @contextmanager
    def reading(self) -> Iterator[Cursor]:
        """What was committed at one moment."""
        with self._translated(), self._connection() as connection:
            connection.execute(_READ)
            with connection.cursor(binary=True) as cursor:
                yield cursor

    @contextmanager
    def write(self) -> Iterator[Cursor]:
        """A transaction that is committed at the end of the block, and undone where that raises."""
        with self._translated(), self._writing() as connection, connection.cursor(binary=True) as cursor:
            yield cursor

    @contextmanager
    def held(self, lock: int) -> Iterator[bool]:
        """Whether the lock, of those above, was free and is ours until the end of the block."""
        with self._translated(), self._connection() as connection:
            (free,) = connection.execute("SELECT pg_try_advisory_lock(%s)", [lock]).fetchone()  # type: ignore[misc]
            try:
                yield free
            finally:
                if free and not connection.closed:
                    connection.execute("SELECT pg_advisory_unlock(%s)", [lock])

    def hold(self, lock: int) -> None:
        """Have a lock until the database is closed or this process ends.  Called now and then, it is taken again where
        the connection that held it was lost."""
        with self._translated(), self._holding:
            if self._closed:
                raise _closed()
            try:
                if self._holder is not None:
                    self._holder.execute("SELECT 1")
                    return
            except psycopg.OperationalError:
                self._holder = None
            self._holder = psycopg.connect(self._address, **self._settings)  # type: ignore[arg-type]
            self._holder.execute("SELECT pg_try_advisory_lock(%s)", [lock])

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        if self._closed:
            raise _closed()
        with self._pool.connection() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """Where the connection turns out to be lost before anything is written, another one is taken."""
        if self._closed:
            raise _closed()
        connection = self._pool.getconn()
        try:
            try:
                connection.execute(_WRITE)
            except psycopg.OperationalError as error:
                if not _lost(error):
                    raise
                self._pool.putconn(connection)
                self._pool.check()
                connection = self._pool.getconn()
                connection.execute(_WRITE)
            with connection:
                yield connection
        finally:
            self._pool.putconn(connection)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except PoolClosed as error:
            raise _closed() from error
        except psycopg.Error as error:
            raise self._told(error) from error

    def _told(self, error: psycopg.Error) -> StoreError:
        if self._closed:
            return _closed()
        said = " ".join(str(error).split())
        if isinstance(error, psycopg.errors.InsufficientPrivilege | psycopg.errors.ReadOnlySqlTransaction):
            return StoreError(f"{self.name} can't be written: {said}", code="unwritable_store")
        if isinstance(error, psycopg.errors.DiskFull | psycopg.errors.OutOfMemory):
            return StoreError(f"{self.name} can't be written: {said}; check its free space", code="unwritable_store")
        if isinstance(error, _BUSY):
            return StoreError(f"{self.name} is busy: {said}; try again", code="busy_store")
        if isinstance(error, PoolTimeout) or _lost(error):
            return StoreError(
                f"{self.name} can't be reached: {said}; check that the server runs, and the setting retrieval.database",
                code="unreachable_store",
            )
        return StoreError(f"{self.name} refuses: {said}")


def _lost(error: BaseException | None) -> bool:
    """Whether it is about one connection rather than what was asked."""
    if isinstance(error, PoolTimeout) or not isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return False
    return error.sqlstate is None or error.sqlstate.startswith(("08", "57P", "28", "3D", "53300"))


def _configure(connection: Connection[Any]) -> None:
    register_vector(connection)
    connection.adapters.register_dumper(str, _Text)


def _parts(url: str) -> dict[str, Any]:
    """Raises StoreError, which says nothing of what is there: a part of a password may be where it doesn't belong."""
    scheme, found, rest = url.partition("://")
    server, _, behind = rest.partition("/")
    if found and scheme in ("postgresql", "postgres") and server.count("@") < 2 and "@" not in behind:
        try:
            parts = conninfo_to_dict(url)
        except psycopg.Error:
            parts = {}
        if parts and all(port.isdigit() for port in str(parts.get("port", "")).split(",") if port):
            return parts
    raise StoreError(
        "the setting retrieval.database is no address of a PostgreSQL database: write "
        "postgresql://USER@HOST/DATABASE, and in names and passwords %XX for what is neither letter nor digit",
        code="bad_database",
    )


def _closed() -> StoreError:
    return StoreError("the library has been closed: open it again", code="closed_store")
