"""A store that is damaged, or of another model, is repaired from its texts or says what to do: never a bare error."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retrieval import EmbedderMissing, Library, SentenceTransformerEmbedder, StoreError
from retrieval.sqlite.vectors import INDEX_FILE, MANIFEST_FILE
from tests.retrieval.conftest import open_files
from tests.retrieval.hashing import HashingEmbedder


@pytest.fixture
def stored(open_library: Callable[..., Library], folder: Path, tmp_path: Path) -> Callable[[str], None]:
    """Runs SQL on the closed library of four pages, whose saved index is gone, too."""
    library = open_library()
    library.ingest_paths([folder])
    library.close()

    def run(statement: str, *values: object) -> None:
        database = sqlite3.connect(tmp_path / "data" / "library.sqlite3")
        with database:
            database.execute(statement, values)
        database.close()
        for file in (INDEX_FILE, MANIFEST_FILE):
            (tmp_path / "data" / file).unlink(missing_ok=True)

    return run


@pytest.mark.parametrize(
    "damage",
    [
        *(f"DELETE FROM meta WHERE key = '{key}'" for key in ("store", "state", "dim", "embedder")),
        *(f"UPDATE meta SET value = x'00ff' WHERE key = '{key}'" for key in ("store", "state", "dim", "embedder")),
        *(f"UPDATE meta SET value = '{dim}' WHERE key = 'dim'" for dim in ("x", "", "-1", "0", "1e3", "9" * 30)),
        "UPDATE meta SET value = CAST(x'ff' AS TEXT) WHERE key = 'state'",
        "DROP TABLE meta",
        "DROP TABLE documents",
        "DROP TABLE embeddings",
        "ALTER TABLE passages RENAME COLUMN document TO gone",
    ],
)
def test_damaged_tables_say_what_to_do(
    stored: Callable[[str], None], open_library: Callable[..., Library], tmp_path: Path, damage: str
):
    stored(damage)
    with pytest.raises(
        StoreError, match="is damaged .*: mend it by `refdesk check --repair`, restore it from a backup"
    ) as refused:
        open_library()
    assert refused.value.code == "damaged_store"
    assert open_files(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "value", "lost"),
    [
        ("DELETE FROM embeddings", (), 4),
        ("DELETE FROM embeddings WHERE passage = 2", (), 1),
        ("UPDATE embeddings SET vector = x'00' WHERE passage = 2", (), 1),
        ("UPDATE embeddings SET vector = 'text' WHERE passage > 2", (), 2),
        ("UPDATE embeddings SET vector = ? WHERE passage = 1", (np.full(64, np.nan, "<f4").tobytes(),), 1),
        ("UPDATE embeddings SET vector = ? WHERE passage = 1", (np.full(64, np.inf, "<f4").tobytes(),), 1),
        ("DELETE FROM meta WHERE key IN ('embedder', 'dim')", (), 4),
        ("INSERT INTO embeddings VALUES (99, 1, ?, x'')", (np.full(64, 0.125, "<f4").tobytes(),), 0),
    ],
)
def test_lost_vectors_are_made_again(
    stored: Callable[..., None],
    open_library: Callable[..., Library],
    embedder: HashingEmbedder,
    damage: str,
    value: tuple,
    lost: int,
):
    stored(damage, *value)
    encoded = embedder.encoded
    library = open_library()
    library.settle()
    assert (len(library._indexes.vectors), embedder.encoded - encoded) == (4, lost)
    for query, title in (("days of leave", "Leave"), ("fire exits", "safety"), ("soup on mondays", "Canteen news")):
        assert library.whole.search(query).passages[0].title == title
    library.close()
    encoded = embedder.encoded
    assert len(open_library()._indexes.vectors) == 4
    assert embedder.encoded == encoded


def test_another_dim_under_the_same_name_embeds_again(stored: Callable, open_library: Callable[..., Library]):
    wider = HashingEmbedder(dim=96)
    library = open_library(embedder=wider)
    library.settle()
    assert (library._indexes.vectors.dim, wider.encoded) == (96, 4)
    assert library.whole.search("fire exits").passages[0].title == "safety"


def test_a_model_that_is_loaded_late_and_has_another_dim_says_so(
    stored: Callable, open_library: Callable[..., Library], folder: Path
):
    late = HashingEmbedder(dim=96)
    late.dim_at_hand = None
    library = open_library(embedder=late)
    for call in (lambda: library.whole.search("fire exits"), lambda: library.ingest_bytes("a.txt", b"some text")):
        with pytest.raises(StoreError, match="vectors of 96 numbers, those stored have 64") as refused:
            call()
        assert refused.value.code == "bad_embedder"


def model_folder(folder: Path, weights: bytes) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 8}')
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_folders_of_one_name_are_models_of_their_own(tmp_path: Path):
    weights = np.random.default_rng(0).bytes(4_000_000)
    one, same, other, shorter = (
        SentenceTransformerEmbedder(str(model_folder(tmp_path / parent / "model", content))).name
        for parent, content in (("a", weights), ("b", weights), ("c", b"\1" * 4_000_000), ("d", weights[:-1]))
    )
    assert one == same
    assert len({one, other, shorter}) == 3
    assert one.startswith("model ")
    (tmp_path / "a" / "model" / "README.md").write_text("what it is for")
    assert SentenceTransformerEmbedder(str(tmp_path / "a" / "model")).name == one
    (tmp_path / "a" / "model" / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert SentenceTransformerEmbedder(str(tmp_path / "a" / "model")).name != one


def test_the_default_model_keeps_its_name():
    assert SentenceTransformerEmbedder("minilm").name == "all-MiniLM-L6-v2"


def test_a_model_folder_that_cannot_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model_folder(tmp_path / "model", b"weights")

    def refuse(folder: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("retrieval.embedding._fingerprint", refuse)
    with pytest.raises(EmbedderMissing, match="Permission denied"):
        SentenceTransformerEmbedder(str(tmp_path / "model"))
