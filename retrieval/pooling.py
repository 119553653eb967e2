"""Vectors of a passage's sentences, from the very pass of the model that embeds the passage.

A sentence's vector is the mean of its tokens' outputs, which have seen the whole passage ("late chunking", Günther et
al. 2024, arXiv 2409.04701), so it costs no second pass and "it" in a sentence still means what the passage says.  A
passage answers by one of its sentences more often than by all of them: the best one's cosine counts in ranking.

They are kept as int8, each in a scale of its own; a cosine doesn't ask for the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from retrieval.sentences import Span, sentences

_MOST = 32  # sentences of a passage; of more (a table's rows, lines of code), neighbours are put together


class PassageText(NamedTuple):
    """What is embedded for a passage, and where in it its sentences stand."""

    text: str
    spans: list[Span]


def passage_text(title: str, heading: str, text: str) -> PassageText:
    """Title and heading path give a paragraph its subject."""
    head = title if not heading or heading == title else f"{title}: {heading.removeprefix(title + ' > ')}"
    head = f"{head}\n" if head else ""
    spans = sentences(text)
    together = -(-len(spans) // _MOST)
    merged = [(spans[i][0], spans[min(i + together, len(spans)) - 1][1]) for i in range(0, len(spans), together or 1)]
    return PassageText(head + text, [(start + len(head), end + len(head)) for start, end in merged])


def pooled(outputs: np.ndarray, offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """The mean output of the tokens of each span: float32 [spans, dim], without those that lie behind the model's
    window.  `outputs` float32 [tokens, dim], `offsets` int [tokens, 2] are characters, (0, 0) for special tokens."""
    real = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    starts, ends = offsets[real, 0], offsets[real, 1]
    means = []
    for start, end in spans:
        first, behind = np.searchsorted(ends, start, "right"), np.searchsorted(starts, end, "left")
        if first < behind:
            means.append(outputs[real[first:behind]].mean(axis=0))
    return np.stack(means) if means else np.zeros((0, outputs.shape[1]), dtype=np.float32)


def packed(vectors: np.ndarray) -> bytes:
    """float32 [n, dim] as int8, as it is stored."""
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=1e-12)
    return np.round(vectors * (127 / largest)).astype(np.int8).tobytes()


def best_cosines(query: np.ndarray, stored: Sequence[bytes]) -> list[float | None]:
    """For each passage the cosine of its sentence closest to `query` (float32 [dim], of length 1); None where it has
    none, or where what is stored is not whole."""
    dim = len(query)
    counts = [len(each) // dim if len(each) % dim == 0 else 0 for each in stored]
    whole = [each for each, count in zip(stored, counts, strict=True) if count]
    if not whole:
        return [None] * len(stored)
    vectors = np.frombuffer(b"".join(whole), dtype=np.int8).reshape(-1, dim).astype(np.float32)
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    cosines = vectors @ query / np.maximum(lengths, 1e-12)
    starts = np.cumsum([0, *(count for count in counts if count)])[:-1]
    best = iter(np.maximum.reduceat(cosines, starts).tolist())
    return [next(best) if count else None for count in counts]
