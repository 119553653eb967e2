"""What a library needs of the place where its documents are: a store that is the truth, and a finder over it.

SQLite with indexes in memory (`retrieval.sqlite`) is one place, PostgreSQL (`retrieval.postgres`) another.  Each keeps
these promises:

- A change takes effect at once and wholly, for every reader, when it is committed, and is durable then.
- Whatever is read is read as somebody; what they may not read isn't there, and shows in no score and no order.
- Ids of documents and passages are never used again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from retrieval.access import Principal
from retrieval.boxes import PageBoxes
from retrieval.embedding import Embedded, SharedEmbedder
from retrieval.job_store import Kept
from retrieval.records import Document, DocumentText, Job, JobState, Passage
from retrieval.search import Found, Question, StageTimer
from retrieval.stored import NewDocument, PassageRow, StoredVersion


class Change(Protocol):
    """One write, all of it or nothing.  Raises UnknownDocument for a document that isn't there."""

    def remove(self, document_id: str) -> None: ...

    def move(self, document_id: str, source: str, title: str) -> None:
        """The file of a document has another name now; its passages keep their ids."""

    def set_readers(self, document_id: str, readers: Sequence[str]) -> None:
        """From the commit on these may read it and nobody else."""


class Store(Protocol):
    """Documents, passages and embeddings.  All methods may be called from any thread and raise StoreError."""

    def counts(self) -> tuple[int, int]:
        """(documents, passages)"""

    def collections(self, principal: Principal) -> list[str]: ...

    def documents(
        self, principal: Principal, collection: str | None, offset: int, limit: int
    ) -> tuple[list[Document], int]:
        """A page by title, and how many there are."""

    def document(self, principal: Principal, document_id: str) -> DocumentText:
        """Raises UnknownDocument, also for one that the principal may not read."""

    def version(self, collection: str, source: str, owner: str) -> StoredVersion | None:
        """Which version of an owner's source is stored, if any."""

    def sources(self, collection: str, owner: str, path: str) -> set[str]:
        """Those of an owner's documents that are this path or lie below it."""

    def same_content(self, collection: str, owner: str, content_hash: str) -> list[Document]:
        """The documents of an owner with this very content."""

    def access_of(self, principal: Principal) -> list[int] | None:
        """Names for what lets this principal read, the same for all who may read the same; None for all."""

    def passages(self, principal: Principal, numbers: Sequence[int]) -> dict[int, PassageRow]:
        """The passages that are there and may be read, by number."""

    def around(self, principal: Principal, number: int, before: int, after: int) -> list[Passage]:
        """A passage with so many before and behind it in its document; none at all where it may not be read."""

    def boxes(self, principal: Principal, document_id: str, start: int, end: int) -> list[tuple[int, PageBoxes]]:
        """(page, its boxes) of those that have a part of the text.  Raises UnknownDocument as `document` does."""

    def vectors_of(self, numbers: Sequence[int]) -> dict[int, np.ndarray]:
        """float32 [dim] by passage, of the embeddings that serve."""

    def close(self) -> None: ...


class Finder(Protocol):
    """Finds passages, and lets them change."""

    @property
    def embedder(self) -> SharedEmbedder | None:
        """The model whose vectors serve; None while nothing is embedded, or nothing that a model at hand could be
        compared with: words alone serve then."""

    @property
    def writing(self) -> SharedEmbedder:
        """The model that embeds what is added."""

    def find(self, principal: Principal, question: Question, count: int, timer: StageTimer) -> dict[int, Found]:
        """What is close by meaning or by words, `count` of each, of what the principal may read, by number."""

    def put(self, documents: Sequence[tuple[NewDocument, Sequence[Embedded]]], embedder: SharedEmbedder) -> bool:
        """Add documents, each with its passages embedded, or replace those of the same collection, source and owner.
        Nothing and False where `embedder` is no longer the one that is `writing`."""

    def change(self) -> AbstractContextManager[Change]:
        """A change that is committed at the end of the block, and undone where that raises."""

    def save(self) -> None:
        """Keep what would take long to make again."""

    def settle(self) -> None:
        """Wait until nothing is being made anew: vectors of another model, an index for more passages."""

    def close(self) -> None:
        """What is being made goes on when the library is opened again."""


class JobStore(Protocol):
    """The queue of documents to be read, a row each (`jobs.Jobs`)."""

    def add(self, kept: Kept, readers: Sequence[str]) -> None:
        """Durable when it returns.  `readers` may read what comes of it."""

    def take(self, kinds: Collection[str], now: float) -> Kept | None:
        """The next one of these kinds that is due, which nobody else takes from here on."""

    def next_due(self, kinds: Collection[str]) -> float | None:
        """When to look for the next one, in seconds since 1970; None: when one is added."""

    def change(self, job_id: str, among: Collection[JobState], **fields: Any) -> bool:
        """Set fields of a job whose state is `among` these; whether it was."""

    def cancel_elsewhere(self, job_id: str) -> bool:
        """Cancel a job that another server reads; whether it is one."""

    def recover(self, most_attempts: int) -> None:
        """What was being read by a process that is gone is queued again, but what was so often has failed."""

    def prune(self, most: int, before: str) -> list[str]:
        """Forget those that ended before that moment, and all but the newest of those that ended; which."""

    def job(self, principal: Principal, job_id: str) -> Kept | None: ...

    def jobs(
        self, principal: Principal, states: Collection[JobState], offset: int, limit: int
    ) -> tuple[list[Job], int]: ...

    def of_source(self, collection: str, source: str, owner: str) -> list[Job]: ...

    def counts(self) -> dict[str, int]: ...

    def with_bytes(self) -> list[tuple[str, JobState, int]]:
        """(job id, state, bytes) of those for which bytes are kept, the oldest first."""


class Incoming(Protocol):
    """What was sent and is not read yet, by job."""

    def keep(self, job_id: str, data: bytes) -> None:
        """Durable when it returns.  Raises QueueFull, StoreError."""

    def read(self, job_id: str) -> bytes:
        """Raises OSError where it is not there."""

    def discard(self, job_id: str) -> None: ...

    def clean(self) -> None:
        """Away with what no job knows of."""
