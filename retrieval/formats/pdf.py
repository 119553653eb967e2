"""PDF files: text page by page, and where each of its characters stands."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np
import pypdfium2
import pypdfium2.raw as pdfium

from retrieval.boxes import PageBoxes, pack
from retrieval.errors import UnreadableFile
from retrieval.formats import progress
from retrieval.formats.parsed import UNSEEN, Parsed, Section, clean_text

# PDFium is not thread-safe, not even for two documents.
_pdfium = threading.Lock()
_NO_TITLES = frozenset(("", "anonymous", "untitled", "unknown", "unspecified", "none"))  # what programs put there
# A word broken at a line's end (PDFium marks the hyphen, the line break follows), half of a line's end, and what nobody
# sees.
_LEFT_OUT = re.compile(f"[\ufffe\x02]\r?\n?|\r(?=\n)|{UNSEEN.pattern}")
_SCANNED = "(scanned images?): make {} searchable with a text recogniser (OCR)"


class _Page(NamedTuple):
    """`boxes` as `pack` makes them; `drawn`: something is on it."""

    text: str
    width: float
    height: float
    boxes: bytes
    drawn: bool


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
            pages = [_read_page(document, number) for number in progress.each(range(len(document)))]
        except pypdfium2.PdfiumError as error:
            raise UnreadableFile(name, f"the PDF is damaged ({error})") from error
        finally:
            document.close()
    if not any(page.text.strip() for page in pages):
        raise UnreadableFile(name, f"the PDF holds no text {_SCANNED.format('it')} first", "no_text")
    starts: list[int] = []
    boxes: list[PageBoxes] = []
    offset = 0
    for page in pages:
        end = offset + len(page.text)
        starts.append(offset)
        boxes.append(PageBoxes(page.width, page.height, offset, end, page.boxes))
        offset = end + len("\n\n")
    text = "\n\n".join(page.text for page in pages)
    return Parsed(text, title, "application/pdf", [Section(0, ())], starts, _unread(pages), boxes=boxes)


def _own_title(document: pypdfium2.PdfDocument) -> str:
    title = " ".join(clean_text(document.get_metadata_dict().get("Title", "")).split())
    return "" if title.lower().strip("()[]") in _NO_TITLES else title[:300]


def _read_page(document: pypdfium2.PdfDocument, number: int) -> _Page:
    page = document[number]
    try:
        text_page = page.get_textpage()
        try:
            codes, boxes = _characters(text_page)
        finally:
            text_page.close()
        width, height = page.get_size()
        boxes = _as_shown(boxes, page)
        drawn = pdfium.FPDFPage_CountObjects(page) > 0
    finally:
        page.close()
    # What stands off the page is not seen, but ends of lines have no size.
    left, top, right, bottom = boxes.T
    off = (right <= 0) | (left >= width) | (bottom <= 0) | (top >= height)
    keep = (codes > 0) & (codes <= 0x10FFFF) & ~(off & (right > left) & (bottom > top))
    text = "".join(map(chr, codes[keep].tolist()))
    stays = np.ones(len(text), dtype=bool)
    for gone in _LEFT_OUT.finditer(text):
        stays[gone.start() : gone.end()] = False
    # From here on each character becomes one other, if any.
    text = clean_text("".join(compress(text, stays)).replace("\r", "\n"))
    return _Page(text, width, height, pack(boxes[keep][stays]), drawn)


def _characters(text_page: pypdfium2.PdfTextPage) -> tuple[np.ndarray, np.ndarray]:
    """Code points int64 [n], 0 for none, and boxes float32 [n, 4] on the page as it was written: left, top, right,
    bottom, counted from its bottom.  Boxes are as high as the line, whatever the letter."""
    count = pdfium.FPDFText_CountChars(text_page)
    codes = np.array([pdfium.FPDFText_GetUnicode(text_page, at) for at in range(count)], dtype=np.int64)
    boxes = (pdfium.FS_RECTF * count)()
    for at in range(count):
        pdfium.FPDFText_GetLooseCharBox(text_page, at, boxes[at])
    # Letters beyond U+FFFF come in two halves (UTF-16).
    first = np.flatnonzero((codes[:-1] >> 10 == 0xD800 >> 10) & (codes[1:] >> 10 == 0xDC00 >> 10))
    codes[first] = 0x10000 + ((codes[first] & 0x3FF) << 10) + (codes[first + 1] & 0x3FF)
    codes[first + 1] = 0
    return codes, np.frombuffer(boxes, dtype=np.float32).reshape(count, 4)


def _as_shown(boxes: np.ndarray, page: pypdfium2.PdfPage) -> np.ndarray:
    """The same from the top left corner of the page as a viewer turns and crops it."""
    left, bottom, right, top = page.get_bbox()
    x, y = boxes[:, 0::2], boxes[:, 1::2]
    across, down = {
        0: (x - left, top - y),
        90: (y - bottom, x - left),
        180: (right - x, y - bottom),
        270: (top - y, right - x),
    }[page.get_rotation()]
    return np.stack([across.min(1), down.min(1), across.max(1), down.max(1)], axis=1)


def _unread(pages: Sequence[_Page]) -> list[str]:
    runs: list[tuple[int, int]] = []
    for number, page in enumerate(pages, 1):
        if not page.drawn or page.text.strip():
            continue
        if runs and runs[-1][1] == number - 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    named = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return [f"no text on page{'s' * (not named.isdigit())} {named} {_SCANNED.format('the PDF')}"] if runs else []
