"""OpenAI's completions on the wire: what clients send, what they read.

Fields that change nothing at the value given are accepted; where a client relies on one that this
server can't honour it is told so by name (`refuse_unsupported`), never ignored.
Reference: https://platform.openai.com/docs/api-reference; `top_k`, `ignore_eos` and `documents` as in vLLM.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from gateway.errors import ApiError
from inference import Sampling, Usage

Absent = UnsetType
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "add_generation_prompt": (True,),
    "skip_special_tokens": (True,),
}
# What only concerns OpenAI's own house: accepted whatever it says.
UNREAD = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "cache_salt")


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: bool = False


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
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    n: Any = UNSET
    best_of: Any = UNSET
    presence_penalty: Any = UNSET
    frequency_penalty: Any = UNSET
    repetition_penalty: Any = UNSET
    min_p: Any = UNSET
    logit_bias: Any = UNSET
    logprobs: Any = UNSET
    top_logprobs: Any = UNSET
    echo: Any = UNSET
    suffix: Any = UNSET
    tools: Any = UNSET
    tool_choice: Any = UNSET
    parallel_tool_calls: Any = UNSET
    response_format: Any = UNSET
    modalities: Any = UNSET
    min_tokens: Any = UNSET
    stop_token_ids: Any = UNSET
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
    """POST /v1/completions."""

    prompt: str | list[str]


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
    """POST /v1/chat/completions.  Model "refdesk" answers from documents, the bare model doesn't look at them."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    documents: Annotated[list[ChatDocument], Meta(max_length=100)] | None = None


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


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
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=None if usage.cached_tokens is None else PromptTokensDetails(usage.cached_tokens),
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


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of any of the four shapes: text or chat, whole or chunk."""

    index: int = 0
    text: str | Absent = UNSET
    message: AnswerMessage | Absent = UNSET
    delta: AnswerMessage | Absent = UNSET
    logprobs: None = None
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
        seed=request.seed,
        stop=tuple(text for text in stop if text),
        ignore_eos=request.ignore_eos,
    )


def _as_float(value: Any) -> Any:
    return float(value) if type(value) is int else value
