"""/v1/models, /v1/completions, /v1/chat/completions: OpenAI's format, so that existing clients work.

Model "refdesk" answers from documents: its reply leads with quotes and ends with its sources.
The bare model's own name continues a prompt and looks at no documents.  Both become the same two
events, `Piece`* and `Stop` for each choice, then one `Ending`, which four shapes of chunk and reply are made of.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from litestar.params import FromPath, JSONBody

from gateway.answering import Ask, Clock, Delta, Done, Grounds, Sources, Spent, answer
from gateway.composing import Turn
from gateway.desk import Desk
from gateway.errors import ApiError, OpenAIErrorBody, ShuttingDown, openai_error, problem_of
from gateway.identity import request_id
from gateway.interleave import interleaved
from gateway.openai_shapes import ChatShape, Ending, Event, Piece, Shape, Stop, TextShape, merge_pieces
from gateway.openai_wire import (
    ChatCompletionRequest,
    ChatDocument,
    Completion,
    CompletionFields,
    CompletionRequest,
    Model,
    ModelList,
    ResponseFormat,
    refuse_unsupported,
    sampling_of,
)
from gateway.streams import EventStream, whole
from gateway.wire import JsonBody, plain_text
from inference import (
    ChatPrompt,
    DocumentOrder,
    DocumentReuse,
    Finished,
    GenerationRequest,
    Message,
    Prompt,
    Sampling,
    Segment,
    TextDelta,
    TextPrompt,
    Unavailable,
    Usage,
)
from retrieval import Principal

REFDESK = "refdesk"
COMPLETION_TOKENS = 16  # OpenAI's own default
CHAT_TOKENS = 512
STARTED = int(time.time())
ERRORS = {
    status: ResponseSpec(OpenAIErrorBody, description=description, generate_examples=False)
    for status, description in {
        400: "A field is wrong or not supported",
        404: "Unknown model",
        503: "Loading, overloaded or shutting down",
    }.items()
}


@get("/v1/models", tags=["openai"], summary="The models")
async def models(desk: NamedDependency[Desk]) -> ModelList:
    return ModelList([Model(REFDESK, STARTED), Model(desk.backend.capabilities.model, STARTED)])


@get("/v1/models/{model:path}", tags=["openai"], summary="One model", responses={404: ERRORS[404]})
async def model(desk: NamedDependency[Desk], model: FromPath[str]) -> Model:
    _check_model(desk, name := model.lstrip("/"))
    return Model(name, STARTED)


@post(
    "/v1/completions",
    dto=JsonBody[CompletionRequest],
    return_dto=None,
    status_code=200,
    tags=["openai"],
    summary="Continue a text",
    responses=ERRORS,
)
async def complete(
    request: Request,
    data: JSONBody[CompletionRequest],
    desk: NamedDependency[Desk],
    principal: NamedDependency[Principal],
) -> Response[Completion]:
    refuse_unsupported(data)
    _check_model(desk, data.model)
    if data.model == REFDESK:
        raise ApiError(400, "invalid_value", f"{REFDESK} answers in /v1/chat/completions", param="model")
    prompts = [data.prompt] if isinstance(data.prompt, str) else data.prompt
    if len(prompts) != 1:
        raise ApiError(400, "unsupported_field", "prompt: send one text per request", param="prompt")
    own_id = request_id(request.scope)
    events = _generate(desk, own_id, TextPrompt(prompts[0]), data, COMPLETION_TOKENS, desk.scopes.own(principal))
    return await _reply(request, desk, data, TextShape(f"cmpl-{own_id}", data.model), events)


@post(
    "/v1/chat/completions",
    dto=JsonBody[ChatCompletionRequest],
    return_dto=None,
    status_code=200,
    tags=["openai"],
    summary="Answer a conversation",
    responses=ERRORS,
)
async def chat(
    request: Request,
    data: JSONBody[ChatCompletionRequest],
    desk: NamedDependency[Desk],
    principal: NamedDependency[Principal],
) -> Response[Completion]:
    refuse_unsupported(data)
    _check_model(desk, data.model)
    if data.messages[-1].role != "user":
        raise ApiError(400, "invalid_value", "messages: the last one must be the user's", param="messages")
    data.max_tokens = data.max_completion_tokens or data.max_tokens
    own_id = request_id(request.scope)
    if data.model == REFDESK:
        events = _from_documents(desk, _ask(desk, own_id, data, principal))
    else:
        how = {"document_order": data.document_order, "document_reuse": data.document_reuse}
        events = _generate(desk, own_id, _conversation(data), data, CHAT_TOKENS, desk.scopes.own(principal), **how)
    return await _reply(request, desk, data, ChatShape(f"chatcmpl-{own_id}", data.model), events)


def _check_model(desk: Desk, name: str) -> None:
    known = [REFDESK, desk.backend.capabilities.model]
    if name not in known:
        raise ApiError(
            404,
            "model_not_found",
            f"there is no model {name[:100]!r} here; there is {' and '.join(known)}",
            param="model",
        )


# ---------------------------------------------------------------- where the events come from


async def _generate(
    desk: Desk,
    own_id: str,
    prompt: Prompt,
    data: CompletionFields,
    max_tokens: int,
    scope: str,
    document_order: DocumentOrder | None = None,
    document_reuse: DocumentReuse | None = None,
) -> AsyncGenerator[Event, None]:
    """The bare model's continuation: `n` of them side by side, whose prompt the engine reads once."""
    sampling = sampling_of(data, max_tokens=max_tokens, temperature=1.0)
    clock, usages = Clock(), []
    requests = [
        GenerationRequest(
            request_id=own_id if index == 0 else f"{own_id}.{index}",
            prompt=prompt,
            sampling=sampling if index == 0 or sampling.seed is None else _seeded(sampling, index),
            scope=scope,
            priority=data.priority,
            document_order=document_order,
            document_reuse=document_reuse,
        )
        for index in range(data.n or 1)
    ]
    try:
        async with aclosing(interleaved([desk.backend.generate(request) for request in requests])) as stream:
            async for index, event in stream:
                match event:
                    case TextDelta():
                        if clock.token():
                            desk.metrics.first_token.observe(clock.last_token - clock.arrived)
                        yield Piece(event.text, index, event.logprobs)
                    case Finished():
                        desk.metrics.count_usage(event.usage)
                        usages.append(event.usage)
                        yield Stop(_reason(desk, event.reason), index)
    finally:
        # Synchronous on purpose, see answering.
        for request in requests:
            desk.backend.abort(request.request_id)
    completed = sum(usage.completion_tokens for usage in usages)
    yield Ending(msgspec.structs.replace(usages[0], completion_tokens=completed))


