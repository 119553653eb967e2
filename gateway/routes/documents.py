"""/v1/documents: put documents in, list them, read one, take it out."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.handlers import BaseRouteHandler
from litestar.openapi import ResponseSpec
from litestar.params import FromPath, FromQuery, QueryParameter

from gateway.config import Config
from gateway.desk import Desk
from gateway.errors import ApiError, Problem
from gateway.uploads import UploadOperation, read_upload
from retrieval import Document

BAD_REQUEST = {400: ResponseSpec(Problem, description="The request is not valid", generate_examples=False)}
NOT_FOUND = {404: ResponseSpec(Problem, description="No such document", generate_examples=False)}
MULTIPART_OVERHEAD = 64 * 1024


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
        description="A document with the same name in the same collection is replaced.",
        responses=BAD_REQUEST
        | {
            413: ResponseSpec(Problem, description="Larger than this server takes", generate_examples=False),
            422: ResponseSpec(Problem, description="Not a document that can be read", generate_examples=False),
        },
    )
    async def upload(request: Request, desk: NamedDependency[Desk]) -> Response[Document]:
        library = desk.library
        sent = await read_upload(request)
        if len(sent.content) > most:
            raise ApiError(413, "too_large", f"{sent.name} is larger than {config.server.max_upload_mb} MB")
        document = await desk.write(library.ingest_bytes, sent.name, sent.content, collection=sent.collection)
        return Response(
            document, status_code=201, headers={"Location": f"/v1/documents/{document.document_id}"}
        )  # fmt: skip

    return [upload, listing, document, remove]


@get("/v1/documents", tags=["documents"], summary="List documents", responses=BAD_REQUEST)
async def listing(
    desk: NamedDependency[Desk],
    collection: FromQuery[str | None] = None,
    offset: Annotated[int, QueryParameter(ge=0, le=10**9)] = 0,
    limit: Annotated[int, QueryParameter(ge=1, le=500)] = 50,
) -> DocumentPage:
    documents, total = await desk.read(desk.library.documents, collection=collection, offset=offset, limit=limit)
    return DocumentPage(documents=documents, total=total, offset=offset, limit=limit)


@get(
    "/v1/documents/{document_id:str}",
    tags=["documents"],
    summary="One document with its text",
    responses=NOT_FOUND,
)
async def document(desk: NamedDependency[Desk], document_id: FromPath[str]) -> DocumentView:
    found: Any = await desk.read(desk.library.document, document_id)
    return DocumentView(document=found.document, text=found.text)


@delete(
    "/v1/documents/{document_id:str}",
    status_code=204,
    tags=["documents"],
    summary="Remove a document",
    responses=NOT_FOUND,
)
async def remove(desk: NamedDependency[Desk], document_id: FromPath[str]) -> None:
    await desk.write(desk.library.remove, document_id)
