"""A library in memory and a backend under the test's control, with the real ones' faces."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime

from inference import (
    Capabilities,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Health,
    Prompt,
    TextDelta,
    Usage,
)
from retrieval import Filters, Job, Principal
from retrieval.errors import UnknownCollection, UnknownDocument, UnknownPassage, UnreadableFile
from retrieval.ingest import Into
from retrieval.records import Document, DocumentText, IngestReport, Passage, Quote, SearchResult, Support


def words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 3}


def sentence_spans(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"[^\s.!?][^.!?]*[.!?]?", text)]


class FakeLibrary:
    """Documents by id, one passage per paragraph, found by shared words."""

    def __init__(self) -> None:
        self.texts: dict[str, DocumentText] = {}
        self.searches: list[str] = []
        self.askers: list[Principal] = []
        self.trouble: str | None = None
        self.closed = False
        self.served = 0
        self.jobs = FakeJobs(self)
        self._lock = threading.Lock()

    def __enter__(self) -> FakeLibrary:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def warm(self) -> None:
        pass

    def seen_by(self, principal: Principal) -> FakeLibrary:
        self.askers.append(principal)
        return self

    @property
    def whole(self) -> FakeLibrary:
        return self

    reads = ""

    def add(self, title: str, text: str, *, collection: str = "default", source: str | None = None) -> Document:
        name = source or f"{title}.txt"
        document_id = f"d{abs(hash((collection, name))) % 10**9}"
        document = Document(
            document_id=document_id,
            title=title,
            source=name,
            media_type="text/plain",
            collection=collection,
            content_hash=str(hash(text)),
            characters=len(text),
            passages=len(self._split(text)),
            pages=None,
            added_at=datetime(2026, 1, 2, tzinfo=UTC).isoformat(),
        )
        with self._lock:
            self.texts[document_id] = DocumentText(document, text)
        return document

    @staticmethod
    def _split(text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"\S(?:.|\n(?!\n))*", text)]

    def _passages(self, collection: str | None) -> list[Passage]:
        return [
            Passage(
                passage_id=f"{document_id}-{start}",
                document_id=document_id,
                title=stored.document.title,
                source=stored.document.source,
                heading="",
                page=None,
                start=start,
                end=end,
                text=stored.text[start:end],
                score=0.0,
            )
            for document_id, stored in self.texts.items()
            if collection is None or stored.document.collection == collection
            for start, end in self._split(stored.text)
        ]

    def search(
        self, query: str, *, collection: str | None = None, filters: Filters = Filters(), top_k: int = 4
    ) -> SearchResult:
        self.searches.append(query)
        self._known(collection)
        asked = words(query)
        found = self._passages(collection)
        shared = {p.passage_id: len(asked & words(p.text)) / (len(asked) or 1) for p in found}
        found.sort(key=lambda p: (-shared[p.passage_id], p.passage_id))
        best = max(shared.values(), default=0.0)
        return SearchResult(
            passages=found[:top_k],
            relevance=best,
            relevant=best >= 0.3,
            facets={"collection": dict.fromkeys(self.collections(), 1)},
            timings={"embed": 1.0, "vectors": 1.0, "text": 1.0, "fuse": 0.1},
        )

    def quotes(self, question: str, passages: Sequence[Passage], count: int = 2) -> list[Quote]:
        asked = words(question)
        candidates = [
            Quote(
                p.passage_id, p.start + start, p.start + end, p.text[start:end], len(asked & words(p.text[start:end]))
            )
            for p in passages
            for start, end in sentence_spans(p.text)
        ]
        return sorted(candidates, key=lambda quote: -quote.similarity)[:count]

    def support(self, statements: Sequence[str], passages: Sequence[Passage]) -> list[Support]:
        found = []
        for statement in statements:
            said = words(statement)
            best = Support(None, 0, 0, "", 0.0)
            for p in passages:
                for start, end in sentence_spans(p.text):
                    share = len(said & words(p.text[start:end])) / (len(said) or 1)
                    if share > max(0.5, best.similarity):
                        best = Support(p.passage_id, p.start + start, p.start + end, p.text[start:end], share)
            found.append(best)
        return found

    def documents(self, *, collection: str | None = None, offset: int = 0, limit: int = 50):
        self._known(collection)
        listed = [t.document for t in self.texts.values() if collection is None or t.document.collection == collection]
        return listed[offset : offset + limit], len(listed)

    def document(self, document_id: str) -> DocumentText:
        try:
            return self.texts[document_id]
        except KeyError:
            raise UnknownDocument(document_id) from None

    def passage(self, passage_id: str) -> Passage:
        try:
            return next(p for p in self._passages(None) if p.passage_id == passage_id)
        except StopIteration:
            raise UnknownPassage(passage_id) from None

    def around(self, passage_id: str, before: int = 1, after: int = 1) -> list[Passage]:
        here = self.passage(passage_id)
        beside = [p for p in self._passages(None) if p.document_id == here.document_id]
        at = beside.index(here)
        return beside[max(0, at - before) : at + after + 1]

    def remove(self, document_id: str) -> None:
        self.document(document_id)
        del self.texts[document_id]

    def ingest_bytes(self, name: str, data: bytes, *, collection: str = "default", **how: object) -> Document:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise UnreadableFile(name, "it is not text") from None
        return self.add(name.rsplit(".", 1)[0], text, collection=collection, source=name)

    def ingest_paths(self, paths, *, collection: str = "default", progress=None, **how: object) -> IngestReport:
        report = IngestReport([], [], [], [], 0)
        for path in paths:
            try:
                report.passages += self.ingest_bytes(path.name, path.read_bytes(), collection=collection).passages
                report.added.append(str(path))
            except UnreadableFile as error:
                report.failed.append((error.name, error.reason))
        return report

    def collections(self) -> list[str]:
        return sorted({stored.document.collection for stored in self.texts.values()})

    def health(self) -> str | None:
        return self.trouble

    @contextmanager
    def serving(self) -> Iterator[None]:
        self.served += 1
        try:
            yield
        finally:
            self.served -= 1

    def notices(self) -> list[str]:
        return []

    def close(self) -> None:
        self.closed = True

    def _known(self, collection: str | None) -> None:
        if collection is not None and collection not in self.collections():
            raise UnknownCollection(collection, self.collections())


class FakeJobs:
    """Reads at once what the real ones read a moment later."""

    def __init__(self, library: FakeLibrary):
        self._library = library
        self._outcomes: dict[str, Future[Document]] = {}

    def start(self) -> None:
        pass

    def add_upload(self, name: str, data: bytes, into: Into, *, waited_for: bool = False) -> Job:
        job = Job(f"j{len(self._outcomes)}", "upload", name, into.collection, into.owner, "queued")
        outcome = self._outcomes[job.job_id] = Future()
        try:
            outcome.set_result(self._library.ingest_bytes(name, data, collection=into.collection))
        except UnreadableFile as error:
            outcome.set_exception(error)
        return job

    def outcome(self, job_id: str) -> Future[Document]:
        return self._outcomes[job_id]


class FakeBackend:
    """Says `reply`, piece by piece.  With `gate` set, stops before each piece until it is released;
    records prompts, aborts and what is still running."""

    def __init__(
        self,
        reply: Sequence[str] = ("Hello", " there."),
        *,
        continues_reply: bool = True,
        shares_documents: bool = False,
    ):
        self.reply = list(reply)
        self.capabilities = Capabilities(
            model="fake", continues_reply=continues_reply, counts_tokens=True, shares_documents=shares_documents
        )
        self.requests: list[GenerationRequest] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.error: Exception | None = None
        self.error_after: int | None = None
        self.ends: FinishReason = "stop"
        self.endless = False
        self.ready = Health(True)
        self.gate: asyncio.Event | None = None
        self.closed = False

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        self.requests.append(request)
        self.running.add(request.request_id)
        said = 0
        try:
            while True:
                for piece in self.reply:
                    if self.gate is not None:
                        await self.gate.wait()
                    await asyncio.sleep(0)
                    if self.error is not None and said == (self.error_after or 0):
                        raise self.error
                    if request.request_id not in self.running:
                        yield Finished("abort", Usage(10, said, 4))
                        return
                    said += 1
                    yield TextDelta(piece)
                if not self.endless:
                    break
            yield Finished(self.ends, Usage(10, said, 4), queued_seconds=0.001)
        finally:
            self.running.discard(request.request_id)

    def abort(self, request_id: str) -> None:
        if request_id in self.running:
            self.aborted.append(request_id)
            self.running.discard(request_id)
            if self.gate is not None:
                self.gate.set()

    async def count_tokens(self, prompt: Prompt) -> int:
        return sum(len(m.text.split()) for m in prompt.messages)

    async def health(self) -> Health:
        return self.ready

    def metrics(self) -> dict[str, float]:
        return {"kv_blocks_free": 7.0, "requests_total": float(len(self.requests))}

    async def close(self) -> None:
        self.closed = True
