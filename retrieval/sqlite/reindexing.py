"""What is made beside the searches, which go on in what there is: vectors of another model, lists for many passages.

Vectors of a new model are the store's next generation: passages get them in small writes, behind whoever waits for the
model, and what is done is kept when the program ends.  Once none lacks one, the generation that served goes and the new
one serves, in one step.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from retrieval.access import OPERATOR
from retrieval.embedding import SharedEmbedder
from retrieval.errors import StoreError
from retrieval.pooling import passage_text
from retrieval.sqlite.vectors import VectorIndex

if TYPE_CHECKING:
    from retrieval.sqlite.indexes import Indexes

log = logging.getLogger(__name__)

_PASSAGES = 64  # embedded and written together
_LISTS = 4  # times the square root of how many passages there are
_SAMPLED = 40  # vectors for each list, to find the lists by
_GROWN = 4  # times as many passages as when the lists were made: they are made anew


class Reindexing:
    """One thread while there is something to make."""

    def __init__(self, indexes: Indexes, embedder: SharedEmbedder, opened_by: str):
        """`embedder` is the one whose vectors are wanted, opened by that name."""
        self._indexes = indexes
        self._embedder = embedder
        self._opened_by = opened_by
        self._stopped = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start where something is to be made and nobody is at it."""
        with self._starting:
            busy = self._thread is not None and self._thread.is_alive()
            if not busy and not self._stopped.is_set() and (self._other_model() or self._wants_lists()):
                self._thread = threading.Thread(target=self._run, name="library-reindex", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        thread = self._thread
        if thread is not None:
            thread.join()

    def stop(self) -> None:
        with self._starting:
            self._stopped.set()
        self.wait()

    def _other_model(self) -> bool:
        store, embedder = self._indexes.store, self._embedder
        same = (store.embedder, store.dim) == (embedder.identity, embedder.dim_at_hand or store.dim)
        return not same and len(self._indexes.table) > 0

    def _wants_lists(self) -> bool:
        made = self._indexes.vectors
        if not isinstance(made, VectorIndex) or len(made) < self._indexes.lists_from:
            return False
        return len(made) >= _GROWN * (made.lists // _LISTS) ** 2

    def _run(self) -> None:
        try:
            if self._other_model():
                self._embed_all()
            if self._wants_lists():
                self._make_lists()
        except StoreError as error:
            if not self._stopped.is_set():
                log.error("the index can't be made anew: %s", error)
        except Exception:
            log.exception("the index can't be made anew; searches go on with what there is")

    # another model

    def _embed_all(self) -> None:
        store, embedder = self._indexes.store, self._embedder
        maker = f"{embedder.identity}, {embedder.dim} numbers"
        if store.next_embedder != maker:
            with store.write() as change:
                change.begin_generation(maker)
                change.commit(mirrored=False)
        started = time.monotonic()
        count = 0
        while not self._stopped.is_set():
            count += self._embed_lacking()
            if self._stopped.is_set():
                return
            made = self._indexes.build_vectors(store.generation + 1, embedder.dim)
            with store.write() as change:
                if store.lacking(store.generation + 1, -1, 1) or len(made) != len(self._indexes.table):
                    continue  # somebody added or removed a document meanwhile
                change.change_generation(embedder.identity, embedder.dim, self._opened_by)
                self._indexes.replace(made, embedder, change.commit)
            log.info("%d passages embedded by %s in %.0f s", count, embedder.name, time.monotonic() - started)
            return

    def _embed_lacking(self) -> int:
        store = self._indexes.store
        generation, last, count = store.generation + 1, -1, 0
        while not self._stopped.is_set() and (numbers := store.lacking(generation, last, _PASSAGES)):
            last = numbers[-1]
            rows = store.passages(OPERATOR, numbers)
            passages = [row.passage for row in rows.values()]
            texts = [passage_text(each.title, each.heading, each.text) for each in passages]
            embedded = self._embedder.encode_passages(texts)
            with store.write() as change:
                change.set_embeddings(list(rows), embedded, generation)
                change.commit(mirrored=False)
            count += len(rows)
            if count % (16 * _PASSAGES) < _PASSAGES:
                log.info("embedding anew: %d passages done", count)
        return count

    # lists

    def _make_lists(self) -> None:
        indexes, store = self._indexes, self._indexes.store
        started = time.monotonic()
        with indexes.lock.read():
            assert indexes.vectors is not None
            numbers, dim = np.sort(indexes.vectors.numbers()), indexes.vectors.dim
        lists = _LISTS * math.isqrt(len(numbers))
        sampled = numbers[:: max(1, len(numbers) // (_SAMPLED * lists))]
        made = VectorIndex.in_lists(dim, np.stack(list(store.vectors_of(sampled).values())), lists)
        for found, vectors in store.vectors(store.generation, dim):
            if self._stopped.is_set():
                return
            made.add(found, vectors)
        with store.write():  # keeps writers away, so that what is missing stays what it is
            now = indexes.table.numbers
            made.remove(np.setdiff1d(made.numbers(), now))
            for number, vector in store.vectors_of(np.setdiff1d(now, made.numbers())).items():
                made.add(np.array([number]), vector[None])
            indexes.replace(made, self._embedder, lambda: None)
        log.info("%d passages put in %d lists in %.0f s", len(made), made.lists, time.monotonic() - started)
