"""Small models now and then go on with the prompt itself, asking the next question or copying its headings: keep
that out of the answer."""

from __future__ import annotations

from gateway.composing import CONVERSATION_INTRO, HINT_INTRO

# At the beginning of a line, in lower case.  The first end the answer once something has been said.
ENDINGS = ("question:",)
HEADINGS = tuple(heading.strip().lower() for heading in (HINT_INTRO, CONVERSATION_INTRO, "Answer:"))
_DECORATION = " \t\"'“”*#>"


class EchoFilter:
    """Feed it the stream; it gives what may be shown.  `ended` turns true where the model begins a question of its
    own.  What could still become a heading of the prompt is held back."""

    def __init__(self) -> None:
        self.ended = False
        self._held = ""
        self._line_start = True
        self._said = False

    def feed(self, text: str) -> str:
        return "".join(map(self._step, text))

    def finish(self) -> str:
        """What was held back to the end."""
        return self._release()

    def _step(self, char: str) -> str:
        if self.ended:
            return ""
        if not self._line_start:
            self._line_start = char == "\n"
            return char
        self._held += char
        begun = self._held.lstrip(_DECORATION).lower()
        if char == "\n":
            return self._release()
        if begun in ENDINGS or begun in HEADINGS:
            self.ended = self._said and begun in ENDINGS
            self._held = ""
        elif not any(phrase.startswith(begun) for phrase in ENDINGS + HEADINGS):
            self._line_start = False
            return self._release()
        return ""

    def _release(self) -> str:
        held, self._held = self._held, ""
        self._said = self._said or bool(held.strip())
        return held
