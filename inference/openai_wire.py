"""OpenAI's wire format, as a client reads and writes it: pure functions, no I/O.

Servers differ in what they accept and how they word errors; here is what all of them share.  A field beyond OpenAI's
is sent only when the request needs it, because strict servers refuse fields that they don't know.
"""

from __future__ import annotations

import email.utils
import re
import time
from typing import Any

import msgspec

from inference.backend import Constraint, FinishReason, GenerationRequest, Usage
from inference.config import OpenAIConfig
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
from inference.prompt import ChatPrompt

_MAX_RETRY_AFTER_SECONDS = 3600.0
_MAX_MESSAGE_CHARACTERS = 300

_CONTEXT = re.compile(r"context[ _](?:length|size|window)", re.IGNORECASE)
_LIMIT = re.compile(r"context (?:length|size|window)\D{0,24}(\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")


# ---- the request ----------------------------------------------------------------------------


def request_body(config: OpenAIConfig, request: GenerationRequest) -> tuple[str, dict[str, Any]]:
    """The path under the base URL, and the JSON body that asks for a stream with usage at its end.  Raises
    RequestRefused for what no such server is asked."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": config.model,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if sampling.top_p != 1.0:
        body["top_p"] = sampling.top_p
    if sampling.top_k:
        body["top_k"] = sampling.top_k
    if sampling.min_p:
        body["min_p"] = sampling.min_p
    if sampling.repetition_penalty != 1.0:
        body["repetition_penalty"] = sampling.repetition_penalty
    if sampling.presence_penalty:
        body["presence_penalty"] = sampling.presence_penalty
    if sampling.frequency_penalty:
        body["frequency_penalty"] = sampling.frequency_penalty
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.stop_token_ids:
        body["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.constraint is not None:
        body |= _format(sampling.constraint)
    if sampling.logprobs is not None:
        raise RequestRefused("logprobs are not read from remote servers")
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.ignore_eos:
        body["ignore_eos"] = True
    prompt = request.prompt
    if not isinstance(prompt, ChatPrompt):
        return "/completions", body | {"prompt": prompt.text}
    messages = [{"role": message.role, "content": message.text} for message in prompt.messages]
    if config.continues_reply and prompt.reply_prefix:
        messages.append({"role": "assistant", "content": prompt.reply_prefix})
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    return "/chat/completions", body | {"messages": messages}


def _format(constraint: Constraint) -> dict[str, Any]:
    match constraint.kind:
        case "regex":
            return {"structured_outputs": {"regex": constraint.value}}
        case "json_object":
            return {"response_format": {"type": "json_object"}}
        case "json_schema":
            schema = {"name": "answer", "schema": msgspec.json.decode(constraint.value)}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}


# ---- the stream -----------------------------------------------------------------------------


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: float | None = None
    completion_tokens: float | None = None
    prompt_tokens_details: _PromptDetails | None = None

    def read(self) -> Usage | None:
        """None where it lacks what the model made."""
        if self.completion_tokens is None:
            return None
        prompt = None if self.prompt_tokens is None else int(self.prompt_tokens)
        details = self.prompt_tokens_details
        return Usage(prompt, int(self.completion_tokens), None if details is None else details.cached_tokens)


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    object: str | None = None
    message: Any = None
    code: Any = None


class Chunk(msgspec.Struct, frozen=True):
    """One event, read.  `is_token`: the model made something, even if no text of the answer came of it."""

    text: str = ""
    is_token: bool = False
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: UpstreamError | None = None


class UpstreamError(msgspec.Struct, frozen=True):
    """An error as a server words it; `status` is its HTTP status or the integer code in the body."""

    status: int
    message: str
    kind: str = ""
    needed_tokens: int | None = None
    limit_tokens: int | None = None


_chunks = msgspec.json.Decoder(_Chunk)


def read_chunk(data: bytes) -> Chunk:
    """Read the data of one event; one that holds nothing is an empty chunk.  Raises msgspec.MsgspecError or
    UnicodeDecodeError where it is not a chunk."""
    raw = _chunks.decode(data)
    says_nothing = raw.choices is None and raw.usage is None
    if raw.error is not None or raw.object == "error" or (says_nothing and (raw.message or raw.code) is not None):
        return Chunk(error=read_error(200, data))
    usage = None if raw.usage is None else raw.usage.read()
    for choice in raw.choices or ():
        if choice.index != 0:
            continue
        delta = choice.delta or _Delta()
        text = (choice.text if choice.delta is None else delta.content) or ""
        is_token = bool(text or delta.reasoning or delta.reasoning_content)
        return Chunk(text, is_token, _finish_reason(choice.finish_reason), usage)
    return Chunk(usage=usage)


def _finish_reason(name: str | None) -> FinishReason | None:
    if not name:
        return None
    if name in ("length", "max_tokens"):
        return "length"
    return "abort" if name in ("abort", "cancelled", "error") else "stop"


# ---- errors ---------------------------------------------------------------------------------


def read_error(status: int, body: bytes) -> UpstreamError:
    """Every error shape in use: `{"error": {...}}`, `{"error": "text"}`, flat `{"message", "code"}`, plain text."""
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


def error_for(error: UpstreamError, config: OpenAIConfig, max_tokens: int, retry_after: str | None) -> BackendError:
    """The BackendError that an upstream error means to us.  Its text goes to the asker: no hosts, no keys."""
    status, said = error.status, f": {error.message}" if error.message else ""
    if status in (400, 413, 422):
        return _prompt_too_long(error, max_tokens) or RequestRefused(f"the inference server refuses the request{said}")
    if status in (401, 403):
        return Unavailable("the inference server refuses our credentials: set the backend's api_key")
    if status == 404:
        if "model" in error.message.lower() or "model" in error.kind.lower():
            return UnknownModel(f"the inference server has no model {config.model!r}: set the backend's model{said}")
        return BadUpstream("the inference server has no such route: check the path of the backend's base_url")
    if status in (408, 504):
        return TimedOut(f"the inference server ran out of time{said}")
    seconds = retry_after_seconds(retry_after)
    if status == 429 or (status == 503 and seconds is not None):
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
