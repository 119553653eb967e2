"""What to look for when a question is a follow-up: "and for contractors?" finds nothing by itself.

A question that refers to what was said is looked for together with the one before it; one that stands by itself, alone,
so that a change of subject doesn't drag the old one along.  With `follow_ups = "rewritten"` the model is asked first to
say the question so that it stands by itself, which models of a few billion parameters do well and smaller ones don't.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from contextlib import aclosing

from gateway.composing import Turn
from inference import Backend, BackendError, ChatPrompt, GenerationRequest, Message, Sampling, Segment, TextDelta

log = logging.getLogger(__name__)

_UNQUOTED = str.maketrans(dict.fromkeys('"“”„«»*', " "))
_WORD = re.compile(r"[^\W_]+")
_REFERRING = re.compile(
    r"\b(?:its?|they|them|theirs?|this|that|these|those|he|him|his|she|hers?|there|ones?|same|such|former|latter|others?"
    r"|else|too|also|both|either|neither|above)\b",
    re.IGNORECASE,
)
_CONTINUING = re.compile(r"\W*(?:and|but|or|so|then|what about|how about|what if|why not|how so)\b", re.IGNORECASE)
_FEW = 4  # words: a shorter question leaves out what it is about

_REWRITE = (
    "You rewrite the last question of a conversation so that it can be understood without the conversation. Keep its "
    "language, names and numbers. Reply with the question alone."
)
_REWRITTEN_TOKENS, _REWRITTEN_CHARACTERS, _REWRITE_SECONDS = 96, 500, 10.0


def refers_back(question: str) -> bool:
    """Whether a question needs what was said before.  English words; in other languages short questions do."""
    few = len(_WORD.findall(question)) < _FEW
    return few or bool(_CONTINUING.match(question) or _REFERRING.search(question))


def joined(question: str, history: Sequence[Turn]) -> str:
    """The question, with the one before it where it needs that."""
    before = [turn.content for turn in history if turn.role == "user"]
    if not before or not refers_back(question):
        return question
    # What the earlier one had in quotation marks was asked of that one.
    return f"{before[-1].translate(_UNQUOTED)}\n{question}"


async def rewritten(
    backend: Backend, question: str, history: Sequence[Turn], request_id: str, scope: str
) -> str | None:
    """The question as the model says it, standing by itself; None where it makes nothing of use of it."""
    turns = "\n".join(f"{turn.role}: {turn.content}" for turn in history)
    prompt = ChatPrompt(
        messages=(
            Message("system", (Segment(_REWRITE, kind="system"),)),
            Message("user", (Segment(f"{turns}\nuser: {question}\n\nThe last question, standing by itself:"),)),
        )
    )
    request = GenerationRequest(
        request_id=f"{request_id}-question",
        prompt=prompt,
        sampling=Sampling(max_tokens=_REWRITTEN_TOKENS, temperature=0.0),
        scope=scope,
    )
    said: list[str] = []
    try:
        async with asyncio.timeout(_REWRITE_SECONDS), aclosing(backend.generate(request)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    said.append(event.text)
    except (BackendError, TimeoutError) as error:
        log.info("the follow-up is looked for as it was asked: %s", error)
        return None
    finally:
        backend.abort(request.request_id)
    text = "".join(said).strip().strip('"')
    return text if text and "\n" not in text and len(text) <= _REWRITTEN_CHARACTERS else None
