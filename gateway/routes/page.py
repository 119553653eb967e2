"""GET /: the page, and the files it is made of.  No data is rendered on the server."""

from __future__ import annotations

from importlib.resources import files

from litestar import Response, get
from litestar.params import FromPath

from gateway.errors import ApiError

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)
MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _file(name: str) -> Response[bytes]:
    folder = files("gateway") / "page"
    known = {item.name for item in folder.iterdir()}
    suffix = name[name.rfind(".") :]
    if name not in known or suffix not in MEDIA_TYPES:
        raise ApiError(404, "not_found", "there is nothing at this address")
    return Response((folder / name).read_bytes(), media_type=MEDIA_TYPES[suffix], headers=HEADERS)


@get("/", include_in_schema=False, sync_to_thread=False)
def index() -> Response[bytes]:
    return _file("index.html")


@get("/page/{name:str}", include_in_schema=False, sync_to_thread=False)
def asset(name: FromPath[str]) -> Response[bytes]:
    return _file(name)


HANDLERS = [index, asset]
