"""What every reader makes of a file: plain text, where its sections begin, where its pages begin."""

from __future__ import annotations

import re

from msgspec import Struct


class Section(Struct, frozen=True):
    """A stretch of text under one path of headings, from `start` (the heading's own line) to the next section."""

    start: int
    path: tuple[str, ...]


class Parsed(Struct):
    """`text` is what all offsets refer to.  `sections` are in order and begin at 0; `page_starts` (None without
    pages) holds the offset of each page, page 1 first."""

    text: str
    title: str
    media_type: str
    sections: list[Section]
    page_starts: list[int] | None = None


class TextBuilder:
    """Collects text and headings; keeps the heading path as it goes."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0
        self._path: list[tuple[int, str]] = []
        self.sections: list[Section] = [Section(0, ())]

    def write(self, text: str) -> None:
        self._parts.append(text)
        self._length += len(text)

    def heading(self, level: int, title: str) -> None:
        """Write a heading on a line of its own and open its section.  Level 1 is the highest."""
        title = " ".join(title.split())
        if not title:
            return
        self._path = [(depth, name) for depth, name in self._path if depth < level] + [(level, title)]
        section = Section(self._length, tuple(name for _, name in self._path))
        if self.sections[-1].start == self._length:
            self.sections.pop()
        self.sections.append(section)
        self.write(title + "\n\n")

    def text(self) -> str:
        return "".join(self._parts)

    def first_heading(self) -> str:
        return next((section.path[0] for section in self.sections if section.path), "")


_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")


def clean_text(text: str) -> str:
    """Line ends as \\n, and nothing that a database or a tokenizer chokes on (NUL, lone surrogates)."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x0c", "\n")
    text = _CONTROLS.sub(" ", text)
    return text.encode("utf-8", "replace").decode("utf-8")
