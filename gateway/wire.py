"""The JSON of our own routes: what they take and give, and how strictly it is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from litestar.dto import AbstractDTO
from msgspec import Meta

from gateway.composing import Turn
from gateway.errors import ApiError
from gateway.grounding import Citation, Unsupported
from gateway.naming import MAX_CHARACTERS
from retrieval import Filters, Passage, Quote

T = TypeVar("T")

Text = Annotated[str, Meta(min_length=1, max_length=100_000)]
CollectionName = Annotated[str, Meta(min_length=1, max_length=MAX_CHARACTERS)]


class AnswerRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A question.  What is left out takes the server's settings; `collection` null asks all of them."""

    question: Text
    collection: CollectionName | None = None
    filters: Filters = Filters()
    top_k: Annotated[int, Meta(ge=1, le=20)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=8192)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stream: bool = False
    history: Annotated[list[Turn], Meta(max_length=50)] = []


class SearchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A search without a model."""

    query: Text
    collection: CollectionName | None = None
    filters: Filters = Filters()
    top_k: Annotated[int, Meta(ge=1, le=100)] = 10


class PassageView(msgspec.Struct, frozen=True, kw_only=True):
    """A passage; `start` and `end` are characters in the document's text."""

    passage_id: str
    document_id: str
    title: str
    source: str
    heading: str
    page: int | None
    start: int
    end: int
    text: str
    score: float

    @classmethod
    def of(cls, passages: Iterable[Passage]) -> list[PassageView]:
        return [msgspec.convert(passage, cls, from_attributes=True) for passage in passages]


class QuoteView(msgspec.Struct, frozen=True, kw_only=True):
    """A sentence as it stands in the document, at `start` to `end` of its text."""

    passage_id: str
    start: int
    end: int
    text: str

    @classmethod
    def of(cls, quotes: Iterable[Quote]) -> list[QuoteView]:
        return [msgspec.convert(quote, cls, from_attributes=True) for quote in quotes]


class UsageView(msgspec.Struct, frozen=True, kw_only=True):
    """`cached_tokens` of the `prompt_tokens` were not computed again; each null where the backend doesn't say.
    `kv_mode` "segments": `approximate_tokens` of them were computed at another place of another prompt, and
    `recomputed_tokens` of the same documents were computed again."""

    prompt_tokens: int | None = 0
    cached_tokens: int | None = None
    kv_mode: Literal["exact", "segments"] = "exact"
    approximate_tokens: int = 0
    recomputed_tokens: int = 0
    completion_tokens: int = 0


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds from the arrival of the request; null for what did not happen."""

    queue_ms: float | None = None
    retrieval_ms: float | None = None
    first_token_ms: float | None = None
    total_ms: float = 0.0
    tokens_per_second: float | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer.  `refused`: nothing in the documents answers this; `sources` are then only the nearest passages."""

    request_id: str
    answer: str
    refused: bool
    finish_reason: str
    quotes: list[QuoteView]
    citations: list[Citation]
    unsupported: list[Unsupported]
    sources: list[PassageView]
    usage: UsageView
    timings: Timings


class SearchResponse(msgspec.Struct, frozen=True, kw_only=True):
    """`relevant` is false where even the best passage is too far from the query to answer it."""

    request_id: str
    passages: list[PassageView]
    relevant: bool
    facets: dict[str, dict[str, int]]
    timings: dict[str, float]


def decode(body: bytes, model: type[T]) -> T:
    """Read a JSON body strictly; raises ApiError 400 that names the field."""
    try:
        return msgspec.json.decode(body, type=model)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, "malformed_json", f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "malformed_json", "the body is nested too deeply") from None


def _invalid(message: str) -> ApiError:
    what, _, where = message.partition(" - at `$")
    path = where.rstrip("`").lstrip(".")
    if "unknown field `" in what:
        name = ".".join(part for part in (path, what.split("`")[1]) if part)
        return ApiError(400, "unknown_field", f"{name} is not a field of this request", param=name)
    if "missing required field `" in what:
        name = ".".join(part for part in (path, what.split("`")[1]) if part)
        return ApiError(400, "missing_field", f"{name} is required", param=name)
    what = what[:1].lower() + what[1:].replace("`", "")
    return ApiError(400, "invalid_value", f"{path or 'the body'}: {what}", param=path or None)


def plain_text(text: str, field: str, *, max_characters: int) -> str:
    """Text that somebody wrote, stripped; raises ApiError when there is none, too much, or not text."""
    stripped = text.strip()
    if not stripped:
        raise ApiError(400, "empty_question", f"{field} is empty", param=field)
    if len(stripped) > max_characters:
        raise ApiError(
            400,
            "question_too_long",
            f"{field} has {len(stripped)} characters, this server takes {max_characters}",
            param=field,
        )
    if "\x00" in stripped:
        raise ApiError(400, "invalid_value", f"{field} holds a NUL character", param=field)
    return stripped


class JsonBody(AbstractDTO[T], Generic[T]):
    """Reads a handler's `data` with `decode` instead of Litestar's lenient conversion."""

    def decode_bytes(self, value: bytes) -> T:
        kind = self.asgi_connection.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind and kind != "application/json" and not kind.endswith("+json"):
            raise ApiError(415, "unsupported_media_type", f"send the body as application/json, not {kind[:100]}")
        return decode(value, self.model_type)

    def decode_builtins(self, value: dict[str, Any]) -> T:
        raise NotImplementedError("only JSON bodies are read")

    def data_to_encodable_type(self, data: Any) -> Any:
        raise NotImplementedError("only for request bodies")

    @classmethod
    def create_for_field_definition(cls, field_definition: Any, handler_id: str, backend_cls: Any = None) -> None:
        pass

    @classmethod
    def create_openapi_schema(cls, field_definition: Any, handler_id: str, schema_creator: Any) -> Any:
        return schema_creator.for_field_definition(field_definition)

    @classmethod
    def generate_field_definitions(cls, model_type: type[Any]) -> Any:
        return iter(())

    @classmethod
    def detect_nested_field(cls, field_definition: Any) -> bool:
        return False
