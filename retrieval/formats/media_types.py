"""The formats that are read, by the names that the wire has for them."""

from __future__ import annotations

from pathlib import PurePath

PARSER_VERSION = 5  # raise it when the same file would give other text

DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
PPTX = "application/vnd.openxmlformats-officedocument.presentationml.presentation"
XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
XLS = "application/vnd.ms-excel"
ODS = "application/vnd.oasis.opendocument.spreadsheet"
CSV = "text/csv"
ZIP = "application/zip"
EPUB = "application/epub+zip"
EML = "message/rfc822"
MSG = "application/vnd.ms-outlook"
JSON = "application/json"
JSON_LINES = "application/jsonl"
NOTEBOOK = "application/x-ipynb+json"
RSS = "application/rss+xml"
ATOM = "application/atom+xml"
XML = "application/xml"
HTML, MARKDOWN, PDF, TEXT, RST = "text/html", "text/markdown", "application/pdf", "text/plain", "text/x-rst"
READABLE = (
    "Markdown, text, HTML, PDF, DOCX, PPTX, XLSX, XLS, ODS, CSV, EPUB, EML, MSG, JSON, notebooks, RSS, XML and ZIP"
)
# By suffix: what is read out of folders, and what a text is taken for.
MEDIA_TYPES = {
    ".md": MARKDOWN,
    ".markdown": MARKDOWN,
    ".txt": TEXT,
    ".text": TEXT,
    ".log": TEXT,
    ".rst": RST,
    ".html": HTML,
    ".htm": HTML,
    ".xhtml": HTML,
    ".pdf": PDF,
    ".docx": DOCX,
    ".docm": DOCX,
    ".pptx": PPTX,
    ".pptm": PPTX,
    ".xlsx": XLSX,
    ".xlsm": XLSX,
    ".xlsb": XLSX,
    ".xls": XLS,
    ".ods": ODS,
    ".csv": CSV,
    ".tsv": CSV,
    ".epub": EPUB,
    ".eml": EML,
    ".msg": MSG,
    ".json": JSON,
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".ipynb": NOTEBOOK,
    ".xml": XML,
    ".rss": RSS,
    ".atom": ATOM,
    ".zip": ZIP,
}


def is_readable_name(name: str) -> bool:
    """Whether a folder's file is one of ours, by its suffix."""
    return PurePath(name).suffix.lower() in MEDIA_TYPES


def named_type(name: str) -> str:
    """What the suffix says, "" where it says nothing."""
    return MEDIA_TYPES.get(PurePath(name).suffix.lower(), "")
