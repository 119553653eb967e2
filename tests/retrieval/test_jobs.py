"""Jobs: told step by step, cancelled without a trace, tried again where that may help, and never lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from retrieval import (
    ANYBODY,
    OPERATOR,
    Job,
    JobConflict,
    Library,
    Principal,
    QueueFull,
    StoreError,
    UnknownJob,
    UnreadableFile,
)
from retrieval import jobs as jobs_module
from retrieval.fetching import Fetched
from retrieval.formats import progress, reading
from retrieval.formats.parsed import Parsed
from retrieval.ingest import Into
from retrieval.sqlite.indexes import Indexes
from tests.retrieval.conftest import SETTINGS
from tests.retrieval.hashing import HashingEmbedder
from tests.retrieval.making import zipped

pytestmark = pytest.mark.every_place

WAIT = 30  # seconds until a stuck test fails; never waited for
HERE = Into("default")
ADA = Principal.of("ada", ["hr"])
BOB = Principal.of("bob", ["it"])


class Gate:
    """Where a thread waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def pass_through(self, *_: object) -> None:
        self.reached.set()
        assert self.opened.wait(WAIT)


class Reader:
    """Reads as ever, but for what a test puts before it."""

    def __init__(self) -> None:
        self.before: Callable[[str], None] = lambda name: None

    def read_file(self, name: str, data: bytes) -> Parsed:
        self.before(name)
        return reading.read_file(name, data)

    read_source = staticmethod(reading.read_source)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def library(open_library: Callable[..., Library], reader: Reader) -> Library:
    return open_library(reader=reader)


@pytest.fixture(autouse=True)
def every_step_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "PROGRESS_SECONDS", 0.0)


def ended(library: Library, job: Job) -> Job:
    """The job once it has ended."""
    library.jobs.start()
    with contextlib.suppress(Exception):  # the job says what it was
        library.jobs.outcome(job.job_id).result(WAIT)
    return library.jobs.job(OPERATOR, job.job_id)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def titles(library: Library) -> list[str]:
    return [document.title for document in library.whole.documents()[0]]


def left_on_the_disk(library: Library) -> list[object]:
    if isinstance(library._indexes, Indexes):
        return list((library._indexes._data_dir / "incoming").glob("*"))
    return library._store._rows("SELECT job_id FROM incoming")


def test_an_upload_is_queued_read_and_found(library: Library):
    job = library.jobs.add_upload("gates.md", b"# Gates\n\nThe north gate closes at nine.", HERE)
    assert (job.state, job.kind, job.source, job.attempts, job.document_id) == ("queued", "upload", "gates.md", 0, None)
    assert titles(library) == []
    assert len(left_on_the_disk(library)) == 1
    done = ended(library, job)
    assert (done.state, done.attempts, done.reason, done.passages_embedded, done.passages) == ("done", 1, None, 1, 1)
    best = library.whole.search("when does the north gate close").passages[0]
    assert best.document_id == done.document_id
    assert left_on_the_disk(library) == []
    again = ended(library, library.jobs.add_upload("gates.md", b"# Gates\n\nThe north gate closes at nine.", HERE))
    assert (again.state, again.document_id) == ("done", done.document_id), "no duplicate"
    assert library.whole.documents()[1] == 1


def test_what_of_a_file_was_not_read_is_told(library: Library):
    data = zipped({"a.md": "# A\n\nHello there.", "b.png": b"\x89PNG...", "c.md": "# C\n\nGood bye."})
    done = ended(library, library.jobs.add_upload("all.zip", data, HERE))
    assert (done.state, done.parts_read, done.parts) == ("done", 3, 3)
    assert [reason[:20] for reason in done.unread] == ["b.png: it is a PNG i"]


def test_how_far_it_is_is_told_page_by_page_and_batch_by_batch(library: Library, reader: Reader, embedder):
    seen: list[tuple] = []

    def look(*_: object) -> None:
        (job,), _ = library.jobs.jobs(OPERATOR, ["parsing", "embedding"])
        seen.append((job.state, job.parts_read, job.parts, job.passages_embedded, job.passages))

    def pages(name: str) -> None:
        for _ in progress.each(range(3)):
            look()

    reader.before, embedder.before_encode = pages, look
    text = "\n\n".join(f"Paragraph {i} tells of gates and keys. " * 12 for i in range(100))
    job = ended(library, library.jobs.add_upload("long.md", text.encode(), HERE))
    total = job.passages
    assert total is not None
    assert total > 40
    assert seen[:3] == [("parsing", done, 3, 0, None) for done in range(3)]
    assert {each[:3] for each in seen[3:]} == {("embedding", 3, 3)}
    assert [each[3:] for each in seen[3:]] == [(done, total) for done in range(0, total, 8)]
    assert (job.state, job.parts_read, job.passages_embedded) == ("done", 3, total)


