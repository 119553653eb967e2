"""Spreadsheets (XLSX, XLS, ODS) and CSV: each row on a line that names its columns, so that it says something alone."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Iterator, Sequence

import python_calamine

from retrieval.errors import UnreadableFile
from retrieval.formats import progress
from retrieval.formats.media_types import CSV
from retrieval.formats.parsed import Parsed, TextBuilder, clean_text, names_columns

_DELIMITERS = ",;\t|"
_HEADER_ROWS = 5  # among which the columns' names are looked for

csv.field_size_limit(2**31 - 1)  # a cell may hold a page


def read_workbook(name: str, data: bytes, media_type: str, title: str = "") -> Parsed:
    """Sheets as sections.  Raises UnreadableFile for one that is locked by a password or damaged."""
    try:
        workbook = python_calamine.CalamineWorkbook.from_filelike(io.BytesIO(data))
        builder = TextBuilder()
        for sheet in progress.each(workbook.sheet_names):
            rows = workbook.get_sheet_by_name(sheet).to_python(skip_empty_area=True)
            cells = [[_cell(value) for value in row] for row in rows]
            if any(any(row) for row in cells):
                builder.heading(1, clean_text(sheet))
                _write_rows(cells, builder)
    except python_calamine.PasswordError as error:
        raise UnreadableFile(name, "the workbook is protected by a password") from error
    except python_calamine.CalamineError as error:
        raise UnreadableFile(name, f"the workbook is damaged ({error})") from error
    parsed = builder.parsed(title, media_type)
    if not title:
        parsed.title = ""  # a sheet's name ("Sheet1") names no document
    return parsed


def read_csv(text: str, title: str = "") -> Parsed:
    """Any of , ; tab and | between the columns."""
    text = clean_text(text)
    rows = list(csv.reader(io.StringIO(text), delimiter=_delimiter(text)))
    builder = TextBuilder()
    _write_rows(rows, builder)
    return builder.parsed(title, CSV)


def _write_rows(rows: Sequence[Sequence[str]], builder: TextBuilder) -> None:
    builder.table(_named_rows(rows), named=False)


def _named_rows(rows: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
    at = _header(rows)
    if at is None:
        yield from ([cell for cell in row if cell.strip()] for row in rows)
        return
    yield from rows[:at]
    names = [" ".join(name.split()) for name in rows[at]]
    for row in rows[at + 1 :]:
        named = [*names, *[""] * (len(row) - len(names))]
        yield [f"{n}: {cell}" if n else cell for n, cell in zip(named, row, strict=False) if cell.strip()]
    if at + 1 == len(rows):
        yield names  # and nothing under them


def _header(rows: Sequence[Sequence[str]]) -> int | None:
    """Where the columns' names stand: the first full row of different words, if the table is that wide below."""
    width = max((sum(1 for cell in row if cell.strip()) for row in rows[:50]), default=0)
    for at, row in enumerate(rows[:_HEADER_ROWS]):
        words = [cell.strip() for cell in row if cell.strip()]
        if len(words) < 2 or 2 * len(words) < width:
            continue
        return at if names_columns(words) else None
    return None


def _cell(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.15g}"
        case datetime.datetime():
            midnight = value.time() == datetime.time()
            return value.date().isoformat() if midnight else value.isoformat(" ", "minutes")
        case datetime.date() | datetime.time():
            return value.isoformat()
    return clean_text(str(value))


def _delimiter(text: str) -> str:
    """The one that most of the first lines have most alike.  (csv.Sniffer takes minutes for some files.)"""
    lines = [line for line in text[:65536].split("\n") if line.strip()][:30]

    def alike(mark: str) -> tuple[int, int]:
        counts = [line.count(mark) for line in lines]
        most = max(set(counts), key=lambda count: (counts.count(count), count), default=0)
        return (counts.count(most), most) if most else (0, sum(counts))

    return max(_DELIMITERS, key=alike) if lines else ","
