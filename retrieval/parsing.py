"""Which reader a file needs, by what it holds rather than by what it is called.

A format is a reader (a module beside this one that makes a `Parsed`) and a line here.  Reading in a process
of its own, with limits, would wrap `read_file`.
"""

from __future__ import annotations

import codecs
import re
from pathlib import PurePath

import charset_normalizer

from retrieval.errors import UnreadableFile
from retrieval.html import read_html
from retrieval.markdown import read_markdown
from retrieval.parsed import Parsed
from retrieval.pdf import read_pdf
from retrieval.underlined import read_text

PARSER_VERSION = 2  # raise it when the same file would give other text

MEDIA_TYPES = {
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".txt": "text/plain",
    ".text": "text/plain",
    ".rst": "text/x-rst",
    ".html": "text/html",
    ".htm": "text/html",
    ".xhtml": "text/html",
    ".pdf": "application/pdf",
}

_OTHER_KINDS = {
    b"PK\x03\x04": "a ZIP or Office file",
    b"\xd0\xcf\x11\xe0": "an old Office or Outlook file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x1f\x8b": "a gzip archive",
    b"\x7fELF": "a program",
    b"SQLite format 3": "an SQLite database",
}
# The header and its version: a text may well begin with a word about %PDF-.
_PDF_HEADER = re.compile(rb"(?:\xef\xbb\xbf)?\s*%PDF-\d\.\d")
_SAMPLE_BYTES = 256 * 1024  # what an encoding is guessed from, and a little more:
# In no encoding is one of these the second byte of a letter, so a sample that ends at one has no half letters.
_WHOLE_LETTER = re.compile(rb"[\x00-\x2f]")
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def is_readable_name(name: str) -> bool:
    """Whether a folder's file is one of ours, by its suffix."""
    return PurePath(name).suffix.lower() in MEDIA_TYPES


def read_file(name: str, data: bytes) -> Parsed:
    """The text and structure of a file.  Raises UnreadableFile with a reason for a person."""
    suffix = PurePath(name).suffix.lower()
    media_type = MEDIA_TYPES.get(suffix, "")
    if not data.strip():
        raise UnreadableFile(name, "no text: the file is empty")
    if _PDF_HEADER.match(data) or (media_type == "application/pdf" and b"%PDF-" in data[:1024]):
        parsed = read_pdf(name, data)
    elif media_type == "application/pdf":
        raise UnreadableFile(name, f"named .pdf, but it is {_kind(data)}")
    else:
        parsed = read_source(name, _decode(name, data), media_type)
    parsed.title = parsed.title or _title_from_name(name)
    return parsed


def read_source(name: str, text: str, media_type: str, title: str = "") -> Parsed:
    """The same for text that is decoded already.  Raises UnreadableFile ("no text")."""
    if media_type == "text/html" or (media_type in ("", "text/plain") and _looks_like_html(text)):
        parsed = read_html(text, title)
    elif media_type == "text/markdown":
        parsed = read_markdown(text, title)
    else:
        parsed = read_text(text, title, media_type or "text/plain")
    if not parsed.text.strip():
        raise UnreadableFile(name, "no text: nothing but white space or markup")
    parsed.title = parsed.title or _title_from_name(name)
    return parsed


def _looks_like_html(text: str) -> bool:
    start = text[:1024].lstrip().lower()
    return start.startswith(("<!doctype html", "<html"))


def _decode(name: str, data: bytes) -> str:
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError as error:
                raise UnreadableFile(name, f"begins as {encoding}, but is not valid {encoding}") from error
    for magic, kind in _OTHER_KINDS.items():
        if data.startswith(magic):
            raise UnreadableFile(name, f"it is {kind}, which is not read yet ({_readable()} are)")
    # Text has no NUL; NULs at every other byte would have been UTF-16, but without a mark that is a guess.
    if b"\0" in data:
        raise UnreadableFile(name, f"it is binary, not text ({_readable()} are read)")
    text = data.decode("utf-8", "replace")
    if _is_utf8(data, text):
        return text
    end = _WHOLE_LETTER.search(data, _SAMPLE_BYTES)
    sample = data[: end.end()] if end else data
    best = charset_normalizer.from_bytes(sample, preemptive_behaviour=True).best()
    if best is None:
        raise UnreadableFile(name, "it is binary, or in an encoding that can't be told; save it as UTF-8")
    try:
        return data.decode(best.encoding)
    except UnicodeDecodeError as error:
        raise UnreadableFile(
            name, f"it looks like {best.encoding}, but breaks off from it; save it as UTF-8"
        ) from error


def _is_utf8(data: bytes, text: str) -> bool:
    """Whether `text` (`data` as UTF-8, with U+FFFD for what is invalid) is what was meant: a few bad bytes, as
    damage and cut files leave them, make no other encoding.  Of text in another encoding next to nothing is valid
    UTF-8 by chance, in the worst (EUC-JP, TIS-620) one sequence in three: four in five is far from that."""
    bad = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
    valid = len(text) - len(text.encode("ascii", "ignore")) - bad
    return valid >= 4 * bad


def _kind(data: bytes) -> str:
    for magic, kind in _OTHER_KINDS.items():
        if data.startswith(magic):
            return kind
    head = data[:4096].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    return "binary data of another kind" if b"\0" in head else "not a PDF"


def _readable() -> str:
    return "Markdown, text, HTML and PDF"


def _title_from_name(name: str) -> str:
    stem = PurePath(name).stem or name
    return " ".join(stem.replace("_", " ").replace("-", " ").split()) or name
