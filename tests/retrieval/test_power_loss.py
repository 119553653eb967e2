"""Power is lost while a library is used: what was said to be safe is there, what was not is there whole or not at all.

A kill alone can't show that: what was written and not synced outlives the program.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import faiss
import pytest

from tests.retrieval.power_loss import COMPILER, record
from tests.retrieval.worlds import examine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs Linux and a C compiler named cc"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """FAISS on more would wait for them longer than it searches."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


def recorded(tmp_path: Path, fault: str) -> tuple[Path, Path, Path]:
    """(what the keeper of a library did, where it did so, where to look at what is left)"""
    watched = tmp_path / "watched"
    watched.mkdir()
    log = record([sys.executable, "-m", "tests.retrieval.keeper", str(watched), "1", fault], watched, tmp_path)
    return log, watched, tmp_path / "left"


def test_what_was_acknowledged_survives_power_loss(tmp_path: Path):
    found = list(examine(*recorded(tmp_path, "none"), random.Random(1), every=12, some=1))
    assert len(found) > 200
    assert [each for each in found if each] == []


@pytest.mark.parametrize(
    ("fault", "lost"),
    [
        ("sqlite", {"the library holds"}),
        ("files", {"the note is neither"}),
        ("folders", {"the note is neither", "copy0 is gone", "what was sent is no longer here"}),
    ],
)
def test_what_is_not_synced_is_found_to_be_lost(tmp_path: Path, fault: str, lost: set[str]):
    for found in examine(*recorded(tmp_path, fault), random.Random(1), every=100, some=0):
        lost = {each for each in lost if each not in " ".join(found)}
        if not lost:
            break
    assert not lost