def test_a_file_that_can_not_be_read_says_why_and_is_not_tried_again(library: Library):
    job = ended(library, library.jobs.add_upload("odd.json", b"{", HERE))
    assert (job.state, job.code, job.attempts) == ("failed", "unreadable_file", 1)
    assert "not valid JSON" in job.reason
    with pytest.raises(UnreadableFile, match="odd.json: .*not valid JSON"):
        library.jobs.outcome(job.job_id).result(WAIT)
    assert len(left_on_the_disk(library)) == 1, "it can be tried again by hand"


def test_what_failed_is_tried_again_by_hand(library: Library, reader: Reader):
    def broken(name: str) -> None:
        raise UnreadableFile(name, "its reader is ill", "parse_memory")

    reader.before = broken
    job = ended(library, library.jobs.add_upload("a.md", b"# A\n\nHello.", HERE))
    assert (job.state, job.code) == ("failed", "parse_memory")
    reader.before = lambda name: None
    assert library.jobs.retry(OPERATOR, job.job_id).state in ("queued", "parsing", "embedding", "done")
    job = ended(library, job)
    assert (job.state, job.attempts, job.reason, job.code) == ("done", 2, None, None)
    with pytest.raises(JobConflict, match="it is done"):
        library.jobs.retry(OPERATOR, job.job_id)


@pytest.mark.parametrize("succeeds_at", [2, 3, None])
def test_what_may_pass_is_tried_again_by_itself_three_times_at_most(
    library: Library, monkeypatch: pytest.MonkeyPatch, succeeds_at: int | None
):
    clock = Clock()
    monkeypatch.setattr(library.jobs, "_clock", clock)
    asked: list[float] = []

    def fetch(url: str, *_: object) -> Fetched:
        asked.append(clock.now)
        if len(asked) != succeeds_at:
            raise UnreadableFile(url, "its server answers 503", "url_failed")
        return Fetched(url, "a.md", b"# From afar\n\nHello.")

    monkeypatch.setattr(jobs_module, "fetch", fetch)
    library.jobs.start()
    job = library.jobs.add_url("http://docs.example/a", HERE)
    for attempt, wait in enumerate((10.0, 60.0), 1):
        if attempt == succeeds_at:
            break
        until(lambda attempt=attempt: (now := library.jobs.job(OPERATOR, job.job_id)).state == "queued"
              and now.attempts == attempt)  # fmt: skip
        told = library.jobs.job(OPERATOR, job.job_id)
        assert (told.code, told.reason) == ("url_failed", "its server answers 503"), "why it waits"
        clock.now += wait - 1
        library.jobs._wake_up()
        clock.now += 1
        library.jobs._wake_up()
    job = ended(library, job)
    if succeeds_at:
        assert (job.state, job.attempts, job.reason) == ("done", succeeds_at, None)
    else:
        assert (job.state, job.attempts, job.code) == ("failed", 3, "url_failed")
    assert asked == [1000.0, 1010.0, 1070.0][: succeeds_at or 3]


def test_who_waits_is_told_at_once(library: Library, monkeypatch: pytest.MonkeyPatch):
    def fetch(url: str, *_: object) -> Fetched:
        raise UnreadableFile(url, "its server answers 503", "url_failed")

    monkeypatch.setattr(jobs_module, "fetch", fetch)
    job = ended(library, library.jobs.add_url("http://docs.example/a", HERE, waited_for=True))
    assert (job.state, job.attempts) == ("failed", 1)


def test_a_slow_server_holds_up_no_file(library: Library, monkeypatch: pytest.MonkeyPatch):
    gate = Gate()

    def fetch(url: str, *_: object) -> Fetched:
        gate.pass_through()
        return Fetched(url, "a.md", b"# From afar\n\nHello.")

    monkeypatch.setattr(jobs_module, "fetch", fetch)
    library.jobs.start()
    slow = library.jobs.add_url("http://docs.example/a", HERE)
    assert gate.reached.wait(WAIT)
    assert ended(library, library.jobs.add_upload("b.md", b"# B\n\nHello.", HERE)).state == "done"
    gate.opened.set()
    assert ended(library, slow).state == "done"


