"""A prompt as the router sees it: pieces whose names chain, so that equal beginnings have equal names.

    head           documents                     tail
    system      ·  d3 · d1 · d7               ·  history · question
    h0             h1 = H(h0, d3)   h2 = H(h1, d1) …

What a server's prefix cache can reuse of a prompt is a beginning of this chain.  The router has no tokenizer: a piece's
length is estimated from its characters, and only ratios of lengths are ever used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import takewhile
from typing import NamedTuple

import msgspec

from inference.prompt import ChatPrompt, Message, Prompt, Segment, TextPrompt

Name = bytes
CHARACTERS_PER_TOKEN = 4.0
TEXT_PIECE = 1024  # characters: raw text has no segments, so it is cut


class Piece(NamedTuple):
    """`name` is a digest of its content, `tokens` an estimate."""

    name: Name
    tokens: float


class Asked(NamedTuple):
    """A prompt in pieces; `documents` by relevance, in a row, and free to change places."""

    head: tuple[Piece, ...]
    documents: tuple[Piece, ...]
    tail: tuple[Piece, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(range(len(self.documents)))

    @property
    def tokens(self) -> float:
        return sum(piece.tokens for part in self for piece in part)

    def pieces(self, order: Sequence[int]) -> list[Piece]:
        """All of them, the documents in `order`."""
        return [*self.head, *(self.documents[rank] for rank in order), *self.tail]


class Chain:
    """The names of a prompt's beginnings, each computed once however many replicas are asked about it."""

    def __init__(self, asked: Asked):
        self.asked = asked
        name, self.head = b"", []
        for piece in asked.head:
            name = behind(name, piece.name)
            self.head.append((name, piece.tokens))
        self._root = name
        self._names: dict[tuple[int, ...], Name] = {(): name}
        self._along: dict[tuple[int, ...], list[tuple[Name, float]]] = {}
        self._behind: dict[tuple[int, ...], list[tuple[int, Name]]] = {}

    def through(self, order: tuple[int, ...]) -> Name:
        """The name of the head and the documents in `order`."""
        name = self._names.get(order)
        if name is None:
            name = self._names[order] = behind(self.through(order[:-1]), self.asked.documents[order[-1]].name)
        return name

    def documents_behind(self, order: tuple[int, ...]) -> list[tuple[int, Name]]:
        """(rank, name with it) of every document that isn't in `order`, by relevance."""
        if (known := self._behind.get(order)) is None:
            name, documents = self.through(order), enumerate(self.asked.documents)
            others = [(rank, behind(name, document.name)) for rank, document in documents if rank not in order]
            known = self._behind[order] = others
        return known

    @cached_property
    def canonical(self) -> tuple[int, ...]:
        """An order that is the same for the same documents, however they are ranked."""
        return tuple(sorted(self.asked.ranks, key=lambda rank: (self.asked.documents[rank].name, rank)))

    def along(self, order: tuple[int, ...]) -> list[tuple[Name, float]]:
        """(name, tokens of its last piece) of every beginning, the documents in `order`."""
        if (known := self._along.get(order)) is not None:
            return known
        names = [*self.head]
        for end, rank in enumerate(order, 1):
            names.append((self.through(order[:end]), self.asked.documents[rank].tokens))
        name = names[-1][0] if names else b""
        for piece in self.asked.tail:
            name = behind(name, piece.name)
            names.append((name, piece.tokens))
        self._along[order] = names
        return names

    @property
    def key(self) -> Name:
        """What the request is about, for hashing: the path to its first document, or to the first piece that isn't the
        head's; of a prompt without either, all of it."""
        if self.asked.documents:
            return self.through((0,))
        return behind(self._root, self.asked.tail[0].name) if self.asked.tail else self._root


def behind(name: Name, more: bytes) -> Name:
    """The name of a chain that goes on with a piece named `more`."""
    return blake2b(name + more, digest_size=16).digest()


def asked_of(prompt: Prompt, scope: str) -> Asked:
    """The pieces of `prompt`.  Those of different scopes never have equal names, as servers share nothing there."""
    if isinstance(prompt, TextPrompt):
        pieces = [_piece("text", prompt.text[at : at + TEXT_PIECE]) for at in range(0, len(prompt.text), TEXT_PIECE)]
        return Asked((_piece("scope", scope),), (), tuple(pieces))
    run = document_run(prompt)
    segments = [(message.role, segment) for message in prompt.messages for segment in message.segments]
    pieces = [_piece(role, segment.text) for role, segment in segments]
    head = run.start if run else next((i for i, (_, segment) in enumerate(segments) if segment.kind != "system"), 0)
    last = run.stop if run else head
    return Asked((_piece("scope", scope), *pieces[:head]), tuple(pieces[head:last]), tuple(pieces[last:]))


def document_run(prompt: ChatPrompt) -> range | None:
    """Where the documents stand that may change places, counted in segments: the first that stand in a row in one
    message."""
    first = 0
    for message in prompt.messages:
        kinds = [segment.kind for segment in message.segments]
        if "document" in kinds:
            start = kinds.index("document")
            length = len(list(takewhile(lambda kind: kind == "document", kinds[start:])))
            return range(first + start, first + start + length)
        first += len(kinds)
    return None


def reordered(prompt: ChatPrompt, order: tuple[int, ...]) -> ChatPrompt:
    """`prompt` with its documents in `order`, given by rank."""
    run, first, messages = document_run(prompt), 0, []
    if run is None:
        return prompt
    for message in prompt.messages:
        segments: tuple[Segment, ...] = message.segments
        if first <= run.start < first + len(segments):
            start, stop = run.start - first, run.stop - first
            moved = tuple(segments[start + rank] for rank in order)
            message = Message(message.role, segments[:start] + moved + segments[stop:])
        messages.append(message)
        first += len(segments)
    return msgspec.structs.replace(prompt, messages=tuple(messages))


def _piece(role: str, text: str) -> Piece:
    content = f"{role}\0{text}".encode("utf-8", "surrogatepass")
    return Piece(blake2b(content, digest_size=16).digest(), len(text) / CHARACTERS_PER_TOKEN)
