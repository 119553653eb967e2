"""An answer as a client sees it arrive: server-sent events with the moment of their first byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Clock = Callable[[], float]


class Event(NamedTuple):
    """`at`: by the clock, when the event's first byte was here."""

    name: str
    data: bytes
    at: float


def read_events(pieces: Iterable[bytes], clock: Clock) -> Iterator[Event]:
    """Events out of byte pieces that end anywhere (lines end in LF or CRLF).  An unfinished last one is dropped."""
    rest = b""
    name, data, began = "message", [], None
    for piece in pieces:
        now = clock()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if data:
                    yield Event(name, b"\n".join(data), now if began is None else began)
                name, data, began = "message", [], None
                continue
            if began is None and not line.startswith(b":"):
                began = now
            field, _, value = line.partition(b":")
            if field == b"event":
                name = value.strip().decode("utf-8", "replace")
            elif field == b"data":
                data.append(value.removeprefix(b" "))
        if began is None and rest and not rest.startswith(b":"):
            began = now


class StreamFailed(Exception):
    """The answer did not come to its end; the message is short and the same for the same cause."""


@dataclass(slots=True)
class AnswerSeen:
    """Moments by the clock; None for what did not happen.  `refused`: no model was asked."""

    first_source: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    done: float | None = None
    characters: int = 0
    refused: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


def watch_answer(pieces: Iterable[bytes], clock: Clock) -> AnswerSeen:
    """Follow the stream of one answer to its `done`.  Raises StreamFailed for an `error` event (with its code), for
    a stream that ends without `done`, and for one that is not what the API promises."""
    seen = AnswerSeen()
    for event in read_events(pieces, clock):
        value = _json(event)
        match event.name:
            case "sources":
                seen.first_source = event.at
                seen.refused = bool(value.get("refused"))
            case "delta":
                if seen.first_source is None:
                    raise StreamFailed("a delta came before the sources")
                seen.first_token = event.at if seen.first_token is None else seen.first_token
                seen.last_token = event.at
                seen.characters += len(value.get("text", ""))
            case "usage":
                usage = value.get("usage", value)
                seen.prompt_tokens = usage.get("prompt_tokens") or 0
                seen.cached_tokens = usage.get("cached_tokens") or 0
                seen.completion_tokens = usage.get("completion_tokens") or 0
            case "error":
                raise StreamFailed(f"error event: {value.get('code', 'without a code')}")
            case "done":
                if value.get("finish_reason") == "abort":
                    raise StreamFailed("the answer was aborted by the server")
                if seen.first_source is None or not seen.characters:
                    raise StreamFailed("done came without sources or text")
                seen.done = event.at
                return seen
    raise StreamFailed("truncated: the stream ended without done")


def _json(event: Event) -> dict[str, Any]:
    try:
        value = json.loads(event.data)
    except ValueError:
        raise StreamFailed(f"the data of a {event.name} event is not JSON") from None
    return value if isinstance(value, dict) else {}
