"""OpenAI's completions on the wire: what clients send, what they read.

Fields that change nothing at the value given are accepted; where a client relies on one that this
server can't honour it is told so by name (`refuse_unsupported`), never ignored.
Reference: https://platform.openai.com/docs/api-reference; `top_k`, `min_p`,
`repetition_penalty`, `stop_token_ids`, `structured_outputs`, `ignore_eos` and `documents` as in vLLM.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from gateway.errors import ApiError
from inference import Constraint, DocumentOrder, DocumentReuse, Priority, Sampling, Usage

Absent = UnsetType
Bias = Annotated[float, Meta(ge=-100, le=100)]
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "min_tokens": (0,),
    "add_generation_prompt": (True,),
    "skip_special_tokens": (True,),
}
# What only concerns OpenAI's own house: accepted whatever it says.
UNREAD = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "cache_salt")


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: bool = False


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: dict[str, Any]
    name: str = ""
    description: str = ""
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`json_schema` is needed with the type of that name."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the two, as in vLLM."""

    regex: Annotated[str, Meta(max_length=10_000)] | None = None
    json: dict[str, Any] | None = None


class CompletionFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both completions take."""

    model: Annotated[str, Meta(max_length=500)]
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1_000_000)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[str, Meta(max_length=500)] | Annotated[list[str], Meta(max_length=16)] | None = None
    ignore_eos: bool = False
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=1000)] | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=100)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Priority = "interactive"
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    best_of: Any = UNSET
    echo: Any = UNSET
    suffix: Any = UNSET
    tools: Any = UNSET
    tool_choice: Any = UNSET
    parallel_tool_calls: Any = UNSET
    modalities: Any = UNSET
    min_tokens: Any = UNSET
    add_generation_prompt: Any = UNSET
    skip_special_tokens: Any = UNSET

    user: Any = UNSET
    store: Any = UNSET
    metadata: Any = UNSET
    service_tier: Any = UNSET
    safety_identifier: Any = UNSET
    prompt_cache_key: Any = UNSET
    cache_salt: Any = UNSET


class CompletionRequest(CompletionFields, kw_only=True):
    """POST /v1/completions.  `logprobs`: how many of the best tokens to tell of beside each."""

    prompt: str | list[str]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A document for the prompt, given by the client (the bare model only).  What it shares goes by its text,
    so an `id` is accepted and not used."""

    text: str
    title: str = ""
    id: str | int | None = None


class ChatCompletionRequest(CompletionFields, kw_only=True):
    """POST /v1/chat/completions.  Model "refdesk" answers from documents.  The bare model doesn't look at them, but it
    takes `documents` that the client has retrieved, best first; `document_order`: how they stand in the prompt, where
    that is not to be the server's way."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    documents: Annotated[list[ChatDocument], Meta(max_length=100)] | None = None
    document_order: DocumentOrder | None = None
    document_reuse: DocumentReuse | None = None


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """`kv_mode` "segments": `approximate_tokens` of the `cached_tokens` were computed at another place of another
    prompt, and `recomputed_tokens` of the same documents were computed again."""

    cached_tokens: int
    kv_mode: Literal["exact", "segments"]
    approximate_tokens: int
    recomputed_tokens: int


class CompletionUsage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None

    @classmethod
    def of(cls, usage: Usage) -> CompletionUsage | None:
        """None where the prompt's length is not known: the format has no place for half a usage."""
        if usage.prompt_tokens is None:
            return None
        details = None
        if usage.cached_tokens is not None:
            again = usage.recomputed_tokens
            details = PromptTokensDetails(usage.cached_tokens, usage.kv_mode, usage.approximate_tokens, again)
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=details,
        )


class Model(msgspec.Struct, frozen=True):
    id: str
    created: int
    object: str = "model"
    owned_by: str = "refdesk"


class ModelList(msgspec.Struct, frozen=True):
    data: list[Model]
    object: str = "list"


class AnswerMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of a chat reply, or the whole of it."""

    role: Literal["assistant"] | Absent = UNSET
    content: str | Absent | None = UNSET


class ChatLogprob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatLogprob] | Absent = UNSET


class Logprobs(msgspec.Struct, frozen=True, kw_only=True):
    """One entry for each token: `content` in /v1/chat/completions, the other three in /v1/completions."""

    content: list[ChatLogprob] | Absent = UNSET
    tokens: list[str] | Absent = UNSET
    token_logprobs: list[float] | Absent = UNSET
    top_logprobs: list[dict[str, float]] | Absent = UNSET


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of any of the four shapes: text or chat, whole or chunk."""

    index: int = 0
    text: str | Absent = UNSET
    message: AnswerMessage | Absent = UNSET
    delta: AnswerMessage | Absent = UNSET
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A reply or a chunk of one.  `refdesk` holds quotes, sources and citations where documents were asked."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage | Absent | None = UNSET
    refdesk: dict[str, Any] | Absent = UNSET


def refuse_unsupported(request: CompletionFields) -> None:
    """Raise ApiError for a field whose value asks for what this server doesn't do."""
    for name, harmless in NO_EFFECT.items():
        value = getattr(request, name)
        if value is UNSET or value is None:
            continue
        if not any(type(value) is type(same) and value == same for same in (*harmless, *map(_as_float, harmless))):
            raise ApiError(400, "unsupported_field", f"{name} is not supported with this value", param=name)
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "invalid_value", "stream_options needs stream: true", param="stream_options")


def sampling_of(request: CompletionFields, *, max_tokens: int, temperature: float) -> Sampling:
    """The request's sampling; `max_tokens` and `temperature` hold where it has none."""
    stop = () if request.stop is None else (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    return Sampling(
        max_tokens=request.max_tokens or max_tokens,
        temperature=temperature if request.temperature is None else request.temperature,
        top_k=max(0, request.top_k or 0),
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias={_token_id(token): bias for token, bias in (request.logit_bias or {}).items()},
        seed=request.seed,
        stop=tuple(text for text in stop if text),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=request.ignore_eos,
        logprobs=_logprobs(request),
        constraint=_constraint(request),
    )


def _token_id(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise ApiError(400, "invalid_value", f"logit_bias: {text[:50]!r} is not a token id", param="logit_bias")
    return int(text)


def _logprobs(request: CompletionFields) -> int | None:
    match request:
        case CompletionRequest():
            return request.logprobs
        case ChatCompletionRequest():
            if request.top_logprobs is not None and not request.logprobs:
                raise ApiError(400, "invalid_value", "top_logprobs needs logprobs: true", param="top_logprobs")
            return (request.top_logprobs or 0) if request.logprobs else None
        case _:
            return None


def _constraint(request: CompletionFields) -> Constraint | None:
    wanted = []
    if (form := request.response_format) is not None and form.type != "text":
        if form.type == "json_schema" and form.json_schema is None:
            raise ApiError(400, "invalid_value", "response_format needs json_schema", param="response_format")
        schema = msgspec.json.encode(form.json_schema.schema).decode() if form.json_schema else ""
        wanted.append(Constraint(form.type, schema))
    if (form := request.structured_outputs) is not None:
        wanted += [Constraint("regex", form.regex)] if form.regex is not None else []
        wanted += [Constraint("json_schema", msgspec.json.encode(form.json).decode())] if form.json is not None else []
    if len(wanted) > 1:
        raise ApiError(400, "invalid_value", "an answer can follow one format only", param="structured_outputs")
    return wanted[0] if wanted else None


def _as_float(value: Any) -> Any:
    return float(value) if type(value) is int else value