def _seeded(sampling: Sampling, index: int) -> Sampling:
    return msgspec.structs.replace(sampling, seed=(sampling.seed or 0) + index)


def _reason(desk: Desk, reason: str) -> str:
    """OpenAI's word for why an answer ended.  It has none for one that was broken off: that is an error."""
    match reason:
        case "abort":
            raise ShuttingDown if desk.drain.begun else Unavailable("the model broke its answer off: ask again")
        case "refused" | "repetition":
            return "stop"
        case _:
            return reason


def _conversation(data: ChatCompletionRequest) -> ChatPrompt:
    """The client's messages; its documents come first of all that is not the system's."""
    messages: list[Message] = []
    documents = [_document(document) for document in data.documents or []]
    for position, message in enumerate(data.messages):
        role = "system" if message.role in ("system", "developer") else message.role
        kind = "system" if role == "system" else "question" if position == len(data.messages) - 1 else "history"
        segments = (Segment(message.text, kind=kind),)
        if role == "user" and documents:
            segments, documents = (*documents, *segments), []
        messages.append(Message(role, segments))
    return ChatPrompt(tuple(messages))


def _document(document: ChatDocument) -> Segment:
    text = f"{document.title}\n{document.text}".strip() + "\n\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return Segment(text, kind="document", document_id=digest)


def _ask(desk: Desk, own_id: str, data: ChatCompletionRequest, principal: Principal) -> Ask:
    for field in ("documents", "document_order", "document_reuse"):
        if getattr(data, field) is not None:
            raise ApiError(400, "unsupported_field", f"{field}: {REFDESK} answers from its own documents", param=field)
    wanted = {
        "n": (data.n or 1) > 1,
        "logprobs": bool(data.logprobs),
        "response_format": data.response_format not in (None, ResponseFormat("text")),
        "structured_outputs": data.structured_outputs is not None,
    }
    for field, asked in wanted.items():
        if asked:
            detail = f"{field}: {REFDESK} gives one answer in plain text; ask the bare model"
            raise ApiError(400, "unsupported_field", detail, param=field)
    settings, most = desk.config.answers, desk.config.server.max_question_characters
    *before, last = data.messages
    return Ask(
        request_id=own_id,
        principal=principal,
        question=plain_text(last.text, f"messages[{len(before)}].content", max_characters=most),
        top_k=settings.top_k,
        sampling=sampling_of(data, max_tokens=settings.max_tokens, temperature=settings.temperature),
        history=tuple(Turn(m.role, m.text) for m in before if m.role in ("user", "assistant")),
        instructions="\n".join(m.text for m in before if m.role in ("system", "developer")),
    )


