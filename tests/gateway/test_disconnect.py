"""When nobody waits any more, generation stops: for streams and for plain JSON, on every route, over real sockets.

Litestar's own streams don't clean up when a client goes (litestar-org/litestar#3772), plain handlers
don't notice at all; LiteLLM fixed one route and left two open (BerriAI/litellm#30244).
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct

import httpx
import pytest

from tests.gateway.conftest import Live, until
from tests.gateway.fakes import FakeBackend

QUESTION = "When must the pump be primed?"
ROUTES = {
    "answers": ("/v1/answers", {"question": QUESTION}),
    "refdesk": ("/v1/chat/completions", {"model": "refdesk", "messages": [{"role": "user", "content": QUESTION}]}),
    "chat": ("/v1/chat/completions", {"model": "fake", "messages": [{"role": "user", "content": QUESTION}]}),
    "completions": ("/v1/completions", {"model": "fake", "prompt": QUESTION}),
}


@pytest.fixture
def backend() -> FakeBackend:
    """Says ever new words, so that only an abort ends it."""
    backend = FakeBackend([f" word{number}" for number in range(1000)])
    backend.endless = True
    return backend


def post(live: Live, route: str, **more) -> socket.socket:
    path, body = ROUTES[route]
    payload = json.dumps(body | more).encode()
    sock = socket.create_connection(("127.0.0.1", live.port), timeout=10)
    sock.sendall(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n".encode()
        + payload
    )
    return sock


def vanish(sock: socket.socket, *, reset: bool) -> None:
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_until(sock: socket.socket, what: bytes) -> bytes:
    got = b""
    while what not in got:
        chunk = sock.recv(4096)
        assert chunk, got
        got += chunk
    return got


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_a_client_that_goes_before_the_first_token(live, backend, route, stream, reset):
    backend.gate = asyncio.Event()  # never released: the first token does not come
    sock = post(live, route, stream=stream)
    until(lambda: backend.running)
    vanish(sock, reset=reset)
    until(lambda: not backend.running, seconds=1)
    until(lambda: live.get_metric("refdesk_aborted_total") == 1)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_in_the_middle(live, backend, route, stream):
    sock = post(live, route, stream=stream, max_tokens=8000)
    if stream:
        read_until(sock, b"word3")
    else:
        until(lambda: backend.running)
    vanish(sock, reset=False)
    until(lambda: not backend.running, seconds=1)


def test_a_client_that_goes_during_the_search(live, library, backend):
    import threading

    entered, leave = threading.Event(), threading.Event()
    search = library.whole.search

    def slow(*arguments, **named):
        entered.set()
        leave.wait(10)
        return search(*arguments, **named)

    library.whole.search = slow
    sock = post(live, "answers", stream=True)
    assert entered.wait(10)
    vanish(sock, reset=True)
    until(lambda: live.get_metric("refdesk_aborted_total") == 1)
    leave.set()
    assert backend.requests == []


def test_others_go_on(live, backend):
    gone, stays = post(live, "completions", stream=True), post(live, "completions", stream=True)
    read_until(gone, b"word3")
    read_until(stays, b"word3")
    until(lambda: len(backend.running) == 2)
    vanish(gone, reset=True)
    until(lambda: len(backend.running) == 1)
    read_until(stays, b"word")
    vanish(stays, reset=False)
    until(lambda: not backend.running)


def test_a_reader_that_never_reads_is_let_go_with_its_connection(config, library, backend, caplog):
    import msgspec

    from tests.gateway.conftest import running

    # Big pieces fill the socket's buffers soon.
    backend.reply = ["x" * 4096 + str(number) for number in range(1000)]
    server = msgspec.structs.replace(config.server, slow_reader_seconds=0.3)
    with running(msgspec.structs.replace(config, server=server), library, backend) as live:
        sock = post(live, "completions", stream=True)
        until(lambda: backend.running)
        until(lambda: not backend.running)
        assert live.get_metric("refdesk_aborted_total") == 1
        # uvicorn's own way to close waits until the client has read all.
        state = live.server.server_state
        until(lambda: not state.connections and not state.tasks)
        sock.close()
    assert "connection cut" in caplog.text
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_the_library_knows_while_somebody_is_answered(live, library):
    """What is read for nobody in particular stands back meanwhile."""
    with httpx.stream("POST", f"{live.url}/v1/answers", json={"question": QUESTION, "stream": True}) as response:
        assert next(response.iter_lines()) == "event: sources"
        assert library.served == 1
    until(lambda: library.served == 0)
