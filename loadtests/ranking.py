"""How well passages are ranked: by words, by meaning, and by both, for the questions of two sets.

    python -m loadtests.ranking                writes ranking.md and .json
    python -m loadtests.ranking --half odd     to choose weights on; written nowhere

CLAPnq's answerable questions over its 597 passages with the handbook's pages as distractors; and 40 questions on the
handbook that are worded unlike its text, some of which need two pages.  nDCG@10 counts documents, each where its first
passage stands; where any of several pages will do, the first of them counts.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from loadtests import report
from loadtests.question_sets import (
    CLAPNQ,
    HANDBOOK,
    Search,
    clapnq_documents,
    clapnq_questions,
    handbook_searches,
)
from loadtests.run import RESULTS
from retrieval import Library, RetrievalSettings

WAYS = {
    "words": {"meaning_weight": 0.0},
    "meaning, passages": {"meaning_weight": 1.0, "sentence_weight": 0.0},
    "meaning, passages and sentences": {"meaning_weight": 1.0},
    "both, without sentences": {"sentence_weight": 0.0},
    "both, as set": {},
}
CUT = 10


def gain(sources: Sequence[str], gold: Sequence[Sequence[str]]) -> float:
    """nDCG of documents in this order."""
    places = [min((sources.index(each) for each in any_of if each in sources), default=None) for any_of in gold]
    found = sum(1 / math.log2(2 + place) for place in places if place is not None and place < CUT)
    return found / sum(1 / math.log2(2 + place) for place in range(len(gold)))


def measured(library: Library, name: str, searches: Sequence[Search], collection: str | None) -> dict:
    gains, took = [], []
    for search in searches:
        found = library.whole.search(search.text, collection=collection, top_k=3 * CUT)
        pages = [passage.source.split("/pages/")[-1] for passage in found.passages]
        gains.append(gain(list(dict.fromkeys(pages)), search.gold))
        took.append(sum(found.timings.values()) - found.timings["embed"])
    return {"way": name, "gains": gains, "ms": took}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.ranking", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--half", choices=("all", "odd", "even"), default="all", help="of the questions")
    parser.add_argument("--weights", nargs="*", default=[], metavar="MEANING:SENTENCE", help="more to try")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not CLAPNQ.is_dir() or not HANDBOOK.is_dir():
        print(f"no {CLAPNQ} or {HANDBOOK}: there is nothing to measure with", file=sys.stderr)
        return 2
    ways = dict(WAYS)
    for each in options.weights:
        meaning, sentence = map(float, each.split(":"))
        ways[each] = {"meaning_weight": meaning, "sentence_weight": sentence}
    sets = {
        "CLAPnq": (
            [Search(q.text, [[q.gold_source]]) for q in clapnq_questions() if q.answerable and q.gold_source],
            None,
        ),
        "the handbook": ([search for search in handbook_searches() if search.gold], "handbook"),
    }
    half = {"all": slice(None), "odd": slice(1, None, 2), "even": slice(None, None, 2)}[options.half]
    lines = ["# How well passages are ranked", ""]
    rows = []
    with tempfile.TemporaryDirectory() as folder, Library.open(Path(folder)) as library:
        began = time.monotonic()
        count = library.ingest_documents(clapnq_documents()).passages
        count += library.ingest_paths([HANDBOOK], collection="handbook").passages
        print(f"{count} passages in {time.monotonic() - began:.0f} s", file=sys.stderr)
        command = shlex.join(["python", "-m", "loadtests.ranking", *sys.argv[1:]])
        lines += [
            f"`{command}`: {count} passages; commit {report.commit()}.  In brackets 95 % intervals by bootstrap over "
            "questions.",
            "",
        ]
        for name, (searches, collection) in sets.items():
            searches = searches[half]
            lines += [
                f"| {len(searches)} questions on {name}, ranked by | nDCG@{CUT} | first | among the first {CUT} "
                "| without embedding the query: p50, p95, ms |",
                "|---|---|---|---|---|",
            ]
            for way, weights in ways.items():
                library._settings = replace(RetrievalSettings(per_document=1), **weights)
                rows.append({"set": name, **measured(library, way, searches, collection)})
                lines.append(line(rows[-1]))
                print(name, lines[-1], flush=True)
            lines.append("")
    if options.half == "all" and not options.weights:
        report.write(options.out, "ranking", lines, {"command": command, "passages": count, "rows": rows})
    return 0


def line(row: dict) -> str:
    gains = np.array(row["gains"])
    means = np.random.default_rng(0).choice(gains, (4000, len(gains))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    took = sorted(row["ms"])
    return (
        f"| {row['way']} | {gains.mean():.3f} ({low:.3f} to {high:.3f}) | {(gains == 1).mean():.1%} "
        f"| {(gains > 0).mean():.1%} | {statistics.median(took):.1f}, {took[int(0.95 * len(took))]:.1f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
