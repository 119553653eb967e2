"""Documents in, passages out: parsing, splitting, embedding, storage, search, and the sentences that answer."""

from retrieval.access import ANYBODY, EVERYBODY, OPERATOR, Principal
from retrieval.embedding import Embedder, SentenceTransformerEmbedder
from retrieval.errors import (
    EmbedderMissing,
    NotAllowed,
    RetrievalError,
    StoreError,
    StoreInUse,
    UnknownCollection,
    UnknownDocument,
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
    "Library",
    "NotAllowed",
    "Passage",
    "Principal",
    "ProgressEvent",
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
    "UnknownPassage",
    "UnreadableFile",
    "View",
    "sample_documents",
    "sentences",
    "write_atomically",
]
