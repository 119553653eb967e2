from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from litestar.testing import TestClient

from gateway.app import create_app
from gateway.config import AnswersConfig, Config, ServerConfig
from gateway.serving import Server, address_of, bind
from tests.gateway.fakes import FakeBackend, FakeLibrary

PUMPS = "The pump must be primed before starting.\n\nThe valve opens at two bars of pressure."


@pytest.fixture
def library() -> FakeLibrary:
    library = FakeLibrary()
    library.add("Pumps", PUMPS)
    library.add("Ladders", "Ladders are inspected every twelve months by the safety officer.", collection="safety")
    return library


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(
        ["The", " pump must be", " primed before", " starting [1]", " [7]. Ice", " cream tastes wonderful."]
    )


@pytest.fixture
def config() -> Config:
    return Config(
        server=ServerConfig(drain_seconds=0.5, max_upload_mb=1, max_question_characters=200),
        answers=AnswersConfig(prompt="quoted", reads=4, max_tokens=256),
    )


@pytest.fixture
def client(config: Config, library: FakeLibrary, backend: FakeBackend) -> Iterator[TestClient]:
    with TestClient(create_app(config, library=library, backend=backend), raise_server_exceptions=False) as client:
        yield client


class Live:
    """A real uvicorn in a thread of its own."""

    def __init__(self, server: Server, url: str, port: int):
        self.server, self.url, self.port = server, url, port

    def get_metric(self, name: str) -> float | None:
        return self.server._desk.metrics.registry.get_sample_value(name)

    def stop(self) -> None:
        self.server.handle_exit(15, None)


@contextmanager
def running(config: Config, library: FakeLibrary | None, backend: FakeBackend | None) -> Iterator[Live]:
    app = create_app(config, library=library, backend=backend)
    sock = bind("127.0.0.1", 0)
    url, port = address_of(sock), sock.getsockname()[1]
    server = Server(app)
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]))
    thread.start()
    try:
        until(lambda: server.started)
        yield Live(server, url, port)
    finally:
        server.handle_exit(15, None)
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def live(config: Config, library: FakeLibrary, backend: FakeBackend) -> Iterator[Live]:
    with running(config, library, backend) as live:
        yield live


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that another thread is about to do; fail when it doesn't."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and not t.daemon and t.is_alive()]
    for thread in left:
        thread.join(5)
    assert not [t.name for t in left if t.is_alive()]