def cancelled_in_the_middle(library: Library, reader: Reader, embedder: HashingEmbedder, where: str) -> Job:
    gate = Gate()

    def in_parsing(name: str) -> None:
        for part in progress.each(range(3)):
            if part == 1:
                gate.pass_through()

    if where == "parsing":
        reader.before = in_parsing
    else:
        embedder.before_encode = gate.pass_through
    library.jobs.start()
    text = "\n\n".join(f"Paragraph {i} tells of gates and keys. " * 12 for i in range(100))
    job = library.jobs.add_upload("gates.md", text.encode(), HERE)
    assert gate.reached.wait(WAIT)
    assert library.jobs.cancel(OPERATOR, job.job_id).state == where
    gate.opened.set()
    job = ended(library, job)
    reader.before, embedder.before_encode = (lambda name: None), (lambda texts: None)
    return job


@pytest.mark.parametrize("where", ["parsing", "embedding"])
def test_what_is_cancelled_leaves_no_trace_and_the_old_version_serves(
    library: Library, reader: Reader, embedder: HashingEmbedder, where: str
):
    old = library.ingest_bytes("gates.md", b"# Gates\n\nThe north gate closes at nine.")
    stored = library._store.counts()
    job = cancelled_in_the_middle(library, reader, embedder, where)
    assert (job.state, job.document_id) == ("cancelled", None)
    assert library.whole.documents() == ([old], 1)
    assert library.whole.search("when does the north gate close").passages[0].document_id == old.document_id
    assert (library._store.counts(), left_on_the_disk(library)) == (stored, [])
    for change in (library.jobs.cancel, library.jobs.retry):
        with pytest.raises(JobConflict):
            change(OPERATOR, job.job_id)
    assert ended(library, library.jobs.add_upload("next.md", b"# Next\n\nIt goes on.", HERE)).state == "done"


def test_what_only_waits_is_cancelled_at_once(library: Library):
    job = library.jobs.add_upload("a.md", b"# A\n\nHello.", HERE)
    outcome = library.jobs.outcome(job.job_id)
    assert library.jobs.cancel(OPERATOR, job.job_id).state == "cancelled"
    with pytest.raises(JobConflict, match="was cancelled"):
        outcome.result(WAIT)
    assert left_on_the_disk(library) == []
    library.jobs.start()
    assert library.jobs.job(OPERATOR, job.job_id).state == "cancelled"
    with pytest.raises(JobConflict, match="send it again"):
        library.jobs.retry(OPERATOR, job.job_id)


def test_people_go_first_and_who_waits_before_them_but_versions_keep_their_order(library: Library, tmp_path: Path):
    order: list[str] = []
    reads = library.jobs._read

    def noted(candidate, into, tell):
        order.append(f"{candidate.source} {candidate.read()[-2:].decode()}")
        return reads(candidate, into, tell)

    library.jobs._read = noted
    (tmp_path / "found.md").write_text("# Found\n\nv1")
    library.jobs.add_file(tmp_path / "found.md", HERE)
    for name, version, waits in (("a", 1, False), ("b", 1, False), ("c", 1, True), ("b", 2, True), ("c", 2, False)):
        last = library.jobs.add_upload(name, f"# {name}\n\nHello v{version}".encode(), HERE, waited_for=waits)
    library.jobs.start()
    ended(library, last)
    until(lambda: library.jobs.counts() == {"done": 6})
    assert order == ["c v1", "b v1", "b v2", "a v1", "c v2", f"{tmp_path}/found.md v1"]


def test_a_file_is_queued_once_while_it_waits(library: Library, tmp_path: Path):
    (tmp_path / "a.md").write_text("# A\n\nHello.")
    first = library.jobs.add_file(tmp_path / "a.md", HERE)
    assert library.jobs.add_file(tmp_path / "a.md", HERE).job_id == first.job_id
    assert ended(library, first).document_id is not None
    assert library.jobs.add_file(tmp_path / "a.md", HERE).job_id != first.job_id


def test_nothing_that_was_acknowledged_is_lost_by_a_crash(open_library: Callable[..., Library], tmp_path: Path):
    library = open_library(tmp_path / "data")
    jobs = [library.jobs.add_upload(f"{i}.md", f"# {i}\n\nHello {i}.".encode(), HERE) for i in range(3)]
    assert library.jobs._store.take(["upload"], 1e12).job.job_id == jobs[0].job_id, "it was being read"
    if isinstance(library._indexes, Indexes):
        (tmp_path / "data" / "incoming" / "unfinished.new").write_bytes(b"never acknowledged")
    crash(library)
    library = open_library(tmp_path / "data")
    assert [ended(library, job).state for job in jobs] == ["done"] * 3
    assert [library.jobs.job(OPERATOR, job.job_id).attempts for job in jobs] == [2, 1, 1]
    assert left_on_the_disk(library) == []


