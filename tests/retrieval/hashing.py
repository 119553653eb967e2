"""A small embedder for tests of everything around the model: hashed words, deterministic, no learning."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np


class HashingEmbedder:
    """Texts that share words are close.  `before_encode` lets a test stop or break an encoding."""

    def __init__(self, dim: int = 64, name: str = "hashing"):
        self.name = name
        self.dim = dim
        self.encoded = 0
        self.before_encode: Callable[[Sequence[str]], None] = lambda texts: None

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.before_encode(texts)
        self.encoded += len(texts)
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                hashed = zlib.crc32(f"{self.name} {word}".encode("utf-8", "replace"))
                vectors[row, hashed % self.dim] += 1.0 if hashed & 1024 else -1.0
            vectors[row, 0] += 0.01  # never the zero vector
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
