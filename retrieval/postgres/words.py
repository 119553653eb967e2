"""Words in PostgreSQL: where each stands for phrases (a tsvector), how often for ranking (postings), and BM25 of these.

`ts_rank` knows nothing of how rare a word is, and what is counted over a whole table would let hidden documents move
the order of others.  So a query brings the postings of its words in the documents that may be seen, and they are
counted here as `lexical.LexicalIndex` counts them.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from retrieval import lexical
from retrieval.lexical import K1, B, words_of

POSTING = np.dtype([("passage", "<i8"), ("length", "<i4"), ("weight", "u1")])
MOST = 128  # passages of one document in one posting: an entry of a btree has at most 2.7 kB
_APART = 10  # words between title, heading and text, which no phrase spans
_PHRASE = re.compile(r'"(.*)"(\*?)')


def postings(passages: Iterable[tuple[int, int, bytes]]) -> Iterator[tuple[int, int, bytes]]:
    """(word, part, posting) as they are stored of a document; `passages` are (number, length, codes as `lexical.encode`
    makes them)."""
    by_word: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for number, length, codes in passages:
        count = len(codes) // 5
        words = np.frombuffer(codes, dtype="<u4", count=count).tolist()
        for word, weight in zip(words, codes[4 * count :], strict=True):
            by_word[word].append((number, length, weight))
    for word, found in by_word.items():
        for start in range(0, len(found), MOST):
            yield word, start, np.array(found[start : start + MOST], dtype=POSTING).tobytes()


def tsvector(title: str, heading: str, text: str) -> str:
    """The words of a passage where they stand, as a literal: they are cut here, since the server's parser goes by its
    locale."""
    places: dict[str, list[int]] = defaultdict(list)
    at = 1
    for part in (title, heading, text):
        for at, word in enumerate(words_of(part), at):  # noqa: B020  goes on from the part before
            places[word].append(at)
        at += _APART
    return " ".join(f"'{word}':{','.join(map(str, found))}" for word, found in places.items())


def tsquery(phrase: str) -> str | None:
    """Of what `search.phrases_of` found, as a literal; None where no word is in it."""
    found = _PHRASE.fullmatch(phrase)
    assert found is not None
    words = [f"'{word}'" for word in words_of(found[1])]
    return " <-> ".join(words) + (":*" if found[2] else "") if words else None


def scores(
    stored: Mapping[int, bytes], words: Sequence[str], total: int, mean: float, among: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(numbers int64 in order, BM25 float32) of the passages with any of these words.  `stored` are postings by the
    code of their word, of `total` passages with `mean` words each; of passages `among` these where given, sorted."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for word in dict.fromkeys(words):
        each = np.frombuffer(stored.get(lexical.code_of(word), b""), dtype=POSTING)
        if among is not None:
            each = each[np.isin(each["passage"], among)]
        if len(each):
            idf = math.log1p((total - len(each) + 0.5) / (len(each) + 0.5))
            weights, lengths = each["weight"].astype(np.float32) / 2, each["length"].astype(np.float32)
            found.append((each["passage"], idf * weights * (K1 + 1) / (weights + K1 * (1 - B + B * lengths / mean))))
    if not found:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    numbers, at = np.unique(np.concatenate([passages for passages, _ in found]), return_inverse=True)
    sums = np.zeros(len(numbers), dtype=np.float32)
    np.add.at(sums, at, np.concatenate([values for _, values in found]))
    return numbers, sums


def best(numbers: np.ndarray, values: np.ndarray, count: int, also: Sequence[int] = ()) -> dict[int, float]:
    """By number, best first, the best `count`; and behind them those of `also` that have a value."""
    first = np.lexsort((numbers, -values))[:count]
    chosen = [*numbers[first].tolist(), *also]
    at = np.searchsorted(numbers, chosen)
    return {
        number: float(values[i])
        for number, i in zip(chosen, at.tolist(), strict=True)
        if i < len(numbers) and numbers[i] == number
    }
