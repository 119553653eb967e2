"""How meaning, sentences and words are put together, and what counts as an answer."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval import Passage, RetrievalSettings
from retrieval.pooling import best_cosines, packed, passage_text, pooled
from retrieval.search import Found, choose, rank, relevance
from retrieval.stored import PassageRow

SETTINGS = RetrievalSettings()


def found(meaning: float | None, sentence: float | None = None, words: float = 0.0, text: str = "") -> Found:
    passage = Passage("p1", text or "d", "", "", "", None, 0, 0, text, 0.0)
    return Found(PassageRow(passage, "default", "text/plain"), meaning, sentence, words)


def test_both_ways_of_searching_count_by_how_far_apart_scores_are():
    candidates = {1: found(0.9, words=1.0), 2: found(0.5, words=1.1), 3: found(0.4), 4: found(None, words=1.0)}
    ranked = rank(candidates, SETTINGS)
    assert [number for number, _ in ranked] == [1, 2, 4, 3]
    assert all(0 < score < 1 for _, score in ranked)
    only_words = rank(candidates, RetrievalSettings(meaning_weight=0.0))
    assert [number for number, _ in only_words] == [2, 1, 4, 3]
    assert rank({}, SETTINGS) == []
    assert rank({7: found(0.5)}, SETTINGS) == [(7, 0.5)]


def test_a_sentence_that_answers_counts_more_than_the_passage_around_it():
    candidates = {1: found(0.6, 0.5), 2: found(0.5, 0.8), 3: found(0.4, 0.3)}
    assert rank(candidates, SETTINGS)[0][0] == 2
    assert rank(candidates, RetrievalSettings(sentence_weight=0.0))[0][0] == 1


def test_relevance_is_how_close_the_closest_sentence_is():
    assert relevance([found(0.9, 0.5), found(0.4, 0.8), found(0.5)]) == 0.8
    assert relevance([found(0.4, 0.3), found(0.6)]) == 0.6, "of the passage where there are no sentences"
    assert relevance([found(None)]) == relevance([]) == 0.0


def test_each_text_once_and_no_document_crowds_the_others_out():
    candidates = {
        number: found(1 - number / 10, text=text) for number, text in enumerate(("same", "Same ", "other", "third"))
    }
    texts = [passage.text for passage in choose(rank(candidates, SETTINGS), candidates, 3, 3)]
    assert texts == ["same", "other", "third"]


def test_sentences_are_found_in_what_is_embedded():
    text, spans = passage_text("Rules", "Rules > Trains", "Trains are late. Take two books with you!")
    assert text == "Rules: Trains\nTrains are late. Take two books with you!"
    assert [text[start:end] for start, end in spans] == ["Trains are late.", "Take two books with you!"]
    assert passage_text("", "", "One. Two.").text == "One. Two."
    assert len(passage_text("", "", "\n\n".join(f"row {n}" for n in range(1000))).spans) <= 32


def test_a_sentence_is_the_mean_of_its_tokens():
    outputs = np.eye(6, dtype=np.float32)
    offsets = np.array([(0, 0), (0, 3), (4, 7), (8, 12), (12, 13), (0, 0)])
    means = pooled(outputs, offsets, [(0, 7), (8, 13), (20, 30)])
    np.testing.assert_allclose(means, [[0, 0.5, 0.5, 0, 0, 0], [0, 0, 0, 0.5, 0.5, 0]])


@pytest.mark.parametrize("dim", [8, 384])
def test_packed_sentences_keep_their_directions(dim: int):
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((5, dim)).astype(np.float32) * 10.0 ** rng.integers(-3, 3, (5, 1))
    query = rng.standard_normal(dim).astype(np.float32)
    query /= np.linalg.norm(query)
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1)
    kept, turned = best_cosines(query, [packed(vectors), packed(-vectors)])
    assert kept == pytest.approx(cosines.max(), abs=5e-3)
    assert abs(turned - cosines.max()) > 5e-3
    assert best_cosines(query, [b"", packed(vectors), b"123"]) == [None, kept, None]
    assert best_cosines(query, [b""]) == [None]
