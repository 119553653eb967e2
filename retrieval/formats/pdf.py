"""PDF files: text page by page."""

from __future__ import annotations

import re
import threading

import pypdfium2

from retrieval.errors import UnreadableFile
from retrieval.formats import progress
from retrieval.formats.parsed import Parsed, Section, clean_text

# PDFium is not thread-safe, not even for two documents.
_pdfium = threading.Lock()
_NO_TITLES = frozenset(("", "anonymous", "untitled", "unknown", "unspecified", "none"))  # what programs put there
# A word broken at a line's end: PDFium marks the hyphen, the line break follows.
_BROKEN_WORD = re.compile("[\ufffe\x02]\r?\n?")


def read_pdf(name: str, data: bytes, title: str = "") -> Parsed:
    """`title` "" takes the metadata's.  Raises UnreadableFile: damaged, locked by a password, or only scans."""
    with _pdfium:
        try:
            document = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as error:
            locked = "password" in str(error).lower()
            reason = "the PDF is protected by a password" if locked else f"the PDF is damaged ({error})"
            raise UnreadableFile(name, reason) from error
        try:
            title = title or _own_title(document)
            pages = [_page_text(document, number) for number in progress.each(range(len(document)))]
        except pypdfium2.PdfiumError as error:
            raise UnreadableFile(name, f"the PDF is damaged ({error})") from error
        finally:
            document.close()
    if not any(page.strip() for page in pages):
        raise UnreadableFile(
            name,
            "the PDF holds no text (scanned images?): make it searchable with a text recogniser (OCR) first",
            "no_text",
        )
    starts, offset = [], 0
    for page in pages:
        starts.append(offset)
        offset += len(page) + 2
    return Parsed("\n\n".join(pages), title, "application/pdf", [Section(0, ())], starts)


def _own_title(document: pypdfium2.PdfDocument) -> str:
    title = " ".join(clean_text(document.get_metadata_dict().get("Title", "")).split())
    return "" if title.lower().strip("()[]") in _NO_TITLES else title[:300]


def _page_text(document: pypdfium2.PdfDocument, number: int) -> str:
    page = document[number]
    try:
        text_page = page.get_textpage()
        try:
            text = text_page.get_text_bounded()
        finally:
            text_page.close()
    finally:
        page.close()
    return clean_text(_BROKEN_WORD.sub("", text))
