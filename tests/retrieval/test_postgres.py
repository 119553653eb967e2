"""What PostgreSQL adds to what every store promises: several libraries over one database, and a server that may go."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from loadtests.postgres_server import Server
from retrieval import ANYBODY, OPERATOR, Job, JobConflict, Library, Principal, StoreError, UnknownDocument
from retrieval.embedding import Embedded, SharedEmbedder
from retrieval.formats import reading
from retrieval.ingest import Into
from retrieval.job_store import ENDED
from retrieval.search import Question, StageTimer
from retrieval.stored import NewDocument, NewPassage
from tests.retrieval.conftest import SETTINGS, open_files
from tests.retrieval.hashing import HashingEmbedder
from tests.retrieval.test_reindexing import QUESTIONS, Held, finds, generations

WAIT = 30
BOB = Principal.of("bob", ["it"])

Open = Callable[..., Library]


@pytest.fixture
def place(postgres: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """One database, whatever the data directory."""
    monkeypatch.setattr("retrieval.postgres.jobs.GRACE_SECONDS", 0)
    url = postgres.new_place()
    return lambda data_dir: url


@pytest.fixture
def two(open_library: Open, tmp_path: Path) -> tuple[Library, Library]:
    return open_library(tmp_path / "one"), open_library(tmp_path / "two")


def titles(library: Library, query: str, who: Principal = OPERATOR) -> list[str]:
    return [passage.title for passage in library.seen_by(who).search(query).passages]


# several libraries


def test_what_one_changes_the_other_sees_at_once(two: tuple[Library, Library], folder: Path):
    one, other = two
    one.ingest_paths([folder])
    assert finds(other)
    leave = other.whole.search("how many days of leave").passages[0]
    one.whole.share(leave.document_id, ["group:hr"])
    assert "Leave" not in titles(other, "days of leave", BOB)
    other.whole.share(leave.document_id, ["group:it"])
    assert titles(one, "days of leave", BOB)[0] == "Leave"
    (folder / "leave.md").write_text("# Leave\n\nStaff have forty days of leave each year.\n")
    other.ingest_paths([folder])
    assert "forty" in one.whole.search("days of leave").passages[0].text
    (folder / "leave.md").rename(folder / "vacation.md")
    one.ingest_paths([folder])
    assert other.whole.document(leave.document_id).document.source.endswith("vacation.md")
    other.whole.remove(leave.document_id)
    assert "Leave" not in titles(one, "days of leave")
    with pytest.raises(UnknownDocument):
        one.whole.document(leave.document_id)


def test_an_empty_database_is_made_once_by_all_that_open_it(open_library: Open, tmp_path: Path):
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(open_library, [tmp_path / str(i) for i in range(4)]))
        list(pool.map(lambda i: libraries[i].ingest_bytes(f"{i}.txt", f"Gate {i} is red.".encode()), range(4)))
        # All at once, and the same document.
        list(pool.map(lambda i: libraries[i].ingest_bytes("same.txt", f"Door {i} is blue.".encode()), range(4)))
    assert {library.whole.documents()[1] for library in libraries} == {5}
    assert len(libraries[0].whole.search("door is blue", top_k=9).passages) == 5


def test_one_embeds_anew_and_the_others_follow(
    open_library: Open, tmp_path: Path, folder: Path, embedder: HashingEmbedder
):
    new = Held(dim=48, name="other")

    def opener(name: str) -> HashingEmbedder:
        return {"hashing": embedder, "other": HashingEmbedder(dim=48, name="other")}[name]

    old = open_library(tmp_path / "old", open_embedder=opener, settings=replace(SETTINGS, embedder="hashing"))
    old.ingest_paths([folder])
    wanted = replace(SETTINGS, embedder="other")
    first = open_library(tmp_path / "first", embedder=new, open_embedder=opener, settings=wanted)
    assert new.asked.wait(WAIT)
    idle = HashingEmbedder(dim=48, name="other")
    second = open_library(tmp_path / "second", embedder=idle, open_embedder=opener, settings=wanted)
    for library in (old, first, second):
        assert library._indexes.embedder.name == "hashing"
        assert finds(library)
    old.ingest_bytes("bicycles.txt", b"Bicycles are parked\nbehind the library.")
    new.let.set()
    for library in (first, second):
        library.settle()
    for library in (old, first, second):
        assert library._indexes.embedder.name == "other"
        assert finds(library)
        assert titles(library, "where are bicycles parked")[0] == "bicycles"
    assert new.encoded - (len(QUESTIONS) + 1) == 5, "each passage once"
    assert idle.encoded == len(QUESTIONS) + 1, "only what was asked"
    assert generations(old) == 1
    old.ingest_bytes("boats.txt", b"Boats lie on the river.")
    assert titles(first, "boats on the river")[0] == "boats"


def test_old_vectors_go_once_nobody_reads_them(open_library: Open, folder: Path, embedder: HashingEmbedder):
    """A copy of the database (pg_dump) reads for as long as it takes, and searches must not wait for that."""
    library = open_library()
    library.ingest_paths([folder])
    with library._store._database.reading() as reader:
        reader.execute("SELECT count(*) FROM embeddings")
        new = open_library(embedder=HashingEmbedder(dim=48, name="other"), open_embedder=lambda name: embedder)
        while new._indexes.embedder.name != "other":
            assert finds(new)
        assert generations(new) == 2
    new.settle()
    assert generations(new) == 1


# jobs


def ended(library: Library, job: Job) -> Job:
    while (job := library.jobs.job(OPERATOR, job.job_id)).state not in ENDED:
        threading.Event().wait(0.01)
    return job


def test_a_job_is_read_by_any_server_and_told_by_all(two: tuple[Library, Library]):
    one, other = two
    jobs = [one.jobs.add_upload(f"{i}.md", f"# {i}\n\nGate {i} is red.".encode(), Into("default")) for i in range(6)]
    other.jobs.start()
    for job in jobs:
        done = ended(one, job)
        assert (done.state, done.attempts) == ("done", 1)
    assert one.jobs.jobs(OPERATOR) == other.jobs.jobs(OPERATOR)
    assert one.whole.documents()[1] == 6
    assert one._store._rows("SELECT count(*) FROM incoming") == [(0,)]


def test_a_file_is_read_where_it_lies_and_what_is_waited_for_where_it_is_waited_for(
    two: tuple[Library, Library], tmp_path: Path
):
    one, other = two
    (tmp_path / "a.md").write_text("# A\n\nHello.")
    for each in (one, other):
        each._store._database.hold(each.jobs._store._number)  # as when it has started
    file = one.jobs.add_file(tmp_path / "a.md", Into("default"))
    waited = one.jobs.add_upload("b.md", b"# B\n\nHello.", Into("default"), waited_for=True)
    plain = one.jobs.add_upload("c.md", b"# C\n\nHello.", Into("default"))
    kinds = ("upload", "file")
    assert other.jobs._store.take(kinds, 1e12).job.job_id == plain.job_id
    assert other.jobs._store.take(kinds, 1e12) is None
    one._store._database._holder.close()  # gone, as far as anybody can tell
    assert other.jobs._store.take(kinds, 1e12).job.job_id == waited.job_id
    assert other.jobs._store.take(kinds, 1e12) is None
    assert one.jobs._store.take(kinds, 1e12).job.job_id == file.job_id


def test_versions_of_one_source_are_read_one_at_a_time(two: tuple[Library, Library]):
    one, other = two
    for version in range(2):
        one.jobs.add_upload("a.md", f"# A\n\nHello {version}.".encode(), Into("default"))
    for each in (one, other):
        each._store._database.hold(each.jobs._store._number)
    first = one.jobs._store.take(("upload",), 1e12)
    assert other.jobs._store.take(("upload",), 1e12) is None
    one.jobs._store.change(first.job.job_id, ("parsing",), state="done")
    assert other.jobs._store.take(("upload",), 1e12) is not None


def test_what_a_server_that_is_gone_was_reading_another_one_reads(two: tuple[Library, Library]):
    one, other = two
    job = one.jobs.add_upload("a.md", b"# A\n\nHello.", Into("default"))
    assert one.jobs._store.take(("upload",), 1e12).job.job_id == job.job_id
    other.jobs._store.recover(3)
    assert other.jobs._store.take(("upload",), 1e12) is None, "it is being read"
    one._store._database._holder.close()
    other.jobs.start()
    done = ended(other, job)
    assert (done.state, done.attempts) == ("done", 2)


def test_after_a_start_of_postgresql_nobody_is_taken_for_gone(
    two: tuple[Library, Library], monkeypatch: pytest.MonkeyPatch
):
    one, other = two
    one.jobs.add_upload("a.md", b"# A\n\nHello.", Into("default"))
    assert one.jobs._store.take(("upload",), 1e12) is not None
    one._store._database._holder.close()
    monkeypatch.setattr("retrieval.postgres.jobs.GRACE_SECONDS", 10**6)
    other.jobs._store.recover(3)
    assert other.jobs.counts() == {"parsing": 1}
    monkeypatch.setattr("retrieval.postgres.jobs.GRACE_SECONDS", 0)
    other.jobs._store.recover(3)
    assert other.jobs.counts() == {"queued": 1}


def test_a_job_is_cancelled_at_any_server(
    two: tuple[Library, Library], embedder: HashingEmbedder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("retrieval.jobs.PROGRESS_SECONDS", 0.0)
    one, other = two
    asked, let = threading.Event(), threading.Event()

    def wait(texts: object) -> None:
        asked.set()
        assert let.wait(WAIT)

    embedder.before_encode = wait
    one.jobs.start()
    text = "\n\n".join(f"Paragraph {i} tells of gates. " * 12 for i in range(60))
    job = one.jobs.add_upload("a.md", text.encode(), Into("default"), waited_for=True)
    outcome = one.jobs.outcome(job.job_id)
    queued = one.jobs.add_upload("b.md", b"# B\n\nHello.", Into("default"), waited_for=True)
    assert asked.wait(WAIT)
    also = one.jobs.outcome(queued.job_id)
    assert other.jobs.cancel(OPERATOR, queued.job_id).state == "cancelled"
    assert other.jobs.cancel(OPERATOR, job.job_id).state == "cancelled"
    let.set()
    for each in (outcome, also):
        with pytest.raises(JobConflict, match="was cancelled"):
            each.result(WAIT)
    assert one.whole.documents()[1] == 0


# a server that goes


def test_what_is_acknowledged_survives_a_crash_of_the_server(library: Library, postgres: Server, folder: Path):
    library.ingest_paths([folder])
    kept = library.ingest_bytes("last.txt", b"The last word.")
    postgres.crash()
    with pytest.raises(StoreError, match="can't be reached") as refused:
        library._store._database._pool.timeout = 0.1
        library.whole.collections()
    assert refused.value.code == "unreachable_store"
    assert "can't be reached" in library.health()
    postgres.start()
    library._store._database._pool.timeout = WAIT
    assert library.whole.document(kept.document_id).text == "The last word."
    assert finds(library)


def test_the_next_request_after_a_restart_works(library: Library, postgres: Server, folder: Path):
    library.ingest_paths([folder])
    with ThreadPoolExecutor(4) as pool:  # several connections
        list(pool.map(lambda _: finds(library), range(8)))
    for work in (
        lambda: library.jobs._store.change("none", ["queued"], state="done"),  # a write at once
        lambda: finds(library),
        lambda: library.ingest_bytes("new.txt", b"Something new."),
        lambda: library.whole.remove(library.whole.search("fire exits").passages[0].document_id),
    ):
        postgres.crash()
        postgres.start()
        work()
    assert library.whole.documents()[1] == 4


def test_close_lets_everything_go(open_library: Open, tmp_path: Path):
    threads = set(threading.enumerate())
    library = open_library()
    library.jobs.start()
    library.ingest_bytes("a.txt", b"text")
    library.close()
    assert set(threading.enumerate()) <= threads
    assert open_files(tmp_path) == []


# what can't be opened


def refused(url: str, tmp_path: Path) -> StoreError:
    with pytest.raises(StoreError) as error:
        Library.open(tmp_path / "data", embedder=HashingEmbedder(), settings=replace(SETTINGS, database=url))
    return error.value


@pytest.mark.parametrize(
    "url",
    [
        "mysql://ada:geheim@localhost/db",
        "geheim",
        "postgresql://ada:geheim@localhost:port/db",
        "postgresql://ada:geheim/x@localhost/db",
        "postgresql://ada:x@geheim@localhost/db",
        "postgresql://ada:12/geheim@localhost/db",
    ],
)
def test_what_is_no_address_is_refused_without_its_password(url: str, tmp_path: Path):
    error = refused(url, tmp_path)
    assert error.code == "bad_database"
    assert "postgresql://USER@HOST/DATABASE" in str(error)
    assert "geheim" not in str(error)


def test_no_password_is_told(
    open_library: Open, place: Callable[[Path], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    error = refused("postgresql://ada:geheim@127.0.0.1:9/db?connect_timeout=2", tmp_path)
    assert error.code == "unreachable_store"
    assert "the PostgreSQL database 'db' at 127.0.0.1" in str(error)
    url = place(tmp_path).replace("postgres:@", "postgres:geheim@")
    library = Library.open(
        tmp_path / "data", embedder=HashingEmbedder(), reader=reading, settings=replace(SETTINGS, database=url)
    )
    library.ingest_bytes("a.txt", b"text")
    library.close()
    assert "geheim" not in caplog.text + str(error) + repr(library)


def test_what_is_no_database_of_ours_says_so(
    library: Library, postgres: Server, place: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:
        patched.setattr("retrieval.postgres.schema.SERVER_VERSION", 99)
        assert "needs 99 or newer" in str(refused(place(tmp_path), tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr("retrieval.postgres.schema.VECTOR_VERSION", (99, 0))
        assert "ALTER EXTENSION vector UPDATE" in str(refused(place(tmp_path), tmp_path))
    with library._store._database.write() as db:
        db.execute("UPDATE refdesk SET schema_version = 99")
    assert refused(place(tmp_path), tmp_path).code == "newer_store"
    with library._store._database.write() as db:
        db.execute("DROP TABLE refdesk")
    assert "another program" in str(refused(place(tmp_path), tmp_path))
    with library._store._database.write() as db:
        db.execute("CREATE ROLE guest LOGIN")
    with library._store._database.write() as db:
        db.execute("SELECT 1")
    guest = postgres.url.replace("postgres:@", "guest@").replace("/postgres?", "/template1?")
    assert "CREATE EXTENSION vector" in str(refused(guest, tmp_path))


def test_sqlite_asks_for_nothing_of_postgresql(tmp_path: Path):
    """And who wants PostgreSQL is told what to install."""
    code = (
        "import sys; sys.modules.update(psycopg=None, psycopg_pool=None, pgvector=None)\n"
        "from retrieval import Library, RetrievalSettings, StoreError\n"
        "Library.open(sys.argv[1]).close()\n"
        "try: Library.open(sys.argv[1], settings=RetrievalSettings(database='postgresql:///db'))\n"
        "except StoreError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert "pip install 'refdesk[postgres]'" in run.stdout, run.stderr


def test_words_of_another_recipe_are_counted_anew(open_library: Open, folder: Path, monkeypatch: pytest.MonkeyPatch):
    library = open_library()
    library.ingest_paths([folder])
    with library._store._database.write() as db:
        db.execute("UPDATE passages SET words = 0, found = ''")
        db.execute("DELETE FROM postings")
        db.execute("UPDATE refdesk SET words_recipe = 0")
    assert titles(library, '"fire exits"') == []
    library = open_library()
    assert titles(library, '"fire exits"') == ["safety"]
    assert len(titles(library, "exits thirt*")) == 1


# searching


def test_what_one_in_a_hundred_may_see_is_found(library: Library, monkeypatch: pytest.MonkeyPatch):
    """However vectors are compared: all, all that are seen, or by the index until enough that are seen are found."""
    rng = np.random.default_rng(6)
    vectors = rng.standard_normal((2000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def document(name: str, reader: str, count: int) -> NewDocument:
        passages = [NewPassage(i, i + 1, None, "", f"{name} {i}") for i in range(count)]
        return NewDocument("default", name, name, "text/plain", "", "", None, "x" * count, passages, (reader,))

    embedded = [Embedded(vector, b"") for vector in vectors]
    few, many = document("few", "public", 20), document("many", "group:hr", 1980)
    finder = library._indexes
    assert finder.put([(few, embedded[:20]), (many, embedded[20:])], finder.writing)
    timer = StageTimer(lambda: 0.0, ("vectors", "text"))
    for exact, share in ((10_000, 50), (0, 50), (0, 10**9)):
        monkeypatch.setattr("retrieval.postgres.finder.EXACT", exact)
        monkeypatch.setattr("retrieval.postgres.finder.SHARE", share)
        close = hits = 0
        for query in vectors[:50]:
            found = finder.find(ANYBODY, Question(query, []), 10, timer)
            exactly = np.argsort(-(vectors[:20] @ query))[:10]
            hits += len({int(each.row.passage.text.split()[1]) for each in found.values()} & set(exactly.tolist()))
            found = finder.find(OPERATOR, Question(query, []), 10, timer)
            close += sum(each.passage >= np.sort(vectors @ query)[-10] - 1e-3 for each in found.values())
        assert hits == 500 or (share > 50 and hits >= 490), "the index alone would miss one now and then"
        assert close >= (500 if exact else 475), "of all, by the index, hardly one is missed"


def test_the_order_is_that_of_sqlite(open_library: Open, tmp_path: Path):
    rng = np.random.default_rng(3)
    vocabulary = [f"word{i}" for i in range(40)]
    texts = []
    for i in range(60):
        words = rng.choice(vocabulary, size=rng.integers(3, 60), p=np.arange(1, 41)[::-1] / 820)
        readers = [["public"], ["group:it"], ["group:hr"]][i % 3]
        texts.append((f"{i}.txt", f"# {vocabulary[i % 40]}\n\n{' '.join(words)}.".encode(), readers))
    settings = replace(SETTINGS, candidates=100)
    library = open_library(settings=settings)
    with Library.open(tmp_path / "plain", embedder=HashingEmbedder(), reader=reading, settings=settings) as plain:
        for each in (library, plain):
            for name, text, readers in texts:
                each.ingest_bytes(name, text, readers=readers, tags=[name[0]], collection=name[-5])
        for who in (OPERATOR, BOB, ANYBODY):
            for _ in range(30):
                query = " ".join(rng.choice(vocabulary, size=rng.integers(1, 6)))
                ours, theirs = (each.seen_by(who).search(query, top_k=9) for each in (library, plain))
                assert [p.source for p in ours.passages] == [p.source for p in theirs.passages]
                np.testing.assert_allclose(
                    [p.score for p in ours.passages], [p.score for p in theirs.passages], atol=2e-6
                )
                assert (ours.facets, ours.relevance) == (theirs.facets, theirs.relevance)
            assert library.seen_by(who).documents()[1] == plain.seen_by(who).documents()[1]


def test_a_word_may_stand_in_any_number_of_passages_of_a_document(library: Library):
    passages = [NewPassage(i, i + 1, None, "", f"gate {i}x") for i in range(1000)]
    document = NewDocument("default", "a", "A", "text/plain", "", "", None, "x" * 1000, passages)
    finder = library._indexes
    embedded = [Embedded(np.eye(1, 64, i % 64, dtype=np.float32)[0], b"") for i in range(1000)]
    assert finder.put([(document, embedded)], finder.writing)
    found = finder.find(OPERATOR, Question(None, ["gate"]), 2000, StageTimer(lambda: 0.0, ("vectors", "text")))
    assert len(found) == 1000


def test_phrases_stand_in_one_part_of_a_passage(library: Library):
    text = "Closed. 東京都の天気 is fine; it's a gatekeeper's l'été."
    library.ingest_documents([("a.md", "North gate", text, "text/plain")])
    for query, there in (
        ('"north gate"', True),
        ('"gate closed"', False),
        ('"closed 東京"', True),
        ('"京都の"', True),
        ('"京天"', False),
        ("gatek*", True),
        ("\"gatekeeper's l'ete\"", True),
        ("close*", True),
        ("天気*", True),
    ):
        assert bool(titles(library, query)) is there, query


def test_what_postgresql_cannot_keep_is_neither_lost_nor_an_error(library: Library):
    library.ingest_documents([("a\0b", "A\0B", "Some text with \0 in it.", "text/plain")])
    (document,) = library.whole.documents()[0]
    text = library.whole.document(document.document_id).text
    assert library.whole.search("some text").passages[0].document_id == document.document_id
    for passage in library.whole.search("some text").passages:
        assert text[passage.start : passage.end] == passage.text
    with pytest.raises(UnknownDocument):
        library.whole.document("\0")
    long = "x" * 10_000
    library.ingest_bytes(long, b"Long names are kept.", readers=[f"user:{i}" for i in range(3000)])
    assert library.whole.search("long names").passages[0].source == long


def test_a_model_that_gives_other_numbers_is_named(open_library: Open, folder: Path):
    class Late(HashingEmbedder):
        """Known by its name alone until it is asked."""

        dim_at_hand = None

    open_library().ingest_paths([folder])
    library = open_library(embedder=Late(dim=48))
    for use in (lambda: library.whole.search("leave"), lambda: library.ingest_bytes("a.txt", b"text")):
        with pytest.raises(StoreError, match="48 numbers") as refused:
            use()
        assert refused.value.code == "bad_embedder"


def test_nothing_is_put_by_a_model_that_serves_no_longer(library: Library):
    library.ingest_bytes("a.txt", b"text")
    assert not library._indexes.put([], SharedEmbedder(HashingEmbedder(name="other")))
