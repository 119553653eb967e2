"""The Litestar application."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from litestar import Litestar, Request, Router
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, YamlRenderPlugin
from litestar.openapi.spec import Tag
from litestar.types import Message

from gateway import errors
from gateway.auth import principals
from gateway.config import Config
from gateway.desk import Desk
from gateway.identity import request_id
from gateway.routes import answers, documents, health, jobs, openai, page, search
from inference import Backend
from retrieval import Library, Principal

logger = logging.getLogger("gateway.access")

VERSION = "0.1.0"
ANSWERING = frozenset({"/v1/answers", "/v1/chat/completions", "/v1/completions"})
METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS"})


def create_app(
    config: Config | None = None, *, library: Library | None = None, backend: Backend | None = None
) -> Litestar:
    """The app.  Opens what isn't handed in beside the server's start; `app.state.desk` is the `Desk`."""
    config = config or Config()
    desk = Desk(config, library=library, backend=backend)

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncGenerator[None, None]:
        desk.open()
        try:
            yield
        finally:
            await desk.close()

    def provide_desk() -> Desk:
        return desk

    told = principals(config.access)

    def provide_principal(request: Request) -> Principal:
        return told(request)

    async def give_way(request: Request) -> None:  # in the event loop, as all of warming
        desk.give_way()

    app = App(
        route_handlers=[
            Router("/", route_handlers=[answers.ask, openai.complete, openai.chat], before_request=give_way),
            search.search,
            *documents.handlers(config),
            *jobs.HANDLERS,
            openai.models,
            openai.model,
            health.live,
            health.ready,
            health.metrics,
            *page.HANDLERS,
        ],
        dependencies={
            "desk": Provide(provide_desk, sync_to_thread=False),
            "principal": Provide(provide_principal, sync_to_thread=False),
        },
        exception_handlers={Exception: errors.handle, 500: errors.handle},
        lifespan=[lifespan],
        request_max_body_size=config.server.max_body_kb * 1024,
        openapi_config=OpenAPIConfig(
            title="refdesk",
            version=VERSION,
            description="Ask an organisation's documents; answers stream back with citations.",
            path="/schema",
            render_plugins=[JsonRenderPlugin(path=["/", "/openapi.json"]), YamlRenderPlugin(path="/openapi.yaml")],
            tags=[Tag(name=name) for name in ("answers", "search", "documents", "jobs", "openai", "health")],
        ),
        logging_config=None,
        debug=False,
    )
    app.state.desk = desk
    return app


class App(Litestar):
    """Litestar with a frame around every request, the unmatched ones too: its id, its place in the metrics."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        arrived = time.perf_counter()
        scope["state"] = dict(scope.get("state") or {})
        own_id = request_id(scope)
        status = 0
        completed = False

        async def framed_send(message: Message) -> None:
            nonlocal status, completed
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", own_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                completed = True
            await send(message)

        desk = self.state.desk
        try:
            with desk.serving() if scope["path"] in ANSWERING else nullcontext():
                await super().__call__(scope, receive, framed_send)
        finally:
            seconds = time.perf_counter() - arrived
            shown = str(status if completed else errors.CLIENT_CLOSED_REQUEST)
            route = scope.get("path_template") or "unmatched"
            method = scope["method"] if scope["method"] in METHODS else "other"
            desk.metrics.requests.labels(method, route, shown).inc()
            desk.metrics.durations.labels(route).observe(seconds)
            logger.info("%s %s %s %.3fs %s%s", scope["method"], route, shown, seconds, own_id, _client_id(scope))


def _client_id(scope: Any) -> str:
    """The client's own request id, made safe for a log line."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return f" client={given[:100].decode('latin-1')!r}" if given else ""
