"""How a completion looks on the wire: text or chat, whole or in chunks.

Whatever was asked, the events are `Piece`* then one `Ending`; a shape turns them into bytes.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from gateway.openai_wire import AnswerMessage, Choice, Completion, CompletionUsage
from inference import Usage


class Piece(msgspec.Struct, frozen=True):
    text: str


class Ending(msgspec.Struct, frozen=True):
    """`about` is what a plain completion has no place for: quotes, sources, citations."""

    reason: str
    usage: Usage
    about: dict[str, Any] | UnsetType = UNSET


Event = Piece | Ending


def merge_pieces(first: Event, second: Event) -> Event | None:
    if isinstance(first, Piece) and isinstance(second, Piece):
        return Piece(first.text + second.text)
    return None


class Shape:
    """How pieces and endings look on the wire; `TextShape` and `ChatShape` say the differing parts."""

    whole_object: str
    chunk_object: str

    def __init__(self, completion_id: str, model: str):
        self.completion_id = completion_id
        self.model = model
        self.created = int(time.time())
        self.begun = False
        self.include_usage = False

    def opening(self) -> list[Choice]:
        """Chunks that come before the first text."""
        return []

    def part(self, text: str) -> Choice:
        raise NotImplementedError

    def last(self, reason: str) -> Choice:
        raise NotImplementedError

    def full(self, text: str, reason: str) -> Choice:
        raise NotImplementedError

    def encode(self, event: Event) -> bytes:
        """The chunks for an event, as `data:` lines."""
        choices = [] if self.begun else self.opening()
        self.begun = True
        match event:
            case Piece():
                return b"".join(self._chunk([choice]) for choice in (*choices, self.part(event.text)))
            case Ending():
                out = [self._chunk([choice]) for choice in choices]
                out.append(self._chunk([self.last(event.reason)], about=event.about))
                if self.include_usage:
                    out.append(self._chunk([], usage=CompletionUsage.of(event.usage)))
                return b"".join(out)

    def response(self, text: str, ending: Ending) -> Completion:
        return Completion(
            id=self.completion_id,
            object=self.whole_object,
            created=self.created,
            model=self.model,
            choices=[self.full(text, ending.reason)],
            usage=CompletionUsage.of(ending.usage),
            refdesk=ending.about,
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

    def part(self, text: str) -> Choice:
        return Choice(text=text)

    def last(self, reason: str) -> Choice:
        return Choice(text="", finish_reason=reason)

    def full(self, text: str, reason: str) -> Choice:
        return Choice(text=text, finish_reason=reason)


class ChatShape(Shape):
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> list[Choice]:
        return [Choice(delta=AnswerMessage(role="assistant", content=""))]

    def part(self, text: str) -> Choice:
        return Choice(delta=AnswerMessage(content=text))

    def last(self, reason: str) -> Choice:
        return Choice(delta=AnswerMessage(), finish_reason=reason)

    def full(self, text: str, reason: str) -> Choice:
        return Choice(message=AnswerMessage(role="assistant", content=text), finish_reason=reason)
