"""What every reader makes of a file: plain text, where its sections begin, where its pages begin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from msgspec import Struct

from retrieval.boxes import PageBoxes


class Section(Struct, frozen=True):
    """A stretch of text under one path of headings, from `start` (the heading's own line) to the next section."""

    start: int
    path: tuple[str, ...]


class Block(Struct, frozen=True, array_like=True):
    """A table or some code, from `start` to `end`: a passage holds all of it or, where it is longer than that, whole
    lines, which are its rows.  `named`: the first line names the columns of the others."""

    start: int
    end: int
    named: bool = False


class Parsed(Struct):
    """`text` is what all offsets refer to.  `sections` are in order and begin at 0; `page_starts` (None without
    pages) holds the offset of each page, page 1 first.  `unread`: parts of the file that gave no text (a picture in an
    archive), each with the reason, in words.  `blocks` are in order and apart from each other.  `boxes` has
    one for each page, where the format tells them."""

    text: str
    title: str
    media_type: str
    sections: list[Section]
    page_starts: list[int] | None = None
    unread: list[str] = []
    blocks: list[Block] = []
    boxes: list[PageBoxes] = []


class TextBuilder:
    """Collects text, headings and pages; keeps the heading path as it goes."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0
        self._path: list[tuple[int, str]] = []
        self._pages: list[int] = []
        self.sections: list[Section] = [Section(0, ())]
        self.unread: list[str] = []
        self.blocks: list[Block] = []

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

    def table(self, rows: Iterable[Sequence[str]], named: bool = True) -> None:
        """A line for each row that is not all empty, and a blank one.  Not `named`: no row names the columns."""
        start = self._length
        filled = [cells for row in rows if any(cells := [" ".join(cell.split()) for cell in row])]
        for cells in filled:
            self.write(" | ".join(cells).rstrip(" |") + "\n")
        self._block(start, named and bool(filled) and names_columns(filled[0]))
        self.write("\n")

    def code(self, text: str) -> None:
        """The lines as they stand, and a blank one."""
        if text.strip():
            start = self._length
            self.write(text.rstrip() + "\n")
            self._block(start)
            self.write("\n")

    def embed(self, part: Parsed, heading: str = "") -> None:
        """Write a whole document that lies within this one, its sections below those that are open, under a heading of
        its own where it has one.  Its pages are not counted."""
        if heading:
            self.heading(self._path[-1][0] + 1 if self._path else 1, heading)
        above = tuple(name for _, name in self._path)
        start = self._length
        for section in part.sections:
            self._open((*above, *section.path), start + section.start)
        self.blocks += [Block(start + each.start, start + each.end, each.named) for each in part.blocks]
        self.write(part.text.rstrip() + "\n\n")
        self._open(above)
        self.unread += [f"{heading}: {each}" if heading else each for each in part.unread]
        if heading:
            self._path.pop()

    def parsed(self, title: str, media_type: str) -> Parsed:
        """The whole; `title` "" takes the first heading."""
        title = " ".join(title.split())[:300] or self.first_heading()
        return Parsed(self.text(), title, media_type, self.sections, self._pages or None, self.unread, self.blocks)

    def _open(self, path: tuple[str, ...], start: int | None = None) -> None:
        start = self._length if start is None else start
        if self.sections[-1].start == start:
            self.sections.pop()
        self.sections.append(Section(start, path))

    def _block(self, start: int, named: bool = False) -> None:
        if start < self._length:
            self.blocks.append(Block(start, self._length, named))

    def text(self) -> str:
        return "".join(self._parts)

    def first_heading(self) -> str:
        return next((section.path[0] for section in self.sections if section.path), "")


def names_columns(row: Sequence[str]) -> bool:
    """Whether a table's first row says what the columns are: some different words, none of them a number."""
    words = [cell.strip() for cell in row if cell.strip()]
    return 2 <= len(words) == len(set(words)) and not any(map(_is_number, words))


def _is_number(word: str) -> bool:
    return any(c.isdigit() for c in word) and not any(c.isalpha() for c in word)


_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
# What nobody sees but a model reads: zero-width marks, orders to turn the direction of writing, and tag characters,
# in which whole sentences can be hidden.  Joiners stay: some scripts and emoji are written with them.
UNSEEN = re.compile("[\u00ad\u180e\u200b\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\U000e0000-\U000e007f]")


def clean_text(text: str) -> str:
    """Line ends as \\n, nothing that a database or a tokenizer chokes on (NUL, lone surrogates), nothing unseen."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x0c", "\n")
    text = UNSEEN.sub("", _CONTROLS.sub(" ", text))
    return text.encode("utf-8", "replace").decode("utf-8")


def title_from_name(name: str) -> str:
    """The title of a file that has none of its own."""
    stem = PurePath(name).stem or name
    return " ".join(stem.replace("_", " ").replace("-", " ").split()) or name
