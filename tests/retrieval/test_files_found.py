"""Which files an ingestion finds, what it calls them, and what it says of those it can't reach."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from retrieval import Library, UnknownCollection
from retrieval.ingest import printable


def test_names_that_are_no_utf8_stay_apart(library: Library, tmp_path: Path):
    texts = {b"a\xff.txt": "Zebras live in Africa.", b"a\xfe.txt": "Copper melts at great heat."}
    for name, text in texts.items():
        (tmp_path / os.fsdecode(name)).write_text(text)
    report = library.ingest_paths([tmp_path / os.fsdecode(name) for name in texts])
    assert (len(set(report.added)), report.failed, library.whole.documents()[1]) == (2, [], 2)
    assert len(library.ingest_paths([tmp_path / os.fsdecode(name) for name in texts]).unchanged) == 2


def test_no_two_names_become_one():
    names = ["a\udcff", "a\udcfe", "a\ufffd", "a\ufffdDCFF", "a\udcffDCFF", "a\\xff", "a\ud800", "aDCFF", "ä"]
    assert len({printable(name) for name in names}) == len(names)
    assert [printable(name) for name in ("ä/b\\c.txt", "a\udcff")] == ["ä/b\\c.txt", "a\ufffdDCFF"]
    for name in names:
        printable(name).encode()


def test_a_folder_that_vanishes_is_reported(library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "gone").mkdir()
    (folder / "gone" / "a.txt").write_text("too late")
    walk = os.walk

    def vanishing(*arguments, **options):
        for here, folders, files in walk(*arguments, **options):
            if Path(here).name == "gone":
                shutil.rmtree(here)
            yield here, folders, files

    monkeypatch.setattr("retrieval.ingest.os.walk", vanishing)
    events = []
    report = library.ingest_paths([folder], progress=events.append)
    assert len(report.added) == 4
    assert report.failed == [(str(folder / "gone"), "does not exist")]
    assert (events[-1].done, events[-1].total) == (5, 5)


def test_a_folder_that_may_not_be_listed_is_reported(library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "closed").mkdir()
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    report = library.ingest_paths([folder])
    assert len(report.added) == 4
    assert [source for source, reason in report.failed if "can't be listed" in reason] == [str(folder / "closed")]


@pytest.mark.parametrize("name", ["", " \n"])
def test_a_collection_needs_a_name(library: Library, folder: Path, name: str):
    for way_in in (
        lambda: library.ingest_paths([folder], collection=name),
        lambda: library.ingest_documents([("a", "A", "some text", "text/plain")], name),
        lambda: library.ingest_bytes("a.txt", b"some text", collection=name),
    ):
        with pytest.raises(UnknownCollection, match="no name of a collection"):
            way_in()
    assert library.whole.collections() == []
