"""The plain values that retrieval hands out.  Offsets are characters in a document's extracted text."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class Document(Struct, frozen=True):
    """One document as it is listed.  `source` is a path or an upload's name; `added_at` is ISO 8601 in UTC.
    `modified_at` is the document's own date, None where unknown; `owner` ("" is the operator) and `readers` as
    `retrieval.access` names them."""

    document_id: str
    title: str
    source: str
    media_type: str
    collection: str
    content_hash: str
    characters: int
    passages: int
    pages: int | None
    added_at: str
    owner: str = ""
    modified_at: str | None = None
    readers: list[str] = []
    tags: list[str] = []


class DocumentText(Struct, frozen=True):
    """A document with the extracted text that all offsets refer to."""

    document: Document
    text: str


class Passage(Struct, frozen=True):
    """A piece of a document: `text == document_text[start:end]`.

    `heading` is the path of headings above it, `page` counts from 1 (None where the format has no pages),
    `score` is in 0..1 and only comparable within one search.  Ids are never used again for other text.
    """

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


class Box(Struct, frozen=True):
    """A rectangle on a page: from its left (`x0`) to its right (`x1`) edge and from its top (`y0`) to its bottom
    (`y1`), in points (1/72 inch) from the top left corner of the page as it is shown; pages count from 1."""

    page: int
    x0: float
    y0: float
    x1: float
    y1: float
    page_width: float
    page_height: float


class Quote(Struct, frozen=True):
    """A sentence as it stands: `text == document_text[start:end]`; `similarity` is a cosine."""

    passage_id: str
    start: int
    end: int
    text: str
    similarity: float


class Support(Struct, frozen=True):
    """The sentence that best supports one statement; `passage_id` None (and an empty quote) = unsupported."""

    passage_id: str | None
    start: int
    end: int
    quote: str
    similarity: float


class SearchResult(Struct, frozen=True):
    """Passages, best first.

    `relevance` is the cosine of the query and the sentence closest to it, an absolute measure (`search.relevance`);
    `relevant` says whether it reaches the floor of the settings.  `facets` counts the candidate documents
    by collection and media type.  `timings` are milliseconds by stage: embed, vectors, text, fuse.
    """

    passages: list[Passage]
    relevance: float
    relevant: bool
    facets: dict[str, dict[str, int]]
    timings: dict[str, float]


class IngestReport(Struct):
    """What became of each source.  `failed` and `unread` are (source, reason): what was not read at all, and what was
    but for a part (a picture in an archive); `codes` has the error's code for each that failed.  `moved`: files that
    were known by another name, their documents have this one now.  `skipped` counts files inside folders whose format
    isn't read."""

    added: list[str]
    updated: list[str]
    unchanged: list[str]
    failed: list[tuple[str, str]]
    passages: int
    skipped: int = 0
    unread: list[tuple[str, str]] = []
    codes: dict[str, str] = {}
    moved: list[str] = []


class ProgressEvent(Struct, frozen=True):
    """`done` of `total` sources are settled; `source` is in `state`.  While it is read `part` of its `parts` (pages,
    slides, sheets, files of an archive) are done, 0 of 0 in a format without them; then `part` of `parts` passages are
    embedded."""

    done: int
    total: int
    source: str
    state: Literal["parsing", "embedding", "added", "updated", "moved", "unchanged", "failed", "checking", "checked"]
    part: int = 0
    parts: int = 0


JobState = Literal["queued", "parsing", "embedding", "done", "failed", "cancelled"]


class Job(Struct, frozen=True):
    """One document that is to be read, is being read or was.  `kind`: what `source` is.  More than one of `attempts`:
    it was tried again.  `parts` (pages, slides, sheets, files of an archive) and `passages` are None until they are
    known, and the first also in a format without parts.  `reason` and `code`: why it failed, or while it is queued, why
    it did before.  `unread`: what of a document that is done gave no text.  Times are ISO 8601 in UTC."""

    job_id: str
    kind: Literal["upload", "url", "file"]
    source: str
    collection: str
    owner: str
    state: JobState
    attempts: int = 0
    parts_read: int = 0
    parts: int | None = None
    passages_embedded: int = 0
    passages: int | None = None
    reason: str | None = None
    code: str | None = None
    document_id: str | None = None
    created_at: str = ""
    updated_at: str = ""
    unread: list[str] = []
