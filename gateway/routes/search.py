"""POST /v1/search: passages, without a model."""

from __future__ import annotations

from litestar import Request, post
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from litestar.params import JSONBody

from gateway.desk import Desk
from gateway.errors import Problem
from gateway.identity import request_id
from gateway.wire import JsonBody, PassageView, SearchRequest, SearchResponse, plain_text
from retrieval import Principal


@post(
    "/v1/search",
    dto=JsonBody[SearchRequest],
    return_dto=None,
    status_code=200,
    tags=["search"],
    summary="Find passages",
    responses={
        400: ResponseSpec(Problem, description="The request is not a valid search", generate_examples=False),
        404: ResponseSpec(Problem, description="Unknown collection", generate_examples=False),
    },
)
async def search(
    request: Request, data: JSONBody[SearchRequest], desk: NamedDependency[Desk], principal: NamedDependency[Principal]
) -> SearchResponse:
    query = plain_text(data.query, "query", max_characters=desk.config.server.max_question_characters)
    view = desk.library.seen_by(principal)
    found = await desk.read(view.search, query, collection=data.collection, filters=data.filters, top_k=data.top_k)
    return SearchResponse(
        request_id=request_id(request.scope),
        passages=PassageView.of(found.passages),
        relevant=found.relevant,
        facets=found.facets,
        timings={name: round(value, 2) for name, value in found.timings.items()},
    )
