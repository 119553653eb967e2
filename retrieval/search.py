"""Which passages answer a query: dense and full-text candidates, fused by rank."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from msgspec.structs import replace

from retrieval.records import Passage
from retrieval.store import PassageRow

MAX_QUERY_CHARACTERS = 2000  # the embedder reads less than that anyway
_MAX_TERMS = 48
_WORD = re.compile(r"[^\W_]+")
# Words that nearly every passage has: they cost time in full text and say nothing.
_COMMON_WORDS = (
    "a an and are as at be by can do does did for from had has have how i if in is it its me my of on or our so that "
    "the their them there they this to was we were what when where which who whom whose why will with would you "
    "your"
)
_COMMON = frozenset(_COMMON_WORDS.split())


def clean_query(query: str) -> str:
    """One line of valid Unicode, not longer than the embedder can use; "" for nothing but white space."""
    query = query.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")
    return " ".join(unicodedata.normalize("NFC", query[: 4 * MAX_QUERY_CHARACTERS]).split())[:MAX_QUERY_CHARACTERS]


def match_expression(query: str) -> str:
    """An FTS5 expression that finds any of the query's words; "" when it has none.

    Every word is quoted, so no operator, quote or bracket of the user's is ever read as syntax.
    """
    words = list(dict.fromkeys(_WORD.findall(query.lower())))
    telling = [word for word in words if word not in _COMMON] or words
    return " OR ".join(f'"{word}"' for word in telling[:_MAX_TERMS])


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


def choose(fused: Sequence[tuple[int, float]], rows: Mapping[int, PassageRow], top_k: int) -> list[Passage]:
    """The best `top_k` that are (still) stored, each text once."""
    chosen: list[Passage] = []
    seen: set[str] = set()
    for number, score in fused:
        if len(chosen) >= top_k:
            break
        row = rows.get(number)
        if row is None:
            continue
        content = " ".join(row.passage.text.split()).lower()
        if content in seen:
            continue
        seen.add(content)
        chosen.append(replace(row.passage, score=round(score, 6)))
    return chosen


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
