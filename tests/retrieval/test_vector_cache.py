"""D3, D5, D13 of the fault list: whatever happens to the index file, the answers are those of the store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retrieval import Library
from retrieval.sqlite.vectors import INDEX_FILE, MANIFEST_FILE, Mirrored, VectorIndex

QUERIES = ("days of leave", "fire exits", "soup on mondays", "flights and trains", "nothing of the kind")


def answers(library: Library) -> list:
    return [
        (result.passages, result.relevance)
        for result in (library.whole.search(query, top_k=10) for query in QUERIES)
    ]  # fmt: skip


@pytest.fixture
def filled(open_library: Callable[..., Library], folder: Path, tmp_path: Path) -> tuple[Path, list]:
    """(data directory, its answers) of a closed library."""
    library = open_library()
    library.ingest_paths([folder])
    expected = answers(library)
    library.close()
    return tmp_path / "data", expected


@pytest.mark.parametrize("file", [INDEX_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("region", range(12))
def test_a_flipped_bit_anywhere_is_found_and_repaired(
    filled: tuple[Path, list], open_library: Callable[..., Library], file: str, region: int
):
    data_dir, expected = filled
    path = data_dir / file
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[min(len(original) - 1, region * len(original) // 11)] ^= 1 << (region % 8)
    path.write_bytes(damaged)
    library = open_library()
    assert answers(library) == expected
    library.close()
    assert path.read_bytes() == original


@pytest.mark.parametrize("file", [INDEX_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_found_and_repaired(
    filled: tuple[Path, list], open_library: Callable[..., Library], file: str, keep: float
):
    data_dir, expected = filled
    path = data_dir / file
    original = path.read_bytes()
    path.write_bytes(original[: int(len(original) * keep)])
    library = open_library()
    assert answers(library) == expected
    library.close()
    assert path.read_bytes() == original


@pytest.mark.parametrize("file", [INDEX_FILE, MANIFEST_FILE])
def test_a_missing_file_is_made_again(filled: tuple[Path, list], open_library: Callable[..., Library], file: str):
    data_dir, expected = filled
    (data_dir / file).unlink()
    assert answers(open_library()) == expected


def test_an_index_of_an_earlier_state_is_not_used(filled: tuple[Path, list], open_library: Callable[..., Library]):
    data_dir, _ = filled
    shutil.copytree(data_dir, data_dir.parent / "old")
    library = open_library()
    library.ingest_bytes("new.txt", b"Bicycles are parked behind the library.")
    expected = answers(library), library.whole.search("bicycles").passages
    library.close()
    for file in (INDEX_FILE, MANIFEST_FILE):
        shutil.copy(data_dir.parent / "old" / file, data_dir / file)
    library = open_library()
    assert (answers(library), library.whole.search("bicycles").passages) == expected


def test_a_newer_index_beside_an_older_store_is_not_used(
    filled: tuple[Path, list], open_library: Callable[..., Library]
):
    data_dir, expected = filled
    backup = (data_dir / "library.sqlite3").read_bytes()
    library = open_library()
    library.ingest_bytes("new.txt", b"Bicycles are parked behind the library.")
    library.close()
    (data_dir / "library.sqlite3").write_bytes(backup)
    assert answers(open_library()) == expected


def test_the_planted_damage_would_have_been_loaded_without_the_checksum(tmp_path: Path):
    """Shows that the check earns its place: FAISS itself loads flipped vectors without a word."""
    import faiss

    index = VectorIndex(8)
    index.add(np.arange(4), np.eye(8, dtype=np.float32)[:4])
    mirrored = Mirrored("store", "state", "model")
    index.save(tmp_path, mirrored)
    assert VectorIndex.load(tmp_path, mirrored, 8, 4) is not None
    data = bytearray((tmp_path / INDEX_FILE).read_bytes())
    data[len(data) // 2] ^= 0x40
    (tmp_path / INDEX_FILE).write_bytes(data)
    faiss.read_index(str(tmp_path / INDEX_FILE))
    assert VectorIndex.load(tmp_path, mirrored, 8, 4) is None


def test_search_of_the_index_has_no_padding_and_obeys_its_limit():
    index = VectorIndex(4)
    assert index.search(np.ones(4), 5) == []
    index.add(np.array([7, 9, 11]), np.eye(4, dtype=np.float32)[:3])
    assert index.search(np.array([0.1, 1.0, 0.5, 0.0]), 50) == [9, 11, 7]
    assert index.search(np.array([0.1, 1.0, 0.5, 0.0]), 50, np.array([7, 11])) == [11, 7]
    index.remove(np.array([9, 1000]))
    assert index.search(np.array([0.1, 1.0, 0.5, 0.0]), 2) == [11, 7]
    assert index.numbers().tolist() == [7, 11]
