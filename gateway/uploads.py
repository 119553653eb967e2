"""An upload: multipart/form-data (RFC 7578) with one file, read part by part as it arrives.

Litestar's own reader breaks at a field that isn't text, and takes a file whose name comes as `filename*`
(RFC 8187) for a field.
"""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import msgspec
from litestar import Request
from litestar.datastructures import UploadFile
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIType, Operation, RequestBody, Schema
from multipart import MultipartError, MultipartSegment, PushMultipartParser

from gateway.errors import ApiError
from gateway.naming import DEFAULT_COLLECTION, collection_name, is_text

FIELDS = ("file", "collection", "readers", "tags")
MAX_PARTS = 100
MAX_LISTED = 100
MAX_NAME_CHARACTERS = 255
WANTED = "send a multipart/form-data body with the document in the field `file`"
ENCODED_NAME = re.compile(r";\s*filename\*\s*=\s*(utf-8|iso-8859-1)'[^']*'([^\s;]*)", re.IGNORECASE)


class Upload(msgspec.Struct, frozen=True):
    """What was sent; `name` is only a name, without the folders before it; `readers` and `tags` None where nothing was
    said."""

    name: str
    content: bytes
    collection: str
    readers: list[str] | None
    tags: list[str] | None


@dataclass
class UploadOperation(Operation):
    """The form as the API's description has it."""

    def __post_init__(self) -> None:
        form = Schema(
            type=OpenAPIType.OBJECT,
            required=["file"],
            properties={
                "file": Schema(type=OpenAPIType.STRING, content_media_type="application/octet-stream"),
                "collection": Schema(type=OpenAPIType.STRING, default=DEFAULT_COLLECTION),
                "readers": Schema(type=OpenAPIType.STRING, description="who may read it, parted by commas"),
                "tags": Schema(type=OpenAPIType.STRING, description="parted by commas"),
            },
        )
        self.request_body = RequestBody({"multipart/form-data": OpenAPIMediaType(form)}, required=True)


async def read_upload(request: Request[Any, Any, Any]) -> Upload:
    """Read the form to its end.  Raises ApiError 400 that names the field at fault."""
    async with AsyncExitStack() as files:
        parts = await _read_parts(request, files)
        if "file" not in parts:
            raise ApiError(400, "missing_field", f"file is missing: {WANTED}", param="file")
        collection = await _collection(*parts["collection"]) if "collection" in parts else DEFAULT_COLLECTION
        readers = await _listed("readers", *parts["readers"]) if "readers" in parts else None
        tags = await _listed("tags", *parts["tags"]) if "tags" in parts else None
        segment, content = parts["file"]
        return Upload(_file_name(segment), await _content(content), collection, readers, tags)


async def _read_parts(
    request: Request[Any, Any, Any], files: AsyncExitStack
) -> dict[str, tuple[MultipartSegment, UploadFile]]:
    """The parts with our names, spooled to disk where they are long; others are passed over."""
    kind, options = request.content_type
    if kind != "multipart/form-data":
        raise ApiError(400, "invalid_request", WANTED)
    parts: dict[str, tuple[MultipartSegment, UploadFile]] = {}
    content: UploadFile | None = None
    try:
        with PushMultipartParser(options.get("boundary", "").encode(), max_segment_count=MAX_PARTS) as parser:
            async for chunk in request.stream():
                # An empty chunk would mean the end, which is `with`'s to notice.
                for event in parser.parse(chunk) if chunk else ():
                    if isinstance(event, MultipartSegment):
                        content = None
                        if event.name in parts:
                            raise _invalid(event.name, "send one per request")
                        if event.name in FIELDS:
                            content = UploadFile(content_type="", filename="")
                            files.push_async_callback(content.close)
                            parts[event.name] = event, content
                    elif event and content is not None:
                        await content.write(event)
    except MultipartError as error:
        raise ApiError(400, "invalid_request", f"the form cannot be read ({error.args[0]}): {WANTED}") from None
    return parts


def _file_name(segment: MultipartSegment) -> str:
    name = segment.filename
    if name is None and (encoded := ENCODED_NAME.search(segment.header("Content-Disposition", ""))):
        name = unquote(encoded[2], encoding=encoded[1])
    if name is None:
        raise _invalid("file", 'it comes without a file name: send it as a file, with filename="…"')
    name = name.replace("\\", "/").rsplit("/", 1)[-1].strip()
    if not 1 <= len(name) <= MAX_NAME_CHARACTERS or not is_text(name):
        raise _invalid("file", f"give the file a name of 1 to {MAX_NAME_CHARACTERS} characters")
    return name


async def _text(field: str, segment: MultipartSegment, content: UploadFile) -> str:
    try:
        return (await _content(content)).decode(segment.charset or "utf-8")
    except LookupError:
        raise _invalid(field, f"{segment.charset!r} is no charset; send UTF-8") from None
    except UnicodeError:
        raise _invalid(field, f"it is not valid {segment.charset or 'UTF-8'}") from None


async def _listed(field: str, segment: MultipartSegment, content: UploadFile) -> list[str] | None:
    """What commas part; None for a field that was left empty."""
    names = [name for each in (await _text(field, segment, content)).split(",") if (name := each.strip())]
    if len(names) > MAX_LISTED or not all(len(name) <= MAX_NAME_CHARACTERS and is_text(name) for name in names):
        raise _invalid(field, f"send at most {MAX_LISTED} names, of {MAX_NAME_CHARACTERS} characters at most")
    return names or None


async def _collection(segment: MultipartSegment, content: UploadFile) -> str:
    try:
        return collection_name(await _text("collection", segment, content))
    except ValueError as error:
        raise _invalid("collection", str(error)) from None


async def _content(part: UploadFile) -> bytes:
    await part.seek(0)
    return await part.read()


def _invalid(field: str, complaint: str) -> ApiError:
    return ApiError(400, "invalid_value", f"{field}: {complaint}", param=field)
