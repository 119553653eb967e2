"""A copy of a library in one file, taken while it is used, and a library made of such a copy.

The store is the whole truth: indexes are built from it when the copy is opened.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from retrieval.errors import StoreError
from retrieval.files import DirectoryLock, sync_folder
from retrieval.sqlite import schema
from retrieval.sqlite.database import DATABASE_FILE

_KEPT = DATABASE_FILE + ".before-restore"


def back_up(data_dir: Path, target: Path) -> int:
    """Copy the library to the new file `target`; how many documents it holds.  Another process may be using the
    library: the copy is what was committed at one moment.  Raises StoreError: no library, a damaged one, or a target
    that is there already or can't be written."""
    source = data_dir / DATABASE_FILE
    if not source.is_file():
        raise StoreError(f"there is no library in {data_dir}: name its directory by --data", code="no_store")
    if target.exists():
        raise StoreError(f"{target} is there already: choose another name", code="unwritable_store")
    return _copied(source, target)


def restore(backup: Path, data_dir: Path, replace: bool = False) -> int:
    """Make the library in `data_dir` what `backup` holds; how many documents that is.  A library that is there already
    is refused, or with `replace` kept beside it under another name.  Raises StoreError and StoreInUse."""
    if not backup.is_file():
        raise StoreError(f"there is no backup {backup}", code="no_store")
    lock = DirectoryLock(data_dir)
    try:
        there = data_dir / DATABASE_FILE
        if there.exists() and not replace:
            raise StoreError(
                f"{data_dir} holds a library already: choose another directory, or --replace it (kept as {_KEPT})",
                code="unwritable_store",
            )
        fresh = data_dir / (DATABASE_FILE + ".restored")
        fresh.unlink(missing_ok=True)
        count = _copied(backup, fresh)
        if there.exists():
            _keep(there)
        for log in ("-wal", "-shm"):
            (data_dir / (DATABASE_FILE + log)).unlink(missing_ok=True)
        sync_folder(data_dir)  # first: the old one's log would be taken for the new one's
        os.replace(fresh, there)
        sync_folder(data_dir)
        return count
    finally:
        lock.release()


def _keep(there: Path) -> None:
    """Give the library a second name, which stays when the first one goes to another file: at no moment is there none.
    What is still in its log belongs to it; where it is too damaged for that, the log is kept, too."""
    kept, log = there.with_name(_KEPT), there.with_name(there.name + "-wal")
    kept_log, second = kept.with_name(kept.name + "-wal"), kept.with_name(kept.name + ".part")
    kept_log.unlink(missing_ok=True)
    second.unlink(missing_ok=True)
    with closing(sqlite3.connect(there)) as db, contextlib.suppress(sqlite3.DatabaseError):
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.link(there, second)
    os.replace(second, kept)
    second.unlink(missing_ok=True)  # nothing happens to two names of the same file
    if log.exists():
        os.replace(log, kept_log)


def _copied(source: Path, target: Path) -> int:
    """Copy, check what came out, and give it its name only then."""
    unfinished = target.with_name(target.name + ".part")
    try:
        unfinished.unlink(missing_ok=True)
        with (
            closing(sqlite3.connect(f"file:{_quoted(source)}?mode=ro", uri=True, timeout=30)) as old,
            closing(sqlite3.connect(unfinished)) as new,
        ):
            old.backup(new)
            new.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
            count = _checked(new, source)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, target)
        sync_folder(target.absolute().parent)
        return count
    except sqlite3.OperationalError as error:
        raise StoreError(f"{source} can't be copied to {target}: {error}", code="unwritable_store") from error
    except sqlite3.DatabaseError as error:
        raise StoreError(f"{source} is damaged: {error}") from error
    except OSError as error:
        raise StoreError(f"{target} can't be written: {error.strerror or error}", code="unwritable_store") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _checked(db: sqlite3.Connection, source: Path) -> int:
    """How many documents it holds.  Raises StoreError where it is damaged, newer than this program, or no library."""
    (verdict,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise StoreError(f"{source} is damaged: {verdict}")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if not 1 <= version <= schema.SCHEMA_VERSION:
        kind = "of a newer refdesk" if version else "no library of refdesk"
        raise StoreError(f"{source} is {kind}", code="newer_store" if version else "damaged_store")
    schema.read_meta(db, str(source))
    return db.execute("SELECT count(*) FROM documents").fetchone()[0]


def _quoted(path: Path) -> str:
    return quote(str(path.absolute()))
