"""What searches look into: vectors, words and columns in memory, which follow the store write by write.

    write:  [ SQLite commit  →  indexes follow ]        excludes searches
    read:   [ mask  →  vectors  ·  words  ·  rows ]     excludes commits

So a search sees a document wholly old or wholly new, in all of them.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np

from retrieval import lexical
from retrieval.access import OPERATOR
from retrieval.change import Change
from retrieval.embedding import SharedEmbedder
from retrieval.errors import StoreError
from retrieval.lexical import LexicalIndex
from retrieval.locks import ReadWriteLock
from retrieval.search import embedding_text
from retrieval.store import Store
from retrieval.table import PassageTable
from retrieval.vectors import Mirrored, VectorIndex

log = logging.getLogger(__name__)


class Indexes:
    """`lock` is held to read while searching; `apply` takes it to write."""

    def __init__(self, data_dir: Path, store: Store, embedder: SharedEmbedder):
        """Load or build what mirrors the store; embed again what has no sound vector of this model."""
        self.lock = ReadWriteLock()
        self.vectors: VectorIndex | None = None  # None while nothing was ever embedded
        self.words = LexicalIndex()
        self.table = PassageTable()
        self._data_dir = data_dir
        self._store = store
        self._embedder = embedder
        self._saved = ""  # the store's state that the file of vectors mirrors
        self._open_table()
        self._open_vectors()

    def apply(self, change: Change) -> None:
        """Commit, and follow before anyone searches again."""
        with self.lock.write():
            change.commit()
            self.table.remove(change.removed)
            for numbers, access in change.readable:
                self.table.set_access(numbers, access)
            added = list(change.added.values())
            slots = self.table.add([each.facts for each in added])
            self.words.add(slots, [each.length for each in added], [each.codes for each in added])
            if self.table.sparse:
                self.table, self.words = PassageTable(), LexicalIndex()
                self._open_table(keep=False)  # this very write is not over
            if self.vectors is None and added:
                self.vectors = VectorIndex(self._embedder.dim)
            if self.vectors is not None:
                self.vectors.remove(np.array(change.removed, dtype=np.int64))
                if added:
                    numbers = np.array([each.facts.number for each in added], dtype=np.int64)
                    self.vectors.add(numbers, np.stack([each.vector for each in added]))

    def check_dim(self) -> None:
        """A model that is loaded late was known by its name alone when the library was opened.  Raises StoreError."""
        if self.vectors is not None and self.vectors.dim != self._embedder.dim:
            raise StoreError(
                f"the embedding model {self._embedder.name!r} gives vectors of {self._embedder.dim} numbers, those "
                f"stored have {self.vectors.dim}: use the model that they were made with, or move {self._data_dir} "
                "away and ingest again",
                code="bad_embedder",
            )

    def save(self) -> None:
        """The vectors, where they have changed."""
        with self.lock.read():
            if self.vectors is None or self._saved == self._store.state:
                return
            try:
                self.vectors.save(self._data_dir, self._mirrored())
                self._saved = self._store.state
            except OSError as error:
                # Only a cache: the next start builds it again.
                log.warning("the vector index can't be saved: %s", error)

    # inside

    def _open_table(self, keep: bool = True) -> None:
        """`keep` what had to be counted again in the store."""
        started = time.perf_counter()
        facts = self._store.facts()
        words = self._store.words(lexical.WORDS_RECIPE)
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
            for number, row in self._store.passages(OPERATOR, numbers[start : start + 1000]).items():
                found[number] = lexical.encode(row.passage.title, row.passage.heading, row.passage.text)
        if keep:
            with self._store.write() as change:
                change.set_words([(number, length, codes) for number, (length, codes) in found.items()])
                change.commit()
        return found

    def _mirrored(self) -> Mirrored:
        return Mirrored(self._store.store_id, self._store.state, self._store.embedder or "")

    def _open_vectors(self) -> None:
        numbers = self.table.numbers
        if self._store.embedder is None and not len(numbers):
            return
        had = (self._store.embedder, self._store.dim)
        want = (self._embedder.name, self._embedder.dim_at_hand or self._store.dim)
        if had != want:
            # Vectors of two models can't be compared, so all are made anew.
            self._embed_again(numbers, f"the embedder and its dimensions were {had} and are {want}")
        dim = self._store.dim
        assert dim is not None
        index = VectorIndex.load(self._data_dir, self._mirrored(), dim, len(numbers))
        if index is not None:
            self._saved = self._store.state
        else:
            index = self._build_vectors(dim, numbers)
            if len(index) < len(numbers):
                missing = numbers[~np.isin(numbers, index.numbers())]
                self._embed_again(missing, "their stored vectors are missing or damaged")
                index = self._build_vectors(dim, numbers)
        self.vectors = index
        self.save()

    def _build_vectors(self, dim: int, numbers: np.ndarray) -> VectorIndex:
        started = time.perf_counter()
        index = VectorIndex(dim)
        for found, vectors in self._store.vectors():
            belongs = np.isin(found, numbers)
            index.add(found[belongs], vectors[belongs])
        log.info("vector index of %d passages built in %.2f s", len(index), time.perf_counter() - started)
        return index

    def _embed_again(self, numbers: np.ndarray, why: str) -> None:
        log.warning("embedding %d passages again: %s", len(numbers), why)
        with self._store.write() as change:
            change.describe_embedder(self._embedder.name, self._embedder.dim)
            for start in range(0, len(numbers), 256):
                some = numbers[start : start + 256]
                rows = self._store.passages(OPERATOR, some.tolist())
                passages = [rows[number].passage for number in some.tolist()]
                texts = [embedding_text(each.title, each.heading, each.text) for each in passages]
                change.set_vectors(some, self._embedder.encode_bulk(texts))
            change.commit()
