"""Kill a library's writer at any moment, again and again, and look for what it had said to be safe."""

from __future__ import annotations

import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from retrieval import Library, Principal, RetrievalSettings
from retrieval.formats import reading
from retrieval.sqlite.checking import check
from tests.retrieval.hashing import HashingEmbedder

_EVERY = 5  # cycles from one look to the next: more kills in the same time


class Kills(Struct):
    """`acknowledged` counts documents that were said to be added or removed; `lost` tells what isn't as was said."""

    cycles: int = 0
    acknowledged: int = 0
    lost: list[str] = []


def kill(
    data: Path, cycles: int, seed: int, hasty: bool = False, tell: Callable[[Kills], None] = lambda kills: None
) -> Kills:
    """In each cycle `killer` opens the library in `data`, adds and removes, and is killed; `tell` hears how far it is.
    A `hasty` one says that a document is safe before it is."""
    rng = random.Random(seed)
    kills = Kills()
    kept: set[int] = set()
    gone: set[int] = set()
    first = 0
    for cycle in range(1, cycles + 1):
        for word, number in _killed(data, first, rng, hasty):
            kills.acknowledged += 1
            if word == "removed":
                gone.add(number)
            elif number % 10 != 9:  # those may have been removed unsaid
                kept.add(number)
        first = max(kept | gone, default=first) + 2  # the next one may have come in unsaid
        kills.cycles = cycle
        if cycle % _EVERY == 0 or cycle == cycles:
            kills.lost += _lost(data, kept, gone, rng)
            tell(kills)
    kills.lost += check(data).found
    return kills


def _killed(data: Path, first: int, rng: random.Random, hasty: bool) -> list[tuple[str, int]]:
    """What it said until then: ("added" or "removed", number)."""
    command = [sys.executable, "-m", "tests.retrieval.killer", str(data), str(first), "hasty" if hasty else "honest"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(rng.randrange(1, 25))]
        select.select([writer.stdout], [], [], rng.random() / 50)  # somewhere within the next write
        writer.kill()
        said += writer.stdout.read().splitlines(keepends=True)
    assert writer.returncode == -signal.SIGKILL, "it ended before it was killed"
    lines = [line.decode().split() for line in said if line.endswith(b"\n")]
    return [(line[0], int(line[1])) for line in lines if len(line) == 2]


def _lost(data: Path, kept: set[int], gone: set[int], rng: random.Random) -> list[str]:
    settings = RetrievalSettings(relevance_floor=0.2)
    with Library.open(data, embedder=HashingEmbedder(), settings=settings, reader=reading) as library:
        listed, total = library.whole.documents(limit=1_000_000)
        there = {int(document.source.removesuffix(".md")) for document in listed}
        lost = [f"{number} was added and is not there" for number in sorted(kept - there)]
        lost += [f"{number} was removed and is there" for number in sorted(gone & there)]
        if not total == len(listed) == len(there):
            lost.append(f"{total} documents are counted, {len(listed)} are listed, of {len(there)} sources")
        if library.seen_by(Principal.of()).documents()[1]:
            lost.append("what is for groups is everybody's")
        for number in rng.sample(sorted(there), min(15, len(there))):
            view = library.seen_by(Principal.of(groups=[f"g{number % 3}"]))
            question = f'the gate "number{number}x" is opened by the keeper of key{number}x'
            found = view.search(question, top_k=1)  # of that passage alone, and how close it is
            if [each.source for each in found.passages] != [f"{number}.md"] or not found.relevant:
                lost.append(f"{number} isn't found by words and by meaning by those whom it is for")
                continue
            (best,) = found.passages
            if view.document(best.document_id).text[best.start : best.end] != best.text:
                lost.append(f"{number} is not whole")
    return lost
