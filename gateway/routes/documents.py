"""/v1/documents: put documents in, list them, read one, take it out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, delete, get, post, put
from litestar.di import NamedDependency
from litestar.handlers import BaseRouteHandler
from litestar.openapi import ResponseSpec
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from gateway.config import Config
from gateway.desk import Desk
from gateway.errors import ApiError, Problem
from gateway.naming import DEFAULT_COLLECTION, collection_name
from gateway.uploads import UploadOperation, read_upload
from gateway.wire import CollectionName, JsonBody, plain_text
from retrieval import Box, Document, Job, Principal
from retrieval.access import qualified
from retrieval.ingest import Into

BAD_REQUEST = {400: ResponseSpec(Problem, description="The request is not valid", generate_examples=False)}
NOT_FOUND = {404: ResponseSpec(Problem, description="No such document", generate_examples=False)}
NOT_YOURS = {403: ResponseSpec(Problem, description="It belongs to somebody else", generate_examples=False)}
QUEUED = {202: ResponseSpec(Job, description="Queued (wait=false): its job", generate_examples=False)}
MULTIPART_OVERHEAD = 64 * 1024

Wait = Annotated[
    bool, QueryParameter(description="Until it is read and stored; with false the answer comes at once and is the job.")
]


class DocumentPage(msgspec.Struct, frozen=True, kw_only=True):
    """`total` counts all documents asked for, `documents` holds those from `offset`."""

    documents: list[Document]
    total: int
    offset: int
    limit: int


class DocumentView(msgspec.Struct, frozen=True, kw_only=True):
    """A document with the text that all offsets refer to."""

    document: Document
    text: str


def handlers(config: Config) -> list[BaseRouteHandler]:
    """The handlers; uploading knows how much this server takes."""
    most = config.server.max_upload_mb * 1024 * 1024

    @post(
        "/v1/documents",
        status_code=201,
        operation_class=UploadOperation,
        request_max_body_size=most + MULTIPART_OVERHEAD,
        tags=["documents"],
        summary="Add a document",
        description="Your own document of the same name in the same collection is replaced, once the new one is read; "
        "until then it serves.",
        responses=BAD_REQUEST
        | QUEUED
        | {
            413: ResponseSpec(Problem, description="Larger than this server takes", generate_examples=False),
            422: ResponseSpec(Problem, description="Not a document that can be read", generate_examples=False),
            503: ResponseSpec(Problem, description="Too much waits to be read", generate_examples=False),
        },
    )
    async def upload(
        request: Request, desk: NamedDependency[Desk], principal: NamedDependency[Principal], wait: Wait = True
    ) -> Response[Document]:
        jobs = desk.library.jobs
        check_may_add(principal)
        sent = await read_upload(request)
        if len(sent.content) > most:
            raise ApiError(413, "too_large", f"{sent.name} is larger than {config.server.max_upload_mb} MB")
        where = into(principal, sent.collection, sent.readers, sent.tags)
        return await _added(desk, wait, jobs.add_upload, sent.name, sent.content, where)

    return [upload, add_address, listing, document, boxes, share, remove]


@get("/v1/documents", tags=["documents"], summary="List documents", responses=BAD_REQUEST)
async def listing(
    desk: NamedDependency[Desk],
    principal: NamedDependency[Principal],
    collection: FromQuery[str | None] = None,
    offset: Annotated[int, QueryParameter(ge=0, le=10**9)] = 0,
    limit: Annotated[int, QueryParameter(ge=1, le=500)] = 50,
) -> DocumentPage:
    documents, total = await desk.read(
        desk.library.seen_by(principal).documents, collection=collection, offset=offset, limit=limit
    )
    return DocumentPage(documents=documents, total=total, offset=offset, limit=limit)


@get(
    "/v1/documents/{document_id:str}",
    tags=["documents"],
    summary="One document with its text",
    responses=NOT_FOUND,
)
async def document(
    desk: NamedDependency[Desk], principal: NamedDependency[Principal], document_id: FromPath[str]
) -> DocumentView:
    found: Any = await desk.read(desk.library.seen_by(principal).document, document_id)
    return DocumentView(document=found.document, text=found.text)


class Boxes(msgspec.Struct, frozen=True, kw_only=True):
    """What to mark, in the order of the text."""

    boxes: list[Box]


@get(
    "/v1/documents/{document_id:str}/boxes",
    tags=["documents"],
    summary="Where a piece of its text stands on its pages",
    description="A rectangle for each line of the text from `start` to `end`, in points from the top left corner of "
    "its page; none for formats other than PDF.",
    responses=NOT_FOUND | BAD_REQUEST,
)
async def boxes(
    desk: NamedDependency[Desk],
    principal: NamedDependency[Principal],
    document_id: FromPath[str],
    start: Annotated[int, QueryParameter(ge=0, le=10**9)],
    end: Annotated[int, QueryParameter(ge=0, le=10**9)],
) -> Boxes:
    found: Any = await desk.read(desk.library.seen_by(principal).boxes, document_id, start, end)
    return Boxes(boxes=found)


class FromAddress(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is at `url`, on the public internet; `readers` as for an upload."""

    url: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
    collection: CollectionName = DEFAULT_COLLECTION
    readers: list[str] | None = None
    tags: Annotated[list[str], msgspec.Meta(max_length=100)] | None = None


