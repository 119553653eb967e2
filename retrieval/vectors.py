"""The nearest vectors: a FAISS index that is only a checked cache of what SQLite holds.

On disk it is two files: the index as FAISS serialises it, and a manifest that says which state of which
store it mirrors and what its bytes must hash to.  Whatever doesn't fit (missing, damaged, stale, of another
embedder) is None here, and the owner rebuilds it from the stored vectors.  FAISS itself would load a file
with flipped bits without a word.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import faiss
import msgspec
import numpy as np

from retrieval.files import write_atomically

log = logging.getLogger(__name__)

INDEX_FILE = "vectors.faiss"
MANIFEST_FILE = "vectors.json"


class Mirrored(msgspec.Struct, frozen=True):
    """What an index mirrors: the store, its state (a token drawn anew by each write), and the embedder."""

    store: str
    state: str
    embedder: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    mirrored: Mirrored
    dim: int
    count: int
    sha256: str


class VectorIndex:
    """Passage ids and their unit vectors; exact inner product.  The owner's lock keeps writers from searchers."""

    def __init__(self, dim: int):
        self.dim = dim
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(dim))

    def __len__(self) -> int:
        return self._index.ntotal

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """`ids` int64 [n], `vectors` float32 [n, dim]."""
        if len(ids):
            self._index.add_with_ids(
                np.ascontiguousarray(vectors, dtype=np.float32), np.ascontiguousarray(ids, dtype=np.int64)
            )

    def remove(self, ids: np.ndarray) -> None:
        if len(ids) and len(self):
            self._index.remove_ids(np.ascontiguousarray(ids, dtype=np.int64))

    def search(self, query: np.ndarray, k: int, among: np.ndarray | None = None) -> list[tuple[int, float]]:
        """(passage id, cosine), best first, at most `k`; `among` int64 [m] limits the search to those ids."""
        k = min(k, len(self) if among is None else len(among))
        if k <= 0:
            return []
        parameters = None
        if among is not None and len(among) < len(self):
            bits = np.zeros(int(among.max()) + 1, dtype=np.uint8)
            bits[among] = 1
            bitmap = np.packbits(bits, bitorder="little")
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bitmap))
        row = np.ascontiguousarray(query.reshape(1, self.dim), dtype=np.float32)
        scores, ids = self._index.search(row, k, params=parameters)
        # FAISS pads a short answer with id -1.
        return [(int(i), float(s)) for i, s in zip(ids[0], scores[0], strict=True) if i >= 0]

    def vectors_of(self, ids: Sequence[int]) -> dict[int, np.ndarray]:
        """float32 [dim] by id, for those that are there."""
        found = {}
        for number in ids:
            try:
                found[number] = self._index.reconstruct(number)
            except RuntimeError:  # FAISS's word for "no such id"
                continue
        return found

    def numbers(self) -> np.ndarray:
        """The ids that are there: int64 [n]."""
        return faiss.vector_to_array(self._index.id_map)

    def save(self, folder: Path, mirrored: Mirrored) -> None:
        """Write index and manifest; a crash between the two leaves a checksum that doesn't match."""
        data = faiss.serialize_index(self._index).tobytes()
        manifest = Manifest(
            format=1, mirrored=mirrored, dim=self.dim, count=len(self), sha256=hashlib.sha256(data).hexdigest()
        )
        write_atomically(folder / INDEX_FILE, data)
        write_atomically(folder / MANIFEST_FILE, msgspec.json.encode(manifest))

    @classmethod
    def load(cls, folder: Path, mirrored: Mirrored, dim: int, count: int) -> VectorIndex | None:
        """The saved index if it is intact and mirrors exactly this; else None, with the reason logged."""
        try:
            manifest = msgspec.json.decode((folder / MANIFEST_FILE).read_bytes(), type=Manifest)
            data = (folder / INDEX_FILE).read_bytes()
        except FileNotFoundError:
            log.info("no saved vector index; building it from the store")
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("the vector index can't be read (%s); rebuilding it from the store", error)
            return None
        if manifest.format != 1 or (manifest.mirrored, manifest.dim, manifest.count) != (mirrored, dim, count):
            log.info("the vector index is of another state of the store; rebuilding it from the store")
            return None
        if hashlib.sha256(data).hexdigest() != manifest.sha256:
            log.warning("the vector index is damaged (checksum); rebuilding it from the store")
            return None
        index = cls(dim)
        try:
            # From the very bytes that were checked, not from the file again.
            index._index = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
        except RuntimeError as error:
            log.warning("the vector index can't be decoded (%s); rebuilding it from the store", error)
            return None
        return index
