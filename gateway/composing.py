"""From passages and a question to a prompt.

    system    who the model is
    user      document block · document block · …      one segment each, the same text in every request
              earlier turns of the conversation
              closest sentences · question
    reply     "According to the document, "            begun for the model, where the backend can

Document blocks hold no numbers and nothing of the request, so that requests which retrieved the
same passages share their cache blocks.  What varies comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from inference import Capabilities, ChatPrompt, Message, Segment
from retrieval import Passage, Quote

# No blank at the end: to a model whose tokens begin with their blank, one that stands alone is the end of a line.
REPLY_PREFIX = "According to the document,"


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An earlier message of the conversation."""

    role: Literal["user", "assistant"]
    content: str


class PromptShape(msgspec.Struct, frozen=True, kw_only=True):
    """How a prompt is worded.  `hints`: how many closest sentences are repeated before the question;
    `hint_intro` leads them; `question` has a `{question}` placeholder; `reply_prefix` begins the reply."""

    system: str
    documents_intro: str = ""
    hints: int = 0
    hint_intro: str = ""
    question: str = "Question: {question}"
    reply_prefix: str = ""


SYSTEM = (
    "You answer questions from the documents that the user gives. Be brief, use only what the documents say, "
    "and say so when they do not hold the answer."
)
HINT_INTRO = "The sentences closest to the question:\n"
CONVERSATION_INTRO = "The conversation so far:\n"

SHAPES: dict[str, PromptShape] = {
    "plain": PromptShape(system=SYSTEM),
    "begun": PromptShape(system=SYSTEM, reply_prefix=REPLY_PREFIX),
    "hinted": PromptShape(system=SYSTEM, hints=3, hint_intro=HINT_INTRO),
    "quoted": PromptShape(system=SYSTEM, hints=3, hint_intro=HINT_INTRO, reply_prefix=REPLY_PREFIX),
    "listed": PromptShape(
        system=SYSTEM,
        hints=3,
        hint_intro=HINT_INTRO,
        question="Question: {question}\nAnswer with the sentences above.",
        reply_prefix="According to the document:",
    ),
}


def compose(
    shape: PromptShape,
    question: str,
    passages: Sequence[Passage],
    *,
    hints: Sequence[Quote] = (),
    history: Sequence[Turn] = (),
    instructions: str = "",
    capabilities: Capabilities,
) -> ChatPrompt:
    """The prompt for a question over passages, in the order given.  `instructions` are the asker's own."""
    segments = [document_segment(passage) for passage in passages]
    if shape.documents_intro:
        segments.insert(0, Segment(shape.documents_intro, kind="system"))
    if history:
        segments.append(Segment(_conversation(history), kind="history"))
    if instructions:
        segments.append(Segment(f"{instructions}\n\n", kind="history"))
    segments.append(Segment(_closing(shape, question, hints)))
    return ChatPrompt(
        messages=(
            Message("system", (Segment(shape.system, kind="system"),)),
            Message("user", tuple(segments)),
        ),
        reply_prefix=shape.reply_prefix if capabilities.continues_reply else "",
    )


def document_segment(passage: Passage) -> Segment:
    """A passage as its own block: title, heading path, text, separator."""
    heading = passage.heading if passage.heading and passage.heading != passage.title else ""
    lines = [line for line in (passage.title, heading, passage.text.strip()) if line]
    return Segment("\n".join(lines) + "\n\n", kind="document", document_id=passage.passage_id)


def _conversation(history: Sequence[Turn]) -> str:
    names = {"user": "User", "assistant": "Assistant"}
    turns = "\n".join(f"{names[turn.role]}: {turn.content}" for turn in history)
    return f"{CONVERSATION_INTRO}{turns}\n\n"


def _closing(shape: PromptShape, question: str, hints: Sequence[Quote]) -> str:
    sentences = "".join(f"- {' '.join(hint.text.split())}\n" for hint in hints[: shape.hints])
    lead = f"{shape.hint_intro}{sentences}\n" if sentences else ""
    return lead + shape.question.replace("{question}", question)
