"""How good the answers are on real questions: token-F1 against what people wrote.

    python -m loadtests.answer_quality                                    CLAPnq, the default prompt
    python -m loadtests.answer_quality --shapes all --half even           compare prompt shapes (gateway.composing)
    python -m loadtests.answer_quality --shapes listed --reads 1,2,4      and how many passages the model reads

The documents of a question set are ingested, a server is started over them, and its questions go to
POST /v1/answers: search, quotes and answer are judged end to end, a refusal counts 0.  The score is SQuAD's
(Rajpurkar et al., EMNLP 2016): lower case, no punctuation, no articles, best over the answers.  Variants are
compared with the first one question by question, with the standard error of the mean difference; they are chosen
on the even questions and confirmed on the odd ones.  Writes NAME.md and NAME.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import shlex
import statistics
import string
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from msgspec import Struct, structs
from tqdm import tqdm

from gateway.composing import SHAPES
from gateway.config import AnswersConfig
from loadtests import report
from loadtests.question_sets import SETS, Question
from loadtests.run import RESULTS, served
from retrieval import Library


class QuotesScore(Struct):
    """Means over the questions."""

    questions: int
    token_f1: float
    gold_at_1: float  # share of questions whose gold document is first
    gold_at_k: float
    words: float  # per reply


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 of the shared words over the answers, 0..1."""
    return max((_f1(_words(prediction), _words(answer)) for answer in answers), default=0.0)


def quotes_f1(library: Library, questions: Sequence[Question], count: int = 2, top_k: int = 4) -> QuotesScore:
    """Search, quote, score: over the answerable ones among `questions`."""
    scores, first, among, words = [], 0, 0, 0
    for question in (each for each in questions if each.answerable):
        found = library.whole.search(question.text, top_k=top_k)
        sources = [passage.source for passage in found.passages]
        first += question.gold_source in sources[:1]
        among += question.gold_source in sources
        reply = " ".join(quote.text for quote in library.whole.quotes(question.text, found.passages, count))
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
    """What one variant made of the questions: means, and the F1 of each answer in their order."""

    shape: str
    reads: int
    questions: str
    quotes_f1: float
    refused: float
    answer_words: float
    supported: float  # share of the answers without an unsupported sentence
    answer_f1: list[float]


def ask_all(url: str, questions: Sequence[Question], workers: int = 6) -> list[dict]:
    """The server's replies, in the order of the questions."""
    with httpx.Client(base_url=url, timeout=300) as client, ThreadPoolExecutor(workers) as pool:

        def ask(question: Question) -> dict:
            reply = client.post("/v1/answers", json={"question": question.text})
            reply.raise_for_status()
            return reply.json()

        return list(tqdm(pool.map(ask, questions), total=len(questions), disable=None))


def score(shape: str, reads: int, which: str, questions: Sequence[Question], replies: Sequence[dict]) -> ReplyScore:
    pairs = list(zip(questions, replies, strict=True))
    return ReplyScore(
        shape=shape,
        reads=reads,
        questions=which,
        quotes_f1=statistics.fmean(token_f1(" ".join(q["text"] for q in r["quotes"]), a.answers) for a, r in pairs),
        refused=statistics.fmean(r["refused"] for r in replies),
        answer_words=statistics.fmean(len(r["answer"].split()) for r in replies),
        supported=statistics.fmean(not r["unsupported"] for r in replies),
        answer_f1=[0.0 if r["refused"] else round(token_f1(r["answer"], a.answers), 4) for a, r in pairs],
    )


def main() -> None:
    options = _options()
    questions = SETS[options.set]
    folder = options.data or questions.folder
    if not folder.exists():
        sys.exit(f"answer_quality: no {options.set} at {folder}: give its folder with --data")
    answerable = [question for question in questions.questions(folder) if question.answerable]
    if options.half != "all":
        answerable = answerable[options.half == "odd" :: 2]
    answerable = answerable[: options.limit]
    halves = {"even": slice(0, None, 2), "odd": slice(1, None, 2)} if options.half == "all" else {}
    scores: list[ReplyScore] = []
    with tempfile.TemporaryDirectory() as data:
        with Library.open(Path(data)) as library:
            questions.ingest(library, folder)
        for shape, reads in itertools.product(options.shapes, options.reads):
            os.environ |= {"REFDESK_ANSWERS__PROMPT": shape, "REFDESK_ANSWERS__READS": str(reads)}
            with served(Path(data), None) as url:
                replies = ask_all(url, answerable)
            for which, part in (halves | {options.half: slice(None)}).items():
                scores.append(score(shape, reads, which, answerable[part], replies[part]))
            _write(options, scores)
    print(table(scores))


def _options() -> argparse.Namespace:
    default = AnswersConfig()
    arguments = argparse.ArgumentParser(
        prog="python -m loadtests.answer_quality", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    arguments.add_argument("--set", choices=SETS, default="clapnq", help="which questions")
    arguments.add_argument("--data", type=Path, help="folder of the set")
    arguments.add_argument("--shapes", type=_shapes, default=[default.prompt], help=f"of {','.join(SHAPES)}; or all")
    arguments.add_argument("--reads", type=_counts, default=[default.reads], help="answers.reads, such as 1,2,4")
    arguments.add_argument("--half", choices=["all", "even", "odd"], default="all")
    arguments.add_argument("--limit", type=int, help="only that many questions")
    arguments.add_argument("--name", default="answer_quality", help="of the two files")
    arguments.add_argument("--out", type=Path, default=RESULTS)
    return arguments.parse_args()


def _shapes(text: str) -> list[str]:
    shapes = list(SHAPES) if text == "all" else text.split(",")
    for shape in shapes:
        if shape not in SHAPES:
            raise argparse.ArgumentTypeError(f"{shape!r} is not a prompt shape; there are {', '.join(SHAPES)}")
    return shapes


def _counts(text: str) -> list[int]:
    return [int(count) for count in text.split(",")]


def _write(options: argparse.Namespace, scores: Sequence[ReplyScore]) -> None:
    command = shlex.join(["python", "-m", "loadtests.answer_quality", *sys.argv[1:]])
    environment = report.environment()
    record = {"command": command, "scores": [structs.asdict(s) for s in scores], "environment": environment}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    bars = "Bars: quotes 0.50, answers 0.42 over all 150 questions.\n\n" if options.set == "clapnq" else ""
    (options.out / f"{options.name}.md").write_text(
        f"# Answers to the answerable questions of {options.set}\n\n"
        f"`{command}`, commit {environment['commit']}; {versions}\n\n{bars}{table(scores)}\n",
        encoding="utf-8",
    )


def table(scores: Sequence[ReplyScore]) -> str:
    """Each variant beside the first one that answered the same questions."""
    lines = [
        "| prompt shape | passages read | questions | F1 of the quotes | F1 of the answer | against the first | "
        "refused | words | all supported |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first: dict[str, ReplyScore] = {}
    for s in scores:
        base = first.setdefault(s.questions, s)
        lines.append(
            f"| {s.shape} | {s.reads} | {len(s.answer_f1)} {s.questions} | {s.quotes_f1:.3f} | "
            f"{statistics.fmean(s.answer_f1):.3f} | {'' if s is base else difference(s.answer_f1, base.answer_f1)} | "
            f"{s.refused:.3f} | {s.answer_words:.0f} | {s.supported:.2f} |"
        )
    return "\n".join(lines)


def difference(scores: Sequence[float], base: Sequence[float]) -> str:
    """The mean of the paired differences and its standard error."""
    differences = [a - b for a, b in zip(scores, base, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return f"{statistics.fmean(differences):+.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
