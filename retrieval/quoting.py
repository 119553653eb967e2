"""Which sentences of the passages answer the question, and which one supports a statement."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct

from retrieval.embedding import SharedEmbedder
from retrieval.records import Passage, Quote, Support
from retrieval.sentences import Span, sentences

_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_MIN_WORDS = 4  # shorter sentences are headings and crumbs
# How much a passage's own closeness to the question counts beside its sentence's.  Chosen on half of CLAPnq's
# answerable questions, confirmed on the other half (`python -m loadtests.answer_quality`).
_PASSAGE_WEIGHT = 0.5

PassageVectors = Callable[[Sequence[str]], dict[str, np.ndarray]]


class _Sentence(Struct, frozen=True):
    passage: Passage
    span: Span
    text: str

    def is_full(self) -> bool:
        """Neither a crumb nor a heading, which would only repeat the question."""
        words = _WORD.findall(self.text.lower())
        names = (self.passage.title, *self.passage.heading.split(" > "))
        return len(words) >= _MIN_WORDS and all(words != _WORD.findall(name.lower()) for name in names)


class Quoter:
    """Finds sentences by meaning.  Keeps the sentence embeddings of passages it has seen, least recently used out."""

    def __init__(
        self, embedder: SharedEmbedder, passage_vectors: PassageVectors, cache_sentences: int, support_floor: float
    ):
        """`passage_vectors` gives float32 [dim] by passage id, for those that are indexed."""
        self._embedder = embedder
        self._passage_vectors = passage_vectors
        self._support_floor = support_floor
        self._cache = _SentenceCache(cache_sentences)

    def forget(self) -> None:
        """Drop what is cached: removed text must not stay in memory."""
        self._cache.clear()

    def quotes(self, question: str, passages: Sequence[Passage], count: int) -> list[Quote]:
        """The `count` sentences that answer the question best, best first, each text once, all of one document:
        two halves of one answer, not the beginnings of two."""
        found, vectors = self._sentences(passages)
        if not found or count <= 0 or not question.strip():
            return []
        query = self._embedder.encode_query(question)
        similarities = vectors @ query
        about = {
            passage_id: float(vector @ query)
            for passage_id, vector in self._passage_vectors([passage.passage_id for passage in passages]).items()
        }
        worst = min(about.values(), default=0.0)
        closeness = np.array([about.get(sentence.passage.passage_id, worst) for sentence in found])
        return [
            Quote(
                passage_id=found[i].passage.passage_id,
                start=found[i].passage.start + found[i].span[0],
                end=found[i].passage.start + found[i].span[1],
                text=found[i].text,
                similarity=round(float(similarities[i]), 4),
            )
            for i in _choose(found, similarities + _PASSAGE_WEIGHT * closeness, count)
        ]

    def support(self, statements: Sequence[str], passages: Sequence[Passage]) -> list[Support]:
        """For each statement the passage sentence closest to it, or unsupported: nothing close enough, or the
        statement has a number that the passage hasn't (embeddings hardly see numbers)."""
        if not statements:
            return []
        found, vectors = self._sentences(passages)
        unsupported = Support(None, 0, 0, "", 0.0)
        asked = [i for i, statement in enumerate(statements) if _WORD.search(statement)]
        if not found or not asked:
            return [unsupported] * len(statements)
        similarities = self._embedder.encode([statements[i] for i in asked]) @ vectors.T
        result = [unsupported] * len(statements)
        for row, i in enumerate(asked):
            result[i] = self._best_support(statements[i], found, similarities[row])
        return result

    def _best_support(self, statement: str, found: list[_Sentence], similarities: np.ndarray) -> Support:
        numbers = set(_NUMBER.findall(statement))
        for i in np.argsort(-similarities, kind="stable"):
            similarity = round(float(similarities[i]), 4)
            if similarity < self._support_floor:
                break
            sentence = found[i]
            if numbers <= set(_NUMBER.findall(sentence.passage.text)):
                start = sentence.passage.start
                return Support(
                    passage_id=sentence.passage.passage_id,
                    start=start + sentence.span[0],
                    end=start + sentence.span[1],
                    quote=sentence.text,
                    similarity=similarity,
                )
        return Support(None, 0, 0, "", round(float(similarities.max()), 4))

    def _sentences(self, passages: Sequence[Passage]) -> tuple[list[_Sentence], np.ndarray]:
        """The sentences of the passages in order, with their vectors float32 [sentences, dim]."""
        texts = list(dict.fromkeys(passage.text for passage in passages))
        known = {text: hit for text in texts if (hit := self._cache.get(text)) is not None}
        spans = {text: sentences(text) for text in texts if text not in known}
        # One call for all that is missing: batches fill up across passages.
        pieces = [text[start:end] for text, parts in spans.items() for start, end in parts]
        fresh = self._embedder.encode(pieces) if pieces else None
        at = 0
        for text, parts in spans.items():
            if fresh is not None:
                known[text] = (parts, fresh[at : at + len(parts)].copy())
                at += len(parts)
                self._cache.put(text, *known[text])
        found: list[_Sentence] = []
        rows: list[np.ndarray] = []
        for passage in passages:
            if passage.text not in known:
                continue
            parts, vectors = known[passage.text]
            found += [_Sentence(passage, (start, end), passage.text[start:end]) for start, end in parts]
            rows.append(vectors)
        return found, np.concatenate(rows) if rows else np.zeros((0, 0), dtype=np.float32)


def _choose(found: Sequence[_Sentence], scores: np.ndarray, count: int) -> list[int]:
    """Indices of the sentences to quote, best first."""
    order = [int(i) for i in np.argsort(-scores, kind="stable")]
    order = [i for i in order if found[i].is_full()] or order
    chosen: dict[str, int] = {}
    for i in order:
        if found[i].passage.document_id == found[order[0]].passage.document_id and len(chosen) < count:
            chosen.setdefault(" ".join(found[i].text.split()).lower(), i)
    return list(chosen.values())


class _SentenceCache:
    """Sentence spans and vectors by passage text, at most `limit` sentences in all."""

    def __init__(self, limit: int):
        self._limit = limit
        self._size = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[list[Span], np.ndarray]] = OrderedDict()

    def get(self, text: str) -> tuple[list[Span], np.ndarray] | None:
        with self._lock:
            hit = self._entries.get(text)
            if hit is not None:
                self._entries.move_to_end(text)
            return hit

    def put(self, text: str, spans: list[Span], vectors: np.ndarray) -> None:
        with self._lock:
            if text in self._entries:
                return
            self._entries[text] = (spans, vectors)
            self._size += len(spans)
            while self._size > self._limit and self._entries:
                _, (dropped, _) = self._entries.popitem(last=False)
                self._size -= len(dropped)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._size = 0
