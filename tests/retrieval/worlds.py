"""What is there after power was lost, compared with what `keeper` had told to be safe."""

from __future__ import annotations

import functools
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from retrieval import Library, Principal, RetrievalError
from retrieval.access import OPERATOR
from retrieval.sqlite.checking import check
from tests.retrieval.keeper import Pages, World, open_library, page
from tests.retrieval.power_loss import contents, put, replay


def examine(
    log: Path, watched: Path, scratch: Path, rng: random.Random, every: int = 1, some: int = 3
) -> Iterator[list[str]]:
    """What is lost, of each folder that may be there when power goes after something was done: after each `every`th
    write, and after all that isn't one; with what was synced, and with `some` times any of the rest, too."""
    seen = set()
    for number, (kind, disk) in enumerate(replay(log, watched)):
        if kind == "w" and number % every:
            continue
        for files in (disk.least(), *(disk.some(rng) for _ in range(some))):
            state = hash((disk.said, *sorted(files.items())))
            if state in seen:
                continue
            seen.add(state)
            put(files, scratch)
            try:
                yield list(_lost(scratch, *_told(disk.said)))
            except RetrievalError as error:
                yield [str(error)]
            shutil.rmtree(scratch)
    assert disk.most() == contents(watched), "not all that was done was written down"


def _told(said: bytes) -> tuple[World, World]:
    """The world that is safe, and the one that is there after the step that was begun, if one was."""
    safe = after = World()
    for line in said.splitlines(keepends=True):
        if line.endswith(b"\n"):
            word, world = line.split(b" ", 1)
            after = msgspec.json.decode(world, type=World)
            safe = after if word == b"did" else safe
    return safe, after


def _lost(folder: Path, before: World, after: World) -> Iterator[str]:
    """What is neither as before the last step nor as after it, and what goes wrong when one goes on from there."""
    data = folder / "data"
    with open_library(data) as library:
        pages = dict(_listed(library))
        library.ingest_bytes("99.txt", page(99, 1).encode(), readers=["group:g0"])
        jobs, sent = library.jobs.jobs(OPERATOR)
        if jobs:
            library.jobs.start()
            library.jobs.outcome(jobs[0].job_id).result()
        more = pages | {99: (1, 0)} | (after.sent if sent else before.sent)
        yield from (f"{number} isn't found" for number, state in more.items() if not _is_found(library, number, *state))
    yield from check(data).found
    if _pages(data) != more:
        yield "what is added afterwards isn't kept"
    if pages not in (before.pages, after.pages):
        yield f"the library holds {pages}, not {before.pages} or {after.pages}"
    note = data / "note"
    if (note.read_text() if note.exists() else "") not in (before.note, after.note):
        yield "the note is neither the old nor the new one"
    # What restoring replaces is kept before it is replaced.
    replaced = pages == after.pages != before.pages
    must = after.copies if replaced else before.copies
    for name, then in after.copies.items():
        if (folder / name).exists():
            pages = _copied((folder / name).read_bytes())
            if pages not in (must.get(name), then):
                yield f"{name} holds {pages}, not {must.get(name)} or {then}"
        elif name in must:
            yield f"{name} is gone"


@functools.lru_cache(32)
def _copied(backup: bytes) -> Pages:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "library.sqlite3").write_bytes(backup)
        return _pages(Path(folder))


def _pages(data: Path) -> Pages:
    with open_library(data) as library:
        return dict(_listed(library))


def _listed(library: Library) -> Iterator[tuple[int, tuple[int, int]]]:
    """(version, group) by number; version -1 of what isn't whole."""
    for document in library.whole.documents(limit=1000)[0]:
        number = int(document.source.removesuffix(".txt"))
        text = library.whole.document(document.document_id).text
        version = int(re.search(r"key\d+v(\d+)x", text)[1])
        (reader,) = document.readers
        yield number, (version if text.strip() == page(number, version) else -1, int(reader.removeprefix("group:g")))


def _is_found(library: Library, number: int, version: int, group: int) -> bool:
    """By its words and its meaning, for whom it is meant."""
    view = library.seen_by(Principal.of(groups=[f"g{group}"]))
    question = f'the gate "number{number}x" is opened by the keeper of key{number}v{version}x'
    found = view.search(question, top_k=1)  # of that passage alone, and how close it is
    return [each.source for each in found.passages] == [f"{number}.txt"] and found.relevant
