"""How good the answers are on real questions: token-F1 against what people wrote.

    python -m loadtests.answer_quality                            the default prompt, all answerable questions
    python -m loadtests.answer_quality --shapes plain,quoted      compare prompt shapes (gateway.composing)

CLAPnq's passages are ingested, a server is started over them, and its questions go to POST /v1/answers: search,
quotes and answer are judged end to end, a refusal counts 0.  The score is SQuAD's (Rajpurkar et al., EMNLP 2016):
lower case, no punctuation, no articles, best over the answers.  Prompt shapes are compared on the even questions
and confirmed on the odd ones.  Writes answer_quality.md and .json, or prompt_shapes.md
and .json where several are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import string
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from msgspec import Struct, structs
from tqdm import tqdm

from gateway.composing import SHAPES
from gateway.config import AnswersConfig
from loadtests import report
from loadtests.run import RESULTS, served
from retrieval import Library

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


class ReplyScore(Struct):
    """Means over the questions that one prompt shape answered."""

    shape: str
    questions: str
    count: int
    quotes_f1: float
    answer_f1: float
    refused: float
    answer_words: float
    supported: float  # share of the answers without an unsupported sentence


def ask_all(url: str, questions: Sequence[Question], workers: int = 6) -> list[dict]:
    """The server's replies, in the order of the questions."""
    with httpx.Client(base_url=url, timeout=300) as client, ThreadPoolExecutor(workers) as pool:

        def ask(question: Question) -> dict:
            reply = client.post("/v1/answers", json={"question": question.text})
            reply.raise_for_status()
            return reply.json()

        return list(tqdm(pool.map(ask, questions), total=len(questions), disable=None))


def score(shape: str, which: str, questions: Sequence[Question], replies: Sequence[dict]) -> ReplyScore:
    def mean(values: Iterable[float]) -> float:
        return sum(values) / max(1, len(replies))

    pairs = list(zip(questions, replies, strict=True))
    return ReplyScore(
        shape=shape,
        questions=which,
        count=len(replies),
        quotes_f1=mean(token_f1(" ".join(q["text"] for q in r["quotes"]), a.answers) for a, r in pairs),
        answer_f1=mean(0.0 if r["refused"] else token_f1(r["answer"], a.answers) for a, r in pairs),
        refused=mean(r["refused"] for r in replies),
        answer_words=mean(len(r["answer"].split()) for r in replies),
        supported=mean(not r["unsupported"] for r in replies),
    )


def main() -> None:
    arguments = argparse.ArgumentParser(
        prog="python -m loadtests.answer_quality", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    arguments.add_argument("--data", type=Path, default=CLAPNQ, help="folder of CLAPnq in BEIR layout")
    arguments.add_argument("--shapes", default=AnswersConfig().prompt, help=f"any of {','.join(SHAPES)}, or all")
    arguments.add_argument("--half", choices=["all", "even", "odd"], default="all")
    arguments.add_argument("--limit", type=int, help="only that many questions")
    arguments.add_argument("--out", type=Path, default=RESULTS)
    options = arguments.parse_args()
    if not options.data.exists():
        sys.exit(f"answer_quality: no CLAPnq at {options.data}: give its folder with --data")
    answerable = [question for question in load_questions(options.data) if question.answerable]
    if options.half != "all":
        answerable = answerable[options.half == "odd" :: 2]
    answerable = answerable[: options.limit]
    scores = []
    with tempfile.TemporaryDirectory() as folder:
        with Library.open(Path(folder)) as library:
            library.ingest_documents(corpus_documents(options.data))
        for shape in SHAPES if options.shapes == "all" else options.shapes.split(","):
            os.environ["REFDESK_ANSWERS__PROMPT"] = shape
            with served(Path(folder), None) as url:
                replies = ask_all(url, answerable)
            if options.half == "all":
                for which, part in (("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
                    scores.append(score(shape, which, answerable[part], replies[part]))
            scores.append(score(shape, options.half, answerable, replies))
            print(table(scores), flush=True)
    command = shlex.join(["python", "-m", "loadtests.answer_quality", *sys.argv[1:]])
    environment = report.environment()
    record = {"command": command, "scores": [structs.asdict(s) for s in scores], "environment": environment}
    name = "prompt_shapes" if "," in options.shapes or options.shapes == "all" else "answer_quality"
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    (options.out / f"{name}.md").write_text(
        f"# Answers on CLAPnq's answerable questions\n\n`{command}`, commit {environment['commit']}; {versions}\n\n"
        f"Bars: quotes 0.50, answers 0.42 over all 150 questions.\n\n{table(scores)}\n",
        encoding="utf-8",
    )


def table(scores: Sequence[ReplyScore]) -> str:
    lines = [
        "| prompt shape | questions | F1 of the quotes | F1 of the answer | refused | words | all supported |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in scores:
        lines.append(
            f"| {s.shape} | {s.count} {s.questions} | {s.quotes_f1:.3f} | {s.answer_f1:.3f} | {s.refused:.3f} | "
            f"{s.answer_words:.0f} | {s.supported:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
