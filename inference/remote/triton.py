"""NVIDIA's Triton Inference Server, KServe's protocol v2 with the generate extension.

`POST /v2/models/M/generate_stream` answers with one event for each response of the model, and its end is the end of
the body: there is no `[DONE]`.  An error before the first response comes with its status, a later one as an event
`{"error": "..."}` under status 200 (docs/protocol/extension_generate.md, src/http_server.cc).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import msgspec

from inference.backend import Capabilities, GenerationRequest, Usage
from inference.config import TritonConfig
from inference.errors import BadUpstream, Unavailable, UnknownModel
from inference.prompt import Prompt
from inference.remote.flavours import FLAVOURS, check
from inference.remote.openai import checked_url, finish_reason
from inference.remote.refusals import read_error
from inference.remote.tokenizing import ModelTokenizer
from inference.remote.wire import Call, Chunk, Facts, Fetch, Reader, encode


class TritonWire:
    """A model of text behind Triton; the prompt's text is made here, with the model's own tokenizer."""

    asks_first = False

    def __init__(self, config: TritonConfig):
        self._config = config
        self._flavour = FLAVOURS[config.flavour]
        self._server = checked_url(config.base_url, "http://127.0.0.1:8000").removesuffix("/v2")
        self._path = f"{self._server}/v2/models/{quote(config.model, safe='')}"
        self._tokenizer = ModelTokenizer(config.tokenizer)
        self._text_mode = config.text_mode or self._flavour.text_mode
        self.ends_with_body = not self._flavour.tells_reason
        self.capabilities = Capabilities(
            model=config.model,
            max_context_tokens=config.max_context_tokens,
            continues_reply=True,
            counts_tokens=True,
        )

    @property
    def model(self) -> str:
        return self._config.model

    async def call(self, request: GenerationRequest) -> Call:
        sampling, flavour, streams = request.sampling, self._flavour, self._config.streams
        check(flavour, sampling)
        body = {
            "id": request.request_id,
            "text_input": await self._tokenizer.render(request.prompt),
            **flavour.fields(sampling, streams),
        }
        return Call(
            self._path + ("/generate_stream" if streams else "/generate"),
            encode(body),
            streams,
            stop=sampling.stop if flavour.keeps_stop else (),
            prompt_tokens=None if flavour.tells_counts else await self._tokenizer.count(request.prompt),
        )

    def reader(self) -> Reader:
        told_by_events = self._flavour.tells_counts or self._config.streams
        count = None if told_by_events else self._tokenizer.count_text
        return _Responses(cumulative=self._text_mode == "cumulative", count=count).read

    async def look(self, fetch: Fetch) -> Facts:
        """Ready is what the server says of itself and of the model, and that the model has the flavour's inputs."""
        response = await fetch("GET", self._server + "/v2/health/ready")
        if response.status_code != 200:
            return Facts(Unavailable(f"the inference server is not ready (status {response.status_code})"))
        response = await fetch("GET", self._path + "/ready")
        if response.status_code != 200:
            known = await self._models(fetch)
            return Facts(UnknownModel(f"the inference server has no model {self.model!r} that is ready{known}"))
        response = await fetch("GET", self._path)
        try:
            inputs = {each.name for each in msgspec.json.decode(response.content, type=_Metadata).inputs}
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return Facts(detail="the inference server does not describe its model")
        if lacking := [name for name in self._flavour.needs if name not in inputs]:
            flavour = self._config.flavour
            return Facts(
                Unavailable(f"the model has no input {lacking[0]!r}: is its flavour {flavour!r} the right one?")
            )
        return Facts()

    async def _models(self, fetch: Fetch) -> str:
        """What models there are, as far as the server tells."""
        response = await fetch("POST", self._server + "/v2/repository/index", b"{}")
        try:
            index = msgspec.json.decode(response.content, type=list[_Listed])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return ""
        return "; it has " + (", ".join(f"{each.name} ({each.state.lower()})" for each in index[:8]) or "none")

    async def count_tokens(self, fetch: Fetch, prompt: Prompt) -> int | None:
        return await self._tokenizer.count(prompt)


class _Named(msgspec.Struct):
    name: str


class _Metadata(msgspec.Struct):
    inputs: list[_Named]


class _Listed(msgspec.Struct):
    name: str
    state: str = ""


class _Response(msgspec.Struct):
    """An output of one element is a scalar, one of several an array."""

    text_output: str | list[str] | None = None
    finish_reason: str | list[str] | None = None
    num_input_tokens: int | list[int] | None = None
    num_output_tokens: int | list[int] | None = None
    error: Any = None


_responses = msgspec.json.Decoder(_Response)


class _Responses:
    """Reads the responses of one answer; `cumulative`: each has the text and the counts of all before it, too.
    `count`: of the tokens of a text, for whole answers that don't tell them; else each response is one."""

    def __init__(self, cumulative: bool, count: Callable[[str], int] | None):
        self._cumulative = cumulative
        self._count = count
        self._text = ""
        self._tokens = 0

    def read(self, data: bytes) -> Chunk:
        raw = _responses.decode(data)
        if raw.error is not None:
            return Chunk(error=read_error(200, data))
        if raw.text_output is None:
            return Chunk()
        reason = finish_reason(_one(raw.finish_reason))
        text = self._new(_one(raw.text_output) or "", whole=reason is not None)
        told = _one(raw.num_output_tokens)
        if told is None:
            tokens, usage = 1 if self._count is None else self._count(text), None
        else:
            tokens = told - self._tokens if self._cumulative else told
            usage = Usage(_one(raw.num_input_tokens), self._tokens + tokens)
        self._tokens += tokens
        return Chunk(text, tokens, reason, usage)

    def _new(self, text: str, whole: bool) -> str:
        """What `text` adds.  A character that isn't whole yet ends as U+FFFD, and is another one in the next text."""
        if not self._cumulative:
            return text
        shown = text if whole else text.rstrip("\ufffd")
        if not shown.startswith(self._text):
            raise BadUpstream(
                "the inference server's texts don't continue each other: set the backend's text_mode to \"delta\""
            )
        new, self._text = shown[len(self._text) :], shown
        return new


def _one(value):
    """An output of several elements has one for each answer asked for; we ask for one."""
    return (value[0] if value else None) if isinstance(value, list) else value