def crash(library: Library) -> None:
    """Let go of the directory as the kernel would, and end nothing."""
    library._close_place()


def test_a_job_that_takes_the_server_with_it_does_so_three_times_at_most(open_library: Callable[..., Library]):
    library = open_library()
    job = library.jobs.add_upload("a.md", b"# A\n\nHello.", HERE)
    for _ in range(3):
        assert library.jobs._store.take(["upload"], 1e12) is not None
        crash(library)
        library = open_library()
        library.jobs._store.recover(jobs_module.ATTEMPTS)
    job = ended(library, job)
    assert (job.state, job.code, job.attempts) == ("failed", "interrupted", 3)
    library.jobs.retry(OPERATOR, job.job_id)
    assert ended(library, job).state == "done"


def test_closing_queues_what_was_at_hand_again(open_library: Callable[..., Library], reader: Reader):
    library, gate = open_library(reader=reader), Gate()

    def in_parsing(name: str) -> None:
        for part in progress.each(range(3)):
            if part == 1:
                gate.pass_through()

    reader.before = in_parsing
    library.jobs.start()
    job = library.jobs.add_upload("a.md", b"# A\n\nHello.", HERE)
    outcome = library.jobs.outcome(job.job_id)
    assert gate.reached.wait(WAIT)
    closing = threading.Thread(target=library.close)
    closing.start()
    assert library.jobs._stopping.wait(WAIT)
    gate.opened.set()
    closing.join(WAIT)
    with pytest.raises(StoreError, match="closed"):
        outcome.result(WAIT)
    library = open_library()
    assert library.jobs.job(OPERATOR, job.job_id).attempts == 0, "that was nobody's fault"
    assert ended(library, job).state == "done"