async def _from_documents(desk: Desk, ask: Ask) -> AsyncGenerator[Event, None]:
    """An answer as chat text: quotes, the generated text, the sources that either rests on."""
    said: list[str] = []
    about: dict[str, Any] = {}
    usage = Usage(0, 0)
    async with aclosing(answer(desk, ask)) as events:
        async for event in events:
            match event:
                case Sources():
                    about = {"refused": event.refused, "quotes": event.quotes, "sources": event.sources}
                    if lead := _quoted(event):
                        yield Piece(lead)
                case Delta():
                    said.append(event.text)
                    yield Piece(event.text)
                case Grounds():
                    about |= {"answer": "".join(said), "citations": event.citations, "unsupported": event.unsupported}
                    if tail := _listed(about):
                        yield Piece(tail)
                case Spent():
                    about["timings"] = event.timings
                    spent = event.usage
                    usage = Usage(
                        spent.prompt_tokens,
                        spent.completion_tokens,
                        spent.cached_tokens,
                        spent.approximate_tokens,
                        spent.recomputed_tokens,
                    )
                case Done():
                    yield Stop(_reason(desk, event.finish_reason), about=about)
    yield Ending(usage)


def _quoted(event: Sources) -> str:
    markers = {source.passage_id: index for index, source in enumerate(event.sources, 1)}
    lines = [f"> {' '.join(quote.text.split())} [{markers[quote.passage_id]}]" for quote in event.quotes]
    return "\n>\n".join(lines) + "\n\n" if lines else ""


def _listed(about: dict[str, Any]) -> str:
    quoted = {quote.passage_id for quote in about["quotes"]}
    cited = {citation.marker for citation in about["citations"]}
    lines = [
        f"[{index}] {source.title}" + (f", {source.source}" if source.source != source.title else "")
        for index, source in enumerate(about["sources"], 1)
        if index in cited or source.passage_id in quoted
    ]
    return "\n\nSources:\n" + "\n".join(lines) if lines else ""


# ---------------------------------------------------------------- how they are sent


async def _reply(
    request: Request, desk: Desk, data: CompletionFields, shape: Shape, events: AsyncGenerator[Event, None]
) -> Response[Completion]:
    own_id, abort = request_id(request.scope), desk.backend.abort
    if not data.stream:
        return Response(await whole(request, desk, own_id, abort, _collected(shape, events)))
    shape.include_usage = data.stream_options is not None and data.stream_options.include_usage
    return EventStream(
        events,
        desk=desk,
        request_id=own_id,
        encode=shape.encode,
        encode_error=_error_encoder(own_id),
        merge=merge_pieces,
        abort=abort,
        closing=b"data: [DONE]\n\n",
    )


async def _collected(shape: Shape, events: AsyncGenerator[Event, None]) -> Completion:
    pieces: dict[int, list[Piece]] = {}
    stops: dict[int, Stop] = {}
    async with aclosing(events) as stream:
        async for event in stream:
            match event:
                case Piece():
                    pieces.setdefault(event.index, []).append(event)
                case Stop():
                    stops[event.index] = event
                case Ending():
                    ending = event
    whole_pieces = [
        Piece(
            "".join(piece.text for piece in pieces.get(index, ())),
            index,
            tuple(each for piece in pieces.get(index, ()) for each in piece.logprobs),
        )
        for index in sorted(stops)
    ]
    return shape.response(whole_pieces, [stops[index] for index in sorted(stops)], ending)


def _error_encoder(own_id: str) -> Callable[[Exception], bytes]:
    def encode(error: Exception) -> bytes:
        problem, _ = problem_of(error, own_id)
        return b"data: " + msgspec.json.encode(openai_error(problem)) + b"\n\n"

    return encode
