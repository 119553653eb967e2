"""Ranking by words: BM25 over an inverted index in memory, counted among the passages that may be seen.

SQLite's full text ranks by statistics of the whole table, so what somebody may not read would show in the order of what
they may.  Here the number of passages, their mean length and how many hold a word are those of the passages in question
(Robertson and Zaragoza 2009; the idf is Lucene's, which is never negative).  A word of a title or a heading counts for
more of them (BM25F with one length for all).

Words are known by a hash: each passage's codes and weights are stored with it, and the index is put together from them
when a library is opened.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import snowballstemmer

WORDS_RECIPE = 1  # raise it when the same text would give other codes

K1, B = 1.2, 0.75
_WEIGHTS = {"title": 4, "heading": 3, "text": 2}  # halves
_WORD = re.compile(r"[^\W_]+")
# Scripts without spaces: each pair of letters is a word.
_NO_SPACES = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+"
)

_CODES = np.dtype("<u4")


def words_of(text: str) -> list[str]:
    """Words as they are compared: small letters, no accents, English endings cut; pairs of letters where a script has
    no spaces."""
    text = unicodedata.normalize("NFKD", text.casefold())
    text = "".join(c for c in text if not unicodedata.combining(c)) if not text.isascii() else text
    found: list[str] = []
    for word in _WORD.findall(text):
        at = 0
        for run in _NO_SPACES.finditer(word):
            if run.start() > at:
                found.append(_stem(word[at : run.start()]))
            letters = run[0]
            found += [letters[i : i + 2] for i in range(len(letters) - 1)] or [letters]
            at = run.end()
        if at < len(word):
            found.append(_stem(word[at:]))
    return found


@functools.cache
def _stemmer() -> snowballstemmer.english_stemmer.EnglishStemmer:
    return snowballstemmer.stemmer("english")


@functools.lru_cache(200_000)
def _stem(word: str) -> str:
    return _stemmer().stemWord(word) if len(word) < 40 else word[:40]


@functools.lru_cache(200_000)
def code_of(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "replace"))


def encode(title: str, heading: str, text: str) -> tuple[int, bytes]:
    """(number of words, their codes uint32 and then their weights uint8), as a passage is stored."""
    weights: Counter[int] = Counter()
    length = 0
    for name, part in (("title", title), ("heading", heading), ("text", text)):
        words = words_of(part)
        length += len(words)
        for word in words:
            weights[code_of(word)] += _WEIGHTS[name]
    codes = np.fromiter(weights, dtype=_CODES, count=len(weights))
    counts = np.fromiter((min(255, weight) for weight in weights.values()), dtype=np.uint8, count=len(weights))
    return length, codes.tobytes() + counts.tobytes()


class _Postings:
    """Where each word stands: `slots` of word i are slots[starts[i]:starts[i + 1]]."""

    def __init__(self, codes: np.ndarray, slots: np.ndarray, weights: np.ndarray):
        """One of each for each word of each passage, in the order of passages."""
        order = np.argsort(codes, kind="stable")
        self.codes, starts = np.unique(codes[order], return_index=True)
        self.starts = np.append(starts, len(codes))
        self.slots, self.weights = slots[order], weights[order]

    @classmethod
    def of_passages(cls, slots: Sequence[int], blobs: Sequence[bytes]) -> _Postings:
        counts = np.array([len(blob) // 5 for blob in blobs], dtype=np.int64)
        codes = b"".join(blob[: 4 * n] for blob, n in zip(blobs, counts, strict=True))
        weights = b"".join(blob[4 * n :] for blob, n in zip(blobs, counts, strict=True))
        return cls(
            np.frombuffer(codes, dtype=_CODES),
            np.repeat(np.array(slots, dtype=np.uint32), counts),
            np.frombuffer(weights, dtype=np.uint8),
        )

    def followed_by(self, other: _Postings) -> _Postings:
        """With those of later slots."""
        codes = [np.repeat(each.codes, np.diff(each.starts)) for each in (self, other)]
        return _Postings(
            np.concatenate(codes),
            np.concatenate((self.slots, other.slots)),
            np.concatenate((self.weights, other.weights)),
        )

    def __len__(self) -> int:
        return len(self.slots)

    def of(self, code: int) -> tuple[np.ndarray, np.ndarray]:
        """(slots, weights in halves) of a word."""
        at = int(np.searchsorted(self.codes, code))
        if at == len(self.codes) or self.codes[at] != code:
            return self.slots[:0], self.weights[:0]
        part = slice(self.starts[at], self.starts[at + 1])
        return self.slots[part], self.weights[part]


class LexicalIndex:
    """Passages by slot (a row of `table.PassageTable`).  The owner's lock keeps writers from searchers."""

    def __init__(self) -> None:
        self._parts: list[_Postings] = []  # each more than twice as long as the next: adding costs log n at most
        self._lengths = np.zeros(0, dtype=np.float32)

    def add(self, slots: Sequence[int], lengths: Sequence[int], blobs: Sequence[bytes]) -> None:
        """Slots above all that were added before, with what `encode` made of their passages."""
        if not slots:
            return
        most = slots[-1] + 1
        if most > len(self._lengths):
            grown = np.zeros(max(most, 2 * len(self._lengths)), dtype=np.float32)
            grown[: len(self._lengths)] = self._lengths
            self._lengths = grown
        self._lengths[list(slots)] = lengths
        part = _Postings.of_passages(slots, blobs)
        while self._parts and len(self._parts[-1]) <= 2 * len(part):
            part = self._parts.pop().followed_by(part)
        self._parts.append(part)

    def search(self, words: Sequence[str], seen: np.ndarray, count: int, also: Sequence[int] = ()) -> dict[int, float]:
        """Scores by slot, best first, of the best `count` of those slots where `seen` bool [slots] is set; and behind
        them of the slots `also`, which are seen as well, where they have any of the words."""
        total = int(seen.sum())
        if not total or not self._parts:
            return {}
        lengths = self._lengths[: len(seen)]
        mean = float(lengths[seen].mean()) or 1.0
        scores = np.zeros(len(seen), dtype=np.float32)
        for word in dict.fromkeys(words):
            parts = [part.of(code_of(word)) for part in self._parts]
            slots = np.concatenate([slots for slots, _ in parts])
            weights = np.concatenate([weights for _, weights in parts])
            visible = seen[slots]
            slots, weights = slots[visible], weights[visible].astype(np.float32) / 2
            if not len(slots):
                continue
            idf = math.log1p((total - len(slots) + 0.5) / (len(slots) + 0.5))
            scores[slots] += idf * weights * (K1 + 1) / (weights + K1 * (1 - B + B * lengths[slots] / mean))
        found = np.flatnonzero(scores)
        if len(found) > count > 0:
            # All that tie with the last one are kept until they are sorted, so that the cut doesn't depend on chance.
            least = np.partition(scores[found], len(found) - count)[len(found) - count]
            found = found[scores[found] >= least]
        best = found[np.lexsort((found, -scores[found]))][:count]
        return {int(slot): float(scores[slot]) for slot in [*best, *also] if scores[slot]}
