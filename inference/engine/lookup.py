"""Guesses from what the prompt says: an answer over documents quotes them, so when its last tokens stand in one, what
follows there probably follows here (prompt lookup decoding, Saxena 2023).

The index belongs to the text: built once, when a request that holds it first decodes, and shared by all that do.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

GRAM = 3  # tokens that must agree before anything is guessed
PATIENCE = 8  # tokens without guesses after some that were wrong


class TokenText:
    """The tokens of one text, and where each run of GRAM tokens goes on in it: the first place wins."""

    __slots__ = ("_ahead", "_key", "tokens")

    def __init__(self, tokens: array[int]):
        self.tokens = tokens
        self._ahead: dict[tuple[int, ...], int] | None = None
        self._key = b""

    @property
    def key(self) -> bytes:
        """Equal for equal tokens, and for no others."""
        if not self._key:
            self._key = blake2b(self.tokens.tobytes(), digest_size=16).digest()
        return self._key

    def follows(self, gram: tuple[int, ...], most: int) -> Sequence[int]:
        """At most `most` tokens that come after `gram` in this text."""
        if self._ahead is None:
            ahead: dict[tuple[int, ...], int] = {}
            for at in range(len(self.tokens) - GRAM):
                ahead.setdefault(tuple(self.tokens[at : at + GRAM]), at + GRAM)
            self._ahead = ahead
        at = self._ahead.get(gram)
        return () if at is None else self.tokens[at : at + most]


class PromptLookup:
    """The drafter of one request (`inference.engine.sequence.Drafter`): it stays with the text that it last found,
    and holds its tongue for a while after guesses that were all wrong."""

    def __init__(self, texts: Sequence[TokenText]):
        self._texts = list(texts)
        self._silent = 0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        if most <= 0 or len(tokens) < GRAM:
            return []
        if self._silent > 0:
            self._silent -= 1
            return []
        gram = tuple(tokens[-GRAM:])
        for i, text in enumerate(self._texts):
            if found := text.follows(gram, most):
                self._texts.insert(0, self._texts.pop(i))
                return list(found)
        return []

    def learn(self, proposed: int, accepted: int) -> None:
        if accepted == 0:
            self._silent = PATIENCE
