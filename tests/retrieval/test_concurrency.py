"""Searching while documents change: no error, no half document, no wait behind bulk work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from retrieval import Library
from retrieval.embedding import BULK_BATCH, SharedEmbedder
from retrieval.locks import REST, PriorityLock, ReadWriteLock
from retrieval.pooling import PassageText
from tests.retrieval.hashing import HashingEmbedder

pytestmark = pytest.mark.every_place

WAIT = 30  # seconds until a stuck test fails; never waited for


def test_a_document_is_always_found_whole_while_it_is_replaced(library: Library):
    def version(number: int) -> bytes:
        return "\n\n".join(f"Gate {part} opens in version v{number}. " * 12 for part in ("north", "south")).encode()

    library.ingest_bytes("gates.txt", version(0))
    stop = threading.Event()

    def watch() -> int:
        searches = 0
        while not stop.is_set():
            found = library.whole.search("gate opens in version", top_k=10)
            versions = {word for passage in found.passages for word in passage.text.split() if word.startswith("v")}
            versions -= {"version"}
            assert len(versions) == 1, versions
            library.whole.quotes("which gate opens", found.passages)
            searches += 1
        return searches

    with ThreadPoolExecutor(3) as pool:
        watchers = [pool.submit(watch) for _ in range(3)]
        try:
            for number in range(1, 25):
                library.ingest_bytes("gates.txt", version(number))
        finally:
            stop.set()
        assert all(watcher.result(WAIT) > 0 for watcher in watchers)


def test_a_search_is_answered_in_the_middle_of_an_ingest(library: Library, folder: Path):
    library.ingest_paths([folder])
    middle, go_on = threading.Event(), threading.Event()

    documents = [(f"d{i}", f"D{i}", f"paragraph {i} " * 60, "text/plain") for i in range(60)]
    seen: list[str] = []

    def progress(event):
        seen.append(event.state)
        if seen.count("added") == 10:
            middle.set()
            assert go_on.wait(WAIT)

    with ThreadPoolExecutor(1) as pool:
        ingest = pool.submit(library.ingest_documents, documents, "bulk", progress)
        try:
            assert middle.wait(WAIT)
            assert library.whole.search("fire exits").passages[0].title == "safety"
            library.whole.remove(library.whole.search("soup on mondays").passages[0].document_id)
        finally:
            go_on.set()
        assert len(ingest.result(WAIT).added) == 60
    assert library.whole.documents()[1] == 63


def test_closing_ends_an_ingest_and_keeps_what_it_committed(open_library: Callable[..., Library]):
    library = open_library()
    middle, go_on = threading.Event(), threading.Event()

    def progress(event):
        if event.state == "added" and not middle.is_set():
            middle.set()
            assert go_on.wait(WAIT)

    documents = [(f"d{i}", f"D{i}", f"paragraph {i} " * 60, "text/plain") for i in range(200)]
    with ThreadPoolExecutor(2) as pool:
        ingest = pool.submit(library.ingest_documents, documents, "bulk", progress)
        assert middle.wait(WAIT)
        closing = pool.submit(library.close)
        while library.health() != "the library is closed":
            pass
        go_on.set()
        closing.result(WAIT)
        assert "closed" in str(ingest.exception(WAIT))
    kept = open_library().whole.documents()[1]
    assert 0 < kept < 200


def test_people_go_before_bulk_work():
    lock, order = PriorityLock(), []
    queued = threading.Barrier(2)

    def bulk(name: str) -> None:
        with lock.bulk():
            order.append(name)

    def urgent() -> None:
        queued.wait(WAIT)
        with lock.urgent():
            order.append("urgent")

    with ThreadPoolExecutor(2) as pool:
        with lock.bulk():
            person = pool.submit(urgent)
            queued.wait(WAIT)
            while not lock._urgent_waiting:
                pass
            worker = pool.submit(bulk, "bulk")
        person.result(WAIT)
        worker.result(WAIT)
    assert order == ["urgent", "bulk"]


def test_bulk_work_stands_back_while_people_are_served():
    moments = iter((0.0, WAIT / REST, 0.0, 0.0))
    lock, order = PriorityLock(lambda: next(moments)), []

    def bulk() -> None:
        with lock.bulk():
            order.append("bulk")

    bulk()  # which took so long that it has to rest now
    with ThreadPoolExecutor(1) as pool:
        with lock.serving(), lock.serving():
            worker = pool.submit(bulk)
            while not lock._changed._waiters:
                pass
            with lock.urgent():
                order.append("urgent")
        worker.result(WAIT)
    assert order == ["bulk", "urgent", "bulk"]


def test_bulk_work_gets_on_though_people_are_served_all_the_time():
    lock = PriorityLock(lambda: 0.0)
    with lock.serving():
        for _ in range(3):
            with lock.bulk():
                pass


@pytest.mark.parametrize(("seconds_each", "texts"), [(0.03, 4), (1.0, 2), (0.001, BULK_BATCH)])
def test_a_turn_of_bulk_work_is_short_whatever_the_model_once_people_are_served(seconds_each: float, texts: int):
    now, turns = 0.0, []

    def before(some) -> None:
        nonlocal now
        turns.append(len(some))
        now += seconds_each * len(some)

    embedder = HashingEmbedder()
    embedder.before_encode = before
    shared, passages = SharedEmbedder(embedder, lambda: now), [PassageText(f"text {i}", []) for i in range(100)]
    shared.encode_passages(passages)
    assert set(turns[:-1]) == {BULK_BATCH}
    turns.clear()
    with shared.serving():
        pass
    shared.encode_passages(passages)
    assert turns[1] == max(turns) == texts
    assert sum(turns) == 100


def test_a_waiting_writer_is_not_starved_by_readers():
    lock, order = ReadWriteLock(), []

    def write() -> None:
        with lock.write():
            order.append("write")

    def read() -> None:
        with lock.read():
            order.append("read")

    with ThreadPoolExecutor(2) as pool:
        with lock.read():
            writer = pool.submit(write)
            while not lock._writers_waiting:
                pass
            reader = pool.submit(read)
        writer.result(WAIT)
        reader.result(WAIT)
    assert order == ["write", "read"]
