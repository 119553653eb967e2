"""What an answer may claim: markers only for sources that were given, and a source for every sentence.

`MarkerFilter` works on the stream, a piece at a time; `ground` on the whole answer at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from retrieval import Passage, Support


class Citation(msgspec.Struct, frozen=True, kw_only=True):
    """A sentence of the answer (`answer_start` to `answer_end`, characters) and the passage that supports it.

    `marker` counts the sources from 1; `start` and `end` are characters in the document's text, where
    `quote` stands.
    """

    marker: int
    passage_id: str
    document_id: str
    title: str
    source: str
    page: int | None
    start: int
    end: int
    quote: str
    similarity: float
    answer_start: int
    answer_end: int


class Unsupported(msgspec.Struct, frozen=True):
    """A sentence of the answer that no given passage supports."""

    start: int
    end: int
    text: str


class MarkerFilter:
    """Removes citation markers such as `[3]` or `[2, 7]` that name none of the sources given.

    A marker is `\\[\\d+(?:, ?\\d+)*\\]`; of a list, the numbers that exist survive.  One blank before a
    removed marker goes with it.  Code (between backticks) is left alone.  The output doesn't depend
    on how the text was cut into pieces, and each character is looked at once.
    """

    def __init__(self, sources: int):
        self._sources = sources
        self._held: list[str] = []  # a blank, or what may become a marker
        self._open = False  # is a "[" held?
        self._backticks = 0  # length of the run of backticks being read
        self._run_at_line_start = False
        self._code = 0  # length of the run that opened the code, 0 outside
        self._fenced = False
        self._line_start = True

    def feed(self, text: str) -> str:
        """The part of the stream that is certain after `text`."""
        out: list[str] = []
        for char in text:
            self._step(char, out)
        return "".join(out)

    def finish(self) -> str:
        """What was held back to the end."""
        return self._release()

    def _step(self, char: str, out: list[str]) -> None:
        if char == "`":
            if not self._backticks:
                self._run_at_line_start = self._line_start
            self._backticks += 1
        elif self._backticks:
            self._end_run()
        if self._code or self._backticks:
            out.append(self._release() + char)
            if char == "\n" and self._code and not self._fenced:
                self._code = 0  # an inline code span that never closed
        elif self._open:
            self._inside(char, out)
        elif char == "[":
            self._held.append(char)
            self._open = True
        elif char == " ":
            out.append(self._release())
            self._held.append(char)
        else:
            out.append(self._release() + char)
        self._line_start = char == "\n" or (self._line_start and char == " ")

    def _inside(self, char: str, out: list[str]) -> None:
        before = self._held[-1]
        if char == "]" and before.isascii() and before.isdigit():
            self._held.append(char)
            out.append(self._judge(self._release()))
        elif (
            (char.isascii() and char.isdigit())
            or (char == "," and before.isascii() and before.isdigit())
            or (char == " " and before == ",")
        ):
            self._held.append(char)
        else:
            out.append(self._release())
            if char in "[ ":
                self._held.append(char)
                self._open = char == "["
            else:
                out.append(char)

    def _release(self) -> str:
        held = "".join(self._held)
        self._held.clear()
        self._open = False
        return held

    def _judge(self, held: str) -> str:
        blank, _, inner = held.partition("[")
        numbers = [part.strip() for part in inner[:-1].split(",")]
        known = [number for number in numbers if len(number) < 6 and 1 <= int(number) <= self._sources]
        return f"{blank}[{', '.join(str(int(number)) for number in known)}]" if known else ""

    def _end_run(self) -> None:
        length, self._backticks = self._backticks, 0
        if not self._code:
            self._code = length
            self._fenced = length >= 3 and self._run_at_line_start
        elif (self._run_at_line_start and length >= self._code) if self._fenced else length == self._code:
            self._code, self._fenced = 0, False


def ground(
    answer: str,
    prefix: str,
    passages: Sequence[Passage],
    *,
    sentences: Callable[[str], list[tuple[int, int]]],
    support: Callable[[list[str], Sequence[Passage]], list[Support]],
) -> tuple[list[Citation], list[Unsupported]]:
    """Tie each sentence of `answer` to the passage that supports it, or report it as unsupported.

    `prefix` is how the reply was begun for the model: it says nothing, so it is left out of the comparison.
    """
    spans = [(start, end) for start, end in sentences(answer) if _says_something(answer[start:end])]
    if not spans:
        return [], []
    begun = len(prefix) if answer.startswith(prefix) else 0
    statements = [answer[max(start, begun) if end > begun else start : end].strip() for start, end in spans]
    position = {passage.passage_id: index for index, passage in enumerate(passages)}
    citations: list[Citation] = []
    unsupported: list[Unsupported] = []
    for (start, end), found in zip(spans, support(statements, passages), strict=True):
        index = position.get(found.passage_id) if found.passage_id is not None else None
        if index is None:
            unsupported.append(Unsupported(start, end, answer[start:end]))
            continue
        passage = passages[index]
        citations.append(
            Citation(
                marker=index + 1,
                passage_id=passage.passage_id,
                document_id=passage.document_id,
                title=passage.title,
                source=passage.source,
                page=passage.page,
                start=found.start,
                end=found.end,
                quote=found.quote,
                similarity=round(found.similarity, 4),
                answer_start=start,
                answer_end=end,
            )
        )
    return citations, unsupported


def _says_something(sentence: str) -> bool:
    return any(char.isalnum() for char in sentence)
