"""Killed at any moment: every upload that was acknowledged becomes a document, once."""

from __future__ import annotations

import random
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retrieval import OPERATOR, Library
from retrieval.formats import reading
from tests.retrieval.conftest import SETTINGS
from tests.retrieval.hashing import HashingEmbedder

CYCLES = 8


@pytest.mark.slow
def test_what_was_queued_survives_kills(tmp_path: Path):
    rng = random.Random(3)
    queued: set[int] = set()
    for _ in range(CYCLES):
        first = max(queued, default=-2) + 2  # the next one may have come in unsaid
        command = [sys.executable, "-m", "tests.retrieval.job_killer", str(tmp_path / "data"), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            lines = [process.stdout.readline().decode() for _ in range(rng.randrange(1, 25))]
            select.select([process.stdout], [], [], rng.random() / 50)  # somewhere within the next write
            process.kill()
            lines += process.stdout.read().decode().splitlines()
        queued |= {int(line.split()[1]) for line in lines if line.startswith("queued")}
    with Library.open(tmp_path / "data", embedder=HashingEmbedder(), settings=SETTINGS, reader=reading) as library:
        library.jobs.start()
        deadline = time.monotonic() + 60
        incoming = tmp_path / "data" / "incoming"
        while set(library.jobs.counts()) != {"done"} or list(incoming.iterdir()):
            assert time.monotonic() < deadline, library.jobs.counts()
            time.sleep(0.01)
        jobs, _ = library.jobs.jobs(OPERATOR, limit=10_000)
        assert {f"{number}.md" for number in queued} <= {job.source for job in jobs}
        documents, total = library.whole.documents(limit=10_000)
        assert {document.document_id for document in documents} == {job.document_id for job in jobs}
        assert total == len({document.source for document in documents})
