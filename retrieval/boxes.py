"""Where the characters of a document stand on its pages, kept small, and what to mark for a piece of its text."""

from __future__ import annotations

import zlib

import numpy as np
from msgspec import Struct

from retrieval.records import Box

_PER_POINT = 10  # boxes are kept to a tenth of a point
_FARTHEST = 100_000  # points: no page is that large
_GAP = 2  # of a line's height: from one column to the next


class PageBoxes(Struct, frozen=True, array_like=True):
    """A page of `width` by `height` points, which has the characters `start` to `end` of the document's text.
    `packed` are their boxes."""

    width: float
    height: float
    start: int
    end: int
    packed: bytes


def pack(boxes: np.ndarray) -> bytes:
    """[characters, 4]: left, top, right, bottom in points from the page's top left corner; without width for what is
    not seen, as the end of a line.  About a byte a character."""
    points = np.clip(np.nan_to_num(boxes), -_FARTHEST, _FARTHEST)
    left, top, right, bottom = np.rint(points * _PER_POINT).astype("<i4").T
    # In a line each begins where the last one ended, and all are equally high: zlib makes next to nothing of that.
    gap = left - np.concatenate(([0], right[:-1]))
    columns = gap, right - left, np.diff(top, prepend=0), np.diff(bottom, prepend=0)
    return zlib.compress(np.stack(columns).astype("<i4").tobytes())


def unpack(packed: bytes, characters: int) -> np.ndarray:
    """float64 [characters, 4] as `pack` took them, to a tenth of a point; none at all where `packed` is damaged."""
    size = 16 * characters
    try:
        data = zlib.decompressobj().decompress(packed, size + 1)
    except zlib.error:
        data = b""
    if len(data) != size:
        return np.zeros((0, 4))
    gap, width, top, bottom = np.frombuffer(data, dtype="<i4").reshape(4, characters).astype(np.int64)
    right = np.cumsum(gap + width)
    return np.stack([right - width, np.cumsum(top), right, np.cumsum(bottom)], axis=1) / _PER_POINT


def marked(page: int, boxes: PageBoxes, start: int, end: int) -> list[Box]:
    """What to mark on this page for the text from `start` to `end`: a rectangle for each line, or for each column of
    it, in the order of the text."""
    characters = unpack(boxes.packed, boxes.end - boxes.start)[max(0, start - boxes.start) : max(0, end - boxes.start)]
    left, top, right, bottom = characters[
        (characters[:, 2] > characters[:, 0]) & (characters[:, 3] > characters[:, 1])
    ].T
    if not len(left):
        return []
    height = bottom - top
    shared = np.minimum(bottom[1:], bottom[:-1]) - np.maximum(top[1:], top[:-1])
    lower = np.minimum(height[1:], height[:-1])
    gap = np.maximum(left[1:] - right[:-1], left[:-1] - right[1:])
    begins = np.flatnonzero(np.concatenate(([True], (shared < lower / 2) | (gap > _GAP * lower))))
    edges = (
        np.minimum.reduceat(left, begins),
        np.minimum.reduceat(top, begins),
        np.maximum.reduceat(right, begins),
        np.maximum.reduceat(bottom, begins),
    )
    return [Box(page, *map(float, edge), boxes.width, boxes.height) for edge in zip(*edges, strict=True)]
