"""A file's text and structure, by the reader that it needs.

A format is a module beside this one that makes a `Parsed`, a line in `media_types`, one in `sniffing` and one here.
This runs in a process of its own (`retrieval.sandbox`): readers may stumble over what they are given, take for ever, or
crash.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from retrieval.errors import UnreadableFile
from retrieval.formats import sniffing
from retrieval.formats.archive import Archive, ReadMember, read_archive
from retrieval.formats.decoding import decode
from retrieval.formats.epub import read_epub
from retrieval.formats.html import read_html
from retrieval.formats.json import read_json, read_json_lines
from retrieval.formats.mail import read_eml, read_msg
from retrieval.formats.markdown import read_markdown
from retrieval.formats.media_types import (
    ATOM,
    CSV,
    DOCX,
    EML,
    EPUB,
    HTML,
    JSON,
    JSON_LINES,
    MARKDOWN,
    MSG,
    NOTEBOOK,
    ODS,
    PDF,
    PPTX,
    RSS,
    XLS,
    XLSX,
    XML,
    ZIP,
)
from retrieval.formats.parsed import Parsed, clean_text, title_from_name
from retrieval.formats.pdf import read_pdf
from retrieval.formats.sheets import read_csv, read_workbook
from retrieval.formats.slides import read_pptx
from retrieval.formats.underlined import read_text
from retrieval.formats.word import read_docx
from retrieval.formats.xml import read_xml

log = logging.getLogger(__name__)

MAX_CHARACTERS = 20_000_000  # of a document's text
_DEEPEST = 3  # archives and mails within each other


def read_file(name: str, data: bytes, depth: int = 0) -> Parsed:
    """The text and structure of a file.  Raises UnreadableFile with a reason for a person."""
    if not data.strip():
        raise UnreadableFile(name, "no text: the file is empty", "no_text")
    if depth > _DEEPEST:
        raise UnreadableFile(name, "it lies too deep, in archives within archives", "too_large_expanded")
    media_type = sniffing.binary_type(name, data)
    if not media_type:
        text = decode(name, data)
        return read_source(name, text, sniffing.text_type(name, text), depth=depth, data=data)
    return _guarded(name, partial(_read_binary, name, data, media_type, partial(read_file, depth=depth + 1)))


def read_source(
    name: str, text: str, media_type: str, title: str = "", depth: int = 0, data: bytes | None = None
) -> Parsed:
    """The same for text that is decoded already; `data` is what it was decoded from.  Raises UnreadableFile."""
    media_type = media_type or sniffing.text_type(name, text)
    encoded = data if data is not None else text.encode("utf-8", "replace")
    read_member = partial(read_file, depth=depth + 1)
    return _guarded(name, partial(_read_text, name, text, encoded, media_type, read_member, title))


def _read_text(name: str, text: str, encoded: bytes, media_type: str, read_member: ReadMember, title: str) -> Parsed:
    if media_type == HTML:
        return read_html(text, title)
    if media_type == MARKDOWN:
        return read_markdown(text, title)
    if media_type == CSV:
        return read_csv(text, title)
    if media_type in (JSON, NOTEBOOK):
        return read_json(name, text, title)
    if media_type == JSON_LINES:
        return read_json_lines(name, text, title)
    if media_type in (XML, RSS, ATOM):
        return read_xml(name, encoded, title)
    if media_type == EML:
        return read_eml(encoded, read_member, title)
    return read_text(text, title, media_type)


def _read_binary(name: str, data: bytes, media_type: str, read_member: ReadMember) -> Parsed:
    if media_type == PDF:
        return read_pdf(name, data)
    if media_type == XLS:
        return read_workbook(name, data, XLS)
    if media_type == MSG:
        return read_msg(name, data, read_member)
    archive = Archive(name, data)
    archive.check()
    if media_type == ZIP:
        return read_archive(name, archive, read_member)
    if media_type == EPUB:
        return read_epub(name, archive)
    if media_type == DOCX:
        return read_docx(data)
    if media_type == PPTX:
        return read_pptx(data)
    assert media_type in (XLSX, ODS), media_type
    return read_workbook(name, data, media_type)


def _guarded(name: str, read: Callable[[], Parsed]) -> Parsed:
    try:
        parsed = read()
    except (UnreadableFile, MemoryError):
        raise
    except Exception as error:
        # A reader that stumbles over this file means that the file is not what its format asks for.
        log.warning("reading %s failed", name, exc_info=True)
        raise UnreadableFile(name, f"it is damaged, its reader says: {type(error).__name__}: {error}") from error
    if not parsed.text.strip():
        raise UnreadableFile(name, "no text: nothing but white space or markup", "no_text")
    if len(parsed.text) > MAX_CHARACTERS:
        raise UnreadableFile(name, f"more than {MAX_CHARACTERS:,} characters of text: split it", "too_large_expanded")
    parsed.title = clean_text(parsed.title).strip() or title_from_name(name)
    return parsed
