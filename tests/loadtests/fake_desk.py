"""A server of `POST /v1/answers` that streams what it is told to, for trying out the load test itself."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Behaviour = Literal["good", "truncated", "cut", "error", "refused", "shed", "broken"]

SOURCES = {"sources": [{"title": "With"}], "quotes": [], "refused": False}


def event(name: str, value: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()


@contextlib.contextmanager
def desk(behaviour: Behaviour) -> Iterator[tuple[str, list[dict]]]:
    """Its address, and the questions that it was asked so far."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if behaviour == "shed":
                return self._plain(503, {"Retry-After": "0.2"})
            if behaviour == "broken":
                return self._plain(500, {})
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self._stream()

        def _stream(self) -> None:
            self._chunk(b": still here\n\n")
            self._chunk(event("sources", SOURCES | {"refused": behaviour == "refused"}))
            self._chunk(event("delta", {"text": "It leaves "}))
            if behaviour == "error":
                self._chunk(event("error", {"code": "bad_upstream", "status": 502}))
            elif behaviour == "cut":
                self.close_connection = True
                return
            elif behaviour != "truncated":
                self._chunk(event("delta", {"text": "the block."}))
                self._chunk(event("citations", {"citations": []}))
                self._chunk(event("usage", {"usage": {"prompt_tokens": 9, "completion_tokens": 2, "cached_tokens": 3}}))
                self._chunk(event("done", {"finish_reason": "stop"}))
            self._chunk(b"")

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        def _plain(self, status: int, headers: dict[str, str]) -> None:
            body = json.dumps({"code": "overloaded"}).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
