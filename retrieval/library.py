"""The library: one data directory of documents, open for reading, searching and adding.

    write:  prepare and embed  →  [ SQLite commit  →  vector index follows ]      the bracket excludes searches
    read:   embed the query    →  [ vectors  ·  full text  ·  rows ]              the bracket excludes commits

So a search sees a document wholly old or wholly new, in both indexes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from retrieval import ingest
from retrieval.embedding import Embedder, SentenceTransformerEmbedder, SharedEmbedder
from retrieval.errors import RetrievalError, StoreError, UnknownCollection, UnreadableFile
from retrieval.files import DirectoryLock
from retrieval.locks import ReadWriteLock
from retrieval.quoting import Quoter
from retrieval.records import Document, DocumentText, IngestReport, Passage, Quote, SearchResult, Support
from retrieval.sandbox import Reader, Sandbox
from retrieval.search import (
    StageTimer,
    choose,
    clean_query,
    count_facets,
    embedding_text,
    fuse,
    match_expression,
    top_cosine,
)
from retrieval.settings import RetrievalSettings
from retrieval.store import Change, NewDocument, Store, passage_number
from retrieval.vectors import Mirrored, VectorIndex

log = logging.getLogger(__name__)


class Library:
    """Documents in, passages out.  Every method is synchronous and may be called from any thread."""

    def __init__(
        self,
        data_dir: Path,
        lock: DirectoryLock,
        store: Store,
        embedder: SharedEmbedder,
        settings: RetrievalSettings,
        reader: Reader | None,
    ):
        """Use `Library.open`."""
        self._data_dir = data_dir
        self._lock = lock
        self._store = store
        self._embedder = embedder
        self._settings = settings
        self._sandbox = Sandbox(settings.read_seconds, settings.read_memory_mb)
        self._reader = reader or self._sandbox
        self._quoter = Quoter(embedder, self._passage_vectors, settings.sentence_cache, settings.support_floor)
        self._contents = ReadWriteLock()
        self._ingesting = threading.Lock()
        self._closing = threading.Lock()
        self._closed = False
        self._index: VectorIndex | None = None  # None while nothing was ever embedded
        self._index_saved = ""  # the store's state that the file mirrors
        self._members: dict[str, np.ndarray] = {}  # collection → passage numbers; emptied by each write

    @classmethod
    def open(
        cls,
        data_dir: Path,
        *,
        embedder: Embedder | None = None,
        settings: RetrievalSettings | None = None,
        reader: Reader | None = None,
    ) -> Library:
        """Open (or create) the library under `data_dir` and hold it exclusively.

        Files are read in a process of their own, where no other `reader` is given.  The model is found here but
        loaded by `warm` or by the first search.  Raises StoreInUse, StoreError, EmbedderMissing.
        """
        settings = settings or RetrievalSettings()
        data_dir = Path(data_dir)
        shared = SharedEmbedder(embedder or SentenceTransformerEmbedder(settings.embedder, settings.threads))
        lock = DirectoryLock(data_dir)
        try:
            store = Store(data_dir)
            try:
                library = cls(data_dir, lock, store, shared, settings, reader)
                library._open_index()
            except BaseException:
                store.close()
                raise
        except BaseException:
            lock.release()
            raise
        return library

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Save the vector index and let the data directory go.  May be called again."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        with self._ingesting:  # a run that is on ends at its next commit, what it committed stays
            with self._contents.read():
                self._save_index()
            self._store.close()
            self._lock.release()
        self._sandbox.close()
        self._quoter.forget()

    def warm(self) -> None:
        """Load the embedding model and run it once, so that the first search doesn't wait for it."""
        self._embedder.encode(["warm"])

    def health(self) -> str | None:
        """What is wrong, in words; None when searches can be answered."""
        if self._closed:
            return "the library is closed"
        try:
            _, passages = self._store.counts()
        except RetrievalError as error:
            return str(error)
        if self._index is None and passages:
            return "the vector index is not loaded"
        return None

    # documents in

    def ingest_paths(
        self, paths: Iterable[Path | str], *, collection: str = "default", progress: ingest.Progress | None = None
    ) -> IngestReport:
        """Add files and folders (all the way down).  What hasn't changed is skipped, what has is replaced; a file
        that can't be read is in `failed` with the reason.  Sources are absolute paths.  Raises UnknownCollection for a
        collection without a name, as all ways in do."""
        files, skipped = ingest.find_files(paths)
        candidates = (ingest.file_candidate(file, self._settings.max_file_bytes) for file in files)
        return self._ingest(candidates, len(files), collection, progress, skipped)

    def ingest_documents(
        self,
        documents: Iterable[tuple[str, str, str, str]],
        collection: str = "default",
        progress: ingest.Progress | None = None,
    ) -> IngestReport:
        """Add texts: (name, title, text, media type) each; title "" takes the text's own."""
        listed = list(documents)
        candidates = (ingest.text_candidate(*each) for each in listed)
        return self._ingest(candidates, len(listed), collection, progress, 0)

    def ingest_bytes(self, name: str, data: bytes, *, collection: str = "default") -> Document:
        """Add one upload; the same name with other content replaces it, with the same content changes nothing.
        Raises UnreadableFile, UnknownCollection."""
        name = ingest.printable(name) or "unnamed"
        candidate = ingest.bytes_candidate(name, data, self._settings.max_file_bytes)
        report = self._ingest([candidate], 1, collection, None, 0, save=False)
        if report.failed:
            raise UnreadableFile(*report.failed[0])
        stored = self._store.version(collection, name)
        if stored is None:
            raise UnreadableFile(name, "it was removed by someone else while it was added; add it again")
        return self._store.document(stored.document_id).document

    def remove(self, document_id: str) -> None:
        """Remove a document from every index, at once.  Raises UnknownDocument."""
        with self._store.write() as change:
            change.remove(document_id)
            self._apply(change)
        self._quoter.forget()

    # documents out

    def documents(
        self, *, collection: str | None = None, offset: int = 0, limit: int = 50
    ) -> tuple[list[Document], int]:
        """A page of documents by title, and how many there are.  Raises UnknownCollection."""
        self._check_collection(collection)
        return self._store.documents(collection, max(0, offset), max(0, limit))

    def document(self, document_id: str) -> DocumentText:
        """Raises UnknownDocument."""
        return self._store.document(document_id)

    def passage(self, passage_id: str) -> Passage:
        """Raises UnknownPassage (an UnknownDocument)."""
        return self._store.passage(passage_id)

    def collections(self) -> list[str]:
        return self._store.collections()

    # passages out

    def search(self, query: str, *, collection: str | None = None, top_k: int = 4) -> SearchResult:
        """The passages that best match the query.  Raises UnknownCollection.

        Who may read what will be decided here, in `among` for the vectors and beside it for the text: one place.
        """
        timer = StageTimer(time.perf_counter, ("embed", "vectors", "text", "fuse"))
        self._check_collection(collection)
        query = clean_query(query)
        if not query or top_k <= 0 or self._index is None:
            return SearchResult([], 0.0, False, {"collection": {}, "media_type": {}}, timer.milliseconds)
        settings = self._settings
        candidates = max(settings.candidates, 2 * top_k)
        vector = self._embedder.encode_query(query)
        self._check_dim()
        timer.done("embed")
        with self._contents.read():
            among = self._numbers_of(collection) if collection is not None else None
            near = self._index.search(vector, candidates, among)
            timer.done("vectors")
            match = match_expression(query)
            worded = self._store.match_text(match, collection, candidates) if match else []
            timer.done("text")
            rankings = [
                (settings.dense_weight, [number for number, _ in near]),
                (settings.text_weight, [number for number, _ in worded]),
            ]
            fused = fuse(rankings, settings.fusion_constant)
            rows = self._store.passages([number for number, _ in fused])
        passages = choose(fused, rows, top_k)
        relevance = round(top_cosine(near), 4)
        facets = count_facets(rows)
        timer.done("fuse")
        return SearchResult(
            passages, relevance, bool(passages) and relevance >= settings.relevance_floor, facets, timer.milliseconds
        )

    def quotes(self, question: str, passages: Sequence[Passage], count: int = 2) -> list[Quote]:
        """The sentences of the passages closest to the question, as they stand."""
        return self._quoter.quotes(clean_query(question), passages, count)

    def support(self, statements: Sequence[str], passages: Sequence[Passage]) -> list[Support]:
        """For each statement the sentence that supports it, or unsupported (`passage_id` None)."""
        return self._quoter.support([clean_query(statement) for statement in statements], passages)

    # inside

    def _ingest(
        self,
        candidates: Iterable[ingest.Candidate],
        total: int,
        collection: str,
        progress: ingest.Progress | None,
        skipped: int,
        save: bool = True,
    ) -> IngestReport:
        if not collection.strip():
            raise UnknownCollection(collection)
        with self._ingesting:
            run = ingest.Ingestion(
                collection=collection,
                embedder=self._embedder,
                reader=self._reader,
                settings=self._settings,
                stored=self._store.version,
                commit=self._commit,
                progress=progress,
            )
            run.skip(skipped)
            report = run.run(candidates, total)
            if save:
                with self._contents.read():
                    self._save_index()
            return report

    def _commit(self, documents: list[tuple[NewDocument, np.ndarray]]) -> None:
        if self._closed:
            raise StoreError("the library was closed while documents were being added", code="closed_store")
        self._check_dim()
        with self._store.write() as change:
            change.describe_embedder(self._embedder.name, self._embedder.dim)
            for document, vectors in documents:
                change.put(document, vectors)
            self._apply(change)
        if change.removed:
            self._quoter.forget()

    def _apply(self, change: Change) -> None:
        """Commit, and let the index follow before anyone searches again."""
        with self._contents.write():
            change.commit()
            self._members.clear()
            if self._index is None and change.added:
                self._index = VectorIndex(self._embedder.dim)
            if self._index is not None:
                self._index.remove(np.array(change.removed, dtype=np.int64))
                if change.added:
                    self._index.add(np.array(list(change.added), dtype=np.int64), np.stack(list(change.added.values())))

    def _numbers_of(self, collection: str) -> np.ndarray:
        """Under the contents lock: two readers may both fill this in, with the same numbers."""
        if collection not in self._members:
            self._members[collection] = self._store.numbers_of(collection)
        return self._members[collection]

    def _passage_vectors(self, passage_ids: Sequence[str]) -> dict[str, np.ndarray]:
        numbers = {passage_id: passage_number(passage_id) for passage_id in passage_ids}
        with self._contents.read():
            known = self._index.vectors_of([n for n in numbers.values() if n is not None]) if self._index else {}
        return {passage_id: known[n] for passage_id, n in numbers.items() if n in known}

    def _check_collection(self, collection: str | None) -> None:
        if collection is not None and collection not in (known := self._store.collections()):
            raise UnknownCollection(collection, known)

    def _check_dim(self) -> None:
        """A model that is loaded late was known by its name alone when the library was opened."""
        if self._index is not None and self._index.dim != self._embedder.dim:
            raise StoreError(
                f"the embedding model {self._embedder.name!r} gives vectors of {self._embedder.dim} numbers, those "
                f"stored have {self._index.dim}: use the model that they were made with, or move {self._data_dir} "
                "away and ingest again",
                code="bad_embedder",
            )

    def _mirrored(self) -> Mirrored:
        return Mirrored(self._store.store_id, self._store.state, self._store.embedder or "")

    def _open_index(self) -> None:
        """Load or build the index that mirrors the store; embed again what has no sound vector of this model."""
        numbers = self._store.numbers_of()
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
            self._index_saved = self._store.state
        else:
            index = self._build_index(dim, numbers)
            if len(index) < len(numbers):
                missing = numbers[~np.isin(numbers, index.numbers())]
                self._embed_again(missing, "their stored vectors are missing or damaged")
                index = self._build_index(dim, numbers)
        self._index = index
        self._save_index()

    def _build_index(self, dim: int, numbers: np.ndarray) -> VectorIndex:
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
                rows = self._store.passages(some.tolist())
                passages = [rows[number].passage for number in some.tolist()]
                texts = [embedding_text(each.title, each.heading, each.text) for each in passages]
                change.set_vectors(some, self._embedder.encode_bulk(texts))
            change.commit()

    def _save_index(self) -> None:
        if self._index is None or self._index_saved == self._store.state:
            return
        try:
            self._index.save(self._data_dir, self._mirrored())
            self._index_saved = self._store.state
        except OSError as error:
            # Only a cache: the next start builds it again.
            log.warning("the vector index can't be saved: %s", error)
