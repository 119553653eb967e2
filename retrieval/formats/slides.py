"""Presentations (PPTX): a page for each slide, its title as a heading, what it says and what its speaker notes say."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pptx

from retrieval.formats import progress
from retrieval.formats.media_types import PPTX
from retrieval.formats.parsed import Parsed, TextBuilder, clean_text


def read_pptx(data: bytes, title: str = "") -> Parsed:
    """`title` "" takes the properties', else the first slide's."""
    presentation = pptx.Presentation(io.BytesIO(data))
    builder = TextBuilder()
    for number, slide in enumerate(progress.each(presentation.slides), 1):
        builder.page()
        head = slide.shapes.title
        named = clean_text(head.text_frame.text).strip() if head is not None and head.has_text_frame else ""
        builder.heading(1, named or f"Slide {number}")
        for shape in _shapes(slide.shapes):
            if head is not None and shape._element is head._element:
                continue
            if getattr(shape, "has_table", False) and shape.has_table:
                builder.table([clean_text(cell.text_frame.text) for cell in row.cells] for row in shape.table.rows)
            elif getattr(shape, "has_chart", False) and shape.has_chart:
                try:
                    _write_chart(shape.chart, builder)
                except (ValueError, KeyError, AttributeError, NotImplementedError):  # kinds that python-pptx lacks
                    builder.unread.append(f"slide {number}: the numbers of a chart")
            elif shape.has_text_frame:
                _write_paragraphs(shape.text_frame, builder)
        if slide.has_notes_slide and (frame := slide.notes_slide.notes_text_frame) is not None:
            notes = clean_text(frame.text).strip()
            builder.write(f"Notes: {notes}\n\n" if notes else "")
    return builder.parsed(title or clean_text(presentation.core_properties.title or ""), PPTX)


def _shapes(shapes: Any) -> Iterator[Any]:
    """From the top down and from the left, groups taken apart."""
    for shape in sorted(shapes, key=lambda each: (each.top or 0, each.left or 0)):
        if hasattr(shape, "shapes"):
            yield from _shapes(shape.shapes)
        else:
            yield shape


def _write_paragraphs(frame: Any, builder: TextBuilder) -> None:
    lines = [("  " * paragraph.level, clean_text(paragraph.text).strip()) for paragraph in frame.paragraphs]
    lines = [(indent, text) for indent, text in lines if text]
    bullet = "- " if len(lines) > 1 else ""
    for indent, text in lines:
        builder.write(f"{indent}{bullet}{' '.join(text.split())}\n")
    builder.write("\n" if lines else "")


def _write_chart(chart: Any, builder: TextBuilder) -> None:
    if chart.has_title and chart.chart_title.has_text_frame:
        builder.write(clean_text(chart.chart_title.text_frame.text).strip() + "\n")
    for plot in chart.plots:
        rows = [["", *(str(category) for category in plot.categories)]]
        rows += [
            [series.name or "", *("" if value is None else f"{value:g}" for value in series.values)]
            for series in plot.series
        ]
        builder.table(rows)
