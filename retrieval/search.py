"""Which passages answer a query: dense and full-text candidates, fused by rank."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct
from msgspec.structs import replace

from retrieval.lexical import words_of
from retrieval.records import Passage
from retrieval.store import PassageRow

MAX_QUERY_CHARACTERS = 2000  # the embedder reads less than that anyway
_MAX_TERMS = 48
_MAX_PHRASES = 8
_WORD = re.compile(r"[^\W_]+")
_QUOTED = re.compile(r'(?<!\w)["“„«]([^"“”„«»]{1,500})["”“»](?!\w)')
_PREFIX = re.compile(r"(?<!\S)([^\W_]{2,})\*(?!\S)")
# Words that nearly every passage has: they cost time in full text and say nothing.
_COMMON_WORDS = (
    "a an and are as at be by can do does did for from had has have how i if in is it its me my of on or our so that "
    "the their them there they this to was we were what when where which who whom whose why will with would you "
    "your"
)
_COMMON = frozenset(words_of(_COMMON_WORDS))


Values = Annotated[tuple[Annotated[str, Meta(max_length=1000)], ...], Meta(max_length=100)]


class Filters(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What passages must be to be found.  Any of the values of a field will do, and every field that has values must
    be met.  `sources` are what a source begins with.  `since` and `until` are days (2026-11-02) of the document's own
    date, both included; a document without a date meets neither."""

    collections: Values = ()
    media_types: Values = ()
    tags: Values = ()
    sources: Values = ()
    since: date | None = None
    until: date | None = None

    @property
    def since_day(self) -> int | None:
        return None if self.since is None else (self.since - date(1970, 1, 1)).days

    @property
    def until_day(self) -> int | None:
        return None if self.until is None else (self.until - date(1970, 1, 1)).days


def clean_query(query: str) -> str:
    """One line of valid Unicode, not longer than the embedder can use; "" for nothing but white space."""
    query = query.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")
    return " ".join(unicodedata.normalize("NFC", query[: 4 * MAX_QUERY_CHARACTERS]).split())[:MAX_QUERY_CHARACTERS]


def telling_words(words: Sequence[str]) -> list[str]:
    """The query's words, once each, without those that nearly every passage has, unless it has no others."""
    words = list(dict.fromkeys(words))
    return ([word for word in words if word not in _COMMON] or words)[:_MAX_TERMS]


def phrases_of(query: str) -> list[str]:
    """FTS5 expressions for what stands in quotation marks (words in this order), and for words with a star at the end
    (words that begin so): passages must have them.  Every word is quoted, so no operator of the user's is read as
    syntax."""
    found = [f'"{" ".join(words)}"' for quoted in _QUOTED.findall(query) if (words := _WORD.findall(quoted))]
    found += [f'"{word}"*' for word in _PREFIX.findall(_QUOTED.sub(" ", query))]
    return list(dict.fromkeys(found))[:_MAX_PHRASES]


def fuse(rankings: Sequence[tuple[float, Sequence[int]]], constant: int) -> list[tuple[int, float]]:
    """Reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009): (number, score), best first.

    `rankings` are (weight, numbers best first).  Scores are in 0..1; 1 is first in every ranking.
    """
    total = sum(weight for weight, _ in rankings) or 1.0
    scores: dict[int, float] = {}
    for weight, numbers in rankings:
        for rank, number in enumerate(numbers):
            scores[number] = scores.get(number, 0.0) + weight / total * (constant + 1) / (constant + 1 + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def choose(
    fused: Sequence[tuple[int, float]], rows: Mapping[int, PassageRow], top_k: int, per_document: int
) -> list[Passage]:
    """The best `top_k` that are (still) stored, each text once, and no more than `per_document` of one document while
    others have something to say."""
    chosen: list[Passage] = []
    crowd: list[Passage] = []
    seen: set[str] = set()
    of_document: dict[str, int] = {}
    for number, score in fused:
        row = rows.get(number)
        if row is None:
            continue
        content = " ".join(row.passage.text.split()).lower()
        if content in seen:
            continue
        seen.add(content)
        passage = replace(row.passage, score=round(score, 6))
        of_document[passage.document_id] = of_document.get(passage.document_id, 0) + 1
        (chosen if of_document[passage.document_id] <= per_document else crowd).append(passage)
    if len(chosen) < top_k:
        chosen = sorted(chosen + crowd[: top_k - len(chosen)], key=lambda passage: -passage.score)
    return chosen[:top_k]


def count_facets(rows: Mapping[int, PassageRow]) -> dict[str, dict[str, int]]:
    """Documents among the candidates, by collection and by media type."""
    documents = {row.passage.document_id: row for row in rows.values()}.values()
    facets: dict[str, dict[str, int]] = {"collection": {}, "media_type": {}}
    for row in documents:
        for name, value in (("collection", row.collection), ("media_type", row.media_type)):
            facets[name][value] = facets[name].get(value, 0) + 1
    return facets


Clock = Callable[[], float]


class StageTimer:
    """Milliseconds by stage."""

    def __init__(self, clock: Clock, stages: Sequence[str]):
        self._clock = clock
        self._last = clock()
        self.milliseconds = dict.fromkeys(stages, 0.0)

    def done(self, stage: str) -> None:
        now = self._clock()
        self.milliseconds[stage] = round((now - self._last) * 1000, 3)
        self._last = now


def embedding_text(title: str, heading: str, text: str) -> str:
    """What is embedded for a passage: title and heading path give a paragraph its subject."""
    head = title if not heading or heading == title else f"{title}: {heading.removeprefix(title + ' > ')}"
    return f"{head}\n{text}" if head else text


def top_cosine(found: Sequence[tuple[int, float]]) -> float:
    return float(np.clip(found[0][1], -1.0, 1.0)) if found else 0.0
