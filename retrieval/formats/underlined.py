"""Plain text, whose headings (if any) are underlined, as reStructuredText writes them."""

from __future__ import annotations

import re

from retrieval.formats.parsed import Parsed, TextBuilder, clean_text

_UNDERLINE = re.compile(r"([=\-*~^\"'+#`:.])\1{2,}\s*$")


def read_text(text: str, title: str, media_type: str = "text/plain") -> Parsed:
    """Keep the text as it stands, but for the underlines of headings.  `title` "" takes the first heading."""
    lines = clean_text(text).split("\n")
    builder = TextBuilder()
    levels: list[str] = []
    at = 0
    while at < len(lines):
        mark = _heading_mark(lines, at)
        if mark is None:
            builder.write(lines[at] + ("\n" if at + 1 < len(lines) else ""))
            at += 1
            continue
        if mark not in levels:
            levels.append(mark)
        builder.heading(levels.index(mark) + 1, lines[at])
        at += 2
        while at < len(lines) and not lines[at].strip():
            at += 1
    return Parsed(builder.text(), title or builder.first_heading(), media_type, builder.sections)


def _heading_mark(lines: list[str], at: int) -> str | None:
    """The underlining character if line `at` is a heading: text at the margin, after a blank line, underlined
    about as long as itself."""
    if at + 1 >= len(lines) or not (line := lines[at].rstrip()) or line[0].isspace() or len(line) > 200:
        return None
    if at and lines[at - 1].strip():
        return None
    under = lines[at + 1].rstrip()
    if not _UNDERLINE.match(under) or _UNDERLINE.match(line) or abs(len(under) - len(line)) > 3:
        return None
    return under[0]
