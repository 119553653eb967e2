"""Addresses are asked only on the public internet, whatever they say, lead to or resolve to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address

import pytest

from retrieval import UnreadableFile
from retrieval.fetching import fetch, is_public


class Server(ThreadingHTTPServer):
    """Answers by path; counts who came.  Closing it waits for its threads."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hits: list[tuple[str, str]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.hits.append((self.headers["Host"], self.path))
        kind, body, to = "text/plain", b"It says so.", ""
        if self.path.startswith("/to/"):
            to = self.path[4:]
        elif self.path == "/page":
            kind, body = "text/html; charset=utf-8", b"<html><body><p>A page.</p></body></html>"
        elif self.path == "/large":
            body = b"x" * 4096
        self.send_response(302 if to else {"/absent": 404, "/busy": 503}.get(self.path, 200))
        if to:
            self.send_header("Location", to)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Server, url: str, names: dict[str, list[str]] | None = None, **how: object):
    """As if 127.0.0.1 were public, and 127.0.0.2 a machine inside the house."""
    port = server.server_address[1]
    known = {"docs.example": ["127.0.0.1"]} | (names or {})
    return fetch(
        url.replace("PORT", str(port)),
        how.pop("max_bytes", 10_000),
        5.0,
        ports=frozenset((port,)),
        resolve=lambda host, _: known.get(host) or [host],
        public=lambda number: str(number) == "127.0.0.1",
        **how,
    )


def test_a_document_is_fetched_by_its_name(server: Server):
    found = ask(server, "http://docs.example:PORT/a%20b.txt?x=1#part")
    assert (found.name, found.data) == ("a b.txt", b"It says so.")
    assert server.hits == [(f"docs.example:{server.server_address[1]}", "/a%20b.txt?x=1")]
    assert ask(server, "http://docs.example:PORT/page").name == "page.html"
    assert ask(server, "http://docs.example:PORT/").name == "docs.example"


def test_redirects_are_followed_and_checked(server: Server):
    found = ask(server, "http://docs.example:PORT/to//page")
    assert (found.name, found.url.endswith("/page")) == ("page.html", True)
    for target in (
        "http://127.0.0.2:PORT/x",
        "http://inside.example:PORT/x",
        "file:///etc/passwd",
        "gopher://docs.example/x",
        "http://docs.example:22/x",
        "//127.0.0.2:PORT/x",
    ):
        hits = len(server.hits)
        target = target.replace("PORT", str(server.server_address[1]))
        with pytest.raises(UnreadableFile) as refused:
            ask(server, f"http://docs.example:PORT/to/{target}", {"inside.example": ["127.0.0.2"]})
        assert refused.value.code == "url_forbidden", target
        assert len(server.hits) == hits + 1, "only the redirect itself"
    with pytest.raises(UnreadableFile, match="more than 5 times"):
        ask(server, "http://docs.example:PORT" + "/to/" * 7 + "x")


@pytest.mark.parametrize(
    ("names", "url"),
    [
        ({"two.example": ["127.0.0.1", "127.0.0.2"]}, "http://two.example:PORT/"),
        ({"none.example": ["127.0.0.2"]}, "http://none.example:PORT/"),
        ({}, "http://user:secret@docs.example:PORT/"),
        ({}, "http://docs.example:1/"),
        ({}, "ftp://docs.example:PORT/"),
        ({}, "file:///etc/passwd"),
        ({}, "docs.example"),
        ({}, "http://"),
        ({}, "http://[::1"),
        ({}, ""),
    ],
)
def test_what_must_not_be_asked_is_not(server: Server, names: dict, url: str):
    with pytest.raises(UnreadableFile) as refused:
        ask(server, url, names)
    assert refused.value.code == "url_forbidden"
    assert server.hits == []


def test_a_second_look_up_changes_nothing(server: Server):
    """The name resolves to another address each time: the one that was checked is the one that is asked."""
    answers = iter((["127.0.0.1"], ["127.0.0.2"]))
    port = server.server_address[1]
    fetch(
        f"http://turning.example:{port}/",
        1000,
        5.0,
        ports=frozenset((port,)),
        resolve=lambda host, _: next(answers),
        public=lambda number: str(number) == "127.0.0.1",
    )
    assert len(server.hits) == 1


@pytest.mark.parametrize(
    ("path", "code", "reason"),
    [("/absent", "url_refused", "404"), ("/busy", "url_failed", "503"), ("/large", "too_large", "larger")],
)
def test_what_comes_back_wrong_says_why(server: Server, path: str, code: str, reason: str):
    with pytest.raises(UnreadableFile, match=reason) as refused:
        ask(server, f"http://docs.example:PORT{path}", max_bytes=1000)
    assert refused.value.code == code


@pytest.mark.parametrize(
    "url", ["http://127.1/", "http://2130706433/", "http://0x7f000001/", "http://[::1]/", "http://169.254.169.254/",
            "http://[::ffff:10.0.0.1]/", "http://0/", "http://localhost/"]
)  # fmt: skip
def test_names_of_this_machine_are_forbidden(url: str):
    """With the system's own look-up."""
    with pytest.raises(UnreadableFile) as refused:
        fetch(url, 1000, 5.0)
    assert refused.value.code == "url_forbidden"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("192.0.2.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("0.0.0.0", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("::ffff:8.8.8.8", True),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),
        ("ff02::1", False),
    ],
)
def test_what_is_public(address: str, public: bool):
    assert is_public(ip_address(address)) == public
