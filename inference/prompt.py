"""Prompts stay structured until the last moment.

A prompt is a list of messages, each a list of segments.  The engine tokenises every segment
on its own and concatenates the ids, so the same document always gives the same tokens and
two prompts that begin with the same documents share their cache blocks.  Segments carry
their own separators: joining their texts gives the message.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Role = Literal["system", "user", "assistant"]
SegmentKind = Literal["system", "document", "history", "question"]
DocumentOrder = Literal["relevance", "planned", "best_first", "canonical"]
DocumentReuse = Literal["prefix", "segments"]


class Segment(msgspec.Struct, frozen=True):
    """A piece of a message.  `document_id` names the document (passage) that it holds, if any."""

    text: str
    kind: SegmentKind = "question"
    document_id: str | None = None


class Message(msgspec.Struct, frozen=True):
    role: Role
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


class ChatPrompt(msgspec.Struct, frozen=True, tag="chat"):
    """Messages that the model's own chat template wraps.

    Their text is data: special tokens written in it are encoded as plain text.
    `reply_prefix` begins the model's reply for it; the generated text continues it and does
    not repeat it.  Only backends with `Capabilities.continues_reply` take one.
    """

    messages: tuple[Message, ...]
    reply_prefix: str = ""


class TextPrompt(msgspec.Struct, frozen=True, tag="text"):
    """Raw text, no template.  Special tokens written in it count, as in OpenAI's completions."""

    text: str


Prompt = ChatPrompt | TextPrompt


def length_of(prompt: Prompt) -> int:
    """Characters of a prompt, the template's own left out."""
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    return sum(len(segment.text) for message in prompt.messages for segment in message.segments)
