"""GET /health/live and /health/ready, GET /metrics: for those who run the server."""

from __future__ import annotations

import msgspec
from litestar import Response, get
from litestar.di import NamedDependency
from prometheus_client import CONTENT_TYPE_LATEST

from gateway.desk import Desk


class Live(msgspec.Struct, frozen=True):
    status: str = "live"


class Ready(msgspec.Struct, frozen=True):
    """`lacking` says what requests still wait for; empty when ready.  `notices`: what else somebody should see to."""

    status: str
    lacking: list[str]
    notices: list[str] = []


@get("/health/live", tags=["health"], summary="Is the process up?")
async def live() -> Live:
    return Live()


@get("/health/ready", tags=["health"], summary="Can questions be answered now?", description="503 while they can't.")
async def ready(desk: NamedDependency[Desk]) -> Response[Ready]:
    lacking = await desk.unready()
    status = "unready" if lacking else "ready"
    headers = {"Retry-After": "2"} if lacking else {}
    return Response(Ready(status, lacking, desk.notices()), status_code=503 if lacking else 200, headers=headers)


@get("/metrics", tags=["health"], summary="Prometheus metrics", media_type="text/plain")
async def metrics(desk: NamedDependency[Desk]) -> Response[bytes]:
    return Response(
        desk.metrics.render(desk.backend if desk.has_backend else None),
        headers={"Content-Type": CONTENT_TYPE_LATEST},
        media_type=CONTENT_TYPE_LATEST,
    )
