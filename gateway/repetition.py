"""Small models, decoding greedily, sooner or later say the same sentence for ever: stop them before anyone reads it.

Text of a sentence that so far reads like the beginning of one already said is held back: it is
let through as soon as it differs, and dropped when it turns out to be the same.
"""

from __future__ import annotations

import re
from collections import deque

_LONE_BULLET = re.compile(r"\s*(?:[-*•–—]|\d+[.)])?\s*")
MIN_CHARACTERS = 24  # shorter sentences may well be said twice
MAX_PERIOD = 8  # words
TURNS = 4  # so often may a few words follow themselves
BULLETS = frozenset("-*•–—0123456789.)")


class RepetitionGuard:
    """Feed it the stream; it gives what may be shown.  `repeating` turns true at the first sentence said twice, or
    where a few words follow themselves again and again."""

    def __init__(self) -> None:
        self.repeating = False
        self._said: set[str] = set()
        self._held: list[str] = []
        self._sentence: list[str] = []  # lower case, white space as one blank, without its bullet
        self._word = 0  # letters and digits just before
        self._alike = True
        self._letters: list[str] = []  # of the word being read
        self._words: deque[str] = deque(maxlen=MAX_PERIOD * TURNS)

    def feed(self, text: str) -> str:
        out: list[str] = []
        for char in text:
            if self.repeating:
                break
            self._step(char, out)
        return "".join(out)

    def finish(self, cut: bool = False) -> str:
        """What was held back to the end, unless it is the beginning of a repetition; or, where the answer was `cut`
        short, the bullet of an item that never came."""
        held = "" if self.repeating or len(self._sentence) >= MIN_CHARACTERS else "".join(self._held)
        self._held.clear()
        return "" if cut and _LONE_BULLET.fullmatch(held) else held

    def _step(self, char: str, out: list[str]) -> None:
        # "e.g." and "1." end no sentence.
        ends = char == "\n" or (char in ".!?" and self._word not in (1, 2))
        self._word = self._word + 1 if char.isalnum() else 0
        self._held.append(char)
        self._note(char)
        if char.isalnum():
            self._letters.append(char.lower())
        elif char.isspace() and self._turns():
            self.repeating = True
            self._let_go(out)
            return
        if self._alike and self._sentence:
            so_far = "".join(self._sentence).rstrip()
            self._alike = any(said.startswith(so_far) for said in self._said)
        if ends and self._sentence:
            self._end(out)
        elif not self._alike:
            self._let_go(out)

    def _turns(self) -> bool:
        """Whether the words up to here are the same few, TURNS times over."""
        if not self._letters:
            return False
        self._words.append("".join(self._letters))
        self._letters.clear()
        words = list(self._words)
        for period in range(1, len(words) // TURNS + 1):
            last = words[-period * TURNS :]
            if last == last[:period] * TURNS and sum(map(len, last)) >= MIN_CHARACTERS:
                return True
        return False

    def _note(self, char: str) -> None:
        if char.isspace():
            if self._sentence and self._sentence[-1] != " ":
                self._sentence.append(" ")
        elif self._sentence or char not in BULLETS:
            self._sentence.append(char.lower())

    def _end(self, out: list[str]) -> None:
        sentence = "".join(self._sentence).rstrip()
        if self._alike and len(sentence) >= MIN_CHARACTERS and sentence in self._said:
            self.repeating = True
        else:
            self._let_go(out)
            self._said.add(sentence)
        self._held.clear()
        self._sentence.clear()
        self._alike = True

    def _let_go(self, out: list[str]) -> None:
        out.extend(self._held)
        self._held.clear()
