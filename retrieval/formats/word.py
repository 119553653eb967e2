"""Word documents (DOCX): paragraphs, headings by style, lists, tables, formulas' letters, footnotes, endnotes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import docx
from docx.oxml.ns import qn

from retrieval.formats.media_types import DOCX
from retrieval.formats.parsed import Parsed, TextBuilder, clean_text
from retrieval.formats.tree import local_name, safe_xml

_HEADING = re.compile(r"heading ([1-9])$", re.IGNORECASE)
_NOTES = {"footnote": "[{}]", "endnote": "[endnote {}]"}  # how each is marked: both kinds are numbered from 1
# A change that was struck out; what older programs show in place of a text box that was written already.
_LEFT_OUT = frozenset(("del", "movefrom", "fallback", "instrtext"))


def read_docx(data: bytes, title: str = "") -> Parsed:
    """`title` "" takes the properties', else the first heading."""
    document = docx.Document(io.BytesIO(data))
    styles = {style.style_id: style for style in document.styles if hasattr(style, "style_id")}
    builder = TextBuilder()
    in_list = False
    for block in _blocks(document.element.body):
        if local_name(block) == "tbl":
            builder.table([clean_text(_text(cell)) for cell in _inside(row, "tc")] for row in _inside(block, "tr"))
            in_list = False
            continue
        text = clean_text(_text(block)).strip()
        if not text:
            continue
        level, listed = _level_and_list(block, styles)
        if in_list and not listed:
            builder.write("\n")
        in_list = listed and level is None
        if level is not None:
            builder.heading(level, text)
        elif listed:
            builder.write(f"- {text}\n")
        else:
            builder.write(f"{text}\n\n")
    _write_notes(document, builder)
    return builder.parsed(title or clean_text(document.core_properties.title or ""), DOCX)


def _blocks(container: Any) -> Iterator[Any]:
    """Paragraphs and tables in order, also those in content controls and tracked insertions."""
    for child in container:
        name = local_name(child)
        if name in ("p", "tbl"):
            yield child
        elif name not in _LEFT_OUT:
            yield from _blocks(child)


def _inside(node: Any, wanted: str) -> Iterator[Any]:
    """The rows of a table or the cells of a row, not those of tables within."""
    for child in node:
        if local_name(child) == wanted:
            yield child
        elif local_name(child) in ("sdt", "sdtcontent", "ins", "customxml"):
            yield from _inside(child, wanted)


def _text(node: Any) -> str:
    parts: list[str] = []
    stack = [node]
    while stack:
        each = stack.pop()
        if isinstance(each, str):
            parts.append(each)
            continue
        name = local_name(each)
        if name in _LEFT_OUT:
            continue
        if name == "t":  # a text run, or the letters of a formula
            parts.append(each.text or "")
        elif name in ("tab", "ptab"):
            parts.append("\t")
        elif name in ("br", "cr"):
            parts.append("\n")
        elif name == "nobreakhyphen":
            parts.append("-")
        elif name in ("footnotereference", "endnotereference"):
            parts.append(_NOTES[name.removesuffix("reference")].format(each.get(qn("w:id"))))
        if name == "p" and each is not node:
            parts.append("\n" if parts else "")
        stack += reversed(each) if name not in ("t", "ppr", "rpr") else ()
    return "".join(parts)


def _level_and_list(paragraph: Any, styles: dict[str, Any]) -> tuple[int | None, bool]:
    """(the level of a heading, whether it is an item of a list)"""
    properties = paragraph.find(qn("w:pPr"))
    if properties is None:
        return None, False
    listed = properties.find(qn("w:numPr")) is not None
    named = properties.find(qn("w:pStyle"))
    style = styles.get(named.get(qn("w:val"))) if named is not None else None
    seen = 0
    while style is not None and seen < 20:  # styles may be based on each other in a circle
        name = style.name or ""
        if name.lower() == "title":
            return 1, False
        if found := _HEADING.match(name):
            return int(found[1]), False
        listed = listed or name.lower().startswith("list")
        style, seen = getattr(style, "base_style", None), seen + 1
    return None, listed


def _write_notes(document: Any, builder: TextBuilder) -> None:
    parts = {each.reltype.rpartition("/")[2]: each for each in document.part.rels.values() if not each.is_external}
    for kind, mark in _NOTES.items():
        for note in safe_xml(parts[f"{kind}s"].target_part.blob) if f"{kind}s" in parts else ():
            text = " ".join(clean_text(_text(note)).split())
            if text and local_name(note) == kind and note.get(qn("w:type")) is None:
                builder.write(f"{mark.format(note.get(qn('w:id')))} {text}\n")
