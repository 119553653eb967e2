"""Documents into passages: by section, paragraph and sentence, about as long as the embedder reads best.

Passages tile the text: in order, without overlap, each `text[start:end]`, and what lies between two is white
space.  Sizes are in the embedder's tokens, measured per stretch of text and turned into characters, because
the splitting itself then needs no tokenizer; what is cut is counted.

Tables and code (`Parsed.blocks`) are whole where they fit.  Where they don't, they are cut between lines, and what a
table's columns are called comes last in the heading path of each part but the first.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

from semantic_text_splitter import TextSplitter

from retrieval.formats.parsed import Block, Parsed, Section
from retrieval.stored import NewPassage

SPLITTER_VERSION = 2  # raise it when the same text would give other passages

CountTokens = Callable[[str], int]
Span = tuple[int, int]
Stretch = tuple[int, int, tuple[str, ...]]  # start, end, heading path

_STRETCH = 20_000  # characters split at once: keeps one-line files linear
_MIN_CHARACTERS_PER_TOKEN, _MAX_CHARACTERS_PER_TOKEN = 1.0, 6.0
_HEADING_LIMIT = 200
_COLUMNS_LIMIT = 100  # characters: more would leave little of the path
_CRUMB = 8  # less than this part of a passage doesn't stand alone


class _Sizes(NamedTuple):
    """Of a passage, in tokens."""

    count: CountTokens
    target: int
    maximum: int


def split(parsed: Parsed, count_tokens: CountTokens, target_tokens: int, max_tokens: int) -> list[NewPassage]:
    """Passages of about `target_tokens`, none above `max_tokens` unless one unbreakable run is."""
    sizes = _Sizes(count_tokens, target_tokens, max_tokens)
    passages: list[NewPassage] = []
    for start, end, path in _stretches(parsed, target_tokens):
        text, blocks = parsed.text[start:end], _blocks_within(parsed, start, end)
        for offset, piece in _around(blocks, text, sizes) if blocks else _prose(text, sizes):
            begin = start + offset
            page = bisect_right(parsed.page_starts, begin) if parsed.page_starts else None
            heading = _heading(path + _columns(parsed, begin))
            passages.append(NewPassage(begin, begin + len(piece), page, heading, piece))
    return passages


def _heading(path: tuple[str, ...]) -> str:
    heading = " > ".join(path)
    return heading if len(heading) <= _HEADING_LIMIT else "…" + heading[-(_HEADING_LIMIT - 1) :]


def _columns(parsed: Parsed, begin: int) -> tuple[str, ...]:
    """What the columns are called, for a passage that begins within a table: one more of its headings."""
    block = _block_around(parsed, begin)
    if block is None or not block.named:
        return ()
    names, whole, _ = parsed.text[block.start : block.start + _COLUMNS_LIMIT + 1].partition("\n")
    return (names,) if whole else ()


def _block_around(parsed: Parsed, place: int) -> Block | None:
    """The block that begins before a place and ends behind it."""
    at = bisect_left(parsed.blocks, place, key=lambda block: block.start) - 1
    return parsed.blocks[at] if at >= 0 and parsed.blocks[at].end > place else None


def _blocks_within(parsed: Parsed, start: int, end: int) -> list[Span]:
    """Those of a stretch of text, or their parts in it, counted from its start."""
    first = bisect_right(parsed.blocks, start, key=lambda block: block.end)
    last = bisect_left(parsed.blocks, end, key=lambda block: block.start)
    inside = parsed.blocks[first:last]
    return [(max(block.start, start) - start, min(block.end, end) - start) for block in inside]


def _stretches(parsed: Parsed, target_tokens: int) -> Iterator[Stretch]:
    """Sections, small neighbours put together, huge ones cut."""
    small = target_tokens * 2  # characters: about half a passage
    group: Section | None = None
    path: tuple[str, ...] = ()
    starts = [section.start for section in parsed.sections] + [len(parsed.text)]
    for section, end in zip(parsed.sections, starts[1:], strict=True):
        if group is not None and (section.start - group.start >= small or end - group.start > 2 * small):
            yield from _cut_long(parsed, group.start, section.start, path)
            group = None
        if group is None:
            group, path = section, section.path
        elif path:
            path = _common(path, section.path) or path
        else:
            path = section.path
    if group is not None:
        yield from _cut_long(parsed, group.start, len(parsed.text), path)


def _common(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return one[:same]


def _cut_long(parsed: Parsed, start: int, end: int, path: tuple[str, ...]) -> Iterator[Stretch]:
    text = parsed.text
    while end - start > _STRETCH:
        limit = start + _STRETCH
        cut = limit
        for mark in ("\n\n", "\n", ". ", " "):
            at = text.rfind(mark, start + _STRETCH // 2, limit)
            if at >= 0:
                cut = at + len(mark)
                break
        block = _block_around(parsed, cut)
        if block is not None and block.start > start:
            cut = block.start
        yield start, cut, path
        start = cut
    if text[start:end].strip():
        yield start, end, path


def _around(blocks: list[Span], text: str, sizes: _Sizes) -> Iterator[tuple[int, str]]:
    """Prose as ever, blocks whole where they fit, and what fits into a passage together."""
    parts: list[Span] = []
    at = 0
    for start, end in [*blocks, (len(text), len(text))]:
        parts += [(at + offset, at + offset + len(piece)) for offset, piece in _prose(text[at:start], sizes)]
        parts += _rows(text, start, end, sizes)
        at = end
    for start, end in _together(parts, text, sizes):
        yield from _fitting(start, text[start:end], sizes)


def _rows(text: str, start: int, end: int, sizes: _Sizes) -> list[Span]:
    """A block in even parts of whole lines: in one if it fits."""
    lines: list[tuple[int, int, int]] = []  # where it begins and ends, its tokens
    for line in text[start:end].split("\n"):
        stop = start + len(line)
        if line.strip():
            lines.append((start, stop, sizes.count(text[start : stop + 1])))
        start = stop + 1
    total = sum(tokens for _, _, tokens in lines)
    even = max(1, total if total <= sizes.maximum else total / math.ceil(total / sizes.target))
    parts: list[Span] = []
    before = held = 0  # tokens of all lines so far, and of those in the last part
    number = -1
    for begin, stop, tokens in lines:
        last, number = number, int((before + tokens / 2) / even)
        if number == last and held + tokens <= sizes.maximum:
            parts[-1], held = (parts[-1][0], stop), held + tokens
        else:
            line = _prose(text[begin:stop], sizes) if tokens > sizes.maximum else [(0, text[begin:stop])]
            parts += [(begin + offset, begin + offset + len(piece)) for offset, piece in line]
            held = tokens
        before += tokens
    return parts


def _together(parts: list[Span], text: str, sizes: _Sizes) -> list[Span]:
    """A crumb goes with what follows, as a heading does with its table, and then all that fits."""

    def tokens(begin: int, end: int) -> int:
        return sizes.count(text[begin:end])

    led: list[Span] = []
    for start, end in parts:
        if led and tokens(*led[-1]) < sizes.target / _CRUMB and tokens(led[-1][0], end) <= sizes.maximum:
            led[-1] = led[-1][0], end
        else:
            led.append((start, end))
    joined: list[Span] = []
    for start, end in led:
        crumb = tokens(start, end) < sizes.target / _CRUMB
        if joined and tokens(joined[-1][0], end) <= (sizes.maximum if crumb else sizes.target):
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined


def _prose(text: str, sizes: _Sizes) -> Iterator[tuple[int, str]]:
    count_tokens, target, maximum = sizes
    tokens = max(1, count_tokens(text))
    ratio = min(_MAX_CHARACTERS_PER_TOKEN, max(_MIN_CHARACTERS_PER_TOKEN, len(text) / tokens))
    parts = max(1, math.ceil(len(text) / (target * ratio)))
    if parts == 1 or (tokens <= maximum and len(text) <= maximum * _MAX_CHARACTERS_PER_TOKEN and parts <= 2):
        capacity = max(len(text), 1)
    else:
        # Even parts, with some room to end at a sentence: no crumb is left at the end.
        capacity = max(1, min(int(target * ratio), int(len(text) / parts * 1.15)))
    for offset, piece in _joined(text, TextSplitter(capacity).chunk_indices(text), capacity // 8):
        yield from _fitting(offset, piece, sizes)


def _joined(text: str, chunks: list[tuple[int, str]], crumb: int) -> list[tuple[int, str]]:
    """A crumb (a heading alone, a last line) goes with its neighbour: the next one, or the last one at the end."""
    joined: list[tuple[int, str]] = []
    pending: int | None = None
    for offset, chunk in chunks:
        begin = offset if pending is None else pending
        if len(chunk) < crumb:
            pending = begin
            continue
        joined.append((begin, text[begin : offset + len(chunk)]))
        pending = None
    if pending is not None:
        end = chunks[-1][0] + len(chunks[-1][1])
        begin = joined.pop()[0] if joined else pending
        joined.append((begin, text[begin:end]))
    return joined


def _fitting(offset: int, piece: str, sizes: _Sizes) -> Iterator[tuple[int, str]]:
    """Halve what is still too long for the embedder (dense code, tables, scripts of one token per character)."""
    maximum = sizes.maximum
    too_long = len(piece) > maximum * _MAX_CHARACTERS_PER_TOKEN * 1.5 or sizes.count(piece) > maximum
    if not too_long or len(piece) < 40:
        yield offset, piece
        return
    for start, half in TextSplitter(len(piece) // 2 + 1).chunk_indices(piece):
        if len(half) == len(piece):  # one grapheme that can't be cut
            yield offset + start, half
            continue
        yield from _fitting(offset + start, half, sizes)
