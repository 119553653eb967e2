"""What a file is, by what it holds; its name decides only between kinds of text."""

from __future__ import annotations

import re

import olefile

from retrieval.errors import UnreadableFile
from retrieval.formats.archive import Archive
from retrieval.formats.mail import looks_like_mail
from retrieval.formats.media_types import (
    ATOM,
    DOCX,
    EML,
    EPUB,
    HTML,
    MSG,
    ODS,
    PDF,
    PPTX,
    READABLE,
    RSS,
    TEXT,
    XLS,
    XLSX,
    XML,
    ZIP,
    named_type,
)

# The header and its version: a text may well begin with a word about %PDF-.
_PDF_HEADER = re.compile(rb"(?:\xef\xbb\xbf)?\s*%PDF-\d\.\d")
_FEED = re.compile(r"(?:<\?xml[^>]*>|<!--[^>]*-->|\s)*<(?:rss|feed|rdf:RDF)[\s>]")
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_ZIPS = (b"PK\x03\x04", b"PK\x05\x06")
_UNREAD = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a sound, a film or a WebP image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"ID3": "a sound",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x7fELF": "a program",
    b"MZ\x90\0": "a program",
    b"SQLite format 3": "an SQLite database",
    b"{\\rtf": "an RTF file: save it as DOCX",
}
_WITHIN_ZIP = {
    "word/document.xml": DOCX,
    "ppt/presentation.xml": PPTX,
    "xl/workbook.xml": XLSX,
    "xl/workbook.bin": XLSX,
    "META-INF/container.xml": EPUB,
}
_WITHIN_OLE = {"workbook": XLS, "book": XLS, "__properties_version1.0": MSG}
_OLD_OFFICE = {
    "encryptedpackage": "an Office file that is protected by a password",
    "worddocument": "an old Word file: save it as DOCX",
    "powerpoint document": "an old PowerPoint file: save it as PPTX",
}


def binary_type(name: str, data: bytes) -> str:
    """The media type of what is no text, "" for what may be one.  Raises UnreadableFile for what is not read, or is
    called a PDF and is none."""
    named = named_type(name)
    if _PDF_HEADER.match(data) or (named == PDF and b"%PDF-" in data[:1024]):
        return PDF
    found = ""
    if data.startswith(_ZIPS):
        found = _zip_type(name, data)
    elif data.startswith(_OLE):
        found = _ole_type(name, data)
    for magic, kind in _UNREAD.items():
        # A text may begin with the letters of one, but has no byte of zeros.
        if data.startswith(magic) and (b"\0" in data[:512] or not magic.isascii() or magic.startswith(b"{")):
            raise UnreadableFile(name, f"it is {kind}, which is not read ({READABLE} are)")
    if named == PDF:
        raise UnreadableFile(name, f"named .pdf, but it is {found or _kind(data)}")
    return found


def text_type(name: str, text: str) -> str:
    """The media type of a text, by its name where that says more than "text", else by its beginning."""
    named = named_type(name)
    named = "" if named in _WITHIN_ZIP.values() or named in (PDF, ZIP, ODS, XLS, MSG) else named
    start = text[:2048].removeprefix("\ufeff").lstrip()
    if named in ("", TEXT, XML, HTML) and _FEED.match(start):
        return ATOM if "<feed" in start else RSS
    if named in ("", TEXT) and start.lower().startswith(("<!doctype html", "<html")):
        return HTML
    if named == "" and start.startswith("<?xml"):
        return XML
    if named == "" and looks_like_mail(text[:8192].encode("utf-8", "replace")):
        return EML
    return named or TEXT


def _zip_type(name: str, data: bytes) -> str:
    archive = Archive(name, data)
    inside = set(archive.names)
    for member, media_type in _WITHIN_ZIP.items():
        if member in inside:
            return media_type
    if "mimetype" in inside:
        declared = archive.read("mimetype").decode("ascii", "replace").strip()
        if declared == ODS:
            return ODS
        if declared.startswith("application/vnd.oasis.opendocument"):
            raise UnreadableFile(name, "it is an OpenDocument file, which is not read: save it as DOCX or PPTX")
    return ZIP


def _ole_type(name: str, data: bytes) -> str:
    try:
        with olefile.OleFileIO(data) as ole:
            streams = {entry[0].lower() for entry in ole.listdir()}
    except OSError as error:
        raise UnreadableFile(name, f"it begins as an old Office or Outlook file, but is damaged ({error})") from error
    for stream, kind in _OLD_OFFICE.items():
        if stream in streams:
            raise UnreadableFile(name, f"it is {kind}")
    for stream, media_type in _WITHIN_OLE.items():
        if stream in streams:
            return media_type
    raise UnreadableFile(name, f"it is an old Office file of a kind that is not read ({READABLE} are)")


def _kind(data: bytes) -> str:
    head = data[:4096].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    return "binary data of another kind" if b"\0" in head else "not a PDF"
