"""What a server says, and when: the same for all protocols."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

WORDS = ("Ordnung", "naïve", "漢字", "🙂", "plain", "words", "of", "the", "answer", "flow")


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(slots=True, kw_only=True)
class Script:
    """At once, or held back by events that a test sets; after `endless_after` tokens nothing comes any more."""

    model: str = "fake"
    words: tuple[str, ...] = WORDS
    max_context: int = 4096
    cached_tokens: int | None = None
    fail_before: bool = False
    fail_after: int | None = None
    endless_after: int | None = None
    hold_first: asyncio.Event = field(default_factory=_set_event)
    hold_after_first: asyncio.Event = field(default_factory=_set_event)

    def spoken(
        self, max_tokens: int, stop: Sequence[str] = (), endless: bool = False, keeps_stop: bool = False
    ) -> Iterator[tuple[str, str | None]]:
        """Texts of tokens, the last with why it is the last."""
        words = self.words * (max_tokens // len(self.words) + 1) if endless else self.words
        reason = "length" if max_tokens <= len(words) else "stop"
        words = words[:max_tokens]
        for number, word in enumerate(words, 1):
            text = word if number == 1 else " " + word
            if ends := [(text.index(each), len(each)) for each in stop if each in text]:
                at, length = min(ends)
                yield text[: at + length] if keeps_stop else text[:at], "stop"
                return
            yield text, reason if number == len(words) else None

    async def held(self, said: int) -> None:
        await self.hold_after_first.wait()
        if said == self.endless_after:
            await asyncio.Event().wait()
