"""`refdesk check`: what is damaged in words, and by exit code whether anything still is."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from gateway import cli
from retrieval import Library
from retrieval.formats import reading
from tests.retrieval.hashing import HashingEmbedder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REFDESK_DATA", str(tmp_path / "data"))
    with open_library(tmp_path / "data") as library:
        library.ingest_bytes("soup\x1b.md", b"# Soup\n\nSoup is hot.")
    return tmp_path / "data"


def open_library(data: Path) -> Library:
    return Library.open(data, embedder=HashingEmbedder(), reader=reading)


def run(capsys: pytest.CaptureFixture[str], *arguments: str, command: str = "check") -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *arguments])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def damage(data: Path, statement: str) -> None:
    with closing(sqlite3.connect(data / "library.sqlite3")) as db, db:
        db.execute(statement)


def test_what_is_found_and_repaired_is_told(data: Path, capsys: pytest.CaptureFixture[str]):
    assert run(capsys)[:2] == (0, "1 documents, nothing is wrong\n")
    damage(data, "UPDATE words SET length = 77")
    code, out, err = run(capsys)
    assert (code, out) == (
        1,
        "the words of 1 passages aren't those of their text\n"
        "`refdesk check --repair` makes again what can be made from the rest\n",
    )
    assert "1/1 checked" in err
    assert run(capsys, "--repair")[:2] == (0, "repaired: the words of 1 passages aren't those of their text\n")
    assert run(capsys)[0] == 0


def test_what_is_still_wrong_after_repair_is_an_error(data: Path, capsys: pytest.CaptureFixture[str]):
    damage(data, "UPDATE documents SET text = 'Soup is cold.'")
    for _ in range(2):
        code, out, _ = run(capsys, "--repair")
        assert code == 1
        assert out.startswith("soup .md (")
        assert "add it again" in out


def test_what_can_not_be_checked_is_an_error_of_its_own(data: Path, capsys: pytest.CaptureFixture[str]):
    with open_library(data):
        code, _, err = run(capsys)
        assert code == 2
        assert "in use" in err
    code, _, err = run(capsys, "--data", str(data / "nowhere"))
    assert code == 2
    assert "no library" in err


@pytest.mark.parametrize("command", ["backup", "restore", "check"])
def test_a_library_in_a_database_server_is_kept_by_its_own_tools(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
):
    monkeypatch.setenv("REFDESK_RETRIEVAL__DATABASE", "postgresql://localhost/desk")
    code, _, err = run(capsys, *([] if command == "check" else [str(tmp_path / "copy")]), command=command)
    assert code == 2
    assert "pg_dump" in err
    assert not (tmp_path / "copy").exists()
