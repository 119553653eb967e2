from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from msgspec.structs import replace

from loadtests.postgres_server import NoServer, Server, serving
from retrieval import Library, RetrievalSettings
from retrieval.formats import reading
from retrieval.sqlite.indexes import Indexes
from tests.retrieval.hashing import HashingEmbedder

SETTINGS = RetrievalSettings(relevance_floor=0.2)

PAGES = {
    "leave.md": "# Leave\n\nStaff have thirty days of leave each year.\n\n"
    "## Asking\n\nAsk your manager two weeks before.\n",
    "travel.md": "# Travel\n\nTrains are booked by the travel office.\n\nFlights need the consent of a director.\n",
    "safety.txt": "The fire exits are in the east wing. Extinguishers hang beside every door.\n",
    "news.html": (
        "<html><head><title>Canteen news</title></head><body><h1>Canteen</h1><p>The canteen serves soup on "
        "Mondays and fish on Fridays, and it is open from eleven until two.</p></body></html>"
    ),
}


@pytest.fixture
def embedder() -> HashingEmbedder:
    return HashingEmbedder()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    if "place" in metafunc.fixturenames and "every_place" in marks and "sqlite" not in marks:
        metafunc.parametrize("place", ["sqlite", "postgres"], indirect=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    with ExitStack() as running:
        try:
            server = running.enter_context(serving())
        except NoServer as error:
            pytest.skip(str(error))
        yield server


@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """The setting `database` for a data directory: a test marked `every_place` runs over each kind of store."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return lambda data_dir: ""
    server = request.getfixturevalue("postgres")
    monkeypatch.setattr("retrieval.postgres.jobs.GRACE_SECONDS", 0)
    return functools.cache(lambda data_dir: server.new_place())


@pytest.fixture
def open_library(
    tmp_path: Path, embedder: HashingEmbedder, place: Callable[[Path], str]
) -> Iterator[Callable[..., Library]]:
    """Opens libraries, by default the same one; closes what a test leaves open."""
    opened: list[Library] = []

    def open_one(data_dir: Path = tmp_path / "data", **options: object) -> Library:
        options.setdefault("reader", reading)
        options.setdefault("embedder", embedder)
        options["settings"] = replace(options.get("settings", SETTINGS), database=place(data_dir))
        opened.append(Library.open(data_dir, **options))
        return opened[-1]

    yield open_one
    for library in opened:
        library.close()


@pytest.fixture
def library(open_library: Callable[..., Library]) -> Library:
    return open_library()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of four readable pages."""
    folder = tmp_path / "pages"
    folder.mkdir()
    for name, text in PAGES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def nothing_leaks(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads and files of the test's own folder are gone when its libraries are closed."""
    threads = set(threading.enumerate())
    yield
    if "open_library" in request.fixturenames:
        return  # its own teardown closes later; tests of closing check for themselves
    assert set(threading.enumerate()) <= threads
    assert open_files(tmp_path) == []


def with_vectors(library: Library) -> int:
    """How many passages searches find by their vectors."""
    finder = library._indexes
    if isinstance(finder, Indexes):
        return len(finder.vectors)
    return len(library._store.vectors_of(range(1, 1000)))


def open_files(folder: Path) -> list[str]:
    """What this process holds open under `folder`."""
    held = []
    for descriptor in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if target.startswith(str(folder)):
            held.append(target)
    return held
