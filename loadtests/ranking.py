"""How well passages are ranked: by words, by meaning, and by both, for the questions of a set.

    python -m loadtests.ranking                writes ranking.md and .json
    python -m loadtests.ranking --half odd     to choose weights on; written nowhere

CLAPnq's answerable questions over its 597 passages with the handbook's pages as distractors; a question has one right
document, so nDCG@10 is 1 / log2(1 + its place).  Weights are of meaning and words in reciprocal rank fusion, and the
constant is what is added to a place (`retrieval.settings`).
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loadtests import report
from loadtests.question_sets import CLAPNQ, HANDBOOK, clapnq_documents, clapnq_questions
from loadtests.run import RESULTS
from retrieval import Library, RetrievalSettings

WAYS = {
    "words": {"dense_weight": 0.0, "text_weight": 1.0},
    "meaning": {"dense_weight": 1.0, "text_weight": 0.0},
    "both, as set": {},
}
CUT = 10


def gain(sources: Sequence[str], gold: str) -> float:
    """nDCG where one document is right."""
    return 1 / math.log2(2 + sources.index(gold)) if gold in sources else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.ranking", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--half", choices=("all", "odd", "even"), default="all", help="of the questions")
    parser.add_argument("--weights", nargs="*", default=[], metavar="DENSE:TEXT:CONSTANT", help="more to try")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not CLAPNQ.is_dir() or not HANDBOOK.is_dir():
        print(f"no {CLAPNQ} or {HANDBOOK}: there is nothing to measure with", file=sys.stderr)
        return 2
    ways = dict(WAYS)
    for each in options.weights:
        dense, text, constant = map(float, each.split(":"))
        ways[each] = {"dense_weight": dense, "text_weight": text, "fusion_constant": int(constant)}
    questions = [each for each in clapnq_questions() if each.answerable and each.gold_source]
    questions = {"all": questions, "odd": questions[1::2], "even": questions[::2]}[options.half]
    rows = []
    with tempfile.TemporaryDirectory() as folder, Library.open(Path(folder)) as library:
        began = time.monotonic()
        count = library.ingest_documents(clapnq_documents()).passages
        count += library.ingest_paths([HANDBOOK], collection="handbook").passages
        print(f"{count} passages in {time.monotonic() - began:.0f} s", file=sys.stderr)
        for name, weights in ways.items():
            library._settings = RetrievalSettings(**weights)
            gains, took = [], []
            for question in questions:
                found = library.whole.search(question.text, top_k=CUT)
                sources = list(dict.fromkeys(passage.source for passage in found.passages))
                gains.append(gain(sources, question.gold_source or ""))
                took.append(sum(found.timings.values()) - found.timings["embed"])
            rows.append({"way": name, "gains": gains, "ms": took})
            print(line(rows[-1]), flush=True)
    if options.half == "all" and not options.weights:
        where = report.environment()
        command = shlex.join(["python", "-m", "loadtests.ranking", *sys.argv[1:]])
        lines = [
            "# How well passages are ranked",
            "",
            f"`{command}`: {len(questions)} answerable questions of CLAPnq over {count} passages, the handbook's among "
            f"them; commit {where['commit']}.  In brackets 95 % intervals by bootstrap over questions.",
            "",
            f"| ranked by | nDCG@{CUT} | first | among the first {CUT} | without embedding the query: p50, p95, ms |",
            "|---|---|---|---|---|",
            *map(line, rows),
            "",
        ]
        (options.out / "ranking.md").write_text("\n".join(lines), encoding="utf-8")
        record = {"command": command, "passages": count, "rows": rows, "environment": where}
        (options.out / "ranking.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
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
