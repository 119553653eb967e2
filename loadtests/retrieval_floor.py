"""What a floor on the best cosine refuses: the trade behind `RetrievalSettings.relevance_floor`.

    python -m loadtests.retrieval_floor [--data ../shared/data/clapnq]

Over CLAPnq: answerable questions that pass, unanswerable ones that are refused.  Over the sample corpus (the
Python manual's topics): questions it answers, and questions about something else.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from loadtests.question_sets import CLAPNQ, clapnq_documents, clapnq_questions
from retrieval import SAMPLE_COLLECTION, Library, RetrievalSettings, sample_documents

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


def relevances(library: Library, questions: Iterable[str], collection: str) -> np.ndarray:
    """The best cosine for each question: float [questions]."""
    return np.array([library.whole.search(question, collection=collection).relevance for question in questions])


def curve(name: str, kept: np.ndarray, refused: np.ndarray, floors: Sequence[float]) -> str:
    """A Markdown table: the share of `kept` at or above each floor, the share of `refused` below it."""
    lines = [f"| {name}: floor | answerable kept | others refused |", "|---|---|---|"]
    lines += [f"| {floor:.2f} | {(kept >= floor).mean():.3f} | {(refused < floor).mean():.3f} |" for floor in floors]
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, default=CLAPNQ, help="folder of CLAPnq in BEIR layout")
    options = arguments.parse_args()
    floors = [0.25, 0.30, 0.35, 0.40, 0.45, 0.50, 0.55, 0.60]
    settings = RetrievalSettings()
    with tempfile.TemporaryDirectory() as folder, Library.open(Path(folder), settings=settings) as library:
        library.ingest_documents(sample_documents(), SAMPLE_COLLECTION)
        on, off = (relevances(library, each, SAMPLE_COLLECTION) for each in (ON_TOPIC, OFF_TOPIC))
        print(curve("Python topics", on, off, floors), "\n")
        if not (options.data / "corpus.jsonl").is_file():
            print(f"no CLAPnq under {options.data}: its curve is left out")
            return
        library.ingest_documents(clapnq_documents(options.data), "clapnq")
        questions = clapnq_questions(options.data)
        yes, no = (
            relevances(library, (q.text for q in questions if q.answerable is a), "clapnq") for a in (True, False)
        )
        print(curve("CLAPnq", yes, no, floors), "\n")
        print(f"the floor in use is {settings.relevance_floor}")


if __name__ == "__main__":
    main()
