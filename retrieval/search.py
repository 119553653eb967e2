"""Which passages answer a query: those close by meaning and by words, ranked by both."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct
from msgspec.structs import replace

from retrieval.lexical import words_of
from retrieval.pooling import best_cosines
from retrieval.records import Passage
from retrieval.settings import RetrievalSettings
from retrieval.stored import FoundPassage, PassageRow

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


class Question(Struct, frozen=True):
    """What a finder looks for: `vector` float32 [dim] (None while there is no model to tell it), `words` for ranking,
    `phrases` that passages must have (FTS5 expressions)."""

    vector: np.ndarray | None
    words: Sequence[str]
    phrases: Sequence[str] = ()
    collection: str | None = None
    filters: Filters = Filters()


class Found(Struct, frozen=True):
    """One candidate with what each way of searching says of it: cosines of its vector and of its best sentence (None
    where there is none), and BM25."""

    row: PassageRow
    passage: float | None
    sentence: float | None
    words: float

    def meaning(self, sentence_weight: float) -> float | None:
        """How close it is by meaning, in -1..1."""
        if self.passage is None or self.sentence is None:
            return self.passage
        return (1 - sentence_weight) * self.passage + sentence_weight * self.sentence


def found_passages(
    question: Question, candidates: Mapping[int, FoundPassage], words: Mapping[int, float]
) -> dict[int, Found]:
    """`candidates` as they are stored, by number, with the scores of their words."""
    query, stored = question.vector, list(candidates.values())
    if query is None:
        return {number: Found(each.row, None, None, words.get(number, 0.0)) for number, each in candidates.items()}
    sentences = best_cosines(query, [each.sentences for each in stored])
    vectors = [np.zeros_like(query) if each.vector is None else each.vector for each in stored]
    passages = np.clip(np.array(vectors).reshape(-1, len(query)) @ query, -1, 1).tolist()
    return {
        number: Found(each.row, None if each.vector is None else passage, sentence, words.get(number, 0.0))
        for (number, each), passage, sentence in zip(candidates.items(), passages, sentences, strict=True)
    }


def rank(found: Mapping[int, Found], settings: RetrievalSettings) -> list[tuple[int, float]]:
    """(number, score), best first.  Meaning and words are each counted in standard deviations from the candidates'
    mean, and joined by weight: of the ways to join them that Bruch, Gai and Ingber compare (TOIS 2023), one that keeps
    how far apart scores are, which ranks lose.  The sum is squeezed into 0..1."""
    numbers = sorted(found)
    meaning = _standardized([found[number].meaning(settings.sentence_weight) for number in numbers])
    words = _standardized([found[number].words for number in numbers])
    scores = settings.meaning_weight * meaning + (1 - settings.meaning_weight) * words
    order = np.lexsort((numbers, -scores))
    return [(numbers[i], float(1 / (1 + np.exp(-scores[i])))) for i in order]


def _standardized(values: Sequence[float | None]) -> np.ndarray:
    """None is as far away as the farthest."""
    least = min((value for value in values if value is not None), default=0.0)
    array = np.array([least if value is None else value for value in values], dtype=np.float64)
    return (array - array.mean()) / (array.std() + 1e-9) if len(array) else array


def relevance(found: Iterable[Found]) -> float:
    """The cosine of the question and the sentence closest to it (of the passage where there are none), an absolute
    measure: of those that `loadtests.retrieval_floor` was made for, the one that travels best from one collection to
    another.  How far the closest stands above others tells as much in one collection, and misleads in the next."""
    close = (each.passage if each.sentence is None else each.sentence for each in found)
    return max((value for value in close if value is not None), default=0.0)


def choose(
    ranked: Sequence[tuple[int, float]], found: Mapping[int, Found], top_k: int, per_document: int
) -> list[Passage]:
    """The best `top_k`, each text once, and no more than `per_document` of one document while others have something to
    say."""
    chosen: list[Passage] = []
    crowd: list[Passage] = []
    seen: set[str] = set()
    of_document: dict[str, int] = {}
    for number, score in ranked:
        if len(chosen) == top_k:
            break
        row = found[number].row
        content = " ".join(row.passage.text.split()).lower()
        if content in seen:
            continue
        seen.add(content)
        passage = replace(row.passage, score=round(score, 6))
        of_document[passage.document_id] = of_document.get(passage.document_id, 0) + 1
        (chosen if of_document[passage.document_id] <= per_document else crowd).append(passage)
    if len(chosen) < top_k:
        chosen = sorted(chosen + crowd[: top_k - len(chosen)], key=lambda passage: -passage.score)
    return chosen


def count_facets(found: Mapping[int, Found]) -> dict[str, dict[str, int]]:
    """Documents among the candidates, by collection and by media type."""
    documents = {each.row.passage.document_id: each.row for each in found.values()}.values()
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
        self.milliseconds[stage] = round(self.milliseconds[stage] + (now - self._last) * 1000, 3)
        self._last = now
