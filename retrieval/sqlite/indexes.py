"""What searches look into: vectors, words and columns in memory, which follow the store write by write.

    write:  [ SQLite commit  →  indexes follow ]        excludes searches
    read:   [ mask  →  vectors  ·  words  ·  rows ]     excludes commits

So a search sees a document wholly old or wholly new, in all of them.  What takes long (vectors of another model, lists
for many passages) is made beside them by `reindexing` and put in their place in one step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retrieval import lexical
from retrieval.access import OPERATOR, Principal
from retrieval.embedding import Embedded, SharedEmbedder
from retrieval.errors import StoreError
from retrieval.lexical import LexicalIndex
from retrieval.locks import ReadWriteLock
from retrieval.pooling import passage_text
from retrieval.search import Found, Question, StageTimer, found_passages
from retrieval.sqlite.change import Change
from retrieval.sqlite.reindexing import Reindexing
from retrieval.sqlite.store import Store
from retrieval.sqlite.table import PassageTable
from retrieval.sqlite.vectors import Mirrored, VectorIndex
from retrieval.stored import NewDocument

if TYPE_CHECKING:
    from retrieval.sqlite.device_vectors import DeviceVectors

log = logging.getLogger(__name__)


class Indexes:
    """The finder (`contracts.Finder`) over a store in SQLite.  `lock` is held to read while searching; `apply` takes it
    to write."""

    def __init__(
        self,
        data_dir: Path,
        store: Store,
        embedder: SharedEmbedder,
        opened_by: str,
        earlier: Callable[[str], SharedEmbedder | None],
        lists_from: int,
        vectors_on: str = "cpu",
    ):
        """Load or build what mirrors the store; embed again what has no sound vector.  Where the store's vectors are of
        another model than `embedder` (of that name in the settings), the one that `earlier` finds by their identity
        goes on serving them (words alone serve where it finds none) until `embedder` has made all anew."""
        self.lock = ReadWriteLock()
        # None while nothing was ever embedded, or nobody can read what was.
        self.vectors: VectorIndex | DeviceVectors | None = None
        self.words = LexicalIndex()
        self.table = PassageTable()
        self.store = store
        self._serving: SharedEmbedder | None = embedder  # whose vectors those are
        self._wanted = embedder
        self._opened_by = opened_by
        self.lists_from = lists_from
        self._vectors_on = vectors_on
        self._empty(1)  # the device is there
        self._data_dir = data_dir
        self._saved = ""  # the store's state that the file of vectors mirrors
        self._reindexing = Reindexing(self, embedder, opened_by)
        self._open_table()
        self._open_vectors(embedder, earlier)
        self._reindexing.begin()

    @property
    def embedder(self) -> SharedEmbedder | None:
        return self._serving if self.vectors is not None else None

    @property
    def writing(self) -> SharedEmbedder:
        return (self._serving if len(self.table) else None) or self._wanted

    @contextmanager
    def change(self) -> Iterator[Change]:
        with self.store.write() as change:
            yield change
            self.apply(change)

    def put(self, documents: Sequence[tuple[NewDocument, Sequence[Embedded]]], embedder: SharedEmbedder) -> bool:
        with self.store.write() as change:
            if embedder is not self.writing:
                return False
            if not len(self.table):  # whatever model the documents had that are gone
                change.describe_embedder(embedder.identity, embedder.dim, self._opened_by)
                with self.lock.write():
                    self.vectors, self._serving = None, embedder
            self.check_dim()
            generation = self.store.generation + (self._serving is None)
            for document, embedded in documents:
                change.put(document, embedded, generation)
            self.apply(change)
        return True

    def find(self, principal: Principal, question: Question, count: int, timer: StageTimer) -> dict[int, Found]:
        with self.lock.read():
            mask = self._mask(principal, question)
            numbers = self.table["number"][mask]
            near = []
            if self.vectors is not None and question.vector is not None:
                if len(question.vector) != self.vectors.dim:
                    self.check_dim()
                    return {}  # another model has come into place since; who asks asks again
                near = self.vectors.search(question.vector, count, numbers)
            timer.done("vectors")
            worded = self.words.search(question.words, mask, count, self.table.slots_of(near))
            words = dict(zip(self.table.numbers_of(worded), worded.values(), strict=True))
            timer.done("text")
            stored = self.store.found(principal, list(dict.fromkeys([*near, *words])))
        return found_passages(question, stored, words)

    def apply(self, change: Change) -> None:
        """Commit, and follow before anyone searches again."""
        with self.lock.write():
            change.commit()
            self.table.remove([*change.removed, *(each.facts.number for each in change.reworded)])
            for numbers, access in change.readable:
                self.table.set_access(numbers, access)
            added = list(change.added.values())
            worded = [*change.reworded, *added]
            slots = self.table.add([each.facts for each in worded])
            self.words.add(slots, [each.length for each in worded], [each.codes for each in worded])
            if self.table.sparse:
                self.table, self.words = PassageTable(), LexicalIndex()
                self._open_table(keep=False)  # this very write is not over
            if self.vectors is None and added and self._serving is not None:
                self.vectors = self._empty(self._serving.dim)
            if self.vectors is not None:
                self.vectors.remove(np.array(change.removed, dtype=np.int64))
                if added:
                    numbers = np.array([each.facts.number for each in added], dtype=np.int64)
                    self.vectors.add(numbers, np.stack([each.vector for each in added]))
        self._reindexing.begin()

    def replace(self, made: VectorIndex | DeviceVectors, embedder: SharedEmbedder, commit: Callable[[], None]) -> None:
        """From now on `made` serves, with the model that made it."""
        with self.lock.write():
            commit()
            self.vectors, self._serving = made, embedder

    def check_dim(self) -> None:
        """A model that is loaded late was known by its name alone when the library was opened.  Raises StoreError."""
        embedder = self.embedder
        if self.vectors is not None and embedder is not None and self.vectors.dim != embedder.dim:
            raise StoreError(
                f"the embedding model {embedder.name!r} gives vectors of {embedder.dim} numbers, those "
                f"stored have {self.vectors.dim}: use the model that they were made with, or move {self._data_dir} "
                "away and ingest again",
                code="bad_embedder",
            )

    def settle(self) -> None:
        self._reindexing.wait()

    def close(self) -> None:
        self._reindexing.stop()
        self.save()

    def save(self) -> None:
        """The vectors, where they have changed."""
        with self.lock.read():
            if not isinstance(self.vectors, VectorIndex) or self._saved == self.store.state:
                return
            try:
                self.vectors.save(self._data_dir, self._mirrored())
                self._saved = self.store.state
            except OSError as error:
                # Only a cache: the next start builds it again.
                log.warning("the vector index can't be saved: %s", error)

    # inside

    def _mask(self, principal: Principal, question: Question) -> np.ndarray:
        """The slots that a search may look at."""
        filters, collection = question.filters, question.collection
        mask = self.table.mask(
            access=self.store.access_of(principal),
            collections=[collection] if collection is not None else filters.collections or None,
            media_types=filters.media_types or None,
            documents=self.store.matching(principal, filters.tags, filters.sources),
            since=filters.since_day,
            until=filters.until_day,
        )
        for phrase in question.phrases:
            mask &= np.isin(self.table["number"], self.store.containing(principal, phrase))
        return mask

    def _open_table(self, keep: bool = True) -> None:
        """`keep` what had to be counted again in the store."""
        started = time.perf_counter()
        facts = self.store.facts()
        words = self.store.words(lexical.WORDS_RECIPE)
        missing = [each.number for each in facts if each.number not in words]
        if missing:
            words |= self._count_words_again(missing, keep)
        slots = self.table.add(facts)
        known = [words[each.number] for each in facts]
        self.words.add(slots, [length for length, _ in known], [codes for _, codes in known])
        if facts:
            log.info("words of %d passages indexed in %.2f s", len(facts), time.perf_counter() - started)

    def _count_words_again(self, numbers: list[int], keep: bool) -> dict[int, tuple[int, bytes]]:
        log.info("counting the words of %d passages", len(numbers))
        found: dict[int, tuple[int, bytes]] = {}
        for start in range(0, len(numbers), 1000):
            for number, row in self.store.passages(OPERATOR, numbers[start : start + 1000]).items():
                found[number] = lexical.encode(row.passage.title, row.passage.heading, row.passage.text)
        if keep:
            with self.store.write() as change:
                change.set_words([(number, length, codes) for number, (length, codes) in found.items()])
                change.commit()
        return found

    def _mirrored(self) -> Mirrored:
        return Mirrored(self.store.store_id, self.store.state, self.store.embedder or "")

    def _open_vectors(self, embedder: SharedEmbedder, earlier: Callable[[str], SharedEmbedder | None]) -> None:
        numbers = self.table.numbers
        had, dim = self.store.embedder, self.store.dim
        if not len(numbers):
            return
        if (had, dim) != (embedder.identity, embedder.dim_at_hand or dim):
            log.warning(
                "vectors are made anew: the embedder was %s (%s numbers), now it is %s", had, dim, embedder.name
            )
            self._serving = earlier(had) if had else None
            if self._serving is None or self._serving.dim_at_hand not in (None, dim):
                self._serving = None
                return
        assert dim is not None
        index: VectorIndex | DeviceVectors | None = None
        if self._vectors_on == "cpu":
            index = VectorIndex.load(self._data_dir, self._mirrored(), dim, len(numbers))
        if index is not None:
            self._saved = self.store.state
        else:
            index = self.build_vectors(self.store.generation, dim)
            if len(index) < len(numbers):
                self._embed_again(numbers[~np.isin(numbers, index.numbers())])
                index = self.build_vectors(self.store.generation, dim)
        self.vectors = index
        self.save()

    def _empty(self, dim: int) -> VectorIndex | DeviceVectors:
        if self._vectors_on == "cpu":
            return VectorIndex(dim)
        from retrieval.sqlite.device_vectors import DeviceVectors  # torch takes seconds to import

        return DeviceVectors(dim, self._vectors_on)

    def build_vectors(self, generation: int, dim: int) -> VectorIndex | DeviceVectors:
        """Of the stored vectors of a generation."""
        started = time.perf_counter()
        index = self._empty(dim)
        numbers = self.table.numbers
        for found, stored in self.store.vectors(generation, dim):
            belongs = np.isin(found, numbers)
            index.add(found[belongs], stored[belongs])
        log.info("vector index of %d passages built in %.2f s", len(index), time.perf_counter() - started)
        return index

    def _embed_again(self, numbers: np.ndarray) -> None:
        assert self._serving is not None
        log.warning("embedding %d passages again: their stored vectors are missing or damaged", len(numbers))
        with self.store.write() as change:
            for start in range(0, len(numbers), 256):
                some = numbers[start : start + 256].tolist()
                rows = self.store.passages(OPERATOR, some)
                texts = [passage_text(each.title, each.heading, each.text) for each in (rows[n].passage for n in some)]
                change.set_embeddings(some, self._serving.encode_passages(texts))
            change.commit()
