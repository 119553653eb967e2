"""Real questions with the answers that people wrote, and the documents that hold them.

    clapnq      150 answerable and 150 unanswerable questions over 597 passages of Wikipedia (CLAPnq, BEIR layout)
    handbook    pages of a staff handbook: a heading that asks is a question, the text under it the answer
    searches    60 questions on that handbook in other words than its own, with the pages that answer them; a third
                has no answer there (`tests/retrieval/handbook_questions.jsonl`)

The folders of documents are given by the one who measures; nothing of them is in this repository.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec import Struct

from retrieval import Library, UnreadableFile
from retrieval.formats.reading import read_file

CLAPNQ = Path("../shared/data/clapnq")
HANDBOOK = Path("../shared/data/handbook/pages")
SEARCHES = Path(__file__).parent.parent / "tests" / "retrieval" / "handbook_questions.jsonl"

# A heading of fewer words asks nothing by itself ("Questions?"); an answer of fewer words is hardly one, and one of
# many words is no answer but a chapter.
HEADING_WORDS = 4
ANSWER_WORDS = range(15, 151)


class Question(Struct, frozen=True):
    """One question of the set; `answers` is empty where nothing in the corpus answers it."""

    question_id: str
    text: str
    answerable: bool
    answers: list[str]
    gold_source: str | None  # the source of the document that answers it


def clapnq_questions(folder: Path = CLAPNQ) -> list[Question]:
    """CLAPnq's questions, in the file's order.  Raises FileNotFoundError."""
    gold: dict[str, str] = {}
    for line in (folder / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, _ = line.split("\t")
        gold[query] = document
    return [
        Question(row["_id"], row["text"], row["answerable"], row["answers"], gold.get(row["_id"]))
        for row in map(json.loads, (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines())
    ]


def clapnq_documents(folder: Path = CLAPNQ) -> Iterator[tuple[str, str, str, str]]:
    """CLAPnq's passages, for `Library.ingest_documents`."""
    for line in (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row["_id"], row["title"], row["text"], "text/plain"


def handbook_questions(folder: Path = HANDBOOK) -> list[Question]:
    """Headings that end in a question mark, each once, in the order of the pages."""
    questions: dict[str, Question] = {}
    for path in sorted(folder.rglob("*.md")):
        try:
            parsed = read_file(path.name, path.read_bytes())
        except UnreadableFile:  # a page without text holds no question either
            continue
        ends = [section.start for section in parsed.sections[1:]] + [len(parsed.text)]
        for section, end in zip(parsed.sections, ends, strict=True):
            heading = section.path[-1] if section.path else ""
            answer = parsed.text[section.start : end].removeprefix(heading).strip()
            asks = heading.endswith("?") and len(heading.split()) >= HEADING_WORDS
            if asks and len(answer.split()) in ANSWER_WORDS and heading not in questions:
                source = str(path.relative_to(folder))
                questions[heading] = Question(f"{source}#{section.start}", heading, True, [answer], source)
    return list(questions.values())


class Search(Struct, frozen=True):
    """What is asked of the handbook.  `gold`: for each thing to be known, the pages that tell it, any of which will do;
    empty where none does."""

    text: str
    gold: list[list[str]]


def handbook_searches(path: Path = SEARCHES) -> list[Search]:
    searches = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        gold: list[list[str]] = []
        for each in row["gold"]:
            if each.get("also"):
                gold[-1].append(each["page"])
            else:
                gold.append([each["page"]])
        searches.append(Search(row["question"], gold))
    return searches


class QuestionSet(Struct, frozen=True):
    """Where a set lies, how to read its questions, how to ingest its documents."""

    folder: Path
    questions: Callable[[Path], list[Question]]
    ingest: Callable[[Library, Path], object]


SETS = {
    "clapnq": QuestionSet(
        CLAPNQ, clapnq_questions, lambda library, folder: library.ingest_documents(clapnq_documents(folder))
    ),
    "handbook": QuestionSet(HANDBOOK, handbook_questions, lambda library, folder: library.ingest_paths([folder])),
}
