"""With the real embedder: found at once, loaded late, and good enough to answer from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retrieval import SAMPLE_COLLECTION, EmbedderMissing, Library, SentenceTransformerEmbedder, sample_documents
from retrieval.pooling import passage_text

pytestmark = pytest.mark.slow
CLAPNQ = Path("../shared/data/clapnq")


@pytest.fixture(scope="module")
def minilm() -> SentenceTransformerEmbedder:
    embedder = SentenceTransformerEmbedder()
    embedder.encode(["load the model once, for the whole file"])
    return embedder


def test_opening_a_library_imports_no_model_library(tmp_path: Path):
    program = (
        "import sys; from pathlib import Path; from retrieval import Library\n"
        f"library = Library.open(Path({str(tmp_path / 'data')!r})); library.whole.documents(); library.close()\n"
        "assert not {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere"])
def test_a_missing_model_is_named(tmp_path: Path, model: str):
    with pytest.raises(EmbedderMissing, match=model):
        SentenceTransformerEmbedder(model)


def test_vectors_are_unit_rows_and_tokens_are_counted(minilm: SentenceTransformerEmbedder):
    vectors = minilm.encode(["a dog", "a puppy", "a treaty of 1815"])
    assert vectors.shape == (3, minilm.dim)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    assert minilm.count_tokens("hello world") == 2
    assert minilm.count_tokens("word " * 1000) == 1000  # not truncated


def test_one_pass_gives_passages_and_their_sentences(minilm: SentenceTransformerEmbedder):
    texts = ["Trains are late on Mondays. Books help!", "A dog sleeps. " * 200, "", "One"]
    passages = [passage_text("Rules", "Rules > Trains", text) for text in texts]
    vectors, sentences = minilm.encode_passages(passages)
    exact = minilm.encode([passage.text for passage in passages])
    assert (np.einsum("ij,ij->i", vectors, exact) > 0.999).all(), "a passage may be embedded in bf16, a question not"
    assert (np.einsum("ij,ij->i", vectors, minilm.encode([text or "a" for text in texts])) < 0.999).any()
    assert [len(each) for each in sentences[::2]] == [2, 0]
    assert 0 < len(sentences[1]) < 200, "what lies behind the model's window has none"
    query = minilm.encode(["are trains punctual"])[0]
    late, books = sentences[0] @ query / np.linalg.norm(sentences[0], axis=1)
    assert late > books


def test_the_manual_answers_about_python_and_about_nothing_else(tmp_path: Path, minilm: SentenceTransformerEmbedder):
    topics = {"lambda", "while", "raise", "import", "global", "with"}
    documents = [each for each in sample_documents() if Path(each[0]).stem in topics]
    with Library.open(tmp_path / "data", embedder=minilm) as library:
        library.ingest_documents(documents, SAMPLE_COLLECTION)
        found = library.whole.search("how do I create an anonymous function")
        assert found.relevant
        assert found.passages[0].title == "Lambdas"
        quotes = library.whole.quotes("how do I create an anonymous function", found.passages)
        assert "anonymous functions" in " ".join(" ".join(quote.text.split()) for quote in quotes)
        assert not library.whole.search("How do I bake sourdough bread?").relevant


@pytest.mark.skipif(not CLAPNQ.is_dir(), reason="needs ../shared/data/clapnq")
def test_quotes_answer_real_questions(tmp_path: Path, minilm: SentenceTransformerEmbedder):
    """A tenth of `python -m loadtests.answer_quality`, whose bar is 0.50 over the whole set."""
    from loadtests.answer_quality import quotes_f1
    from loadtests.question_sets import clapnq_documents, clapnq_questions

    questions = [question for question in clapnq_questions() if question.answerable][::10]
    gold = {question.gold_source for question in questions}
    documents = list(clapnq_documents())
    some = [each for each in documents if each[0] in gold] + [each for each in documents if each[0] not in gold][:40]
    with Library.open(tmp_path / "data", embedder=minilm) as library:
        library.ingest_documents(some)
        score = quotes_f1(library, questions)
    assert score.gold_at_k >= 0.9
    assert score.token_f1 >= 0.45
