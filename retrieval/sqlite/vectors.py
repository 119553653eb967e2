"""The nearest vectors: a FAISS index that is only a checked cache of what SQLite holds.

Vectors are kept as int8 in one scale that doesn't depend on them, so that what one document holds never moves where
another is found.  All that may be seen are compared; of very many only those of the nearest lists (IVF), unless few may
be seen.  Who searches takes more than they need and ranks them by the stored vectors.

On disk it is two files: the index as FAISS serialises it, and a manifest that says which state of which store it
mirrors and what its bytes must hash to.  Whatever doesn't fit (missing, damaged, stale, of another embedder) is None
here, and the owner rebuilds it from the stored vectors.  FAISS itself would load a file with flipped bits without a
word.
"""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path

import faiss
import msgspec
import numpy as np

from retrieval.files import write_atomically

log = logging.getLogger(__name__)

INDEX_FILE = "vectors.faiss"
MANIFEST_FILE = "vectors.json"

_PROBED = 1 / 32  # of the lists; `python -m loadtests.million` shows what recall it gives
_FEW = 1 / 16  # of all: where no more may be seen, all of them are compared
_LARGEST = 8.0  # in units of 1 / sqrt(dim), the usual size of a number in a vector; above it they are cut
_CODES = faiss.ScalarQuantizer.QT_8bit_direct_signed


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
    """Passage ids and their unit vectors.  The owner's lock keeps writers from searchers."""

    def __init__(self, dim: int):
        """An empty one that compares all vectors."""
        self.dim = dim
        self._index = faiss.IndexScalarQuantizer(dim, _CODES, faiss.METRIC_INNER_PRODUCT)
        self._ids = np.zeros(0, dtype=np.int64)  # by position; not used where there are lists

    @classmethod
    def in_lists(cls, dim: int, sample: np.ndarray, lists: int) -> VectorIndex:
        """An empty one whose lists are the clusters of `sample`, float32 [n, dim] of the vectors to come."""
        index = cls(dim)
        flat = faiss.IndexFlatIP(dim)
        index._index = faiss.IndexIVFScalarQuantizer(
            flat, dim, min(lists, len(sample)), _CODES, faiss.METRIC_INNER_PRODUCT, False
        )
        index._index.cp.spherical = True
        index._index.cp.min_points_per_centroid = 1
        index._index.train(index._scaled(sample))
        flat.this.disown()
        index._index.own_fields = True
        return index

    def __len__(self) -> int:
        return self._index.ntotal

    @property
    def lists(self) -> int:
        """How many; 0 where all vectors are compared."""
        return getattr(self._index, "nlist", 0)

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """`ids` int64 [n], `vectors` float32 [n, dim]."""
        if self.lists:
            self._index.add_with_ids(self._scaled(vectors), np.ascontiguousarray(ids, dtype=np.int64))
        elif len(ids):
            self._index.add(self._scaled(vectors))
            self._ids = np.concatenate((self._ids, ids))

    def remove(self, ids: np.ndarray) -> None:
        if not len(ids) or not len(self):
            return
        if self.lists:
            self._index.remove_ids(np.ascontiguousarray(ids, dtype=np.int64))
        else:
            gone = np.isin(self._ids, ids)
            self._index.remove_ids(faiss.IDSelectorBitmap(np.packbits(gone, bitorder="little")))
            self._ids = self._ids[~gone]

    def search(self, query: np.ndarray, k: int, among: np.ndarray | None = None) -> list[int]:
        """The ids of about the nearest, best first, at most `k`; `among` int64 [m] limits the search to those ids."""
        k = min(k, len(self) if among is None else len(among))
        if k <= 0:
            return []
        # Whole numbers as the codes are: FAISS cuts off what is behind the point.
        row = self._scaled(query.reshape(1, self.dim))
        faiss.omp_set_num_threads(1)  # of this thread: one question is no work for several, which only await each other
        _, found = self._index.search(row, k, params=self._parameters(among))
        found = found[0][found[0] >= 0]  # FAISS pads a short answer with -1
        return (found if self.lists else self._ids[found]).tolist()

    def numbers(self) -> np.ndarray:
        """The ids that are there: int64 [n]."""
        if not self.lists:
            return self._ids
        lists = self._index.invlists
        sizes = [(i, lists.list_size(i)) for i in range(lists.nlist)]
        parts = [faiss.rev_swig_ptr(lists.get_ids(i), size).copy() for i, size in sizes if size]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _parameters(self, among: np.ndarray | None) -> faiss.SearchParameters:
        selector, seen = None, 1.0
        if among is not None and len(among) < len(self):
            seen = len(among) / len(self)
            bits = np.zeros(int(max(among.max(), self._ids.max(initial=0))) + 1, dtype=bool)
            bits[among] = True
            bitmap = np.packbits(bits if self.lists else bits[self._ids], bitorder="little")
            selector = faiss.IDSelectorBitmap(bitmap)
        if not self.lists:
            return faiss.SearchParameters(sel=selector)
        share = 1.0 if seen <= _FEW else _PROBED / seen
        return faiss.SearchParametersIVF(sel=selector, nprobe=max(1, math.ceil(min(1.0, share) * self.lists)))

    def _scaled(self, vectors: np.ndarray) -> np.ndarray:
        scale = 127 * math.sqrt(self.dim) / _LARGEST
        return np.clip(np.rint(np.asarray(vectors, dtype=np.float32) * np.float32(scale)), -127, 127)

    def save(self, folder: Path, mirrored: Mirrored) -> None:
        """Write index and manifest; a crash between the two leaves a checksum that doesn't match."""
        data = faiss.serialize_index(self._index if self.lists else self._with_ids()).data
        manifest = Manifest(
            format=2, mirrored=mirrored, dim=self.dim, count=len(self), sha256=hashlib.sha256(data).hexdigest()
        )
        write_atomically(folder / INDEX_FILE, data)
        write_atomically(folder / MANIFEST_FILE, msgspec.json.encode(manifest))

    def _with_ids(self) -> faiss.IndexIDMap:
        named = faiss.IndexIDMap(faiss.IndexScalarQuantizer(self.dim, _CODES, faiss.METRIC_INNER_PRODUCT))
        named.index, named.ntotal = self._index, len(self)
        faiss.copy_array_to_vector(self._ids, named.id_map)
        return named

    @classmethod
    def load(cls, folder: Path, mirrored: Mirrored, dim: int, count: int) -> VectorIndex | None:
        """The saved index if it is intact and mirrors exactly this; else None, with the reason logged."""
        try:
            manifest = msgspec.json.decode((folder / MANIFEST_FILE).read_bytes(), type=Manifest)
            data = np.fromfile(folder / INDEX_FILE, dtype=np.uint8)
        except FileNotFoundError:
            log.info("no saved vector index; building it from the store")
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("the vector index can't be read (%s); rebuilding it from the store", error)
            return None
        if manifest.format != 2 or (manifest.mirrored, manifest.dim, manifest.count) != (mirrored, dim, count):
            log.info("the vector index is of another state of the store; rebuilding it from the store")
            return None
        if hashlib.sha256(data.data).hexdigest() != manifest.sha256:
            log.warning("the vector index is damaged (checksum); rebuilding it from the store")
            return None
        index = cls(dim)
        try:
            # From the very bytes that were checked, not from the file again.
            found = faiss.deserialize_index(data)
        except RuntimeError as error:
            log.warning("the vector index can't be decoded (%s); rebuilding it from the store", error)
            return None
        if isinstance(found, faiss.IndexIDMap):
            index._ids = faiss.vector_to_array(found.id_map)
            found.own_fields = False
            found = faiss.downcast_index(found.index)
            found.this.own()
        index._index = found
        return index
