"""The seam between the client, which does the I/O, and a protocol, which knows the words.

client                                  wire
──────                                  ────
generate(request)  ── call() ─────────► where to send what
bytes ► events     ── reader()(data) ─► Chunk: text, tokens, why it ended, usage, error
health()           ── look(fetch) ────► Facts: ready, the context's size
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import httpx
import msgspec

from inference.backend import Capabilities, FinishReason, GenerationRequest, Usage
from inference.errors import BackendError
from inference.prompt import Prompt

Fetch = Callable[..., Awaitable[httpx.Response]]  # fetch(method, url, body=None): within the connect timeout
Reader = Callable[[bytes], "Chunk"]


class UpstreamError(msgspec.Struct, frozen=True):
    """An error as a server words it; `status` is its HTTP status or the integer code in the body."""

    status: int
    message: str
    kind: str = ""
    needed_tokens: int | None = None
    limit_tokens: int | None = None


class Chunk(msgspec.Struct, frozen=True):
    """One event, read.  `tokens`: how many the model made, even where no text of the answer came of it."""

    text: str = ""
    tokens: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: UpstreamError | None = None


class Call(msgspec.Struct, frozen=True):
    """One request to a server.  `stop`: strings that end the answer and that the server doesn't take off its end;
    `prompt_tokens`: by our own count, for servers that don't tell."""

    url: str
    body: bytes
    streams: bool = True
    stop: tuple[str, ...] = ()
    prompt_tokens: int | None = None


class Facts(msgspec.Struct, frozen=True):
    """What a server says of itself.  `problem`: why requests can't be answered, None if they can."""

    problem: BackendError | None = None
    detail: str = ""
    max_context_tokens: int | None = None


class Wire(Protocol):
    """A protocol.  `asks_first`: a server that must be looked at before the first request, since the model's name
    isn't known or the server answers with whatever model it has.  `ends_with_body`: there is no `[DONE]`, and an
    answer may end without a reason."""

    capabilities: Capabilities
    asks_first: bool
    ends_with_body: bool

    @property
    def model(self) -> str: ...

    async def call(self, request: GenerationRequest) -> Call:
        """Raises RequestRefused for what the server can't do, since some servers ignore what they don't know."""

    def reader(self) -> Reader:
        """Reads the events of one answer.  Raises msgspec.MsgspecError or UnicodeDecodeError for what is none."""

    async def look(self, fetch: Fetch) -> Facts: ...

    async def count_tokens(self, fetch: Fetch, prompt: Prompt) -> int | None: ...


def encode(body: dict[str, Any]) -> bytes:
    return msgspec.json.encode(body)
