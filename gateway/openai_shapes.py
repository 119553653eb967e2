"""How a completion looks on the wire: text or chat, whole or in chunks.

Whatever was asked, the events are `Piece`* and one `Stop` for each choice, then one `Ending`; a shape turns them into
bytes.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from gateway.openai_wire import (
    AnswerMessage,
    ChatLogprob,
    Choice,
    Completion,
    CompletionUsage,
    Logprobs,
)
from inference import TokenLogprob, Usage


class Piece(msgspec.Struct, frozen=True):
    """Text of the choice `index`."""

    text: str
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


class Stop(msgspec.Struct, frozen=True):
    """A choice has come to its end.  `about` is what a plain completion has no place for: quotes, sources,
    citations."""

    reason: str
    index: int = 0
    about: dict[str, Any] | UnsetType = UNSET


class Ending(msgspec.Struct, frozen=True):
    """The end of all."""

    usage: Usage


Event = Piece | Stop | Ending


def merge_pieces(first: Event, second: Event) -> Event | None:
    if isinstance(first, Piece) and isinstance(second, Piece) and first.index == second.index:
        return Piece(first.text + second.text, first.index, first.logprobs + second.logprobs)
    return None


class Shape:
    """How pieces and endings look on the wire; `TextShape` and `ChatShape` say the differing parts."""

    whole_object: str
    chunk_object: str

    def __init__(self, completion_id: str, model: str):
        self.completion_id = completion_id
        self.model = model
        self.created = int(time.time())
        self.include_usage = False
        self._begun: set[int] = set()

    def opening(self, index: int) -> list[Choice]:
        """What comes before the first text of a choice."""
        return []

    def part(self, piece: Piece) -> Choice:
        raise NotImplementedError

    def last(self, stop: Stop) -> Choice:
        raise NotImplementedError

    def full(self, piece: Piece, stop: Stop) -> Choice:
        raise NotImplementedError

    def encode(self, event: Event) -> bytes:
        """The chunks for an event, as `data:` lines."""
        match event:
            case Ending():
                return self._chunk([], usage=CompletionUsage.of(event.usage)) if self.include_usage else b""
            case Piece():
                return self._opened(event.index) + self._chunk([self.part(event)])
            case Stop():
                return self._opened(event.index) + self._chunk([self.last(event)], about=event.about)

    def _opened(self, index: int) -> bytes:
        choices = [] if index in self._begun else self.opening(index)
        self._begun.add(index)
        return b"".join(self._chunk([choice]) for choice in choices)

    def response(self, pieces: list[Piece], stops: list[Stop], ending: Ending) -> Completion:
        """The whole of it; a piece and a stop for each choice."""
        return Completion(
            id=self.completion_id,
            object=self.whole_object,
            created=self.created,
            model=self.model,
            choices=[self.full(piece, stop) for piece, stop in zip(pieces, stops, strict=True)],
            usage=CompletionUsage.of(ending.usage),
            refdesk=stops[0].about,
        )

    def _chunk(
        self,
        choices: list[Choice],
        usage: CompletionUsage | None = None,
        about: dict[str, Any] | UnsetType = UNSET,
    ) -> bytes:
        chunk = Completion(
            id=self.completion_id,
            object=self.chunk_object,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage if self.include_usage else UNSET,
            refdesk=about,
        )
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


class TextShape(Shape):
    whole_object = chunk_object = "text_completion"

    def part(self, piece: Piece) -> Choice:
        return Choice(index=piece.index, text=piece.text, logprobs=_text_logprobs(piece.logprobs))

    def last(self, stop: Stop) -> Choice:
        return Choice(index=stop.index, text="", finish_reason=stop.reason)

    def full(self, piece: Piece, stop: Stop) -> Choice:
        return msgspec.structs.replace(self.part(piece), finish_reason=stop.reason)


class ChatShape(Shape):
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> list[Choice]:
        return [Choice(index=index, delta=AnswerMessage(role="assistant", content=""))]

    def part(self, piece: Piece) -> Choice:
        return Choice(
            index=piece.index, delta=AnswerMessage(content=piece.text), logprobs=_chat_logprobs(piece.logprobs)
        )

    def last(self, stop: Stop) -> Choice:
        return Choice(index=stop.index, delta=AnswerMessage(), finish_reason=stop.reason)

    def full(self, piece: Piece, stop: Stop) -> Choice:
        message = AnswerMessage(role="assistant", content=piece.text)
        logprobs = _chat_logprobs(piece.logprobs)
        return Choice(index=stop.index, message=message, logprobs=logprobs, finish_reason=stop.reason)


def _text_logprobs(logprobs: tuple[TokenLogprob, ...]) -> Logprobs | None:
    if not logprobs:
        return None
    return Logprobs(
        tokens=[each.text for each in logprobs],
        token_logprobs=[each.logprob for each in logprobs],
        top_logprobs=[{other.text: other.logprob for other in each.top} for each in logprobs],
    )


def _chat_logprobs(logprobs: tuple[TokenLogprob, ...]) -> Logprobs | None:
    return Logprobs(content=[_chat_logprob(each, top=True) for each in logprobs]) if logprobs else None


def _chat_logprob(each: TokenLogprob, top: bool) -> ChatLogprob:
    others = [_chat_logprob(other, top=False) for other in each.top] if top else UNSET
    return ChatLogprob(token=each.text, logprob=each.logprob, bytes=list(each.text.encode()), top_logprobs=others)
