"""What a floor on relevance refuses: the trade behind `RetrievalSettings.relevance_floor`.

    python -m loadtests.retrieval_floor          writes relevance.md and .json

CLAPnq's questions, 150 that its passages answer and 150 that they don't, with the handbook's pages beside them; the
handbook's own questions, a third of which it doesn't answer; and the sample corpus (the Python manual's topics) with
questions that it answers, and questions about something else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from loadtests import report
from loadtests.question_sets import (
    CLAPNQ,
    HANDBOOK,
    clapnq_documents,
    clapnq_questions,
    handbook_searches,
)
from loadtests.run import RESULTS
from retrieval import SAMPLE_COLLECTION, Library, sample_documents

ON_TOPIC = (
    "How do I open a context manager with the with statement?",
    "what does the lambda keyword do",
    "How are exceptions raised and chained?",
    "which methods must a class define to emulate a container",
    "What is the difference between a list and a tuple?",
    "how does string formatting with format specifiers work",
    "What happens when break is used inside a loop?",
    "how can I set a breakpoint in the debugger",
    "What is operator precedence?",
    "when is __del__ called on an object",
    "how do decorators work on functions",
    "What does the global statement do?",
)
OFF_TOPIC = (
    "How do I bake sourdough bread?",
    "who won the football world cup in 1998",
    "What is the capital of Mongolia?",
    "how many days of parental leave do employees get",
    "symptoms of vitamin D deficiency",
    "What is the best route from Vienna to Prague by train?",
    "how do tides depend on the moon",
    "Who painted the Mona Lisa?",
    "how to remove a red wine stain from a carpet",
    "current mortgage interest rates in Canada",
    "why did the Roman Empire fall",
    "how often should I water a cactus",
)
KEPT = (0.99, 0.97, 0.95, 0.9, 0.85, 0.8)
FLOORS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65)


def relevances(library: Library, questions: Iterable[str], collection: str | None) -> np.ndarray:
    """float [questions]."""
    return np.array([library.whole.search(question, collection=collection).relevance for question in questions])


def refused_at(scores: np.ndarray, answers: np.ndarray, kept: float) -> tuple[float, float]:
    """(floor, share of the unanswerable below it) where at least `kept` of the answerable are at or above it."""
    floor = float(np.quantile(scores[answers], 1 - kept, method="lower"))
    return floor, float((scores[~answers] < floor).mean())


def curve(name: str, scores: np.ndarray, answers: np.ndarray) -> list[str]:
    rng = np.random.default_rng(0)
    lines = [f"| {name}: answerable kept | floor | others refused |", "|---|---|---|"]
    yes, no = scores[answers], scores[~answers]
    for kept in KEPT:
        floor, refused = refused_at(scores, answers, kept)
        drawn = [
            refused_at(np.r_[a, b], np.r_[np.ones(len(a), bool), np.zeros(len(b), bool)], kept)[1]
            for a, b in ((rng.choice(yes, len(yes)), rng.choice(no, len(no))) for _ in range(1000))
        ]
        low, high = np.quantile(drawn, (0.025, 0.975))
        lines.append(f"| {kept:.0%} | {floor:.2f} | {refused:.3f} ({low:.2f} to {high:.2f}) |")
    return [*lines, ""]


def at_floor(scores: np.ndarray, answers: np.ndarray, floor: float) -> str:
    return f"{(scores[answers] >= floor).mean():.0%}, {(scores[~answers] < floor).mean():.0%}"


def main() -> int:
    arguments = argparse.ArgumentParser(
        prog="python -m loadtests.retrieval_floor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("--out", type=Path, default=RESULTS)
    options = arguments.parse_args()
    if not CLAPNQ.is_dir() or not HANDBOOK.is_dir():
        print(f"no {CLAPNQ} or {HANDBOOK}: there is nothing to measure with", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, Library.open(Path(folder)) as library:
        settings = library._settings
        library.ingest_documents(sample_documents(), SAMPLE_COLLECTION)
        library.ingest_documents(clapnq_documents(), "clapnq")
        library.ingest_paths([HANDBOOK], collection="handbook")
        asked, own = clapnq_questions(), handbook_searches()
        answers = np.array([question.answerable for question in asked])
        scores = relevances(library, (question.text for question in asked), None)
        others = {
            "on the handbook": (
                relevances(library, (search.text for search in own), "handbook"),
                np.array([bool(search.gold) for search in own]),
            ),
            "on Python, others on anything": (
                relevances(library, (*ON_TOPIC, *OFF_TOPIC), SAMPLE_COLLECTION),
                np.arange(len(ON_TOPIC) + len(OFF_TOPIC)) < len(ON_TOPIC),
            ),
        }
    lines = [
        "# What a floor on relevance refuses",
        "",
        f"`python -m loadtests.retrieval_floor`: {len(asked)} questions of CLAPnq over its passages, the handbook and "
        f"the Python manual; commit {report.commit()}.  In brackets 95 % intervals by bootstrap.",
        "",
        *curve("CLAPnq", scores, answers),
        "A floor for one collection is none for another, since people word their questions as their documents do or "
        "otherwise:",
        "",
        f"| floor | {' | '.join(f'{name}: kept, others refused' for name in ('CLAPnq', *others))} |",
        f"|---|{'---|' * (1 + len(others))}",
        *(
            f"| {floor:.2f}{', in use' if floor == settings.relevance_floor else ''} | "
            + " | ".join(at_floor(*each, floor) for each in ((scores, answers), *others.values()))
            + " |"
            for floor in FLOORS
        ),
        "",
    ]
    print("\n".join(lines))
    report.write(options.out, "relevance", lines, {"clapnq": scores.tolist(), "answerable": answers.tolist()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
