"""Ranking by words against BM25 written out, and the masks that filters make."""

from __future__ import annotations

import math
import random
from collections import Counter
from datetime import date

import numpy as np
import pytest
from msgspec import convert

from retrieval import Filters, Library
from retrieval.lexical import K1, B, LexicalIndex, encode, words_of
from retrieval.sqlite.table import PassageFacts, PassageTable

pytestmark = pytest.mark.every_place


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Running runners RUN", ["run", "runner", "run"]),
        ("Grüße, ÉCOLE naïve Straße", ["gruss", "ecol", "naiv", "strass"]),
        ("東京都の天気", ["東京", "京都", "都の", "の天", "天気"]),
        ("Python入門 v3.11", ["python", "入門", "v3", "11"]),
        ("", []),
        ("...", []),
    ],
)
def test_words(text: str, words: list[str]):
    assert words_of(text) == words


def plain_bm25(query: list[str], passages: dict[int, tuple[str, str, str]], seen: list[int]) -> list[tuple[int, float]]:
    weights = (2.0, 1.5, 1.0)
    counts, lengths = {}, {}
    for slot in seen:
        counts[slot] = Counter()
        for weight, part in zip(weights, passages[slot], strict=True):
            for word in words_of(part):
                counts[slot][word] += weight
        lengths[slot] = sum(len(words_of(part)) for part in passages[slot])
    mean = sum(lengths.values()) / len(seen)
    scores: Counter[int] = Counter()
    for word in dict.fromkeys(query):
        holding = [slot for slot in seen if counts[slot][word]]
        idf = math.log(1 + (len(seen) - len(holding) + 0.5) / (len(holding) + 0.5))
        for slot in holding:
            tf = counts[slot][word]
            scores[slot] += idf * tf * (K1 + 1) / (tf + K1 * (1 - B + B * lengths[slot] / mean))
    return sorted(scores.items(), key=lambda item: (-round(item[1], 4), item[0]))


@pytest.mark.parametrize("seed", range(5))
def test_ranking_is_bm25_over_what_is_seen(seed: int):
    rng = random.Random(seed)
    vocabulary = [f"word{i}x" for i in range(30)]

    def some(most: int) -> str:
        return " ".join(rng.choices(vocabulary, k=rng.randrange(most)))

    index, passages = LexicalIndex(), {}
    while len(passages) < 120:
        fresh = {len(passages) + i: (some(3), some(4), some(40)) for i in range(rng.randrange(1, 12))}
        passages |= fresh
        coded = [encode(*parts) for parts in fresh.values()]
        index.add(list(fresh), [length for length, _ in coded], [codes for _, codes in coded])
    seen = sorted(rng.sample(sorted(passages), 70))
    mask = np.zeros(len(passages), dtype=bool)
    mask[seen] = True
    for _ in range(10):
        query = words_of(some(6)) or ["word1x"]
        expected = plain_bm25(query, passages, seen)
        scored = index.search(query, mask, 500)
        found = list(scored.items())
        assert set(scored) == {slot for slot, _ in expected}
        scores = dict(expected)
        np.testing.assert_allclose([score for _, score in found], [scores[slot] for slot, _ in found], rtol=1e-5)
        assert found == sorted(found, key=lambda item: (-item[1], item[0]))
        assert list(index.search(query, mask, 7).items()) == found[:7]
        assert index.search(query, mask, 7, seen) == scored, "of those asked for besides, too"


def test_an_index_of_nothing():
    index = LexicalIndex()
    assert index.search(["a"], np.zeros(0, dtype=bool), 5) == {}
    length, codes = encode("", "", "a word")
    index.add([0], [length], [codes])
    assert index.search(["word"], np.zeros(1, dtype=bool), 5) == {}
    assert index.search(["absent"], np.ones(1, dtype=bool), 5) == {}
    assert index.search(["word"], np.ones(1, dtype=bool), 0) == {}


