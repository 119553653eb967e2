"""OpenAI's API as a client writes and reads it; what servers differ in stands in `dialects`."""

from __future__ import annotations

import hashlib
import re
from typing import Any
from urllib.parse import urlsplit

import msgspec

from inference.backend import Capabilities, FinishReason, GenerationRequest, Usage
from inference.config import OpenAIConfig
from inference.errors import Unavailable, UnknownModel
from inference.prompt import ChatPrompt, Prompt
from inference.remote.dialects import CHAT, COMPLETIONS, DIALECTS, sampling_fields
from inference.remote.refusals import read_error
from inference.remote.tokenizing import ModelTokenizer
from inference.remote.wire import Call, Chunk, Facts, Fetch, Reader, encode

PUBLIC_SCOPE = "public"


class OpenAIWire:
    """Raises Unavailable for settings that no server could follow."""

    ends_with_body = False

    def __init__(self, config: OpenAIConfig):
        self._config = config
        self._dialect = DIALECTS[config.dialect]
        self._base_url = normalise_base_url(config.base_url)
        self._server = re.sub(r"/v\d+[a-z0-9]*$", "", self._base_url)
        self._model = config.model
        self._tokenizer = ModelTokenizer(config.tokenizer) if config.tokenizer else None
        if config.continues_reply and self._dialect.continues is None:
            raise Unavailable(f"{config.dialect} continues no reply: leave continues_reply out")
        if config.priority and self._dialect.priorities is None:
            raise Unavailable(f"the dialect {config.dialect} knows no priorities: leave priority out")
        self.asks_first = not config.model or not self._dialect.knows_model
        self.capabilities = Capabilities(
            model=config.model,
            max_context_tokens=config.max_context_tokens,
            continues_reply=config.continues_reply,
            counts_tokens=self._tokenizer is not None or self._dialect.counts is not None,
        )

    @property
    def model(self) -> str:
        return self._model

    async def call(self, request: GenerationRequest) -> Call:
        path, body = self._prompt(request.prompt)
        body = {"model": self._model, **body, "stream": True, "stream_options": {"include_usage": True}}
        body |= sampling_fields(self._dialect, request.sampling)
        if self._config.priority and self._dialect.priorities is not None:
            body["priority"] = self._dialect.priorities[request.priority]
        if path in self._dialect.salted and request.scope != PUBLIC_SCOPE:
            body["cache_salt"] = hashlib.sha256(request.scope.encode()).hexdigest()
        return Call(self._base_url + path, encode(body))

    def _prompt(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        """The path under the base URL, and the fields that hold the prompt."""
        if not isinstance(prompt, ChatPrompt):
            return COMPLETIONS, {"prompt": prompt.text}
        messages = [{"role": message.role, "content": message.text} for message in prompt.messages]
        if not (self._config.continues_reply and prompt.reply_prefix):
            return CHAT, {"messages": messages}
        messages.append({"role": "assistant", "content": prompt.reply_prefix})
        return CHAT, {"messages": messages} | (self._dialect.continues or {})

    def reader(self) -> Reader:
        return read_chunk

    # ---- what the server says of itself ----------------------------------------------------

    async def look(self, fetch: Fetch) -> Facts:
        if self._dialect.health is not None:
            response = await fetch("GET", self._server + self._dialect.health)
            if response.status_code != 200:
                return Facts(Unavailable(f"the inference server is not ready (status {response.status_code})"))
        response = await fetch("GET", self._base_url + "/models")
        if response.status_code == 404 and self._model:
            return Facts(detail="the inference server answers, but lists no models")
        if response.status_code != 200:
            return Facts(Unavailable(f"the inference server lists no models (status {response.status_code})"))
        try:
            cards = msgspec.json.decode(response.content, type=_ModelList).data
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return Facts(Unavailable("the inference server does not list models: is base_url an OpenAI API?"))
        names = [card.id for card in cards]
        if not self._config.model:
            if len(names) != 1:
                return Facts(UnknownModel(f"choose the backend's model: the inference server has {_some(names)}"))
            self._model = names[0]
        elif names and self._model not in names:
            missing = f"the inference server has no model {self._model!r}; it has {_some(names)}"
            return Facts(UnknownModel(f"{missing}: set the backend's model"))
        context = next((card.max_model_len for card in cards if card.id == self._model), None)
        if self._dialect.counts == "template":
            context = await self._slot_context(fetch)
        return Facts(max_context_tokens=context)

    async def _slot_context(self, fetch: Fetch) -> int | None:
        """llama.cpp tells what one request may hold; its list of models, only what the model was trained for."""
        response = await fetch("GET", self._server + "/props")
        try:
            return msgspec.json.decode(response.content, type=_Props).default_generation_settings.n_ctx
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None

    async def count_tokens(self, fetch: Fetch, prompt: Prompt) -> int | None:
        """By the tokenizer that the backend's settings name, else by the server's; None where there is neither."""
        if self._tokenizer is not None:
            return await self._tokenizer.count(prompt)
        if self._dialect.counts is None:
            return None
        _, body = self._prompt(prompt)
        if self._dialect.counts == "template":
            if "messages" in body:
                response = await fetch("POST", self._server + "/apply-template", encode(body))
                body = {"prompt": msgspec.json.decode(response.content, type=_Templated).prompt}
            body = {"content": body["prompt"], "add_special": True}
        else:
            body = {"model": self._model, **body}
        response = await fetch("POST", self._server + "/tokenize", encode(body))
        counted = msgspec.json.decode(response.content, type=_Tokenized)
        return len(counted.tokens) if counted.count is None else counted.count


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _ModelList(msgspec.Struct):
    data: list[_Card] = []


class _Settings(msgspec.Struct):
    n_ctx: int


class _Props(msgspec.Struct):
    default_generation_settings: _Settings


class _Templated(msgspec.Struct):
    prompt: str


class _Tokenized(msgspec.Struct):
    tokens: list[int]
    count: int | None = None


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) or "none"


