"""Everything that can go wrong, as the client sees it.

Our own routes answer with RFC 9457 problems, the OpenAI routes with OpenAI's envelope.  `problem_of`
is the one place where an exception becomes a status and a stable `code`; whatever it doesn't
know is a 500 that says nothing of the inside.
"""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, LitestarException

from gateway.disconnect import ClientGone
from gateway.identity import request_id
from inference import (
    BackendError,
    BadUpstream,
    GenerationFailed,
    Overloaded,
    RequestRefused,
    TimedOut,
    Unavailable,
    UnknownModel,
)
from retrieval import (
    JobConflict,
    NotAllowed,
    RetrievalError,
    StoreError,
    UnknownCollection,
    UnknownDocument,
    UnknownJob,
    UnreadableFile,
)

logger = logging.getLogger(__name__)

PROBLEM_JSON = "application/problem+json"
OPENAI_PATHS = ("/v1/chat/", "/v1/completions", "/v1/models")
CLIENT_CLOSED_REQUEST = 499


class ApiError(Exception):
    """A refusal that a route decided on.  `param` names the field at fault, where there is one."""

    def __init__(
        self, status: int, code: str, detail: str, *, param: str | None = None, retry_after_seconds: float | None = None
    ):
        self.status = status
        self.code = code
        self.detail = detail
        self.param = param
        self.retry_after_seconds = retry_after_seconds
        super().__init__(detail)


class NotReady(ApiError):
    """The server is up but still loading, or is going down."""

    def __init__(self, detail: str, code: str = "not_ready"):
        super().__init__(503, code, detail, retry_after_seconds=2.0)


class ShuttingDown(NotReady):
    def __init__(self) -> None:
        super().__init__("the server is shutting down: ask again in a moment", code="shutting_down")


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """RFC 9457.  `code` is stable and meant for programs, `detail` for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str = ""
    param: str | None = None


class OpenAIError(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorBody(msgspec.Struct, frozen=True):
    error: OpenAIError


def problem_of(error: BaseException, request_id: str) -> tuple[Problem, float | None]:
    """The problem that stands for an exception, and after how many seconds to try again (None: no use)."""
    status, code, detail, param, retry_after = _facts(error)
    phrase = "Client Closed Request" if status == CLIENT_CLOSED_REQUEST else HTTPStatus(status).phrase
    problem = Problem(
        type=f"urn:refdesk:problem:{code}",
        title=phrase,
        status=status,
        detail=detail,
        code=code,
        request_id=request_id,
        param=param,
    )
    return problem, retry_after


def openai_error(problem: Problem) -> OpenAIErrorBody:
    """The same problem in OpenAI's envelope."""
    kinds = {404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(problem.status, "invalid_request_error" if problem.status < 500 else "server_error")
    return OpenAIErrorBody(OpenAIError(problem.detail, kind, problem.param, problem.code))


def handle(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Litestar's exception handler for everything."""
    problem, retry_after = problem_of(error, request_id(request.scope))
    if problem.status == 500:
        logger.error("request %s failed", problem.request_id, exc_info=error)
    headers = dict(getattr(error, "headers", None) or {}) if problem.status == 405 else {}
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    openai = request.scope["path"].startswith(OPENAI_PATHS)
    return Response(
        content=msgspec.json.encode(openai_error(problem) if openai else problem),
        status_code=problem.status,
        media_type="application/json" if openai else PROBLEM_JSON,
        headers=headers,
    )


def _facts(error: BaseException) -> tuple[int, str, str, str | None, float | None]:
    match error:
        case ApiError():
            return error.status, error.code, error.detail, error.param, error.retry_after_seconds
        case BackendError():
            return _backend_status(error), error.code, str(error), None, error.retry_after_seconds
        case UnknownCollection() | UnknownDocument() | UnknownJob():
            return 404, error.code, str(error), None, None
        case NotAllowed():
            return 403, error.code, str(error), None, None
        case JobConflict():
            return 409, error.code, str(error), None, None
        case UnreadableFile():
            return 422, error.code, str(error), None, None
        case StoreError():
            logger.error("the store failed", exc_info=error)
            return 503, error.code, "the document store cannot be read or written just now", None, 5.0
        case RetrievalError():
            return 503, error.code, str(error), None, 5.0
        case ClientGone():
            return CLIENT_CLOSED_REQUEST, "client_closed_request", "the client went away", None, None
        case HTTPException() if error.status_code < 500:
            return error.status_code, *_framework(error), None, None
        case LitestarException() if "disconnected prematurely" in str(error):
            return CLIENT_CLOSED_REQUEST, "client_closed_request", "the client went away", None, None
        case _:
            return 500, "internal_error", "something went wrong on our side; the log has more under this id", None, None


def _backend_status(error: BackendError) -> int:
    match error:
        case UnknownModel():
            return 404
        case RequestRefused():
            return 400
        case Overloaded() | Unavailable():
            return 503
        case TimedOut():
            return 504
        case BadUpstream():
            return 502
        case GenerationFailed():
            return 500
        case _:
            return 502


def _framework(error: HTTPException) -> tuple[str, str]:
    match error.status_code:
        case 404:
            return "not_found", "there is nothing at this address; /schema lists the routes"
        case 405:
            return "method_not_allowed", "this address does not take that method; /schema lists the routes"
        case 413:
            return "too_large", "the request is larger than this server takes"
        case 415:
            return "unsupported_media_type", error.detail
        case _:
            return "invalid_request", _first_complaint(error)


def _first_complaint(error: HTTPException) -> str:
    if isinstance(error.extra, list) and error.extra and isinstance(error.extra[0], dict):
        complaint = error.extra[0]
        if complaint.get("key") == "data":
            return "the body is empty"
        return f"{complaint.get('key', 'request')}: {complaint.get('message', error.detail)}"
    return error.detail.split(": ", 1)[-1] if error.detail.startswith("400") else error.detail