def test_masks():
    table = PassageTable()
    slots = table.add([PassageFacts(10 + i, i % 3, i % 2, "ab"[i % 2], "m", i - 1) for i in range(8)])
    table.remove([11, 99])

    def numbers(**asked: object) -> list[int]:
        return table["number"][table.mask(**asked)].tolist()

    assert slots == list(range(8))
    assert numbers() == [10, 12, 13, 14, 15, 16, 17]
    assert numbers(access=[1]) == [13, 15, 17]
    assert numbers(access=[]) == []
    assert numbers(collections=["a", "none"]) == [10, 12, 14, 16]
    assert numbers(documents=np.array([0])) == [10, 13, 16]
    assert numbers(since=3) == [14, 15, 16, 17]
    assert numbers(until=2) == [12, 13], "10 has no date"
    assert numbers(media_types=["none"]) == []
    table.set_access([10], 1)
    assert numbers(access=[1]) == [10, 13, 15, 17]


def test_filters_and_phrases(library: Library):
    for name, collection, tags, text in (
        ("a.md", "plants", ["green"], "The north gate of the garden is red."),
        ("b.txt", "plants", ["green", "old"], "The gate in the north is blue, the garden gated."),
        ("c.txt", "rooms", ["old"], "A room with a gate."),
    ):
        library.ingest_bytes(name, text.encode(), collection=collection, tags=tags)

    def sources(query: str = "north gate garden", **filters: object) -> list[str]:
        return sorted(
            p.source for p in library.whole.search(query, filters=convert(filters, Filters), top_k=9).passages
        )

    assert sources() == ["a.md", "b.txt", "c.txt"]
    assert sources(collections=["plants"]) == ["a.md", "b.txt"]
    assert sources(collections=["plants", "rooms"], media_types=["text/plain"]) == ["b.txt", "c.txt"]
    assert sources(tags=["old"]) == ["b.txt", "c.txt"]
    assert sources(tags=["old"], collections=["plants"]) == ["b.txt"]
    assert sources(sources=["a", "c"]) == ["a.md", "c.txt"]
    assert sources(sources=["%"]) == []
    assert sources(since=date(2020, 1, 1)) == [], "uploads have no date of their own"
    assert sources('"north gate"') == ["a.md"]
    assert sources('"gate north"') == []
    assert sources("garden gat*") == ["a.md", "b.txt", "c.txt"]
    assert sources("gard* red") == ["a.md", "b.txt"]


def test_files_have_the_date_of_their_last_change(library: Library, tmp_path):
    import os

    for name, day in (("old.txt", 10_000), ("new.txt", 20_000)):
        (tmp_path / name).write_text(f"The {name} gate.")
        os.utime(tmp_path / name, (day * 86400 + 5, day * 86400 + 5))
    library.ingest_paths([tmp_path / "old.txt", tmp_path / "new.txt"])

    def found(**filters: object) -> list[str]:
        passages = library.whole.search("gate", filters=convert(filters, Filters)).passages
        return sorted(p.source.rsplit("/", 1)[1] for p in passages)

    assert found(since=date(2024, 10, 4)) == ["new.txt"]  # day 20,000
    assert found(until=date(2024, 10, 3)) == ["old.txt"]
    assert found(since=date(1997, 5, 19), until=date(2024, 10, 4)) == ["new.txt", "old.txt"]


@pytest.mark.sqlite
def test_many_removals_make_the_columns_anew(library: Library, monkeypatch: pytest.MonkeyPatch):
    """Also where the stored words of a passage have been damaged since the start."""
    monkeypatch.setattr(PassageTable, "sparse", property(lambda table: True))
    for i in range(6):
        library.ingest_bytes(f"{i}.txt", f"The gate{i}x is red.".encode())
    with library._store.write() as change:
        change._db.execute("UPDATE words SET codes = X'00'")
        change.commit()
    library.whole.remove(library.whole.search("gate2x", top_k=1).passages[0].document_id)
    for i in (0, 1, 3, 4, 5):
        assert library.whole.search(f"gate{i}x", top_k=1).passages[0].source == f"{i}.txt"


def test_one_document_does_not_fill_the_page(library: Library):
    long = "\n\n".join(f"## Gate {i}\n\n{' '.join(f'The gate {i} opens at {j}.' for j in range(30))}" for i in range(9))
    library.ingest_bytes("long.md", f"# Gates\n\n{long}".encode())
    library.ingest_bytes("short.md", b"# Doors\n\nA door beside the gate is open at night.")
    found = [p.source for p in library.whole.search("when does the gate open", top_k=4).passages]
    assert sorted(found) == ["long.md"] * 3 + ["short.md"]
    assert len(library.whole.search("when does the gate open", top_k=8).passages) == 8
