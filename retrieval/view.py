"""What one principal sees of a library: the only way to read from it.

Permission is in the mask that every way of searching is given and in the condition of every query, so that nothing of
what may not be read shows: not a passage, not a number, not the order of others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from retrieval.access import ANYBODY, OPERATOR, Principal, checked
from retrieval.boxes import marked
from retrieval.contracts import Finder, Store
from retrieval.errors import NotAllowed, UnknownCollection, UnknownPassage
from retrieval.lexical import words_of
from retrieval.quoting import Quoter
from retrieval.records import Box, Document, DocumentText, Passage, Quote, SearchResult, Support
from retrieval.reranking import Reranker, reranked
from retrieval.search import (
    Filters,
    Found,
    Question,
    StageTimer,
    choose,
    clean_query,
    count_facets,
    phrases_of,
    rank,
    relevance,
    telling_words,
)
from retrieval.settings import RetrievalSettings
from retrieval.stored import passage_number


class View:
    """Made by `Library.seen_by`.  Every method is synchronous and may be called from any thread."""

    def __init__(
        self,
        principal: Principal,
        store: Store,
        finder: Finder,
        quoter: Quoter,
        settings: RetrievalSettings,
        reranker: Reranker | None,
    ):
        self.principal = principal
        self._store = store
        self._finder = finder
        self._quoter = quoter
        self._settings = settings
        self._reranker = reranker

    @property
    def reads(self) -> str:
        """A name for what may be read, the same for all who may read the same; "" where that is what anybody may."""
        access = self._store.access_of(self.principal)
        if access is None:
            return "everything"
        return "" if access == self._store.access_of(ANYBODY) else " ".join(map(str, access))

    # documents

    def documents(
        self, *, collection: str | None = None, offset: int = 0, limit: int = 50
    ) -> tuple[list[Document], int]:
        """A page of documents by title, and how many there are.  Raises UnknownCollection."""
        self._check_collection(collection)
        return self._store.documents(self.principal, collection, max(0, offset), max(0, limit))

    def document(self, document_id: str) -> DocumentText:
        """Raises UnknownDocument, also where it may not be read."""
        return self._store.document(self.principal, document_id)

    def passage(self, passage_id: str) -> Passage:
        """Raises UnknownPassage (an UnknownDocument), also where it may not be read."""
        number = passage_number(passage_id)
        found = self._store.passages(self.principal, [number]) if number is not None else {}
        if number not in found:
            raise UnknownPassage(passage_id)
        return found[number].passage

    def around(self, passage_id: str, before: int = 1, after: int = 1) -> list[Passage]:
        """A passage with up to so many before it and behind it in its document, in order.  Raises UnknownPassage, also
        where it may not be read."""
        number = passage_number(passage_id)
        found = [] if number is None else self._store.around(self.principal, number, max(0, before), max(0, after))
        if not found:
            raise UnknownPassage(passage_id)
        return found

    def boxes(self, document_id: str, start: int, end: int) -> list[Box]:
        """Where the text from `start` to `end` stands on the document's pages: a rectangle for each line, none where
        the format has no pages to mark.  Raises UnknownDocument, also where it may not be read."""
        pages = self._store.boxes(self.principal, document_id, start, end)
        return [box for page, boxes in pages for box in marked(page, boxes, start, end)]

    def collections(self) -> list[str]:
        """Those with a document that may be read."""
        return self._store.collections(self.principal)

    def remove(self, document_id: str) -> None:
        """Remove a document from every index, at once.  Raises UnknownDocument, NotAllowed."""
        self._check_owner(document_id)
        with self._finder.change() as change:
            change.remove(document_id)
        self._quoter.forget()

    def share(self, document_id: str, readers: Sequence[str]) -> Document:
        """From now on its owner and these may read a document and nobody else.  Raises UnknownDocument, NotAllowed, and
        ValueError for what is no reader."""
        for reader in readers:
            checked(reader)
        owner = self._check_owner(document_id)
        readers = {*readers, owner} - {""}
        with self._finder.change() as change:
            change.set_readers(document_id, sorted(readers))
        self._quoter.forget()
        return self._store.document(OPERATOR, document_id).document

    # passages

    def search(
        self, query: str, *, collection: str | None = None, filters: Filters = Filters(), top_k: int = 4
    ) -> SearchResult:
        """The passages that best match the query, of those that `filters` let through.  Raises UnknownCollection."""
        stages = ("embed", "vectors", "text", "fuse", *(["rerank"] if self._reranker else []))
        timer = StageTimer(time.perf_counter, stages)
        self._check_collection(collection)
        query = clean_query(query)
        if not query or top_k <= 0:
            return SearchResult([], 0.0, False, count_facets({}), timer.milliseconds)
        settings = self._settings
        found = self._find(query, collection, filters, max(settings.candidates, 2 * top_k), timer)
        ranked = rank(found, settings)
        if self._reranker is not None:
            timer.done("fuse")
            ranked = self._reranked(query, ranked, found, max(settings.rerank_candidates, top_k))
            timer.done("rerank")
        passages = choose(ranked, found, top_k, settings.per_document)
        closest = round(relevance(found.values()), 4)
        # Words alone, while no model can tell what is close, refuse nothing.
        relevant = bool(passages) and (closest >= settings.relevance_floor or self._finder.embedder is None)
        facets = count_facets(found)
        timer.done("fuse")
        return SearchResult(passages, closest, relevant, facets, timer.milliseconds)

    def _reranked(
        self, query: str, ranked: list[tuple[int, float]], found: dict[int, Found], count: int
    ) -> list[tuple[int, float]]:
        """The best `count`, each text once, in the reranker's order; as they were where it gives none."""
        passages = choose(ranked, found, count, count)
        numbers = {each.passage_id: number for number in found for each in [found[number].row.passage]}
        seen = [(numbers[each.passage_id], each) for each in passages]
        return reranked(self._reranker, query, seen) or ranked

    def _find(
        self, query: str, collection: str | None, filters: Filters, count: int, timer: StageTimer
    ) -> dict[int, Found]:
        while True:
            embedder = self._finder.embedder
            vector = embedder.encode_query(query) if embedder is not None else None
            timer.done("embed")
            words = telling_words(words_of(query))
            question = Question(vector, words, phrases_of(query), collection, filters)
            found = self._finder.find(self.principal, question, count, timer)
            if self._finder.embedder is embedder:  # else another model's vectors have come into place meanwhile
                return found

    def quotes(self, question: str, passages: Sequence[Passage], count: int = 2) -> list[Quote]:
        """The sentences of the passages closest to the question, as they stand."""
        return self._quoter.quotes(clean_query(question), passages, count)

    def support(self, statements: Sequence[str], passages: Sequence[Passage]) -> list[Support]:
        """For each statement the sentence that supports it, or unsupported (`passage_id` None)."""
        return self._quoter.support([clean_query(statement) for statement in statements], passages)

    # inside

    def _check_collection(self, collection: str | None) -> None:
        if collection is not None and collection not in (known := self.collections()):
            raise UnknownCollection(collection, known)

    def _check_owner(self, document_id: str) -> str:
        """Whose it is."""
        owner = self.document(document_id).document.owner
        if not self.principal.may_change(owner):
            raise NotAllowed(document_id)
        return owner