def test_closing_waits_for_no_file_that_takes_for_ever(open_library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if any(word.startswith('retrieval.formats.worker') for word in sys.orig_argv):\n"
        "    import time\n"
        "    from retrieval.formats import progress, reading\n"
        "    def never(name, data):\n"
        "        for part in progress.each(range(2)):\n"
        "            time.sleep(1000 * part)\n"
        "    reading.read_file = never\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    library = open_library(reader=None)
    library.jobs.start()
    job = library.jobs.add_upload("a.md", b"# A\n\nHello.", HERE)
    until(lambda: library.jobs.job(OPERATOR, job.job_id).parts == 2)
    library.close()
    monkeypatch.delenv("PYTHONPATH")
    library = open_library(reader=None)
    assert (library.jobs.job(OPERATOR, job.job_id).state, library.jobs.job(OPERATOR, job.job_id).attempts) == (
        "queued",
        0,
    )
    assert ended(library, job).state == "done"


def test_a_disk_in_trouble_stops_the_queue_for_as_long_only(library: Library, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs_module, "TROUBLE_SECONDS", 0.0)
    store, troubles = library.jobs._store, []

    def failing(name: str):
        well = getattr(store, name)

        def broken(*args: object, **fields: object):
            if name == "change" and fields.get("state") != "done":
                return well(*args, **fields)
            if troubles.count(name) < 3:
                troubles.append(name)
                raise StoreError("the disk is full", code="unwritable_store")
            return well(*args, **fields)

        monkeypatch.setattr(store, name, broken)

    failing("take")
    failing("change")
    assert ended(library, library.jobs.add_upload("a.md", b"# A\n\nHello.", HERE)).state == "done"
    assert troubles == ["take"] * 3 + ["change"] * 3


def test_a_fault_of_ours_tells_nothing_of_the_inside(library: Library, embedder: HashingEmbedder):
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    embedder.before_encode = broken
    job = ended(library, library.jobs.add_upload("a.md", b"# A\n\nHello.", HERE))
    assert (job.state, job.code) == ("failed", "internal_error")
    assert "secret" not in job.reason


def test_jobs_are_told_to_whom_they_belong(library: Library):
    ada = library.jobs.add_upload("wages.md", b"# Wages\n\nNinety.", Into("default", ("group:hr",), ADA.name))
    public = library.jobs.add_upload("news.md", b"# News\n\nNone.", Into("default", None, ADA.name))
    found = library.jobs.add_file(Path("/srv/notes.md"), Into("default", ("group:it",)))
    keeper = Principal.of("eve", ["it"], steward=True)
    everything = {ada.job_id, public.job_id, found.job_id}
    for principal, sees in (
        (OPERATOR, everything),
        (ADA, {ada.job_id, public.job_id}),
        (BOB, set()),
        (ANYBODY, set()),
        (keeper, {public.job_id, found.job_id}),
        (Principal.of("eve", ["it"]), set()),
    ):
        listed, total = library.jobs.jobs(principal)
        assert ({job.job_id for job in listed}, total) == (sees, len(sees))
        for job_id in everything - sees:
            for call in (library.jobs.job, library.jobs.cancel, library.jobs.retry):
                with pytest.raises(UnknownJob, match=job_id):
                    call(principal, job_id)
    assert library.jobs.counts() == {"queued": 3}


def test_who_may_no_longer_read_a_document_is_not_told_of_its_job(library: Library):
    keeper = Principal.of("eve", ["it"], steward=True)
    job = ended(library, library.jobs.add_upload("news.md", b"# News\n\nNone.", Into("default", None, ADA.name)))
    assert library.jobs.job(keeper, job.job_id).state == "done"
    library.seen_by(ADA).share(job.document_id, ["group:hr"])
    with pytest.raises(UnknownJob):
        library.jobs.job(keeper, job.job_id)
    kept = library.jobs.add_upload("news.md", b"{", Into("default", None, ADA.name))
    with pytest.raises(UnknownJob):
        library.jobs.job(keeper, kept.job_id)


def test_jobs_are_listed_newest_first_by_state_and_page(library: Library):
    jobs = [library.jobs.add_upload(f"{i}.md", b"# A\n\nHello.", HERE) for i in range(5)]
    library.jobs.cancel(OPERATOR, jobs[1].job_id)
    listed, total = library.jobs.jobs(OPERATOR, ["queued", "parsing"], offset=1, limit=2)
    assert ([job.source for job in listed], total) == (["3.md", "2.md"], 4)
    assert [job.source for job in library.jobs.jobs(OPERATOR, ["cancelled"])[0]] == ["1.md"]


def test_a_version_that_came_later_is_not_undone_by_trying_an_older_one_again(library: Library):
    old = ended(library, library.jobs.add_upload("a.json", b"{", HERE))
    assert ended(library, library.jobs.add_upload("a.json", b'{"a": "Hello there."}', HERE)).state == "done"
    with pytest.raises(JobConflict, match="sent again since"):
        library.jobs.retry(OPERATOR, old.job_id)


def test_what_waits_is_bounded_and_what_failed_makes_room(open_library: Callable[..., Library], tmp_path: Path):
    settings = type(SETTINGS)(relevance_floor=0.2, incoming_mb=1)
    library = open_library(tmp_path / "small", settings=settings)
    half = b"{" + b" " * 500_000
    failed = [ended(library, library.jobs.add_upload(f"{i}.json", half, HERE)) for i in range(2)]
    assert {job.state for job in failed} == {"failed"}
    library.jobs.stop()
    first = library.jobs.add_upload("2.json", half, HERE)
    with pytest.raises(JobConflict, match="send it again"):
        library.jobs.retry(OPERATOR, failed[0].job_id)
    library.jobs.add_upload("3.json", half, HERE)
    with pytest.raises(QueueFull, match="1 MiB"):
        library.jobs.add_upload("4.json", half, HERE)
    with pytest.raises(UnreadableFile, match="larger than"):
        library.jobs.add_upload("5.json", b" " * (settings.max_file_bytes + 1), HERE)
    assert library.jobs.job(OPERATOR, first.job_id).state == "queued"
    assert len(left_on_the_disk(library)) == 2


def test_old_jobs_are_forgotten(library: Library, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs_module, "KEPT", 3)
    jobs = [library.jobs.add_upload(f"{i}.json", b"{", HERE) for i in range(6)]
    ended(library, jobs[-1])
    until(lambda: [job.source for job in library.jobs.jobs(OPERATOR)[0]] == ["5.json", "4.json", "3.json"])
    until(lambda: len(left_on_the_disk(library)) == 3)
    monkeypatch.setattr(jobs_module, "KEPT_DAYS", -1)
    last = library.jobs.add_upload("6.json", b"{", HERE)
    library.jobs.outcome(last.job_id).exception(WAIT)
    until(lambda: library.jobs.jobs(OPERATOR) == ([], 0))


@pytest.mark.sqlite
def test_what_a_backup_lacks_is_asked_for_again(library: Library):
    job = library.jobs.add_upload("a.md", b"# A\n\nHello.", HERE)
    for file in left_on_the_disk(library):
        file.unlink()
    job = ended(library, job)
    assert (job.state, job.code) == ("failed", "upload_lost")
