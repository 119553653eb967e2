"""Folders whose documents follow them: what is new or has changed is read, what is gone is removed, and what is moved
keeps its id.

Events (watchfiles) say where to look; a sweep over all of a folder, at the start and now and then, finds what they
missed, as on network drives.  Both do the same: they compare what lies on the disk with what is stored.  A folder that
is gone as a whole, or empty, may be a drive that is not mounted: its documents stay until it is back.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from msgspec import Struct
from watchfiles import watch

from retrieval.formats.media_types import is_readable_name
from retrieval.ingest import Into, is_gone, path_of, printable, walk

log = logging.getLogger(__name__)

SETTLE_SECONDS = 2.0  # how long a file must have been at rest before it is read, and gone before it is removed
TICK_SECONDS = 1.0
TROUBLE_SECONDS = 60.0  # until a folder is swept again in which something failed


class Watch(Struct, frozen=True):
    """A folder, by its absolute path, and where its documents go."""

    path: Path
    into: Into
    sweep_seconds: float = 900.0


class Follower(Protocol):
    """What a watched folder asks of its library."""

    def sources(self, into: Into, path: Path) -> set[str]:
        """Of the documents that are stored of this file, or of what lies below it."""
        ...

    def follow(self, file: Path, into: Into) -> None:
        """A file is there: read it unless it is stored as it is."""
        ...

    def forget(self, source: str, into: Into) -> None:
        """A file is gone."""
        ...


class Signature(NamedTuple):
    """What changes with a file's content, seen without reading it."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int


class Folder:
    """One watched folder.  `apart` are others, whose files are not this one's."""

    def __init__(self, watch: Watch, apart: Sequence[Path], follower: Follower, clock: Callable[[], float] = time.time):
        self.watch = watch
        self.trouble: str | None = None
        self.unsettled: set[Path] = set()  # to be looked at again soon
        self._apart = [path for path in apart if path != watch.path and path.is_relative_to(watch.path)]
        self._follower = follower
        self._clock = clock
        self._seen: dict[str, Signature] = {}  # by source, as it was followed
        self._missing: dict[str, float] = {}  # since when

    def look(self, paths: Iterable[Path], stopped: Callable[[], bool] = lambda: False) -> None:
        """Follow what lies at these paths, and below them."""
        if not self._is_there():
            return
        paths, self.unsettled = set(paths) | self.unsettled, set()
        for path in sorted(paths):
            for file in self._files(path):
                if stopped():
                    return
                self._follow(file)
        # Later, so that what was moved is known by its new name.
        for path in sorted(paths):
            for source in sorted(self._follower.sources(self.watch.into, path)):
                if stopped():
                    return
                self._forget(source)

    def sweep(self, stopped: Callable[[], bool] = lambda: False) -> None:
        self.look([self.watch.path], stopped)

    def _follow(self, file: Path) -> None:
        source = printable(str(file))
        try:
            status = file.stat()
        except OSError:  # gone since, or a link to nothing
            return
        signature = Signature(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if self._seen.get(source) == signature:
            return
        if 0 <= self._clock() - status.st_mtime < SETTLE_SECONDS:
            self.unsettled.add(file)
            return
        self._follower.follow(file, self.watch.into)
        self._seen[source] = signature

    def _forget(self, source: str) -> None:
        path, now = path_of(source), self._clock()
        if self._is_apart(path) or not is_gone(path):
            self._missing.pop(source, None)
            return
        if now - self._missing.setdefault(source, now) < SETTLE_SECONDS:
            self.unsettled.add(path)
        elif self._is_there():  # still: it may be vanishing as a whole
            self._follower.forget(source, self.watch.into)
            self._missing.pop(source)
            self._seen.pop(source, None)

    def _files(self, path: Path) -> Iterator[Path]:
        """Those that are ours to read, at a path or below it."""
        if self._is_apart(path) or any(part.startswith(".") for part in path.relative_to(self.watch.path).parts):
            return
        for file in walk(path, []) if path.is_dir() else [path]:
            if is_readable_name(file.name) and file.is_file() and not self._is_apart(file):
                yield file

    def _is_apart(self, path: Path) -> bool:
        return any(path.is_relative_to(other) for other in self._apart)

    def _is_there(self) -> bool:
        trouble = self._what_is_wrong()
        if trouble is not None and self.trouble is None:
            log.warning("the watched folder %s %s: its documents stay until it is back", self.watch.path, trouble)
        elif trouble is None and self.trouble is not None:
            log.warning("the watched folder %s is back", self.watch.path)
        self.trouble = trouble
        return trouble is None

    def _what_is_wrong(self) -> str | None:
        try:
            with os.scandir(self.watch.path) as entries:
                empty = next(entries, None) is None
        except OSError as error:
            return f"can't be listed ({error.strerror or error})"
        if empty and self._follower.sources(self.watch.into, self.watch.path):
            return "is empty"
        return None


class Watching:
    """Watches folders in a thread of its own, from `start` to `stop`."""

    def __init__(self, follower: Follower, watches: Sequence[Watch]):
        roots = [each.path for each in watches]
        self._folders = [Folder(each, roots, follower) for each in watches]
        self._due = dict.fromkeys(roots, 0.0)  # when each is swept next, by the monotonic clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watching", daemon=False)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def troubles(self) -> int:
        """How many of the folders are gone."""
        return sum(folder.trouble is not None for folder in self._folders)

    def _run(self) -> None:
        while not self._stop.is_set():
            there = self._identities()
            for changed in self._changes([path for path, identity in there.items() if identity is not None]):
                for folder in self._folders:
                    self._tend(folder, [path for path in changed if path.is_relative_to(folder.watch.path)])
                now = self._identities()
                if now != there:  # mounted, moved or made anew: what was watched there is no longer
                    self._due.update((path, 0.0) for path in now if now[path] != there[path])
                    break

    def _tend(self, folder: Folder, changed: list[Path]) -> None:
        path = folder.watch.path
        try:
            if time.monotonic() >= self._due[path]:
                folder.sweep(self._stop.is_set)
                self._due[path] = time.monotonic() + folder.watch.sweep_seconds
            elif changed or folder.unsettled:
                folder.look(changed, self._stop.is_set)
        except Exception:  # the others go on, and this one later
            if not self._stop.is_set():
                log.exception("the watched folder %s can't be followed just now", path)
            self._due[path] = time.monotonic() + TROUBLE_SECONDS

    def _identities(self) -> dict[Path, tuple[int, int] | None]:
        """Which folder is at each path; None for none."""
        return {folder.watch.path: _identity(folder.watch.path) for folder in self._folders}

    def _changes(self, roots: Sequence[Path]) -> Iterator[set[Path]]:
        """What has changed below the roots, and every so often nothing."""
        tick = int(1000 * TICK_SECONDS)
        if roots:
            try:
                for changes in watch(
                    *roots,
                    watch_filter=None,
                    stop_event=self._stop,
                    rust_timeout=tick,
                    yield_on_timeout=True,
                    raise_interrupt=False,
                    ignore_permission_denied=True,
                ):
                    yield {Path(path) for _, path in changes}
                return
            except (OSError, RuntimeError) as error:
                log.warning("changes in watched folders are found by sweeps alone: %s", error)
        while not self._stop.wait(TICK_SECONDS):
            yield set()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