def normalise_base_url(base_url: str) -> str:
    """The URL that routes are appended to; `/v1` is added unless the path names a version already."""
    url = checked_url(base_url, "http://127.0.0.1:8000/v1")
    return url if re.search(r"/v\d+[a-z0-9]*(/|$)", urlsplit(url).path) else url + "/v1"


def checked_url(base_url: str, example: str) -> str:
    """Without the slash at its end, and without a query.  Raises Unavailable."""
    try:
        parts = urlsplit(base_url.strip())
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        valid = False
    if not valid:
        raise Unavailable(f"base_url {base_url!r} is no http(s) URL: write it like {example}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


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
    prompt_cache_hit_tokens: int | None = None  # DeepSeek

    def read(self, timings: _Timings | None) -> Usage | None:
        """None where it lacks what the model made."""
        if self.completion_tokens is None:
            return None
        prompt = None if self.prompt_tokens is None else int(self.prompt_tokens)
        cached = self.prompt_cache_hit_tokens if timings is None else timings.cache_n
        if self.prompt_tokens_details is not None and self.prompt_tokens_details.cached_tokens is not None:
            cached = self.prompt_tokens_details.cached_tokens
        return Usage(prompt, int(self.completion_tokens), cached)


class _Timings(msgspec.Struct):
    cache_n: int | None = None  # llama.cpp


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: Any = None
    object: str | None = None
    message: Any = None
    code: Any = None


_chunks = msgspec.json.Decoder(_Chunk)


def read_chunk(data: bytes) -> Chunk:
    """Read the data of one event; one that holds nothing is an empty chunk.  Raises msgspec.MsgspecError or
    UnicodeDecodeError where it is not a chunk."""
    raw = _chunks.decode(data)
    says_nothing = raw.choices is None and raw.usage is None
    if raw.error is not None or raw.object == "error" or (says_nothing and (raw.message or raw.code) is not None):
        return Chunk(error=read_error(200, data))
    usage = None if raw.usage is None else raw.usage.read(raw.timings)
    for choice in raw.choices or ():
        if choice.index != 0:
            continue
        delta = choice.delta or _Delta()
        text = (choice.text if choice.delta is None else delta.content) or ""
        tokens = int(bool(text or delta.reasoning or delta.reasoning_content))
        return Chunk(text, tokens, finish_reason(choice.finish_reason), usage)
    return Chunk(usage=usage)


def finish_reason(name: str | None) -> FinishReason | None:
    """What a server's word for it means; Triton writes Python's "None" while there is none."""
    if not name or name == "None":
        return None
    if name in ("length", "max_tokens"):
        return "length"
    return "abort" if name in ("abort", "cancelled", "timeout", "error") else "stop"
