"""The way of a question: search, refuse or quote, compose, generate, ground.

`answer` yields it as events, in this order, whoever consumes them:

    Sources ▸ Delta* ▸ Grounds ▸ Spent ▸ Done          errors are raised

`Delta` texts joined are the answer, character for character; all offsets refer to it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec
from msgspec.structs import replace

from gateway.composing import SHAPES, PromptShape, Turn, compose
from gateway.config import AnswersConfig
from gateway.desk import Desk
from gateway.echo import EchoFilter
from gateway.followups import joined, rewritten
from gateway.grounding import Citation, MarkerFilter, Unsupported, ground
from gateway.repetition import RepetitionGuard
from gateway.wire import Answer, PassageView, QuoteView, Timings, UsageView
from inference import Backend, ChatPrompt, Finished, GenerationRequest, Sampling, TextDelta, Usage
from retrieval import ANYBODY, Filters, Passage, Principal, Quote, View, sentences

REFUSAL = "Nothing in the documents answers this."
REFUSAL_EMPTY = "There are no documents to answer from yet. Add some, then ask again."


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A question with everything decided."""

    request_id: str
    question: str
    collection: str | None = None
    top_k: int = 4
    sampling: Sampling = Sampling()
    history: tuple[Turn, ...] = ()
    instructions: str = ""
    principal: Principal = ANYBODY
    filters: Filters = Filters()


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer will rest on, before its first token.  Where `refused`, only the nearest passages."""

    request_id: str
    refused: bool
    quotes: list[QuoteView]
    sources: list[PassageView]
    retrieval_ms: float


class Delta(msgspec.Struct, frozen=True):
    text: str


class Grounds(msgspec.Struct, frozen=True):
    citations: list[Citation]
    unsupported: list[Unsupported]


class Spent(msgspec.Struct, frozen=True):
    usage: UsageView
    timings: Timings


class Done(msgspec.Struct, frozen=True):
    """`finish_reason`: stop, length, abort; refused (no model was asked); repetition (the model began to
    say the same again and was stopped)."""

    request_id: str
    finish_reason: str


AnswerEvent = Sources | Delta | Grounds | Spent | Done


class Clock:
    """When things happened to one request."""

    def __init__(self) -> None:
        self.arrived = time.perf_counter()
        self.first_token: float | None = None
        self.last_token = self.arrived

    def token(self) -> bool:
        """Note a token; True for the first one."""
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token
            return True
        return False

    def timings(
        self, *, retrieval_ms: float | None, queued_seconds: float | None = None, completion_tokens: int = 0
    ) -> Timings:
        rate = None
        if self.first_token is not None and completion_tokens > 1 and self.last_token > self.first_token:
            rate = round((completion_tokens - 1) / (self.last_token - self.first_token), 1)
        return Timings(
            queue_ms=None if queued_seconds is None else _ms(queued_seconds),
            retrieval_ms=retrieval_ms,
            first_token_ms=None if self.first_token is None else _ms(self.first_token - self.arrived),
            total_ms=_ms(time.perf_counter() - self.arrived),
            tokens_per_second=rate,
        )


def sampling_for(
    config: AnswersConfig, *, max_tokens: int | None, temperature: float | None, seed: int | None, **more: object
) -> Sampling:
    """The request's own values, else the server's."""
    return Sampling(
        max_tokens=config.max_tokens if max_tokens is None else max_tokens,
        temperature=config.temperature if temperature is None else temperature,
        seed=seed,
        **more,  # type: ignore[arg-type]
    )


async def answer(desk: Desk, ask: Ask) -> AsyncGenerator[AnswerEvent, None]:
    """Answer a question from the library.  Raises RetrievalError, BackendError, ApiError (not ready)."""
    view, backend, settings = desk.library.seen_by(ask.principal), desk.backend, desk.config.answers
    shape = SHAPES[settings.prompt]
    clock = Clock()
    sought = await _search_text(desk, ask)
    found = await desk.read(view.search, sought, collection=ask.collection, filters=ask.filters, top_k=ask.top_k)
    passages: Sequence[Passage] = found.passages
    refused = not (found.relevant and passages)
    hints: Sequence[Quote] = []
    if not refused:
        reads = settings.reads
        if settings.neighbours:
            passages, reads = await desk.read(_with_neighbours, view, passages, reads, settings.neighbours)
        hints = await desk.read(view.quotes, ask.question, passages, count=max(settings.quotes, shape.hints))
        prompt, read = await _fit(backend, ask, shape, passages[:reads], hints[: shape.hints])
        given, passages = _given_first(passages, read, hints[: shape.hints])
    retrieval_ms = _ms(time.perf_counter() - clock.arrived)
    desk.metrics.retrieval.observe(retrieval_ms / 1000)
    yield Sources(
        request_id=ask.request_id,
        refused=refused,
        quotes=QuoteView.of(hints[: settings.quotes]),
        sources=PassageView.of(passages),
        retrieval_ms=retrieval_ms,
    )
    if refused:
        desk.metrics.answers.labels("refused").inc()
        empty = not passages and not (await desk.read(view.documents, limit=1))[1]
        yield Delta(REFUSAL_EMPTY if empty else REFUSAL)
        yield Grounds([], [])
        yield Spent(UsageView(), clock.timings(retrieval_ms=retrieval_ms))
        yield Done(ask.request_id, "refused")
        return

    scope = await desk.read(desk.scopes.of, view)
    desk.warming.note(read, scope, backend.capabilities)
    said: list[str] = []
    echo, markers, guard = EchoFilter(), MarkerFilter(len(given)), RepetitionGuard()
    opening = Opening(prompt.reply_prefix)
    finished = Finished("abort", Usage(0, 0))
    try:
        async with aclosing(
            backend.generate(
                GenerationRequest(request_id=ask.request_id, prompt=prompt, sampling=ask.sampling, scope=scope)
            )
        ) as stream:
            async for event in stream:
                match event:
                    case TextDelta():
                        if guard.repeating or echo.ended:
                            continue  # already aborted: only the end is waited for, since it knows the usage
                        if clock.token():
                            desk.metrics.first_token.observe(clock.last_token - clock.arrived)
                        text = opening.feed(guard.feed(markers.feed(echo.feed(event.text))))
                        if text:
                            said.append(text)
                            yield Delta(text)
                        if guard.repeating or echo.ended:
                            backend.abort(ask.request_id)
                    case Finished():
                        finished = event
    finally:
        # Synchronous on purpose: when the client has gone, a clean-up that awaits may not get to run.
        backend.abort(ask.request_id)
    last = guard.feed(markers.feed(echo.finish()) + markers.finish())
    rest = opening.feed(last + guard.finish(cut=finished.reason == "length"))
    if rest:
        said.append(rest)
        yield Delta(rest)
    yield await _grounds(desk, view, "".join(said), prompt, given)
    usage = finished.usage
    desk.metrics.count_usage(usage)
    desk.metrics.answers.labels("answered").inc()
    yield Spent(
        usage_view(usage),
        clock.timings(
            retrieval_ms=retrieval_ms,
            queued_seconds=finished.queued_seconds,
            completion_tokens=usage.completion_tokens,
        ),
    )
    reason = "repetition" if guard.repeating else "stop" if echo.ended else finished.reason
    yield Done(ask.request_id, reason)


class Opening:
    """Puts the words that began the reply for the model before what it made of them, unless it began a new line:
    then they stand alone and say nothing."""

    def __init__(self, prefix: str):
        self._prefix = prefix
        self._blank = ""
        self._begun = False

    def feed(self, text: str) -> str:
        if self._begun:
            return text
        blank = text[: len(text) - len(text.lstrip())]
        self._blank += blank
        if len(blank) == len(text):
            return ""
        self._begun = True
        begun = "" if "\n" in self._blank else self._prefix
        space = " " if begun and not begun[-1:].isspace() else ""
        return begun + space + text[len(blank) :]


async def collect(events: AsyncGenerator[AnswerEvent, None]) -> Answer:
    """The whole answer as one value."""
    said: list[str] = []
    async with aclosing(events) as stream:
        async for event in stream:
            match event:
                case Sources():
                    sources = event
                case Delta():
                    said.append(event.text)
                case Grounds():
                    grounds = event
                case Spent():
                    spent = event
                case Done():
                    done = event
    return Answer(
        request_id=done.request_id,
        answer="".join(said),
        refused=sources.refused,
        finish_reason=done.finish_reason,
        quotes=sources.quotes,
        citations=grounds.citations,
        unsupported=grounds.unsupported,
        sources=sources.sources,
        usage=spent.usage,
        timings=spent.timings,
    )


def merge_deltas(first: AnswerEvent, second: AnswerEvent) -> AnswerEvent | None:
    """Two pieces of text that wait for a slow client are one."""
    if isinstance(first, Delta) and isinstance(second, Delta):
        return Delta(first.text + second.text)
    return None


def usage_view(usage: Usage) -> UsageView:
    return msgspec.convert(usage, UsageView, from_attributes=True)


async def _search_text(desk: Desk, ask: Ask) -> str:
    """What to look for: a follow-up is rarely a question of its own."""
    if ask.history and desk.config.answers.follow_ups == "rewritten":
        scope = desk.scopes.own(ask.principal)
        text = await rewritten(desk.backend, ask.question, ask.history, ask.request_id, scope)
        if text is not None:
            return text
    return joined(ask.question, ask.history)


def _with_neighbours(view: View, passages: Sequence[Passage], reads: int, neighbours: int) -> tuple[list[Passage], int]:
    """The best `reads` passages each among those around it in its document, then the others; and how many of them all
    are to be read."""
    score = {passage.passage_id: passage.score for passage in passages}
    read: dict[str, Passage] = {}
    for passage in passages[:reads]:
        for each in view.around(passage.passage_id, neighbours, neighbours):
            read.setdefault(each.passage_id, replace(each, score=score.get(each.passage_id, 0.0)))
    return [*read.values(), *(passage for passage in passages if passage.passage_id not in read)], len(read)


def _given_first(
    passages: Sequence[Passage], read: Sequence[Passage], hints: Sequence[Quote]
) -> tuple[Sequence[Passage], Sequence[Passage]]:
    """(what the model was given, whole or by a sentence; all passages, these first): only they may be cited, so
    they are the first of the sources and a marker counts alike in both."""
    known = {passage.passage_id for passage in read} | {hint.passage_id for hint in hints}
    given = [passage for passage in passages if passage.passage_id in known]
    return given, [*given, *(passage for passage in passages if passage.passage_id not in known)]


async def _fit(
    backend: Backend, ask: Ask, shape: PromptShape, passages: Sequence[Passage], hints: Sequence[Quote]
) -> tuple[ChatPrompt, Sequence[Passage]]:
    """The prompt with as many of the best passages as the model's context holds, one at least."""
    limit = backend.capabilities.max_context_tokens
    while True:
        prompt = compose(
            shape,
            ask.question,
            passages,
            hints=hints,
            history=ask.history,
            instructions=ask.instructions,
            capabilities=backend.capabilities,
        )
        if limit is None or len(passages) == 1:
            return prompt, passages
        # A token is at least a byte, so a prompt of few bytes need not be counted.
        room = limit - ask.sampling.max_tokens
        if sum(len(message.text.encode()) for message in prompt.messages) + 64 <= room:
            return prompt, passages
        tokens = await backend.count_tokens(prompt)
        if tokens is None or tokens <= room:
            return prompt, passages
        passages = passages[:-1]


async def _grounds(desk: Desk, view: View, text: str, prompt: ChatPrompt, passages: Sequence[Passage]) -> Grounds:
    citations, unsupported = await desk.read(
        ground, text, prompt.reply_prefix, passages, sentences=sentences, support=view.support
    )
    return Grounds(citations, unsupported)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
