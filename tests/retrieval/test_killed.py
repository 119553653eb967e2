"""Killed at any moment: what was said to be safe is there, what was not is there whole or not at all."""

from __future__ import annotations

import random
import select
import subprocess
import sys
from pathlib import Path

import pytest

from retrieval import Library, Principal
from retrieval.formats import reading
from tests.retrieval.conftest import SETTINGS
from tests.retrieval.hashing import HashingEmbedder

CYCLES = 20


@pytest.mark.slow
def test_what_was_acknowledged_survives_kills(tmp_path: Path):
    rng = random.Random(6)
    kept: set[int] = set()
    gone: set[int] = set()
    first = 0
    for cycle in range(CYCLES):
        command = [sys.executable, "-m", "tests.retrieval.killer", str(tmp_path / "data"), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            lines = []
            for _ in range(rng.randrange(1, 25)):
                lines.append(writer.stdout.readline().decode())
            select.select([writer.stdout], [], [], rng.random() / 50)  # somewhere within the next write
            writer.kill()
            lines += writer.stdout.read().decode().splitlines()
        for line in lines:
            word, _, number = line.strip().partition(" ")
            if word == "added" and int(number) % 10 != 9:  # those may have been removed unsaid
                kept.add(int(number))
            elif word == "removed":
                gone.add(int(number))
        first = max(kept | gone, default=first) + 2  # the next one may have come in unsaid
        if cycle % 5 and cycle != CYCLES - 1:
            continue
        with Library.open(tmp_path / "data", embedder=HashingEmbedder(), settings=SETTINGS, reader=reading) as library:
            listed, total = library.whole.documents(limit=10_000)
            there = {int(document.source.removesuffix(".md")) for document in listed}
            assert total == len(listed)
            assert kept <= there
            assert not gone & there
            for number in rng.sample(sorted(there), min(15, len(there))):
                view = library.seen_by(Principal.of(groups=[f"g{number % 3}"]))
                best = view.search(f"number{number}x key{number}x", top_k=1).passages[0]
                assert best.source == f"{number}.md", "in vectors, words and rows, for whom it is meant"
                text = view.document(best.document_id).text
                assert text[best.start : best.end] == best.text
                assert library.seen_by(Principal.of()).documents()[1] == 0
