"""What can go wrong between a document and its passages.

    RetrievalError
    ├── UnknownCollection     no document was ever put under that name, or it is no name
    ├── UnknownDocument       never added, or removed since
    │   └── UnknownPassage    its document was removed or replaced since
    ├── NotAllowed            it may be read by whoever asks, but not changed
    ├── UnknownJob            never queued, forgotten since, or somebody else's
    ├── JobConflict           the job is in no state for that
    ├── QueueFull             too much waits to be read
    ├── UnreadableFile        this one file can't become a document; the rest can
    ├── StoreInUse            another process holds the data directory
    ├── StoreError            the store is damaged, closed, full, or newer than this program
    └── EmbedderMissing       the embedding model can't be found or loaded

Each class has a stable `code` for the wire and a message that tells the reader what to do.
"""

from __future__ import annotations

from pathlib import Path


class RetrievalError(Exception):
    code = "retrieval_error"


class UnknownCollection(RetrievalError):
    code = "unknown_collection"

    def __init__(self, name: str, known: list[str] | None = None):
        self.name = name
        if not name.strip():
            super().__init__(f"{name!r} is no name of a collection: give it one")
            return
        known_text = f"; there is {', '.join(known)}" if known else "; no document has been added yet"
        super().__init__(f"there is no collection named {name!r}{known_text}")


class UnknownDocument(RetrievalError):
    code = "unknown_document"

    def __init__(self, document_id: str):
        self.document_id = document_id
        super().__init__(f"there is no document {document_id!r}: it was never added, or it has been removed")


class UnknownPassage(UnknownDocument):
    code = "unknown_passage"

    def __init__(self, passage_id: str):
        RetrievalError.__init__(
            self, f"there is no passage {passage_id!r}: its document has been removed or replaced; search again"
        )
        self.document_id = ""
        self.passage_id = passage_id


class NotAllowed(RetrievalError):
    code = "not_allowed"

    def __init__(self, document_id: str):
        super().__init__(f"the document {document_id!r} belongs to somebody else: ask its owner or an administrator")


class UnknownJob(RetrievalError):
    code = "unknown_job"

    def __init__(self, job_id: str):
        super().__init__(f"there is no job {job_id!r}: it was never queued, or it ended long ago")


class JobConflict(RetrievalError):
    code = "job_conflict"


class QueueFull(RetrievalError):
    code = "queue_full"

    def __init__(self, most_mb: int):
        super().__init__(f"the files that wait to be read take {most_mb} MiB already: send this one later")


class UnreadableFile(RetrievalError):
    """`name` is the file as the user knows it, `reason` a phrase for a person.  `code` tells which: unreadable_file,
    no_text, too_large_expanded, parse_timeout, parse_memory, parser_crashed, file_changing, file_gone; of addresses
    url_forbidden, url_failed (it may pass), url_refused, too_large; upload_lost."""

    def __init__(self, name: str, reason: str, code: str = "unreadable_file"):
        self.name = name
        self.reason = reason
        self.code = code
        super().__init__(f"{name}: {reason}")


class StoreInUse(RetrievalError):
    code = "store_in_use"

    def __init__(self, data_dir: Path):
        self.data_dir = data_dir
        super().__init__(
            f"the data directory {data_dir} is in use by another refdesk process: stop that one, "
            "use it over HTTP (ask and documents take --url; its page and POST /v1/documents add files), "
            "or choose another directory"
        )


MEND = "mend it by `refdesk check --repair`, restore it from a backup, or move it away and ingest again"


class StoreError(RetrievalError):
    """`code` tells which: damaged_store, newer_store, closed_store, unwritable_store, unreachable_store, busy_store,
    bad_database, bad_embedder."""

    code = "damaged_store"

    def __init__(self, message: str, code: str = "damaged_store"):
        self.code = code
        super().__init__(message)


class EmbedderMissing(RetrievalError):
    code = "embedder_missing"
