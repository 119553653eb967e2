"""Documents in, passages out: parsing, splitting, embedding, storage, search, and the sentences that answer."""

from retrieval.access import ANYBODY, EVERYBODY, OPERATOR, Principal
from retrieval.embedding import Embedder, SentenceTransformerEmbedder
from retrieval.errors import (
    EmbedderMissing,
    JobConflict,
    NotAllowed,
    QueueFull,
    RetrievalError,
    StoreError,
    StoreInUse,
    UnknownCollection,
    UnknownDocument,
    UnknownJob,
    UnknownPassage,
    UnreadableFile,
)
from retrieval.files import write_atomically
from retrieval.library import Library
from retrieval.records import (
    Box,
    Document,
    DocumentText,
    IngestReport,
    Job,
    JobState,
    Passage,
    ProgressEvent,
    Quote,
    SearchResult,
    Support,
)
from retrieval.samples import SAMPLE_COLLECTION, sample_documents
from retrieval.search import Filters
from retrieval.sentences import sentences
from retrieval.settings import RetrievalSettings
from retrieval.view import View
from retrieval.watching import Watch

__all__ = [
    "ANYBODY",
    "EVERYBODY",
    "OPERATOR",
    "SAMPLE_COLLECTION",
    "Box",
    "Document",
    "DocumentText",
    "Embedder",
    "EmbedderMissing",
    "Filters",
    "IngestReport",
    "Job",
    "JobConflict",
    "JobState",
    "Library",
    "NotAllowed",
    "Passage",
    "Principal",
    "ProgressEvent",
    "QueueFull",
    "Quote",
    "RetrievalError",
    "RetrievalSettings",
    "SearchResult",
    "SentenceTransformerEmbedder",
    "StoreError",
    "StoreInUse",
    "Support",
    "UnknownCollection",
    "UnknownDocument",
    "UnknownJob",
    "UnknownPassage",
    "UnreadableFile",
    "View",
    "Watch",
    "sample_documents",
    "sentences",
    "write_atomically",
]
