"""How servers refuse: every shape of error in use, and what each means to us.  Pure functions.

{"error": {"message", "type", "param", "code"}}     OpenAI, vLLM, llama.cpp
{"object": "error", "message", "type", "code"}      SGLang, trtllm-serve, older vLLM
{"error": "text"}                                   Triton, also as an event; trtllm-serve for unknown fields
{"detail": ...}, HTML, plain text                   what stands in front of them
"""

from __future__ import annotations

import email.utils
import re
import time

import msgspec

from inference.errors import (
    BackendError,
    BadUpstream,
    Overloaded,
    PromptTooLong,
    RequestRefused,
    TimedOut,
    Unavailable,
    UnknownModel,
)
from inference.remote.wire import UpstreamError

_MAX_RETRY_AFTER_SECONDS = 3600.0
_MAX_MESSAGE_CHARACTERS = 300

_ROOM = r"(?:(?:context|input|model)[ _](?:length|size|window)|max_(?:num_tokens|seq_len|input_len))"
_CONTEXT = re.compile(_ROOM, re.IGNORECASE)
_LIMIT = re.compile(_ROOM + r"\D{0,24}(\d+)", re.IGNORECASE)
_UNKNOWN_MODEL = re.compile(r"unknown model|model\b.*(?:not found|not exist)", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")


def read_error(status: int, body: bytes) -> UpstreamError:
    """Every error shape in use: `{"error": {...}}`, `{"error": "text"}`, flat `{"message", "code"}`, plain text."""
    body = body.removeprefix(b"data:")
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        text = body[: 4 * _MAX_MESSAGE_CHARACTERS].decode("utf-8", "replace")
        return UpstreamError(status, _shorten(re.sub(r"<[^>]*>", " ", text)))
    inner = found.get("error", found) if isinstance(found, dict) else found
    if not isinstance(inner, dict):
        return UpstreamError(status, _shorten(str(inner)))
    code = inner.get("code")
    if status == 200 and isinstance(code, int) and not isinstance(code, bool):
        status = code
    kinds = [str(inner[key]) for key in ("type", "code") if inner.get(key) is not None]
    message = inner.get("message") or inner.get("detail") or inner
    needed, limit = inner.get("n_prompt_tokens"), inner.get("n_ctx")
    return UpstreamError(
        status,
        _shorten(str(message)),
        " ".join(kinds),
        needed if isinstance(needed, int) else None,
        limit if isinstance(limit, int) else None,
    )


def error_for(error: UpstreamError, model: str, max_tokens: int, retry_after: str | None) -> BackendError:
    """The BackendError that an upstream error means to us.  Its text goes to the asker: no hosts, no keys."""
    status, said = error.status, f": {error.message}" if error.message else ""
    if status in (200, 400, 413, 422, 500) and (too_long := _prompt_too_long(error, max_tokens)):
        return too_long  # Triton says it with a 500
    names_model = "model" in f"{error.message} {error.kind}".lower()
    if (status == 404 and names_model) or (status == 400 and _UNKNOWN_MODEL.search(error.message)):
        return UnknownModel(f"the inference server has no model {model!r}: set the backend's model{said}")
    if status in (400, 413, 422):
        return RequestRefused(f"the inference server refuses the request{said}")
    if status in (401, 403):
        return Unavailable("the inference server refuses our credentials: set the backend's api_key")
    if status == 404:
        return BadUpstream("the inference server has no such route: check the path of the backend's base_url")
    if status in (408, 504):
        return TimedOut(f"the inference server ran out of time{said}")
    seconds = retry_after_seconds(retry_after)
    if status == 429 or (status == 503 and (seconds is not None or "queue" in error.message.lower())):
        wait = 1.0 if seconds is None else seconds
        return Overloaded("the inference server is busy: try again later", retry_after_seconds=wait)
    if status in (502, 503):
        return Unavailable(f"the inference server is not ready (status {status}): try again later{said}")
    if 300 <= status < 400:
        return BadUpstream("the inference server redirects, and we don't follow: set base_url to the final address")
    if status == 200:
        return BadUpstream(f"the inference server reported an error{said}")
    return BadUpstream(f"the inference server answered with status {status}{said}")


def retry_after_seconds(header: str | None) -> float | None:
    """Retry-After as seconds from now: a number or an HTTP date; None where it is missing or nonsense."""
    if header is None:
        return None
    header = header.strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", header, re.ASCII):
        seconds = float(header)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_SECONDS)


def _prompt_too_long(error: UpstreamError, max_tokens: int) -> PromptTooLong | None:
    """Needed and allowed tokens, out of the fields or the sentence of a context-length error, if they are there."""
    if error.needed_tokens is not None and error.limit_tokens is not None:
        return PromptTooLong(error.needed_tokens + max_tokens, error.limit_tokens)
    if not (_CONTEXT.search(error.message) or _CONTEXT.search(error.kind)):
        return None
    limit_match = _LIMIT.search(error.message)
    if limit_match is None:
        return None
    limit = int(limit_match[1])
    # Servers name the whole request or only its prompt; the largest number that isn't the limit says the most.
    needed = max((n for n in map(int, _NUMBER.findall(error.message)) if n != limit), default=0)
    if needed <= limit:
        needed += max_tokens
    return PromptTooLong(needed, limit) if needed > limit else None


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_MESSAGE_CHARACTERS else text[: _MAX_MESSAGE_CHARACTERS - 1] + "…"
