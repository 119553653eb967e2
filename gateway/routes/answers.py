"""POST /v1/answers: a question in, a cited answer out, whole or as it comes."""

from __future__ import annotations

import msgspec
from litestar import Request, Response, post
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from litestar.params import JSONBody

from gateway.answering import (
    AnswerEvent,
    Ask,
    Delta,
    Done,
    Grounds,
    Sources,
    Spent,
    answer,
    collect,
    merge_deltas,
    sampling_for,
)
from gateway.composing import Turn
from gateway.desk import Desk
from gateway.errors import Problem, problem_of
from gateway.identity import request_id
from gateway.streams import EventStream, server_sent_event, whole
from gateway.wire import Answer, AnswerRequest, JsonBody, plain_text
from retrieval import Principal

EVENT_NAMES: dict[type, str] = {Sources: "sources", Delta: "delta", Grounds: "citations", Spent: "usage", Done: "done"}


@post(
    "/v1/answers",
    dto=JsonBody[AnswerRequest],
    return_dto=None,
    status_code=200,
    tags=["answers"],
    summary="Ask the documents a question",
    description="With `stream: true` the answer comes as server-sent events: `sources` (with quotes, before the first "
    "token), `delta`, `citations`, `usage` (with timings), `done`; or `error` with a problem object.",
    responses={
        400: ResponseSpec(Problem, description="The request is not a valid question", generate_examples=False),
        404: ResponseSpec(Problem, description="Unknown collection", generate_examples=False),
        503: ResponseSpec(Problem, description="Loading, overloaded or shutting down", generate_examples=False),
    },
)
async def ask(
    request: Request, data: JSONBody[AnswerRequest], desk: NamedDependency[Desk], principal: NamedDependency[Principal]
) -> Response[Answer]:
    question = asked(data, desk, request_id(request.scope), principal)
    events = answer(desk, question)
    abort = desk.backend.abort
    if not data.stream:
        return Response(await whole(request, desk, question.request_id, abort, collect(events)))
    return EventStream(
        events,
        desk=desk,
        request_id=question.request_id,
        encode=encode,
        encode_error=lambda error: encode_error(error, question.request_id),
        merge=merge_deltas,
        abort=abort,
    )


def encode(event: AnswerEvent) -> bytes:
    return server_sent_event(EVENT_NAMES[type(event)], msgspec.json.encode(event))


def encode_error(error: Exception, own_id: str) -> bytes:
    problem, _ = problem_of(error, own_id)
    return server_sent_event("error", msgspec.json.encode(problem))


def asked(data: AnswerRequest, desk: Desk, own_id: str, principal: Principal) -> Ask:
    """The question with the server's settings filled in.  Raises ApiError."""
    settings, most = desk.config.answers, desk.config.server.max_question_characters
    question = plain_text(data.question, "question", max_characters=most)
    return Ask(
        request_id=own_id,
        question=question,
        principal=principal,
        collection=data.collection,
        filters=data.filters,
        top_k=settings.top_k if data.top_k is None else data.top_k,
        sampling=sampling_for(settings, max_tokens=data.max_tokens, temperature=data.temperature, seed=data.seed),
        history=tuple(
            Turn(turn.role, plain_text(turn.content, f"history[{index}].content", max_characters=4 * most))
            for index, turn in enumerate(data.history)
        ),
    )
