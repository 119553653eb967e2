"""What was sent and is not read yet, on the disk: a file for each upload, named by its job."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from retrieval.errors import QueueFull, StoreError
from retrieval.files import make_folder, write_atomically
from retrieval.job_store import JobStore

log = logging.getLogger(__name__)


class Incoming:
    """`most_mb` bounds what all of it takes.  Each job's row says how many bytes are kept for it."""

    def __init__(self, folder: Path, store: JobStore, most_mb: int):
        self._folder = folder
        self._store = store
        self._most_mb = most_mb

    def keep(self, job_id: str, data: bytes) -> None:
        """On the disk when it returns.  Raises QueueFull, and StoreError where it can't be written."""
        make_room(self._store, self._most_mb, len(data), self.discard)
        try:
            make_folder(self._folder)
            write_atomically(self._folder / job_id, data)
        except OSError as error:
            raise StoreError(
                f"{self._folder} can't be written: {error.strerror or error}", code="unwritable_store"
            ) from error

    def read(self, job_id: str) -> bytes:
        """Raises OSError where it is not there: a backup has none of these."""
        return (self._folder / job_id).read_bytes()

    def discard(self, job_id: str) -> None:
        try:
            (self._folder / job_id).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s stays: %s", self._folder / job_id, error.strerror or error)

    def clean(self) -> None:
        """Away with what no job knows of: its process ended between the file and the row."""
        known = {job_id for job_id, *_ in self._store.with_bytes()}
        for file in self._folder.iterdir() if self._folder.is_dir() else ():
            if file.name not in known:
                self.discard(file.name)


def make_room(store: JobStore, most_mb: int, size: int, discard: Callable[[str], None]) -> None:
    """The oldest of those that failed go for a new one; those that wait don't.  Raises QueueFull."""
    kept = store.with_bytes()
    room = most_mb * 1024 * 1024 - sum(each for *_, each in kept)
    for job_id, state, each in kept:
        if room >= size:
            return
        if state == "failed" and store.change(job_id, ("failed",), size=0):
            discard(job_id)
            room += each
    if room < size:
        raise QueueFull(most_mb)
