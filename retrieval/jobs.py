"""The queue of documents to be read: each is a job that is told of, cancelled, tried again, and survives a crash.

    queued ──▶ parsing ──▶ embedding ──▶ done
      ▲  │        │            │
      │  └────────┴────────────┴───────▶ cancelled, failed
      └── after a crash; by itself where it may pass next time; by hand

One document is read at a time; addresses are fetched beside that, since other people's servers may be slow.  What is
stored is stored in one write at the end, so what is cancelled or fails leaves no trace, and an older version serves
until then.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from retrieval import ingest
from retrieval.access import OPERATOR, Principal
from retrieval.contracts import Incoming, JobStore, Store
from retrieval.errors import (
    JobConflict,
    RetrievalError,
    StoreError,
    UnknownCollection,
    UnknownJob,
    UnreadableFile,
)
from retrieval.fetching import fetch
from retrieval.ingest import Into
from retrieval.job_store import ENDED, FOUND, RUNNING, SENT, WAITED_FOR, Kept, moment
from retrieval.records import Document, Job, JobState, ProgressEvent
from retrieval.settings import RetrievalSettings

log = logging.getLogger(__name__)

ATTEMPTS = 3
BACKOFF_SECONDS = (10.0, 60.0)  # before the second attempt, and the third
KEPT, KEPT_DAYS = 1000, 30  # jobs that have ended
PROGRESS_SECONDS = 0.5  # between two that are written down
TROUBLE_SECONDS = 5.0  # until what can't be written is tried again

# What may have passed when it is tried again: a server or a disk in trouble, a file that was being written.
MAY_PASS = frozenset(
    ("url_failed", "parser_crashed", "file_changing", "unwritable_store", "unreachable_store", "busy_store")
)

Read = Callable[[ingest.Candidate, Into, ingest.Progress], tuple[Document, list[str]]]


class _Interrupted(BaseException):
    """No fault of the file, which no reader may take it for."""


class _Progress:
    """Writes down how far a job is, now and then, and ends it where it shall go no further."""

    def __init__(self, store: JobStore, job_id: str, interrupted: Callable[[], bool]):
        self.counts: dict[str, int] = {}
        self._store = store
        self._job_id = job_id
        self._interrupted = interrupted
        self._state: str = "parsing"
        self._written = time.monotonic()

    def __call__(self, event: ProgressEvent) -> None:
        if event.state not in RUNNING:
            return  # it is stored, or never will be
        if self._interrupted():
            raise _Interrupted
        if event.parts:
            names = ("parts_read", "parts") if event.state == "parsing" else ("passages_embedded", "passages")
            self.counts |= zip(names, (event.part, event.parts), strict=True)
        now = time.monotonic()
        if event.state != self._state or now - self._written >= PROGRESS_SECONDS:
            self._state, self._written = event.state, now
            if not self._store.change(self._job_id, RUNNING, state=event.state, **self.counts):
                raise _Interrupted  # it was cancelled by another server


class Jobs:
    """`read` makes a document of a candidate and tells what of it gave no text.  Nothing is read before `start`."""

    def __init__(
        self,
        store: JobStore,
        documents: Store,
        incoming: Incoming,
        settings: RetrievalSettings,
        read: Read,
        clock: Callable[[], float] = time.time,
    ):
        """`incoming` keeps uploads until they are read; `clock` in seconds since 1970."""
        self._store = store
        self._documents = documents
        self._incoming = incoming
        self._settings = settings
        self._read = read
        self._clock = clock
        self._adding = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._wake = (threading.Event(), threading.Event())
        self._stopping = threading.Event()
        self._cancelled: set[str] = set()
        self._outcomes: dict[str, Future[Document]] = {}

    # jobs in; all raise UnknownCollection for one without a name, ValueError for what is no reader or no tag

    def add_upload(self, name: str, data: bytes, into: Into, *, waited_for: bool = False) -> Job:
        """A file that somebody sends.  It is on the disk when this returns.  Raises UnreadableFile where it is too
        large, QueueFull where there is no room for it."""
        name = ingest.printable(name) or "unnamed"
        ingest.checked_size(name, data, self._settings.max_file_bytes)
        kept = self._new("upload", name, into, WAITED_FOR if waited_for else SENT, len(data))
        with self._adding:
            self._incoming.keep(kept.job.job_id, data)
            return self._add(kept)

    def add_url(self, url: str, into: Into, *, waited_for: bool = False) -> Job:
        """What is at an address of the public internet (`retrieval.fetching`)."""
        return self._add(self._new("url", ingest.printable(url), into, WAITED_FOR if waited_for else SENT))

    def add_file(self, path: Path, into: Into) -> Job:
        """A file of a folder; it is not queued twice."""
        kept = self._new("file", ingest.printable(str(path)), into, FOUND)
        with self._adding:
            for job in self._of(into, kept.job.source):
                if job.state == "queued":
                    return job
            return self._add(kept)

    def drop(self, source: str, into: Into) -> None:
        """A file is gone: its jobs that have not ended are cancelled."""
        for job in self._of(into, source):
            if job.state not in ENDED:
                self._cancel(job.job_id)

    # told, to whom they belong, and to stewards those of documents that they may read

    def jobs(
        self, principal: Principal, states: Collection[JobState] = (), *, offset: int = 0, limit: int = 50
    ) -> tuple[list[Job], int]:
        """A page of jobs, newest first, and how many there are."""
        return self._store.jobs(principal, states, max(0, offset), max(0, limit))

    def job(self, principal: Principal, job_id: str) -> Job:
        """Raises UnknownJob, also where it isn't theirs to see."""
        return self._kept(principal, job_id).job

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        return self._store.counts()

    def outcome(self, job_id: str) -> Future[Document]:
        """The document once it is there, or what a direct way in would raise; JobConflict where it was cancelled."""
        outcome = self._outcomes.setdefault(job_id, Future())
        if self.job(OPERATOR, job_id).state in ENDED:  # before it was looked for
            self._deliver(job_id)
        return outcome

    # changed, by whoever may see them

    def cancel(self, principal: Principal, job_id: str) -> Job:
        """It ends at its next page or batch; what is stored already stays.  Raises UnknownJob, JobConflict."""
        self.job(principal, job_id)
        if not self._cancel(job_id):
            job = self.job(principal, job_id)
            raise JobConflict(f"the job {job_id!r} has ended already, it is {job.state}")
        return self.job(principal, job_id)

    def retry(self, principal: Principal, job_id: str) -> Job:
        """One that failed or was cancelled is queued again.  Raises UnknownJob, JobConflict."""
        kept = self._kept(principal, job_id)
        job = kept.job
        if job.kind == "upload" and job.state in ("failed", "cancelled"):
            if not kept.size:
                raise JobConflict(f"the file {job.source!r} of the job {job_id!r} is no longer kept: send it again")
            if self._of(kept.into, job.source)[-1].job_id != job_id:
                raise JobConflict(f"{job.source!r} has been sent again since: see the job of that")
        if not self._store.change(job_id, ("failed", "cancelled"), **_AFRESH, **_NO_FAULT):
            raise JobConflict(f"the job {job_id!r} has neither failed nor been cancelled, it is {job.state}")
        self._wake_up()
        return self.job(principal, job_id)

    # work

    def start(self) -> None:
        """Begin to read, where the last process left off.  May be called again."""
        with self._adding:
            if self._threads or self._stopping.is_set():
                return
            self._store.recover(ATTEMPTS)
            self._incoming.clean()
            self._prune()
            for kinds, wake in zip((("upload", "file"), ("url",)), self._wake, strict=True):
                thread = threading.Thread(target=self._work, args=(kinds, wake), name=f"jobs-{kinds[0]}", daemon=False)
                self._threads.append(thread)
                thread.start()

    def stop(self, interrupt: Callable[[], None] = lambda: None) -> None:
        """End the work at the next page or batch, what is being parsed by `interrupt`; it is queued again."""
        with self._adding:  # not within a start
            self._stopping.set()
        interrupt()
        self._wake_up()
        for thread in self._threads:
            thread.join()
        for job_id in list(self._outcomes):
            self._deliver(job_id, StoreError("the library has been closed: open it again", code="closed_store"))

    def _work(self, kinds: tuple[str, ...], wake: threading.Event) -> None:
        while True:
            wake.clear()
            if self._stopping.is_set():
                return
            try:
                kept = self._store.take(kinds, self._clock())
                if kept is not None:
                    self._run(kept)
                    continue
                self._deliver_ended()
                due = self._store.next_due(kinds)
            except Exception:  # the queue goes on, whatever it was
                log.exception("the queue of jobs is in trouble")
                self._stopping.wait(TROUBLE_SECONDS)
                continue
            wake.wait(None if due is None else max(0.01, due - self._clock()))

    def _run(self, kept: Kept) -> None:
        job = kept.job
        progress = _Progress(self._store, job.job_id, partial(self._interrupted, job.job_id))
        try:
            document, unread = self._read(self._candidate(job), kept.into, progress)
        except (_Interrupted, Exception) as error:
            self._run_failed(kept, error)
        else:
            done = {"state": "done", "document_id": document.document_id, "unread": unread, "size": 0}
            self._settle(job.job_id, **progress.counts, **done, **_NO_FAULT)
        finally:
            self._cancelled.discard(job.job_id)

    def _run_failed(self, kept: Kept, error: BaseException) -> None:
        job = kept.job
        if self._stopping.is_set():
            self._settle(job.job_id, **_AFRESH, attempts=job.attempts - 1)
        elif isinstance(error, _Interrupted):
            self._settle(job.job_id, state="cancelled", size=0)
        elif isinstance(error, UnreadableFile) and error.code == "file_gone":
            self._settle(job.job_id, state="cancelled", code=error.code, reason=error.reason)
        else:
            code, reason = _told(job, error)
            # Who waits is told at once.
            if code in MAY_PASS and job.attempts < ATTEMPTS and kept.urgency != WAITED_FOR:
                due = self._clock() + BACKOFF_SECONDS[job.attempts - 1]
                self._settle(job.job_id, **_AFRESH | {"due": due}, code=code, reason=reason)
            else:
                self._settle(job.job_id, error, state="failed", code=code, reason=reason)

    def _interrupted(self, job_id: str) -> bool:
        return self._stopping.is_set() or job_id in self._cancelled

    def _candidate(self, job: Job) -> ingest.Candidate:
        most = self._settings.max_file_bytes
        match job.kind:
            case "upload":
                try:
                    data = self._incoming.read(job.job_id)
                except OSError as error:
                    reason = "what was sent is no longer here: send it again"
                    raise UnreadableFile(job.source, reason, "upload_lost") from error
                return ingest.bytes_candidate(job.source, data, most)
            case "url":
                return ingest.url_candidate(job.source, fetch(job.source, most, self._settings.fetch_seconds))
            case "file":
                return ingest.file_candidate(ingest.path_of(job.source), most)

    def _settle(self, job_id: str, error: BaseException | None = None, **fields: object) -> None:
        """Write down how a run ended, however long that takes: a disk may be full."""
        while True:
            try:
                self._store.change(job_id, RUNNING, **fields)
                break
            except RetrievalError as trouble:
                log.error("the state of the job %s can't be written: %s", job_id, trouble)
                if self._stopping.wait(TROUBLE_SECONDS):
                    return
        if fields.get("size") == 0:
            self._incoming.discard(job_id)
        if fields["state"] in ENDED:
            self._deliver(job_id, error)
            self._prune()

    def _cancel(self, job_id: str) -> bool:
        """Whether it had not ended."""
        self._cancelled.add(job_id)  # first, so that a run that begins now sees it
        queued = self._store.change(job_id, ("queued",), state="cancelled", size=0)
        if queued or self._store.cancel_elsewhere(job_id):
            self._cancelled.discard(job_id)
            self._incoming.discard(job_id)
            self._deliver(job_id)
            return True
        if self.job(OPERATOR, job_id).state in ENDED:
            self._cancelled.discard(job_id)
            return False
        return True

    def _deliver_ended(self) -> None:
        """Those that another server has cancelled."""
        for job_id in list(self._outcomes):
            if self.job(OPERATOR, job_id).state in ENDED:
                self._deliver(job_id)

    def _deliver(self, job_id: str, error: BaseException | None = None) -> None:
        """Tell whoever waits for it how it ended."""
        outcome = self._outcomes.pop(job_id, None)
        if outcome is None or not outcome.set_running_or_notify_cancel():
            return
        try:
            job = self.job(OPERATOR, job_id)
            if error is None and job.state == "done":
                outcome.set_result(self._documents.document(OPERATOR, job.document_id or "").document)
                return
            if error is None and job.state == "cancelled":
                error = JobConflict(f"{job.source}: its job was cancelled")
            outcome.set_exception(error or UnreadableFile(job.source, job.reason or "", job.code or ""))
        except RetrievalError as trouble:
            outcome.set_exception(error or trouble)

    # inside

    def _new(self, kind: str, source: str, into: Into, urgency: int, size: int = 0) -> Kept:
        if not into.collection.strip():
            raise UnknownCollection(into.collection)
        into.check()
        now = moment()
        job = Job(
            secrets.token_hex(8), kind, source, into.collection, into.owner, "queued", created_at=now, updated_at=now
        )
        return Kept(job, into, urgency, size)

    def _add(self, kept: Kept) -> Job:
        stored = self._documents.version(kept.into.collection, kept.job.source, kept.into.owner)
        self._store.add(kept, kept.into.readers_after(stored))
        self._wake_up()
        return kept.job

    def _kept(self, principal: Principal, job_id: str) -> Kept:
        kept = self._store.job(principal, job_id)
        if kept is None:
            raise UnknownJob(job_id)
        return kept

    def _of(self, into: Into, source: str) -> list[Job]:
        return self._store.of_source(into.collection, source, into.owner)

    def _wake_up(self) -> None:
        for wake in self._wake:
            wake.set()

    def _prune(self) -> None:
        before = datetime.now(UTC) - timedelta(days=KEPT_DAYS)
        for job_id in self._store.prune(KEPT, before.isoformat(timespec="seconds")):
            self._incoming.discard(job_id)


_AFRESH = {"state": "queued", "due": 0.0, "parts_read": 0, "passages_embedded": 0}
_NO_FAULT = {"reason": None, "code": None}


def _told(job: Job, error: BaseException) -> tuple[str, str]:
    """(code, reason) for whoever asks; what went wrong inside is for the log."""
    if isinstance(error, UnreadableFile):
        return error.code, error.reason
    log.error("the job %s of %s failed", job.job_id, job.source, exc_info=error)
    if isinstance(error, RetrievalError):
        return error.code, "the library or its embedding model failed: the log of the server says how"
    return "internal_error", "something went wrong on our side: the log of the server says what"
