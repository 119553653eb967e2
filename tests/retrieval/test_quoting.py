"""Quotes stand as they are in the document; statements are tied to what supports them, or to nothing."""

from __future__ import annotations

from retrieval import Library, Passage, RetrievalSettings
from retrieval.lexical import words_of
from retrieval.search import phrases_of, telling_words

TEXT = """Parking

The car park opens at seven in the morning. Bicycles are parked behind the library. \
Visitors pay four euros for a day of parking. The lift is out of order.
"""


def passages_of(library: Library, query: str = "parking") -> list[Passage]:
    library.ingest_bytes("parking.txt", TEXT.encode())
    library.ingest_bytes("canteen.txt", b"The canteen opens at noon. Soup costs three euros.")
    return library.whole.search(query, top_k=5).passages


def test_quotes_are_slices_of_the_document(library: Library):
    passages = passages_of(library)
    quotes = library.whole.quotes("when does the car park open in the morning", passages, 2)
    assert quotes[0].text == "The car park opens at seven in the morning."
    assert len(quotes) == 2
    for quote in quotes:
        document = library.whole.document(library.whole.passage(quote.passage_id).document_id)
        assert document.text[quote.start : quote.end] == quote.text
    assert len({library.whole.passage(quote.passage_id).document_id for quote in quotes}) == 1


def test_quotes_of_nothing(library: Library):
    passages = passages_of(library)
    assert library.whole.quotes("anything", []) == []
    assert library.whole.quotes("  ", passages) == []
    assert library.whole.quotes("parking", passages, 0) == []
    assert "Parking" not in [quote.text for quote in library.whole.quotes("parking", passages, 9)]


def test_statements_are_supported_or_not(library: Library):
    passages = passages_of(library)
    supported, nonsense, empty = library.whole.support(
        ["Bicycles are parked behind the library.", "Dragons guard treasure mountains.", " ... "], passages
    )
    assert supported.quote == "Bicycles are parked behind the library."
    assert supported.passage_id in {passage.passage_id for passage in passages}
    document = library.whole.document(library.whole.passage(supported.passage_id).document_id)
    assert document.text[supported.start : supported.end] == supported.quote
    assert nonsense.passage_id is None
    assert (empty.passage_id, empty.quote) == (None, "")
    assert library.whole.support(["Bicycles."], [])[0].passage_id is None
    assert library.whole.support([], passages) == []


def test_a_wrong_number_is_not_supported(library: Library):
    library.ingest_bytes("a.txt", b"The bridge was built in 1887 by the city of Graz.")
    passages = library.whole.search("bridge").passages
    right, wrong = library.whole.support(
        ["The bridge was built in 1887 by the city of Graz.", "The bridge was built in 1978 by the city of Graz."],
        passages,
    )
    assert right.passage_id is not None
    assert wrong.passage_id is None


def test_sentences_are_embedded_once_and_forgotten_with_their_document(open_library, embedder):
    library = open_library(settings=RetrievalSettings(sentence_cache=1000))
    passages = passages_of(library)
    library.whole.quotes("parking", passages)
    encoded = embedder.encoded
    library.whole.quotes("parking", passages)
    library.whole.support(["Soup costs three euros."], passages)
    assert embedder.encoded == encoded + 1  # the statement
    library.whole.remove(passages[0].document_id)
    assert len(library._quoter._cache._entries) == 0


def test_the_sentence_cache_is_bounded(open_library):
    library = open_library(settings=RetrievalSettings(sentence_cache=6))
    for number in range(20):
        name = f"{number}.txt"
        library.ingest_bytes(name, f"First sentence of {number} here. Second one of {number} there.".encode())
    for number in range(20):
        library.whole.quotes("sentence here", library.whole.search(f"sentence {number}", top_k=2).passages)
    assert library._quoter._cache._size <= 6


def test_the_words_of_a_query():
    assert telling_words(words_of('What is "AND" OR NEAR(x)')) == ["near", "x"]
    assert telling_words(words_of("what is it")) == ["what", "is", "it"]
    assert telling_words(words_of("?!")) == []
    assert len(telling_words([f"w{i}" for i in range(1000)])) == 48


def test_what_stands_in_quotation_marks_is_a_phrase():
    assert phrases_of('find "the north  gate" or „zwei Wörter“ NEAR(') == ['"the north gate"', '"zwei Wörter"']
    assert phrases_of('gat* of * a* "b*" c*d') == ['"b"', '"gat"*']
    assert phrases_of('5" pipes, "?!" and an end') == []
