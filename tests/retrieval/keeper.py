"""Keeps a library in the folder argv[1]: adds, replaces, removes, shares, backs up, restores, at last sends a page that
is to be read later, and says of each before it begins and when it is safe.  argv[2] seeds what it does, argv[3] names a
fault that it has (`FAULTS`).

A world is all that is there, as far as the keeper knows: pages, a note, backups.
"""

from __future__ import annotations

import os
import random
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from retrieval import Document, Library, RetrievalSettings
from retrieval.files import write_atomically
from retrieval.formats import reading
from retrieval.ingest import Into
from retrieval.sqlite.backup import back_up, restore
from tests.retrieval.hashing import HashingEmbedder

SETTINGS = RetrievalSettings(relevance_floor=0.2, passage_tokens=30, max_passage_tokens=60)
SESSIONS, STEPS = 4, 5


Pages = dict[int, tuple[int, int]]  # (version, group) by number


class World(msgspec.Struct):
    pages: Pages = {}
    note: str = ""
    copies: dict[str, Pages] = {}  # in backups, and in what restoring put aside
    sent: Pages = {}  # to be read


def page(number: int, version: int) -> str:
    """Some have several passages."""
    rules = [f"Rule {n} of gate {number}: nobody passes without a sign." for n in range(number % 4 * 3)]
    gate = f"The gate number{number}x is opened by the keeper of key{number}v{version}x."
    return "\n\n".join((f"Gate {number}", gate, *rules))


def open_library(folder: Path) -> Library:
    library = Library.open(folder, embedder=HashingEmbedder(), settings=SETTINGS, reader=reading)
    library._store._writer.execute("PRAGMA wal_autocheckpoint = 40")  # pages, so that there are many
    return library


def _files(library: Library) -> None:
    os.fsync = lambda descriptor: None  # of what Python writes: files written atomically, copies


_sync = os.fsync


def _folders(library: Library) -> None:
    os.fsync = lambda descriptor: None if stat.S_ISDIR(os.fstat(descriptor).st_mode) else _sync(descriptor)


def _sqlite(library: Library) -> None:
    library._store._writer.execute("PRAGMA synchronous = OFF")


FAULTS: dict[str, Callable[[Library], None]] = {  # what isn't synced once a library is open
    "files": _files,
    "folders": _folders,
    "sqlite": _sqlite,
    "none": lambda library: None,
}


class Keeper:
    def __init__(self, folder: Path, seed: int, fault: Callable[[Library], None]):
        self._folder, self._data = folder, folder / "data"
        self._rng = random.Random(seed)
        self._fault = fault
        self._world = World()

    def keep(self) -> None:
        for session in range(SESSIONS):
            copy, note = f"copy{session}", f"{session}" * 5000
            with open_library(self._data) as library:
                self._fault(library)
                self._change_some(library)
                self._do(partial(write_atomically, self._data / "note", note.encode()), note=note)
                kept = self._world.copies | {copy: self._world.pages}
                self._do(partial(back_up, self._data, self._folder / copy), copies=kept)
            if session % 2:
                earlier = f"copy{session - 1}"
                self._do(
                    partial(restore, self._folder / earlier, self._data, replace=True),
                    pages=self._world.copies[earlier],
                    copies=self._world.copies | {"data/library.sqlite3.before-restore": self._world.pages},
                )
        with open_library(self._data) as library:
            self._fault(library)
            self._change_some(library)
            send = partial(library.jobs.add_upload, "77.txt", page(77, 1).encode(), Into("default", ("group:g0",)))
            self._do(send, sent={77: (1, 0)})

    def _change_some(self, library: Library) -> None:
        ids = {_number(each): each.document_id for each in library.whole.documents(limit=1000)[0]}
        for _ in range(STEPS):
            self._change_one(library, ids)

    def _change_one(self, library: Library, ids: dict[int, str]) -> None:
        """Add, replace, share or remove a page."""
        rng, pages = self._rng, self._world.pages
        number, version, group = rng.randrange(12), rng.randrange(1, 1000), rng.randrange(3)
        readers = [f"group:g{group}"]
        if number not in pages or rng.random() < 0.5:

            def add() -> None:
                text = page(number, version).encode()
                ids[number] = library.ingest_bytes(f"{number}.txt", text, readers=readers).document_id

            self._do(add, pages=pages | {number: (version, group)})
        elif rng.random() < 0.5:
            step = partial(library.whole.share, ids[number], readers)
            self._do(step, pages=pages | {number: (pages[number][0], group)})
        else:
            step = partial(library.whole.remove, ids[number])
            self._do(step, pages={each: state for each, state in pages.items() if each != number})

    def _do(self, step: Callable[[], object], **after: object) -> None:
        world = msgspec.structs.replace(self._world, **after)
        _say("will", world)
        step()
        _say("did", world)
        self._world = world


def _say(word: str, world: World) -> None:
    sys.stdout.write(f"{word} {msgspec.json.encode(world).decode()}\n")
    sys.stdout.flush()


def _number(document: Document) -> int:
    return int(document.source.removesuffix(".txt"))


if __name__ == "__main__":
    Keeper(Path(sys.argv[1]), int(sys.argv[2]), FAULTS[sys.argv[3]]).keep()
