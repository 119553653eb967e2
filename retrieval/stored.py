"""What goes into a store and what comes out of it, whichever it is."""

from __future__ import annotations

from datetime import date

import numpy as np
from msgspec import Struct

from retrieval.access import EVERYBODY
from retrieval.boxes import PageBoxes
from retrieval.records import Passage


class NewPassage(Struct):
    start: int
    end: int
    page: int | None
    heading: str
    text: str


class NewDocument(Struct):
    """What a writer hands in; `recipe` names how the passages were made (so that a change makes them anew),
    `modified_at` is a date (ISO 8601) that the document itself has."""

    collection: str
    source: str
    title: str
    media_type: str
    content_hash: str
    recipe: str
    pages: int | None
    text: str
    passages: list[NewPassage]
    readers: tuple[str, ...] = (EVERYBODY,)
    owner: str = ""
    modified_at: str | None = None
    tags: tuple[str, ...] = ()
    boxes: list[PageBoxes] = []


class StoredVersion(Struct):
    """`readers` and `tags` sorted."""

    document_id: str
    content_hash: str
    recipe: str
    readers: tuple[str, ...]
    tags: tuple[str, ...]


class PassageRow(Struct):
    """A passage with what search needs to know of its document."""

    passage: Passage
    collection: str
    media_type: str


class FoundPassage(Struct):
    """A passage as it is ranked: `vector` float32 [dim] (None where it is lost or damaged), `sentences` as
    `pooling.packed` makes them."""

    row: PassageRow
    vector: np.ndarray | None
    sentences: bytes


def passage_number(passage_id: str) -> int | None:
    """The number in "p123"; None for anything else."""
    digits = passage_id[1:]
    if passage_id[:1] != "p" or not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        return None
    return int(digits)


def day_of(moment: str | None) -> int:
    """Days since 1970 of a date in ISO 8601, -1 for none or one before."""
    try:
        return max(-1, (date.fromisoformat(moment[:10]) - date(1970, 1, 1)).days) if moment else -1
    except ValueError:
        return -1
