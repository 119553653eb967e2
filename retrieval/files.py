"""Files that are either whole or not there, and the lock on a data directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from retrieval.errors import StoreError, StoreInUse


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old bytes or the new ones, also after a power cut."""
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """A rename is durable only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """The folder and those above it that are missing, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


class DirectoryLock:
    """Exclusive hold of a data directory, given back by the kernel even when the process is killed."""

    def __init__(self, data_dir: Path):
        """Creates the directory if it is missing.  Raises StoreInUse or StoreError (unwritable_store)."""
        try:
            make_folder(data_dir)
            self._file = open(data_dir / "library.lock", "a")  # noqa: SIM115  held until release
        except OSError as error:
            raise StoreError(
                f"the data directory {data_dir} can't be used: {error.strerror or error}; "
                "choose one that this user may write",
                code="unwritable_store",
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise StoreInUse(data_dir) from error

    def release(self) -> None:
        self._file.close()
