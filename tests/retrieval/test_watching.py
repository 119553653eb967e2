"""Documents follow their folder: added, changed, moved and removed with its files, and kept when it is gone."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from retrieval import OPERATOR, Library
from retrieval import watching as watching_module
from retrieval.ingest import Into, is_gone, path_of, printable
from retrieval.search import Question, StageTimer
from retrieval.watching import Folder, Watch
from tests.retrieval.hashing import HashingEmbedder
from tests.retrieval.test_jobs import Clock, until

pytestmark = pytest.mark.every_place

HERE = Into("default")


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.now = 2e9  # long after the files of tests were written
    return clock


@pytest.fixture
def followed(library: Library, folder: Path, clock: Clock) -> Folder:
    """The folder of four pages, read."""
    followed = Folder(Watch(folder, HERE), [], library, clock)
    followed.sweep()
    read(library)
    return followed


def read(library: Library) -> None:
    """Work off the queue."""
    library.jobs.start()
    until(lambda: not {"queued", "parsing", "embedding"} & set(library.jobs.counts()))


def documents(library: Library) -> dict[str, str]:
    """Ids by the names of files."""
    return {Path(each.source).name: each.document_id for each in library.whole.documents(limit=500)[0]}


def jobs(library: Library) -> list[str]:
    return [Path(job.source).name for job in library.jobs.jobs(OPERATOR, limit=500)[0]]


def look_twice(followed: Folder, clock: Clock, paths: Sequence[Path] | None = None) -> None:
    """As when something has happened, and after it has settled."""
    for _ in range(2):
        followed.look(paths if paths is not None else [followed.watch.path])
        clock.now += 10


def test_what_lies_in_a_folder_is_read_once(library: Library, folder: Path, followed: Folder, embedder, clock):
    assert sorted(documents(library)) == ["leave.md", "news.html", "safety.txt", "travel.md"]
    assert library.whole.search("fire exits east wing").passages[0].source == str(folder / "safety.txt")
    encoded = embedder.encoded
    for again in (followed, Folder(Watch(folder, HERE), [], library, clock)):  # this process, and the next
        again.sweep()
    assert (len(jobs(library)), embedder.encoded) == (4, encoded)


def test_changes_and_deletions_are_followed_and_strangers_are_not(library, folder: Path, followed: Folder, clock):
    before = documents(library)
    (folder / "safety.txt").write_text("The fire exits are in the west tower.")
    (folder / "leave.md").unlink()
    (folder / "deep").mkdir()
    (folder / "deep" / "more.md").write_text("# More\n\nThere is more.")
    for stranger in (".hidden.md", ".git/a.md", "picture.png", "deep/.x.md"):
        (folder / stranger).parent.mkdir(exist_ok=True)
        (folder / stranger).write_text("secret")
    look_twice(followed, clock)
    read(library)
    after = documents(library)
    assert sorted(after) == ["more.md", "news.html", "safety.txt", "travel.md"]
    assert after["safety.txt"] == before["safety.txt"]
    assert "west tower" in library.whole.search("where are the fire exits").passages[0].text
    assert library.whole.search("thirty days of leave each year").passages[0].title != "Leave"


def test_a_look_at_some_paths_is_a_look_at_no_others(library: Library, folder: Path, followed: Folder, clock):
    (folder / "a.md").write_text("# A\n\nHello.")
    (folder / "b.md").write_text("# B\n\nHello.")
    (folder / "leave.md").unlink()
    (folder / "travel.md").unlink()
    look_twice(followed, clock, [folder / "a.md", folder / "leave.md"])
    read(library)
    assert sorted(documents(library)) == ["a.md", "news.html", "safety.txt", "travel.md"]


@pytest.mark.parametrize("apart", [False, True])
def test_what_is_moved_keeps_its_id_and_is_not_embedded_again(
    library: Library, folder: Path, followed: Folder, embedder: HashingEmbedder, clock: Clock, apart: bool
):
    """Also where its going and its coming are told apart."""
    passage = library.whole.search("fire exits east wing").passages[0]
    before, encoded = documents(library), embedder.encoded
    (folder / "house").mkdir()
    (folder / "safety.txt").rename(folder / "house" / "evacuation plan.txt")
    (folder / "leave.md").rename(folder / "house" / "absence.md")
    if apart:
        followed.look([folder / "safety.txt", folder / "leave.md"])
    look_twice(followed, clock)
    after = documents(library)
    assert after["evacuation plan.txt"] == before["safety.txt"]
    assert after["absence.md"] == before["leave.md"]
    assert (len(after), embedder.encoded, len(jobs(library))) == (4, encoded, 4)
    moved = library.whole.document(after["evacuation plan.txt"]).document
    assert (moved.title, moved.source) == ("evacuation plan", str(folder / "house" / "evacuation plan.txt"))
    assert library.whole.document(after["absence.md"]).document.title == "Leave", "that stands in the file"
    assert library.whole.passage(passage.passage_id).text == passage.text, "citations stay"
    timer = StageTimer(lambda: 0.0, ("vectors", "text"))
    by_words = {
        word: len(library._indexes.find(OPERATOR, Question(None, [word]), 9, timer)) for word in ("evacu", "safeti")
    }
    assert by_words == {"evacu": 1, "safeti": 0}
    assert library.whole.search('"evacuation plan"').passages[0].document_id == moved.document_id
    assert library.whole.search('"safety"').passages == []


def test_an_index_made_anew_knows_a_moved_document_by_its_new_name(
    open_library: Callable[..., Library], folder: Path, clock: Clock
):
    library = open_library()
    followed = Folder(Watch(folder, HERE), [], library, clock)
    followed.sweep()
    read(library)
    (folder / "safety.txt").rename(folder / "evacuation.txt")
    look_twice(followed, clock)
    before = library.whole.search("evacuation exits", top_k=9)
    library.close()
    after = open_library().whole.search("evacuation exits", top_k=9)
    assert [(p.passage_id, p.score) for p in after.passages] == [(p.passage_id, p.score) for p in before.passages]


def test_a_copy_is_a_document_of_its_own(library: Library, folder: Path, followed: Folder, clock: Clock):
    before = documents(library)
    shutil.copy(folder / "leave.md", folder / "copy.md")
    look_twice(followed, clock)
    read(library)
    after = documents(library)
    assert len(after) == 5
    assert after["leave.md"] == before["leave.md"]


def test_the_command_line_knows_a_moved_file_as_well(library: Library, folder: Path, embedder: HashingEmbedder):
    library.ingest_paths([folder])
    before, encoded = documents(library), embedder.encoded
    folder.rename(folder.with_name("elsewhere"))
    report = library.ingest_paths([folder.with_name("elsewhere")])
    assert (len(report.moved), report.added, report.unchanged, embedder.encoded) == (4, [], [], encoded)
    assert documents(library) == before
    assert len(library.ingest_paths([folder.with_name("elsewhere")]).unchanged) == 4


def test_a_file_that_is_still_growing_is_left_alone(library: Library, folder: Path, followed: Folder, clock: Clock):
    growing = folder / "long.md"
    growing.write_text("# Long\n\nIt begins")
    os.utime(growing, (clock.now, clock.now))
    followed.sweep()
    assert len(jobs(library)) == 4
    clock.now += 1
    growing.write_text("# Long\n\nIt begins and goes on.")
    os.utime(growing, (clock.now, clock.now))
    clock.now += 1.5
    followed.look([])
    assert len(jobs(library)) == 4
    clock.now += 1
    followed.look([])
    read(library)
    assert library.whole.document(documents(library)["long.md"]).text.strip().endswith("goes on.")


def test_a_file_that_changes_while_it_is_read_is_read_again(library: Library, folder: Path, monkeypatch):
    target, changes = folder / "leave.md", [1, 2]

    def fstat(descriptor: int):
        if changes:
            os.utime(target, (0, changes.pop()))
        return os.stat(descriptor)

    monkeypatch.setattr("retrieval.ingest.os.fstat", fstat)
    report = library.ingest_paths([target])
    assert list(report.codes.values()) == ["file_changing"]
    assert len(library.ingest_paths([target]).added) == 1


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_a_folder_that_is_gone_as_a_whole_takes_no_document_with_it(
    library: Library, folder: Path, followed: Folder, clock: Clock, caplog, how: str
):
    before = documents(library)
    folder.rename(folder.with_name("away"))
    if how == "empty":
        folder.mkdir()
    for _ in range(3):
        look_twice(followed, clock)
        look_twice(followed, clock, [folder / "leave.md"])
    assert followed.trouble
    assert documents(library) == before
    assert [record.message for record in caplog.records if str(folder) in record.message][1:] == [], "said once"
    if how == "empty":
        folder.rmdir()
    folder.with_name("away").rename(folder)
    (folder / "leave.md").unlink()
    look_twice(followed, clock)
    assert followed.trouble is None
    assert sorted(documents(library)) == ["news.html", "safety.txt", "travel.md"]


def test_a_folder_that_goes_while_it_is_looked_at_takes_no_document_with_it(
    library: Library, folder: Path, followed: Folder, clock: Clock, monkeypatch
):
    before = documents(library)
    (folder / "leave.md").unlink()
    followed.sweep()
    clock.now += 10
    sources = library.sources

    def vanishing(into: Into, path: Path) -> set[str]:
        if folder.exists() and path == folder:
            folder.rename(folder.with_name("away"))
        return sources(into, path)

    monkeypatch.setattr(library, "sources", vanishing)
    followed.sweep()
    assert documents(library) == before


def test_what_can_not_be_seen_is_not_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("x")
    assert is_gone(tmp_path / "absent" / "a")
    assert is_gone(tmp_path / "file" / "a")
    assert not is_gone(tmp_path / "file")

    def stale(self: Path):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "lstat", stale)
    assert not is_gone(tmp_path / "absent")


def test_what_was_added_by_name_is_not_removed_though_it_is_no_file_of_the_folder(
    library: Library, folder: Path, followed: Folder, clock: Clock
):
    (folder / ".notes.md").write_text("# Notes\n\nHello.")
    library.ingest_paths([folder / ".notes.md"])
    look_twice(followed, clock)
    assert ".notes.md" in documents(library)


def test_a_folder_within_another_is_its_own(library: Library, folder: Path, clock: Clock):
    wages = folder / "wages"
    wages.mkdir()
    (wages / "may.md").write_text("# May\n\nNinety.")
    roots = [folder, wages]
    outer = Folder(Watch(folder, HERE), roots, library, clock)
    inner = Folder(Watch(wages, Into("default", ("group:hr",))), roots, library, clock)
    for followed in (outer, inner, outer):
        look_twice(followed, clock)
        look_twice(followed, clock, [wages / "may.md"])
    read(library)
    assert len(jobs(library)) == 5
    assert library.whole.document(documents(library)["may.md"]).document.readers == ["group:hr"]
    wages.rename(folder.with_name("away"))  # as a drive that is mounted there
    for followed in (outer, inner):
        look_twice(followed, clock)
    assert "may.md" in documents(library)


def test_other_readers_are_given_at_the_next_start(library: Library, folder: Path, followed: Folder, clock: Clock):
    before = documents(library)
    Folder(Watch(folder, Into("default", ("group:hr",))), [], library, clock).sweep()
    read(library)
    assert documents(library) == before
    assert {tuple(each.readers) for each in library.whole.documents()[0]} == {("group:hr",)}


def test_what_can_not_be_read_is_not_tried_at_every_sweep(library: Library, folder: Path, followed: Folder, clock):
    (folder / "bad.json").write_text("{")
    for _ in range(3):
        look_twice(followed, clock)
        read(library)
    assert jobs(library).count("bad.json") == 1
    assert library.jobs.jobs(OPERATOR, ["failed"])[0][0].code == "unreadable_file"
    (folder / "bad.json").write_text('{"a": "Hello there."}')
    look_twice(followed, clock)
    read(library)
    assert "bad.json" in documents(library)


def test_a_file_that_goes_before_its_turn_is_no_failure(library: Library, folder: Path, clock: Clock):
    followed = Folder(Watch(folder, HERE), [], library, clock)
    followed.sweep()
    (folder / "leave.md").unlink()
    look_twice(followed, clock)
    read(library)
    assert (library.jobs.counts(), "leave.md" in documents(library)) == ({"done": 3, "cancelled": 1}, False)


def test_names_that_are_no_text(tmp_path: Path):
    for name in (b"a\xff.md", "a\ufffd.md".encode(), "größe.md".encode()):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        assert path_of(printable(str(path))) == path


def test_events_are_followed_as_they_come(open_library: Callable[..., Library], folder: Path, monkeypatch):
    monkeypatch.setattr(watching_module, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(watching_module, "TICK_SECONDS", 0.05)
    library = open_library()
    library.jobs.start()
    library.watch([Watch(folder, HERE, sweep_seconds=1e9), Watch(folder.with_name("none"), HERE)])
    until(lambda: len(documents(library)) == 4)
    assert "gone or empty: 1" in library.notices()[0]
    kept = documents(library)["safety.txt"]

    (folder / "new").mkdir()
    (folder / "new" / "a.md").write_text("# A\n\nZebras live in Africa.")
    until(lambda: "a.md" in documents(library))
    (folder / "safety.txt").rename(folder / "new" / "exits.txt")
    until(lambda: documents(library).get("exits.txt") == kept)
    (folder / "new" / "exits.txt").write_text("The fire exits are in the west tower.")
    until(lambda: "west tower" in library.whole.document(kept).text)
    shutil.rmtree(folder / "new")
    until(lambda: len(documents(library)) == 3)

    folder.rename(folder.with_name("away"))
    until(lambda: "gone or empty: 2" in library.notices()[0])
    (folder.with_name("away") / "leave.md").unlink()
    shutil.copytree(folder.with_name("away"), folder)
    until(lambda: len(documents(library)) == 2)
    folder.with_name("none").mkdir()
    (folder.with_name("none") / "first.md").write_text("# First\n\nAt last.")
    until(lambda: library.notices() == [])
    (folder / "late.md").write_text("# Late\n\nIt is late.")
    until(lambda: sorted(documents(library)) == ["first.md", "late.md", "news.html", "travel.md"])
    library.close()
