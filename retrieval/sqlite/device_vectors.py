"""Vectors on a GPU: all that may be seen are compared, in one product, however many there are.

It takes 2 bytes a number of the device's memory, which the engine's cache then lacks, so it is asked for by
`[retrieval] vectors_on = "cuda"` and never chosen by itself.  It is made of the stored vectors at each start.
(FAISS's GPU indexes can't be told which vectors may be seen; a masked product can.)
"""

from __future__ import annotations

import numpy as np
import torch

from retrieval.errors import StoreError


class DeviceVectors:
    """The face of `vectors.VectorIndex`.  The owner's lock keeps writers from searchers."""

    lists = 0

    def __init__(self, dim: int, device: str):
        """An empty one.  Raises StoreError (bad_device) where the device isn't there."""
        self.dim = dim
        try:
            self._vectors = torch.empty((0, dim), dtype=torch.float16, device=device)
        except (RuntimeError, AssertionError) as error:
            raise StoreError(
                f"vectors can't be kept on {device!r}: {error}; set [retrieval] vectors_on to a device that is there, "
                "or to cpu",
                code="bad_device",
            ) from error
        self._ids = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """`ids` int64 [n], `vectors` float32 [n, dim]."""
        size = len(self)
        if size + len(ids) > len(self._vectors):
            grown = self._vectors.new_empty((max(size + len(ids), 2 * size), self.dim))
            grown[:size] = self._vectors[:size]
            self._vectors = grown
        self._vectors[size : size + len(ids)] = torch.tensor(np.asarray(vectors), device=self._vectors.device)
        self._ids = np.concatenate((self._ids, ids))

    def remove(self, ids: np.ndarray) -> None:
        kept = np.flatnonzero(~np.isin(self._ids, ids))
        if len(kept) < len(self):
            self._vectors = self._vectors[torch.tensor(kept, device=self._vectors.device)]
            self._ids = self._ids[kept]

    def search(self, query: np.ndarray, k: int, among: np.ndarray | None = None) -> list[int]:
        """The ids of the nearest, best first, at most `k`; `among` int64 [m] limits the search to those ids."""
        k = min(k, len(self) if among is None else len(among))
        if k <= 0:
            return []
        vectors, device = self._vectors[: len(self)], self._vectors.device
        scores = (vectors @ torch.tensor(query, dtype=vectors.dtype, device=device)).float()
        if among is not None and len(among) < len(self):
            hidden = torch.tensor(~np.isin(self._ids, among), device=device)
            scores.masked_fill_(hidden, -torch.inf)
        best, found = torch.topk(scores, k)
        return self._ids[found[best > -torch.inf].cpu().numpy()].tolist()

    def numbers(self) -> np.ndarray:
        """The ids that are there: int64 [n]."""
        return self._ids
