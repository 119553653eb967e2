"""A refdesk server from the outside, for the command line: the same answers, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from inference.sse import EventReader, EventTooLarge

T = TypeVar("T")
NO_JSON = (msgspec.DecodeError, UnicodeDecodeError)
MAX_EVENT_BYTES = 32 << 20
TIMEOUT = httpx.Timeout(60.0, connect=5.0)


class ServerError(Exception):
    """The server can't be reached or says no; the message is for the person who asked."""

    code = "server_error"


class _Documents(msgspec.Struct):
    documents: list[dict[str, Any]]


class _Jobs(msgspec.Struct):
    jobs: list[dict[str, Any]]


class Client:
    """One server.  Every method raises ServerError."""

    def __init__(self, url: str):
        self._url = url.rstrip("/")
        try:
            self._http = httpx.Client(base_url=self._url, timeout=TIMEOUT)
        except httpx.InvalidURL as error:
            raise ServerError(f"{url} is not an address: {error}") from error

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def answer(self, request: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events of a streamed answer, name and content."""
        reader = EventReader(MAX_EVENT_BYTES)
        complete = False
        try:
            with self._http.stream("POST", "/v1/answers", json=request | {"stream": True}) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                for chunk in response.iter_bytes():
                    for event in reader.feed(chunk):
                        content = msgspec.json.decode(event.data, type=dict[str, Any])
                        if event.event == "error":
                            raise ServerError(content.get("detail", "the server failed"))
                        complete = complete or event.event == "done"
                        yield event.event, content
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (*NO_JSON, EventTooLarge) as error:
            raise self._foreign() from error
        if not complete:
            raise ServerError(f"{self._url} closed the connection before the answer was complete")

    def documents(self, *, collection: str | None, offset: int, limit: int) -> list[dict[str, Any]]:
        """A page of the list; empty after its end."""
        query = {"collection": collection, "offset": offset, "limit": limit}
        response = self._call("GET", "/v1/documents", params={k: v for k, v in query.items() if v is not None})
        return self._json(response, _Documents).documents

    def jobs(self, *, states: Sequence[str], offset: int, limit: int) -> list[dict[str, Any]]:
        """A page of the list, the newest first; empty after its end."""
        query = {"state": list(states), "offset": offset, "limit": limit}
        return self._json(self._call("GET", "/v1/jobs", params=query), _Jobs).jobs

    def change_job(self, job_id: str, change: str) -> dict[str, Any]:
        """`change`: cancel or retry."""
        return self._json(self._call("POST", f"/v1/jobs/{quote(job_id, safe='')}/{change}"), dict[str, Any])

    def remove(self, document_id: str) -> None:
        self._call("DELETE", f"/v1/documents/{quote(document_id, safe='')}")

    def _json(self, response: httpx.Response, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(response.content, type=kind)
        except NO_JSON as error:
            raise self._foreign() from error

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise _refusal(response)
        return response

    def _foreign(self) -> ServerError:
        return ServerError(f"{self._url} answers, but not as refdesk does: is the address right?")

    def _unreachable(self, error: Exception) -> ServerError:
        if isinstance(error, httpx.ConnectError):
            return ServerError(f"no server answers at {self._url}: start one with `refdesk serve`")
        if isinstance(error, httpx.TimeoutException):
            return ServerError(f"{self._url} did not answer in time")
        return ServerError(f"{self._url}: {error or type(error).__name__}")


def _refusal(response: httpx.Response) -> ServerError:
    try:
        problem = msgspec.json.decode(response.content)
        return ServerError(str(problem["detail"]))
    except (*NO_JSON, KeyError, TypeError):
        return ServerError(f"the server answered {response.status_code} {response.reason_phrase}")
