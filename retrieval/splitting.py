"""Documents into passages: by section, paragraph and sentence, about as long as the embedder reads best.

Passages tile the text: in order, without overlap, each `text[start:end]`, and what lies between two is white
space.  Sizes are in the embedder's tokens, measured per stretch of text and turned into characters, because
the splitting itself then needs no tokenizer.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator

from semantic_text_splitter import TextSplitter

from retrieval.change import NewPassage
from retrieval.formats.parsed import Parsed, Section

SPLITTER_VERSION = 1  # raise it when the same text would give other passages

CountTokens = Callable[[str], int]

_STRETCH = 20_000  # characters split at once: keeps one-line files linear
_MIN_CHARACTERS_PER_TOKEN, _MAX_CHARACTERS_PER_TOKEN = 1.0, 6.0
_HEADING_LIMIT = 200


def split(parsed: Parsed, count_tokens: CountTokens, target_tokens: int, max_tokens: int) -> list[NewPassage]:
    """Passages of about `target_tokens`, none above `max_tokens` unless one unbreakable run is."""
    passages: list[NewPassage] = []
    for start, end, path in _stretches(parsed, target_tokens):
        for offset, piece in _pieces(parsed.text[start:end], count_tokens, target_tokens, max_tokens):
            begin = start + offset
            page = bisect_right(parsed.page_starts, begin) if parsed.page_starts else None
            passages.append(NewPassage(begin, begin + len(piece), page, _heading(path), piece))
    return passages


def _heading(path: tuple[str, ...]) -> str:
    heading = " > ".join(path)
    return heading if len(heading) <= _HEADING_LIMIT else "…" + heading[-(_HEADING_LIMIT - 1) :]


def _stretches(parsed: Parsed, target_tokens: int) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """(start, end, heading path): sections, small neighbours put together, huge ones cut."""
    small = target_tokens * 2  # characters: about half a passage
    group: Section | None = None
    path: tuple[str, ...] = ()
    starts = [section.start for section in parsed.sections] + [len(parsed.text)]
    for section, end in zip(parsed.sections, starts[1:], strict=True):
        if group is not None and (section.start - group.start >= small or end - group.start > 2 * small):
            yield from _cut_long(parsed.text, group.start, section.start, path)
            group = None
        if group is None:
            group, path = section, section.path
        elif path:
            path = _common(path, section.path) or path
        else:
            path = section.path
    if group is not None:
        yield from _cut_long(parsed.text, group.start, len(parsed.text), path)


def _common(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return one[:same]


def _cut_long(text: str, start: int, end: int, path: tuple[str, ...]) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    while end - start > _STRETCH:
        limit = start + _STRETCH
        cut = limit
        for mark in ("\n\n", "\n", ". ", " "):
            at = text.rfind(mark, start + _STRETCH // 2, limit)
            if at >= 0:
                cut = at + len(mark)
                break
        yield start, cut, path
        start = cut
    if text[start:end].strip():
        yield start, end, path


def _pieces(text: str, count_tokens: CountTokens, target: int, maximum: int) -> Iterator[tuple[int, str]]:
    tokens = max(1, count_tokens(text))
    ratio = min(_MAX_CHARACTERS_PER_TOKEN, max(_MIN_CHARACTERS_PER_TOKEN, len(text) / tokens))
    parts = max(1, math.ceil(len(text) / (target * ratio)))
    if parts == 1 or (tokens <= maximum and len(text) <= maximum * _MAX_CHARACTERS_PER_TOKEN and parts <= 2):
        capacity = max(len(text), 1)
    else:
        # Even parts, with some room to end at a sentence: no crumb is left at the end.
        capacity = max(1, min(int(target * ratio), int(len(text) / parts * 1.15)))
    for offset, piece in _joined(text, TextSplitter(capacity).chunk_indices(text), capacity // 8):
        yield from _fitting(offset, piece, count_tokens, maximum)


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


def _fitting(offset: int, piece: str, count_tokens: CountTokens, maximum: int) -> Iterator[tuple[int, str]]:
    """Halve what is still too long for the embedder (dense code, tables, scripts of one token per character)."""
    too_long = len(piece) > maximum * _MAX_CHARACTERS_PER_TOKEN * 1.5 or count_tokens(piece) > maximum
    if not too_long or len(piece) < 40:
        yield offset, piece
        return
    for start, half in TextSplitter(len(piece) // 2 + 1).chunk_indices(piece):
        if len(half) == len(piece):  # one grapheme that can't be cut
            yield offset + start, half
            continue
        yield from _fitting(offset + start, half, count_tokens, maximum)
