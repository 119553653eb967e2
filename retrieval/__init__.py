"""Documents in, passages out: parsing, splitting, embedding, storage, search, and the sentences that answer."""

from retrieval.embedding import Embedder, SentenceTransformerEmbedder
from retrieval.errors import (
    EmbedderMissing,
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
from retrieval.sentences import sentences
from retrieval.settings import RetrievalSettings

__all__ = [
    "SAMPLE_COLLECTION",
    "Document",
    "DocumentText",
    "Embedder",
    "EmbedderMissing",
    "IngestReport",
    "Library",
    "Passage",
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
    "sample_documents",
    "sentences",
    "write_atomically",
]
