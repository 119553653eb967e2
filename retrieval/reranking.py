"""A second look at the best passages by a model that reads question and passage together: a cross-encoder in a folder,
or a server's `/rerank`.

It is optional: no answer waits for it in vain.  Where it fails or takes too long, the order stays as it was.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx
import msgspec

from retrieval.errors import EmbedderMissing
from retrieval.records import Passage
from retrieval.settings import RetrievalSettings

log = logging.getLogger(__name__)


class Reranker(Protocol):
    """`scores` gives one for each text, higher for a better answer; any scale will do.  May raise."""

    def scores(self, query: str, texts: Sequence[str]) -> list[float]: ...

    def close(self) -> None: ...


class CrossEncoderReranker:
    """A sentence-transformers cross-encoder, loaded at first use."""

    def __init__(self, model: str, threads: int | None = None):
        """`model`: a folder, or a Hugging Face id.  Raises EmbedderMissing for a folder that isn't there."""
        folder = Path(model).expanduser()
        if (folder.is_absolute() or model.startswith((".", "~"))) and not folder.is_dir():
            raise EmbedderMissing(f"there is no reranking model at {model}: set the reranker to a folder that exists")
        self._location = str(folder) if folder.is_dir() else model
        self._threads = threads
        self._model: Any = None
        self._turn = threading.Lock()  # a tokenizer is for one thread at a time

    def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        with self._turn:
            if self._threads is not None:
                import torch

                torch.set_num_threads(self._threads)
            if self._model is None:
                from sentence_transformers import CrossEncoder
                from transformers.utils import logging as transformers_logging

                transformers_logging.disable_progress_bar()
                local = Path(self._location).is_dir()
                self._model = CrossEncoder(self._location, device="cpu", local_files_only=local)
            pairs = [(query, text) for text in texts]
            return self._model.predict(pairs, show_progress_bar=False).tolist()

    def close(self) -> None:
        self._model = None


class _Result(msgspec.Struct):
    index: int
    relevance_score: float | None = None
    score: float | None = None


class _Results(msgspec.Struct):
    results: list[_Result]


class HttpReranker:
    """A server's `/rerank`: as Cohere, Jina, vLLM and Infinity have it (`documents` in, `results` out), or as Hugging
    Face's text-embeddings-inference (`texts` in, a list out), which is found out at the first request."""

    def __init__(self, url: str, model: str = "", seconds: float = 2.0, key: str = ""):
        self._url = url
        self._model = model
        self._field = "documents"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(timeout=seconds, headers=headers, trust_env=False)

    def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        response = self._asked(query, texts)
        if response.status_code in (400, 422):
            self._field = "texts" if self._field == "documents" else "documents"
            response = self._asked(query, texts)
        response.raise_for_status()
        data = response.content
        results = (
            msgspec.json.decode(data, type=list[_Result])
            if data.lstrip()[:1] == b"["
            else msgspec.json.decode(data, type=_Results).results
        )
        scores = [float("nan")] * len(texts)
        for each in results:
            value = each.relevance_score if each.relevance_score is not None else each.score
            if value is None or not 0 <= each.index < len(texts):
                raise ValueError(f"a result without a score, or of a text that was not sent: {each}")
            scores[each.index] = value
        if any(map(math.isnan, scores)):
            raise ValueError(f"{len(results)} results for {len(texts)} texts")
        return scores

    def close(self) -> None:
        self._client.close()

    def _asked(self, query: str, texts: Sequence[str]) -> httpx.Response:
        body: dict[str, Any] = {"query": query, self._field: list(texts)}
        if self._model and self._field == "documents":
            body["model"] = self._model
        return self._client.post(self._url, json=body)


def open_reranker(settings: RetrievalSettings) -> Reranker | None:
    """What the settings name: an address, or a cross-encoder; None for nothing.  Raises EmbedderMissing."""
    named = settings.reranker
    if not named:
        return None
    if named.startswith(("http://", "https://")):
        return HttpReranker(named, settings.reranker_model, settings.rerank_seconds, settings.reranker_key)
    return CrossEncoderReranker(named, settings.threads)


def reranked(reranker: Reranker, query: str, passages: Sequence[tuple[int, Passage]]) -> list[tuple[int, float]] | None:
    """(number, score in 0..1) of the passages, best first; None where the reranker gives no scores."""
    texts = [f"{each.title}\n{each.text}" if each.title else each.text for _, each in passages]
    try:
        scores = reranker.scores(query, texts)
        if len(scores) != len(texts) or not all(map(math.isfinite, scores)):
            raise ValueError(f"{len(scores)} scores for {len(texts)} passages, or some that are no numbers")
    except Exception as error:
        log.warning("passages stay in their order, the reranker failed: %s: %s", type(error).__name__, error)
        return None
    if any(not 0 <= score <= 1 for score in scores):
        scores = [1 / (1 + math.exp(-max(-50.0, min(50.0, score)))) for score in scores]
    found = [(number, score) for (number, _), score in zip(passages, scores, strict=True)]
    return sorted(found, key=lambda each: (-each[1], each[0]))