@post(
    "/v1/documents/url",
    dto=JsonBody[FromAddress],
    return_dto=None,
    status_code=201,
    tags=["documents"],
    summary="Add what is at an address",
    description="Only http and https on the public internet, whatever its name resolves to or redirects to.",
    responses=BAD_REQUEST
    | QUEUED
    | {422: ResponseSpec(Problem, description="It can't be fetched, or not be read", generate_examples=False)},
)
async def add_address(
    desk: NamedDependency[Desk],
    principal: NamedDependency[Principal],
    data: JSONBody[FromAddress],
    wait: Wait = True,
) -> Response[Document]:
    check_may_add(principal)
    url = plain_text(data.url, "url", max_characters=2000)
    where = into(principal, data.collection, data.readers, data.tags)
    return await _added(desk, wait, desk.library.jobs.add_url, url, where)


async def _added(desk: Desk, wait: bool, add: Callable[..., Job], *what: Any) -> Response[Any]:
    """The document of a new job, or the job itself for who doesn't wait."""
    job = await desk.write(add, *what, waited_for=wait)
    at = f"/v1/jobs/{job.job_id}"
    if not wait:
        return Response(job, status_code=202, headers={"Location": at})
    outcome = await desk.read(desk.library.jobs.outcome, job.job_id)
    document = await asyncio.wrap_future(outcome)
    headers = {"Location": f"/v1/documents/{document.document_id}", "Link": f'<{at}>; rel="status"'}
    return Response(document, status_code=201, headers=headers)


def check_may_add(principal: Principal) -> None:
    if not (principal.name or principal.steward):
        raise ApiError(403, "not_allowed", "sign in to add documents")


def into(principal: Principal, collection: str, readers: list[str] | None, tags: list[str] | None) -> Into:
    """Where a document of theirs goes.  Raises ApiError that names the field at fault."""
    try:
        collection = collection_name(collection)
    except ValueError as error:
        raise ApiError(400, "invalid_value", f"collection: {error}", param="collection") from error
    named = None if readers is None else readers_of(principal, readers)
    where = Into(collection, named, principal.name, None if tags is None else tuple(tags), principal.usual_readers)
    try:
        where.check()
    except ValueError as error:  # the readers have been checked
        raise ApiError(400, "invalid_value", f"tags: {error}", param="tags") from error
    return where


class Readers(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Who may read: public, tenant:NAME, group:NAME or user:NAME; nobody else may."""

    readers: list[str]


@put(
    "/v1/documents/{document_id:str}/readers",
    dto=JsonBody[Readers],
    return_dto=None,
    status_code=200,
    tags=["documents"],
    summary="Say who may read a document",
    responses=NOT_FOUND | NOT_YOURS | BAD_REQUEST,
)
async def share(
    desk: NamedDependency[Desk],
    principal: NamedDependency[Principal],
    document_id: FromPath[str],
    data: JSONBody[Readers],
) -> Document:
    return await desk.change(desk.library.seen_by(principal).share, document_id, readers_of(principal, data.readers))


def readers_of(principal: Principal, given: list[str]) -> tuple[str, ...]:
    """As they are stored.  Raises ApiError for what is no reader, or one of another tenant."""
    try:
        return tuple(qualified(reader, principal.tenant) for reader in given)
    except ValueError as error:
        raise ApiError(400, "invalid_value", f"readers: {error}", param="readers") from error


@delete(
    "/v1/documents/{document_id:str}",
    status_code=204,
    tags=["documents"],
    summary="Remove a document",
    responses=NOT_FOUND | NOT_YOURS,
)
async def remove(
    desk: NamedDependency[Desk], principal: NamedDependency[Principal], document_id: FromPath[str]
) -> None:
    await desk.change(desk.library.seen_by(principal).remove, document_id)
