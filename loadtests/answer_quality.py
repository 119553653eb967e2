"""How good the answers are on real questions: token-F1 against what people wrote.

    python -m loadtests.answer_quality [--data ../shared/data/clapnq]

The retrieval half: the quotes that lead a reply, end to end from search over the whole corpus.  The score is
SQuAD's (Rajpurkar et al., EMNLP 2016): lower case, no punctuation, no articles, best over the answers.
"""

from __future__ import annotations

import argparse
import json
import re
import string
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from retrieval import Library, RetrievalSettings

CLAPNQ = Path("../shared/data/clapnq")


class Question(Struct, frozen=True):
    """One question of the set; `answers` is empty where nothing in the corpus answers it."""

    question_id: str
    text: str
    answerable: bool
    answers: list[str]
    gold_source: str | None  # the source of the passage that answers it


class QuotesScore(Struct):
    """Means over the questions."""

    questions: int
    token_f1: float
    gold_at_1: float  # share of questions whose gold document is first
    gold_at_k: float
    words: float  # per reply


def load_questions(folder: Path = CLAPNQ) -> list[Question]:
    """CLAPnq's questions, in the file's order.  Raises FileNotFoundError."""
    gold: dict[str, str] = {}
    for line in (folder / "qrels.tsv").read_text().splitlines()[1:]:
        query, document, _ = line.split("\t")
        gold[query] = document
    return [
        Question(row["_id"], row["text"], row["answerable"], row["answers"], gold.get(row["_id"]))
        for row in map(json.loads, (folder / "queries.jsonl").read_text().splitlines())
    ]


def corpus_documents(folder: Path = CLAPNQ) -> Iterator[tuple[str, str, str, str]]:
    """CLAPnq's passages as documents for `Library.ingest_documents`."""
    for line in (folder / "corpus.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield row["_id"], row["title"], row["text"], "text/plain"


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 of the shared words over the answers, 0..1."""
    return max((_f1(_words(prediction), _words(answer)) for answer in answers), default=0.0)


def quotes_f1(library: Library, questions: Sequence[Question], count: int = 2, top_k: int = 4) -> QuotesScore:
    """Search, quote, score: over the answerable ones among `questions`."""
    scores, first, among, words = [], 0, 0, 0
    for question in (each for each in questions if each.answerable):
        found = library.search(question.text, top_k=top_k)
        sources = [passage.source for passage in found.passages]
        first += question.gold_source in sources[:1]
        among += question.gold_source in sources
        reply = " ".join(quote.text for quote in library.quotes(question.text, found.passages, count))
        words += len(reply.split())
        scores.append(token_f1(reply, question.answers))
    n = max(1, len(scores))
    return QuotesScore(len(scores), sum(scores) / n, first / n, among / n, words / n)


def _words(text: str) -> list[str]:
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(prediction: list[str], answer: list[str]) -> float:
    same = sum((Counter(prediction) & Counter(answer)).values())
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, default=CLAPNQ, help="folder of CLAPnq in BEIR layout")
    arguments.add_argument("--count", type=int, default=2, help="sentences quoted per reply")
    options = arguments.parse_args()
    questions = load_questions(options.data)
    with (
        tempfile.TemporaryDirectory() as folder,
        Library.open(Path(folder), settings=RetrievalSettings()) as library,
    ):
        library.ingest_documents(corpus_documents(options.data))
        answerable = [question for question in questions if question.answerable]
        print("| questions | token-F1 of the quotes | gold first | gold in the top 4 | words |")
        print("|---|---|---|---|---|")
        for name, some in (("all", answerable), ("even", answerable[::2]), ("odd", answerable[1::2])):
            score = quotes_f1(library, some, options.count)
            print(
                f"| {name} {score.questions} | {score.token_f1:.3f} | {score.gold_at_1:.3f} | {score.gold_at_k:.3f} "
                f"| {score.words:.1f} |"
            )


if __name__ == "__main__":
    main()
