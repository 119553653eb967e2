"""A Locust user who asks questions and watches the answers stream in.

Reported apart, in milliseconds from sending the question:

    first source · first token · last token     each milestone of an answer
    answer                                      the whole stream, `done` included; failures count here
    refused (nothing in the documents)          answered without a model call: no failure
    shed (429 or 503 with Retry-After)          the server asked us to wait, and we do: no failure
"""

from __future__ import annotations

import http.client
import itertools
import os
import time
from collections.abc import Iterator

import gevent
import requests
import urllib3
from locust import HttpUser, between, task

from loadtests.questions import ZipfChoice
from loadtests.streams import AnswerSeen, StreamFailed, watch_answer

ANSWER, REFUSED, SHED = "answer", "refused (nothing in the documents)", "shed (429 or 503 with Retry-After)"
MILESTONES = ("first source", "first token", "last token")
CONNECT_SECONDS, SILENCE_SECONDS = 5, 60
_LONGEST_WAIT_SECONDS = 10.0

_numbers = itertools.count(int(os.environ.get("LOAD_SEED", "0")))


class Asker(HttpUser):
    """Thinks for a second or so, asks, reads the answer to its end."""

    wait_time = between(0.5, 1.5)

    def on_start(self) -> None:
        self.choose = ZipfChoice(seed=next(_numbers))
        self.client.headers["Accept"] = "text/event-stream"
        self.client.headers["Accept-Encoding"] = "identity"
        if key := os.environ.get("LOAD_API_KEY"):
            self.client.headers["Authorization"] = f"Bearer {key}"

    @task
    def ask(self) -> None:
        body = {"question": self.choose(), "stream": True, "max_tokens": int(os.environ.get("LOAD_MAX_TOKENS", "64"))}
        began = time.perf_counter()
        wait_seconds = 0.0
        with self.client.post(
            "/v1/answers",
            json=body,
            name=ANSWER,
            stream=True,
            catch_response=True,
            timeout=(CONNECT_SECONDS, SILENCE_SECONDS),
        ) as response:
            if response.status_code in (429, 503) and "Retry-After" in response.headers:
                response.request_meta["name"] = SHED
                wait_seconds = _seconds(response.headers["Retry-After"])
                response.success()
            elif response.status_code == 0:
                response.failure(f"no connection: {type(response.error).__name__}")
            elif response.status_code != 200:
                response.failure(f"status {response.status_code} {_code(response)}".rstrip())
            else:
                self._watch(response, began)
            response.request_meta["response_time"] = (time.perf_counter() - began) * 1000
        if wait_seconds:
            gevent.sleep(wait_seconds)

    def _watch(self, response, began: float) -> None:
        pieces = _pieces(response.raw)
        try:
            seen = watch_answer(pieces, time.perf_counter)
            for _ in pieces:  # to the end of the body: hanging up right after `done` would look like leaving
                pass
        except StreamFailed as failure:
            response.failure(str(failure))
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            response.failure(f"truncated: {type(error).__name__}")
        else:
            response.request_meta["response_length"] = seen.characters
            response.request_meta["context"] = {"seen": seen}
            if seen.refused:
                response.request_meta["name"] = REFUSED
            else:
                self._report(seen, began)
            response.success()
        finally:
            response.close()

    def _report(self, seen: AnswerSeen, began: float) -> None:
        for name, at in zip(MILESTONES, (seen.first_source, seen.first_token, seen.last_token), strict=True):
            self.environment.events.request.fire(
                request_type="SSE",
                name=name,
                response_time=(at - began) * 1000,
                response_length=0,
                exception=None,
                context={},
            )


def _pieces(raw: urllib3.HTTPResponse) -> Iterator[bytes]:
    """Bytes as they arrive, one network read at a time; a body that is cut raises."""
    while piece := raw.read1(65536):
        yield piece


def _code(response: requests.Response) -> str:
    try:
        return str(response.json().get("code", ""))
    except (ValueError, AttributeError, requests.RequestException):
        return ""


def _seconds(retry_after: str) -> float:
    try:
        return min(max(float(retry_after), 0.1), _LONGEST_WAIT_SECONDS)
    except ValueError:
        return 1.0
