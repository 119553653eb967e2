"""Searching among many passages: a library of 100,000, and an index of a million vectors.

    python -m loadtests.many_passages                       writes many_passages.md and .json
    python -m loadtests.many_passages --passages 20000 --vectors 100000 --out /tmp

The library is filled through its own door with made-up documents (words by Zipf's law) and vectors from a mixture of
Gaussians, as embeddings of real texts lie in clusters; a hundredth of the documents may be read by one group alone.
Searches are timed without embedding the question.  Recall is against comparing with every vector in float32.

The million vectors are of the same mixture, and once more without clusters, which is the hardest case for any index;
memory is what the process grows by.  What is compared in full up to `lists_from` passages is measured beside the lists
(IVF) that come into use behind it.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from loadtests import report
from loadtests.run import RESULTS
from retrieval import Library, Principal, RetrievalSettings
from retrieval.formats import reading
from retrieval.pooling import PassageText
from retrieval.sqlite.vectors import VectorIndex

DIM = 384
CLUSTERS = 2000
VOCABULARY = 60_000
WORDS, PASSAGES_OF_A_DOCUMENT = 120, 10
SEARCHES = 300
FEW = 100  # one document in so many is the group's


class Mixture:
    """Unit vectors float32 [n, DIM] around `CLUSTERS` centres, or anywhere where `clustered` is False."""

    def __init__(self, seed: int, clustered: bool = True):
        self._rng = np.random.default_rng(seed)
        # Two passages of one cluster have a cosine of about 0.6, as those of one subject do in MiniLM's space.
        self._centres = np.random.default_rng(0).standard_normal((CLUSTERS, DIM), dtype=np.float32) * 1.25
        self._clustered = clustered

    def draw(self, count: int) -> np.ndarray:
        vectors = self._rng.standard_normal((count, DIM), dtype=np.float32)
        if self._clustered:
            vectors += self._centres[self._rng.integers(0, CLUSTERS, count)]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Drawn:
    """An embedder that draws: what is stored is found again by `said`."""

    name, dim, pools_sentences = "drawn", DIM, True

    def __init__(self) -> None:
        self._mixture = Mixture(1)
        self.said: list[np.ndarray] = []

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return self._mixture.draw(len(texts))

    def encode_passages(self, passages: Sequence[PassageText]) -> tuple[np.ndarray, list[np.ndarray]]:
        vectors = self._mixture.draw(len(passages))
        self.said.append(vectors)
        return vectors, [
            vector + 0.05 * self._mixture.draw(len(passage.spans))
            for vector, passage in zip(vectors, passages, strict=True)
        ]


def documents(passages: int, rng: np.random.Generator) -> Iterator[tuple[str, str, str, str]]:
    share = 1 / np.arange(1, VOCABULARY + 1)
    words = np.array([f"w{n}" for n in range(VOCABULARY)])
    for number in range(passages // PASSAGES_OF_A_DOCUMENT):
        drawn = rng.choice(VOCABULARY, (PASSAGES_OF_A_DOCUMENT, WORDS // 12, 12), p=share / share.sum())
        text = "\n\n".join(
            " ".join(" ".join(words[sentence]).capitalize() + "." for sentence in passage) for passage in drawn
        )
        yield f"{number}.txt", f"Document {number}", text, "text/plain"


def spread(milliseconds: Sequence[float]) -> str:
    ordered = sorted(milliseconds)
    return f"{ordered[len(ordered) // 2]:.1f}, {ordered[int(0.95 * len(ordered))]:.1f}"


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_a_library(passages: int) -> tuple[list[str], dict]:
    rng = np.random.default_rng(2)
    embedder = Drawn()
    # As large as the embedder's window lets them be, so that they come out as they are drawn.
    settings = RetrievalSettings(passage_tokens=220, max_passage_tokens=400, relevance_floor=-1)
    group = Principal.of(groups=["few"])
    rows: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        with Library.open(Path(folder), embedder=embedder, settings=settings, reader=reading) as library:
            began = time.perf_counter()
            made = list(documents(passages, rng))
            few = made[::FEW]
            library.ingest_documents(few, readers=["group:few"])
            library.ingest_documents([each for each in made if each not in few], readers=["group:many"])
            rows["seconds to fill"] = time.perf_counter() - began
        began = time.perf_counter()
        with Library.open(Path(folder), embedder=embedder, settings=settings, reader=reading) as library:
            library.settle()
            rows["seconds to open"] = time.perf_counter() - began
            rows["passages"] = count = len(library._indexes.table)
            for name, who in {"all": library.whole.principal, "one in a hundred": group}.items():
                seen = library.seen_by(who)
                took: dict[str, list[float]] = {"vectors": [], "text": [], "fuse": [], "all": []}
                for words in rng.choice(2000, (SEARCHES, 6)):
                    found = seen.search("what about " + " ".join(f"w{word}" for word in words), top_k=5)
                    for stage in ("vectors", "text", "fuse"):
                        took[stage].append(found.timings[stage])
                    took["all"].append(sum(found.timings.values()) - found.timings["embed"])
                rows[f"ms, {name} may be seen"] = took
            recalls = [recall(library, group, query) for query in Mixture(3).draw(100)]
            rows["recall, one in a hundred"] = recalls
    lines = [
        f"| {count:,} passages, who may see | search p50, p95 ms | vectors | words | rows and ranking |",
        "|---|---|---|---|---|",
    ]
    for name in ("all", "one in a hundred"):
        took = rows[f"ms, {name} may be seen"]
        lines.append(f"| {name} | " + " | ".join(spread(took[s]) for s in ("all", "vectors", "text", "fuse")) + " |")
    lines += [
        "",
        f"Recall@10 for who may see one in a hundred: {np.mean(recalls):.3f} (least {min(recalls):.1f}).  Filled in "
        f"{rows['seconds to fill']:.0f} s, opened in {rows['seconds to open']:.1f} s.",
        "",
    ]
    return lines, rows


def recall(library: Library, who: Principal, query: np.ndarray) -> float:
    """Of the ten nearest by meaning that `who` may see, the share that searching puts first."""
    indexes = library._indexes
    with indexes.lock.read():
        numbers = indexes.table["number"][indexes.table.mask(access=indexes.store.access_of(who))]
        near = indexes.vectors.search(query, library._settings.candidates, numbers)
    stored = indexes.store.vectors_of(numbers.tolist())
    exact = sorted(stored, key=lambda number: -float(stored[number] @ query))[:10]
    found = sorted(near, key=lambda number: -float(stored[number] @ query))[:10]
    return len({*exact} & {*found}) / 10


def of_vectors(count: int, clustered: bool, lists: int) -> dict:
    mixture = Mixture(4, clustered)
    queries = mixture.draw(200)
    best = np.full((len(queries), 10), -1.0, dtype=np.float32)
    exact = np.zeros((len(queries), 10), dtype=np.int64)
    before = resident()
    began = time.perf_counter()
    blocks = range(0, count, 100_000)
    drawing = Mixture(5, clustered)
    index = VectorIndex.in_lists(DIM, drawing.draw(40 * lists), lists) if lists else VectorIndex(DIM)
    for start in blocks:
        block = drawing.draw(min(100_000, count - start))
        index.add(np.arange(start, start + len(block)), block)
        # Exact search as the vectors come by: they are never in memory all at once.
        scores = np.concatenate((best, queries @ block.T), axis=1)
        ids = np.concatenate((exact, np.tile(np.arange(start, start + len(block)), (len(queries), 1))), axis=1)
        order = np.argpartition(-scores, 10, axis=1)[:, :10]
        best, exact = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        del block, scores, ids, order
    built = time.perf_counter() - began
    grown = resident() - before
    took, recalls = [], []
    for query, ids in zip(queries, exact, strict=True):
        began = time.perf_counter()
        found = index.search(query, 50)
        took.append(1000 * (time.perf_counter() - began))
        # Who searches ranks these fifty by the stored vectors, which puts the true ten first where they are there.
        recalls.append(len({*found} & {*ids.tolist()}) / 10)
    return {
        "count": count,
        "clustered": clustered,
        "lists": index.lists,
        "seconds to build": built,
        "bytes": grown,
        "ms": took,
        "recall": recalls,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.many_passages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    command = shlex.join(["python", "-m", "loadtests.many_passages", *sys.argv[1:]])
    lines = ["# Searching among many passages", "", f"`{command}`; commit {report.commit()}.", ""]
    record: dict = {"command": command}
    if options.passages:
        told, record["library"] = in_a_library(options.passages)
        lines += told
        print("\n".join(told), flush=True)
    if options.vectors:
        lists = 4 * int(options.vectors**0.5)
        record["vectors"] = []
        lines += [
            f"| {options.vectors:,} vectors of {DIM} | compared | recall@10 | search p50, p95 ms | memory | built in |",
            "|---|---|---|---|---|---|",
        ]
        for clustered, in_lists in ((True, 0), (False, 0), (True, lists)):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:  # one's memory is its own
                row = fresh.submit(of_vectors, options.vectors, clustered, in_lists).result()
            record["vectors"].append(row)
            lines.append(
                f"| {'in clusters' if clustered else 'without clusters'} "
                f"| {f'nearest of {in_lists} lists' if in_lists else 'all'} | {np.mean(row['recall']):.3f} "
                f"| {spread(row['ms'])} | {row['bytes'] / 1e6:.0f} MB | {row['seconds to build']:.0f} s |"
            )
            print(lines[-1], flush=True)
    report.write(options.out, "many_passages", lines, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
