"""What every reader makes of a file: plain text, where its sections begin, where its pages begin."""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import Struct


class Section(Struct, frozen=True):
    """A stretch of text under one path of headings, from `start` (the heading's own line) to the next section."""

    start: int
    path: tuple[str, ...]


class Parsed(Struct):
    """`text` is what all offsets refer to.  `sections` are in order and begin at 0; `page_starts` (None without
    pages) holds the offset of each page, page 1 first.  `unread`: parts of the file that gave no text (a picture in an
    archive), each with the reason, in words."""

    text: str
    title: str
    media_type: str
    sections: list[Section]
    page_starts: list[int] | None = None
    unread: list[str] = []


class TextBuilder:
    """Collects text, headings and pages; keeps the heading path as it goes."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0
        self._path: list[tuple[int, str]] = []
        self._pages: list[int] = []
        self.sections: list[Section] = [Section(0, ())]
        self.unread: list[str] = []

    def write(self, text: str) -> None:
        self._parts.append(text)
        self._length += len(text)

    def heading(self, level: int, title: str) -> None:
        """Write a heading on a line of its own and open its section.  Level 1 is the highest."""
        title = " ".join(title.split())
        if not title:
            return
        named = title if len(title) <= 300 else title[:299] + "…"  # every section below repeats it
        self._path = [(depth, name) for depth, name in self._path if depth < level] + [(level, named)]
        self._open(tuple(name for _, name in self._path))
        self.write(title + "\n\n")

    def page(self) -> None:
        """What is written from here on stands on the next page."""
        self._pages.append(self._length)

    def row(self, cells: Sequence[str]) -> None:
        """A line of a table; nothing where all its cells are empty."""
        cells = [" ".join(cell.split()) for cell in cells]
        if any(cells):
            self.write(" | ".join(cells).rstrip(" |") + "\n")

    def embed(self, part: Parsed, heading: str = "") -> None:
        """Write a whole document that lies within this one, its sections below those that are open, under a heading of
        its own where it has one.  Its pages are not counted."""
        if heading:
            self.heading(self._path[-1][0] + 1 if self._path else 1, heading)
        above = tuple(name for _, name in self._path)
        start = self._length
        for section in part.sections:
            self._open((*above, *section.path), start + section.start)
        self.write(part.text.rstrip() + "\n\n")
        self._open(above)
        self.unread += [f"{heading}: {each}" if heading else each for each in part.unread]
        if heading:
            self._path.pop()

    def parsed(self, title: str, media_type: str) -> Parsed:
        """The whole; `title` "" takes the first heading."""
        title = " ".join(title.split())[:300] or self.first_heading()
        return Parsed(self.text(), title, media_type, self.sections, self._pages or None, self.unread)

    def _open(self, path: tuple[str, ...], start: int | None = None) -> None:
        start = self._length if start is None else start
        if self.sections[-1].start == start:
            self.sections.pop()
        self.sections.append(Section(start, path))

    def text(self) -> str:
        return "".join(self._parts)

    def first_heading(self) -> str:
        return next((section.path[0] for section in self.sections if section.path), "")


_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
# What nobody sees but a model reads: zero-width marks, orders to turn the direction of writing, and tag characters,
# in which whole sentences can be hidden.  Joiners stay: some scripts and emoji are written with them.
_UNSEEN = re.compile("[\u00ad\u180e\u200b\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\U000e0000-\U000e007f]")


def clean_text(text: str) -> str:
    """Line ends as \\n, nothing that a database or a tokenizer chokes on (NUL, lone surrogates), nothing unseen."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x0c", "\n")
    text = _UNSEEN.sub("", _CONTROLS.sub(" ", text))
    return text.encode("utf-8", "replace").decode("utf-8")
