"""The process around the app: a bound port first, then the server, then an orderly end.

SIGHUP  ──▶ the configuration is read again, and replicas join or leave
SIGTERM ──▶ no new connections, /health/ready 503 ──drain_seconds──▶ open streams get `error`
        ──▶ library and backend closed ──▶ exit 0
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from litestar import Litestar
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from gateway.app import create_app
from gateway.config import Config
from gateway.desk import Desk
from gateway.disconnect import CUT
from inference import Backend, FleetConfig
from retrieval import Library

logger = logging.getLogger(__name__)

BACKLOG = 2048
# What uvicorn waits beyond our own deadline before it cancels what is left.
GRACE_SECONDS = 1.5
SWITCH_SECONDS = 0.0005


class BindError(Exception):
    """The address can't be listened on; the message names it."""

    code = "cannot_listen"


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address.  Raises BindError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise BindError(f"cannot listen on {host}: {error.strerror or error}") from error
    except UnicodeError as error:  # what getaddrinfo raises for a name that no host can have
        raise BindError(f"cannot listen on {host}: it is not the name of a host") from error
    try:
        if sys.platform != "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise BindError(
            f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}; "
            "stop what listens there or choose another --port"
        ) from error
    sock.setblocking(False)
    return sock


def address_of(sock: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(AutoHTTPProtocol):
    """uvicorn's connection; its requests know how to cut it off from a client that doesn't read."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, CUT: transport.abort}


class Server(uvicorn.Server):
    """uvicorn for one app, with our drain at the first signal and exit code 0 after it."""

    def __init__(self, app: Litestar, reread: Callable[[], Config] | None = None):
        self._desk: Desk = app.state.desk
        # Without a fleet there is nothing to take on, and a terminal that is closed ends its server as ever.
        self._reread = reread if isinstance(self._desk.config.backend, FleetConfig) else None
        self._reloading: asyncio.Task[None] | None = None
        self._outdated = False
        drain_seconds = self._desk.config.server.drain_seconds
        config = uvicorn.Config(
            app,
            http=Connection,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=int(drain_seconds + GRACE_SECONDS + 0.5),
        )
        super().__init__(config)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        if self._reread is not None and hasattr(signal, "SIGHUP"):
            self._loop.add_signal_handler(signal.SIGHUP, self._begin_reload)
        await super().startup(sockets)

    def _begin_reload(self) -> None:
        self._outdated = True
        if self._reloading is None or self._reloading.done():
            self._reloading = asyncio.create_task(self._reload())

    async def _reload(self) -> None:
        assert self._reread is not None
        while self._outdated:  # a signal may come while replicas are opened
            self._outdated = False
            try:
                news = await self._desk.reload(self._reread())
            except Exception as error:  # whatever it is, what was serving goes on
                print(f"refdesk: the configuration was not taken on: {error}", file=sys.stderr, flush=True)
                continue
            for each in news or ["nothing has changed"]:
                print(f"refdesk: {each}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._desk.drain.begin, self._desk.config.server.drain_seconds)


def serve(
    config: Config,
    sock: socket.socket,
    *,
    library: Library | None = None,
    backend: Backend | None = None,
    on_ready: Callable[[], None] = lambda: None,
    reread: Callable[[], Config] | None = None,
) -> None:
    """Serve until a signal; `reread` the configuration at SIGHUP.  Raises what kept the library or the backend from
    opening."""
    app = create_app(config, library=library, backend=backend)
    desk: Desk = app.state.desk
    server = Server(app, reread)

    def fail() -> None:
        server.should_exit = True

    desk.on_failure = fail

    def ready() -> None:
        # The engine lets go of the interpreter hundreds of times a step; by default it would wait up to 5 ms to get
        # it back each time that the event loop is busy.  Not before: loading is two threads that only compute.
        sys.setswitchinterval(SWITCH_SECONDS)
        on_ready()

    desk.on_ready = ready
    asyncio.run(server.serve(sockets=[sock]))
    if desk.failure is not None:
        raise desk.failure


def leave(code: int) -> None:
    """Exit now, even where a thread still ingests: the store survives that, a waiting supervisor wouldn't wait."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    alive = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    if alive:
        os._exit(code)
    sys.exit(code)
