"""The library: one data directory of documents, open for adding and, through somebody's eyes, for reading."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from retrieval import ingest
from retrieval.access import EVERYBODY, OPERATOR, Principal
from retrieval.embedding import Embedded, Embedder, SentenceTransformerEmbedder, SharedEmbedder
from retrieval.errors import RetrievalError, StoreError, UnknownCollection, UnknownDocument, UnreadableFile
from retrieval.fetching import fetch
from retrieval.formats.parsed import title_from_name
from retrieval.jobs import Jobs
from retrieval.places import Place, open_place
from retrieval.quoting import Quoter
from retrieval.records import Document, IngestReport
from retrieval.reranking import Reranker, open_reranker
from retrieval.sandbox import Reader, Sandbox
from retrieval.settings import RetrievalSettings
from retrieval.stored import NewDocument, StoredVersion, passage_number
from retrieval.view import View
from retrieval.watching import Watch, Watching

log = logging.getLogger(__name__)


class Library:
    """Documents in, at once or as `jobs`; out only by `seen_by`.  Every method is synchronous and may be called from
    any thread."""

    def __init__(
        self,
        place: Place,
        embedder: SharedEmbedder,
        settings: RetrievalSettings,
        reader: Reader | None,
        reranker: Reranker | None,
    ):
        """Use `Library.open`."""
        self._store = place.store
        self._indexes = place.finder
        self._close_place = place.close
        self._embedder = embedder
        self._settings = settings
        self._reranker = reranker
        self._sandbox = Sandbox(settings.read_seconds, settings.read_memory_mb)
        self._reader = reader or self._sandbox
        self._quoter = Quoter(embedder, self._passage_vectors, settings.sentence_cache, settings.support_floor)
        self.jobs = Jobs(place.jobs, place.store, place.incoming, settings, self._read_job)
        self._watching: Watching | None = None
        self._ingesting = threading.Lock()
        self._closing = threading.Lock()
        self._closed = False

    @classmethod
    def open(
        cls,
        data_dir: Path,
        *,
        embedder: Embedder | None = None,
        settings: RetrievalSettings | None = None,
        reader: Reader | None = None,
        open_embedder: Callable[[str], Embedder] | None = None,
        reranker: Reranker | None = None,
    ) -> Library:
        """Open (or create) the library under `data_dir` and hold it exclusively, or the one in the database that the
        settings name, which others may have open, too.

        Files are read in a process of their own, where no other `reader` is given.  The model is found here but
        loaded by `warm` or by the first search.  Where the documents were embedded by another one, that is opened by
        its name (`open_embedder`) and serves until all are embedded anew, which goes on beside searches.  Raises
        StoreInUse, StoreError, EmbedderMissing.
        """
        settings = settings or RetrievalSettings()
        data_dir = Path(data_dir)
        opener = open_embedder or (lambda name: SentenceTransformerEmbedder(name, settings.threads))
        shared = SharedEmbedder(embedder or opener(settings.embedder))
        reranker = reranker or open_reranker(settings)
        return cls(open_place(data_dir, settings, shared, opener), shared, settings, reader, reranker)

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
        if self._watching is not None:
            self._watching.stop()
        self.jobs.stop(self._sandbox.interrupt)
        with self._ingesting:  # a run that is on ends at its next commit, what it committed stays
            self._indexes.close()
            self._close_place()
        self._sandbox.close()
        self._quoter.forget()
        if self._reranker is not None:
            self._reranker.close()

    def warm(self) -> None:
        """Load the embedding model and run it once, so that the first search doesn't wait for it."""
        for embedder in {self._embedder, self._indexes.embedder} - {None}:
            embedder.encode(["warm"])

    def settle(self) -> None:
        """Wait until nothing is being made anew: vectors of another model, an index for more passages."""
        self._indexes.settle()

    def health(self) -> str | None:
        """What is wrong, in words; None when searches can be answered."""
        if self._closed:
            return "the library is closed"
        try:
            self._store.counts()
        except RetrievalError as error:
            return str(error)
        return None

    def seen_by(self, principal: Principal) -> View:
        """What this principal may read, and nothing else."""
        return View(principal, self._store, self._indexes, self._quoter, self._settings, self._reranker)

    @property
    def whole(self) -> View:
        """All of it, for the operator of this machine."""
        return self.seen_by(OPERATOR)

    # documents in

    def ingest_paths(
        self,
        paths: Iterable[Path | str],
        *,
        collection: str = "default",
        readers: Sequence[str] | None = None,
        tags: Sequence[str] | None = None,
        progress: ingest.Progress | None = None,
    ) -> IngestReport:
        """Add files and folders (all the way down).  What hasn't changed is skipped, what has is replaced; a file
        that can't be read is in `failed` with the reason.  Sources are absolute paths.  `readers` as `retrieval.access`
        names them, and `tags`, are those of before (of a new one public, and none) where not given; the operator owns
        what comes this way.  Raises UnknownCollection for a collection without a name, and ValueError for what is no
        reader or no tag, as all ways in do."""
        files, skipped = ingest.find_files(paths)
        candidates = (ingest.file_candidate(file, self._settings.max_file_bytes) for file in files)
        into = ingest.Into(collection, _given(readers), "", _given(tags))
        return self._ingest(candidates, len(files), into, progress, skipped)

    def ingest_documents(
        self,
        documents: Iterable[tuple[str, str, str, str]],
        collection: str = "default",
        progress: ingest.Progress | None = None,
        readers: Sequence[str] | None = None,
    ) -> IngestReport:
        """Add texts: (name, title, text, media type) each; title "" takes the text's own."""
        listed = list(documents)
        candidates = (ingest.text_candidate(*each) for each in listed)
        return self._ingest(candidates, len(listed), ingest.Into(collection, _given(readers)), progress, 0)

    def ingest_bytes(
        self,
        name: str,
        data: bytes,
        *,
        collection: str = "default",
        readers: Sequence[str] | None = None,
        owner: str = "",
        tags: Sequence[str] | None = None,
        usual: Sequence[str] = (EVERYBODY,),
    ) -> Document:
        """Add one upload of `owner`; theirs of the same name is replaced where the content is another one, and stays
        what it was where it isn't.  `usual` readers are those of a new one where none are given.  Raises
        UnreadableFile, UnknownCollection, ValueError."""
        name = ingest.printable(name) or "unnamed"
        candidate = ingest.bytes_candidate(name, data, self._settings.max_file_bytes)
        into = ingest.Into(collection, _given(readers), owner, _given(tags), tuple(usual))
        return self._ingest_one(candidate, into)

    def ingest_url(
        self,
        url: str,
        *,
        collection: str = "default",
        readers: Sequence[str] | None = None,
        owner: str = "",
        tags: Sequence[str] | None = None,
        usual: Sequence[str] = (EVERYBODY,),
    ) -> Document:
        """Add what is at an address of the public internet (`retrieval.fetching`), which becomes its source; the rest
        is as in `ingest_bytes`."""
        into = ingest.Into(collection, _given(readers), owner, _given(tags), tuple(usual))
        into.check()
        fetched = fetch(url, self._settings.max_file_bytes, self._settings.fetch_seconds)
        return self._ingest_one(ingest.url_candidate(ingest.printable(url), fetched), into)

    # folders that are followed (`retrieval.watching.Follower`)

    def watch(self, watches: Sequence[Watch]) -> None:
        """Have the documents of these folders follow them, until the library is closed."""
        assert self._watching is None
        self._watching = Watching(self, watches)
        self._watching.start()

    def serving(self) -> AbstractContextManager[None]:
        """While somebody is answered: documents are embedded a little at a time then."""
        return self._embedder.serving()

    def notices(self) -> list[str]:
        """What whoever runs this should know, in words, though searches are answered."""
        notices = []
        if gone := self._watching.troubles if self._watching else 0:
            notices.append(f"watched folders that are gone or empty: {gone}; their documents stay, the log names them")
        if self._indexes.embedder is None and self._store.counts()[1]:
            notices.append("documents are found by their words alone until the model of the settings has embedded them")
        return notices

    def sources(self, into: ingest.Into, path: Path) -> set[str]:
        return self._store.sources(into.collection, into.owner, ingest.printable(str(path)))

    def follow(self, file: Path, into: ingest.Into) -> None:
        candidate = ingest.file_candidate(file, self._settings.max_file_bytes)
        try:
            content_hash = ingest.hash_of(candidate.read())
        except (UnreadableFile, OSError):
            self.jobs.add_file(file, into)  # which will say why
            return
        stored = self._store.version(into.collection, candidate.source, into.owner)
        stored = stored or self._moved(into, candidate.source, content_hash)
        if not ingest.is_current(stored, into, content_hash, ingest.recipe(self._settings)):
            self.jobs.add_file(file, into)

    def forget(self, source: str, into: ingest.Into) -> None:
        self.jobs.drop(source, into)
        stored = self._store.version(into.collection, source, into.owner)
        if stored is not None:
            with contextlib.suppress(UnknownDocument):  # somebody else was first
                self.whole.remove(stored.document_id)

    # inside

    def _ingest_one(self, candidate: ingest.Candidate, into: ingest.Into) -> Document:
        return self._read_job(candidate, into, None)[0]

    def _read_job(
        self, candidate: ingest.Candidate, into: ingest.Into, progress: ingest.Progress | None
    ) -> tuple[Document, list[str]]:
        """One document, and what of it gave no text."""
        source = candidate.source
        report = self._ingest([candidate], 1, into, progress, 0, save=False)
        if report.failed:
            raise UnreadableFile(*report.failed[0], report.codes[source])
        stored = self._store.version(into.collection, source, into.owner)
        if stored is None:
            raise UnreadableFile(source, "it was removed by someone else while it was added; add it again")
        return self.whole.document(stored.document_id).document, [reason for _, reason in report.unread]

    def _moved(self, into: ingest.Into, source: str, content_hash: str) -> StoredVersion | None:
        """The document of a file with this content that is gone by its old name: it gets this one and stays itself."""
        for document in self._store.same_content(into.collection, into.owner, content_hash):
            path = ingest.path_of(document.source)
            if not (path.is_absolute() and ingest.is_gone(path)):
                continue
            named = document.title == title_from_name(document.source)
            with self._indexes.change() as change:
                change.move(document.document_id, source, title_from_name(source) if named else document.title)
            return self._store.version(into.collection, source, into.owner)
        return None

    def _ingest(
        self,
        candidates: Iterable[ingest.Candidate],
        total: int,
        into: ingest.Into,
        progress: ingest.Progress | None,
        skipped: int,
        save: bool = True,
    ) -> IngestReport:
        if not into.collection.strip():
            raise UnknownCollection(into.collection)
        into.check()
        with self._ingesting:
            run = ingest.Ingestion(
                into=into,
                embedder=lambda: self._indexes.writing,
                reader=self._reader,
                settings=self._settings,
                stored=self._store.version,
                moved=self._moved,
                commit=self._commit,
                progress=progress,
            )
            run.skip(skipped)
            report = run.run(candidates, total)
            if save:
                self._indexes.save()
            return report

    def _commit(
        self, documents: list[tuple[NewDocument, list[Embedded]]], embedder: SharedEmbedder, replaces: bool
    ) -> bool:
        """False where `embedder` is no longer the one whose vectors are wanted."""
        if self._closed:
            raise StoreError("the library was closed while documents were being added", code="closed_store")
        if not self._indexes.put(documents, embedder):
            return False
        if replaces:  # what is new changes no sentence that has been seen
            self._quoter.forget()
        return True

    def _passage_vectors(self, passage_ids: Sequence[str]) -> dict[str, np.ndarray]:
        if self._indexes.embedder is not self._embedder:  # not to be compared with sentences of another model
            return {}
        numbers = {passage_id: passage_number(passage_id) for passage_id in passage_ids}
        known = self._store.vectors_of([n for n in numbers.values() if n is not None])
        return {passage_id: known[n] for passage_id, n in numbers.items() if n in known}


def _given(values: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)
