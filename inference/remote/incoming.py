"""What has arrived for one request, and where it stands."""

from __future__ import annotations

import asyncio
import collections

from inference.backend import Finished, FinishReason, TextDelta, Usage
from inference.errors import BackendError
from inference.remote.stops import StopStrings
from inference.remote.wire import Call, Chunk

EVENTS_AHEAD = 1024  # a reader slower than this holds the server back
GRACE_SECONDS = 2.0  # for usage and [DONE] once the answer is whole, and for closing
TOKENS_OVER = 16  # some servers finish a character after max_tokens


class Incoming:
    """Filled by the pump, emptied by the reader.  `answering`: the response's head has arrived."""

    def __init__(self, max_tokens: int) -> None:
        self.events: collections.deque[TextDelta | Finished | BackendError] = collections.deque()
        self.wake = asyncio.Event()
        self.drained = asyncio.Event()
        self.pump: asyncio.Task[None] | None = None
        self.deadline: asyncio.Timeout | None = None
        self.answering = False
        self.stopped = False
        self.ended = False
        self.tokens = 0
        self._unshown = 0  # tokens that have given no text yet: half a character, or the beginning of a stop string
        self.reason: FinishReason | None = None
        self.corrected = False
        self.max_tokens = max_tokens
        self._told: Usage | None = None
        self._prompt_tokens: int | None = None
        self._stops = StopStrings(())

    def expect(self, call: Call) -> None:
        self._stops = StopStrings(call.stop)
        self._prompt_tokens = call.prompt_tokens

    @property
    def usage(self) -> Usage:
        """As the server tells it; else our own count, and of the prompt what is known."""
        return self._told or Usage(self._prompt_tokens, self.tokens)

    @property
    def full(self) -> bool:
        return len(self.events) >= EVENTS_AHEAD

    @property
    def cut_short(self) -> bool:
        """A stop string ended the answer, whatever the server still has to say."""
        return self._stops.hit

    def put(self, event: TextDelta | Finished | BackendError) -> None:
        self.events.append(event)
        self.wake.set()

    def stop(self) -> None:
        """Cancel the pump, once: a second cancellation would hit it while it closes the connection."""
        if self.stopped:
            return
        self.stopped = True
        self.wake.set()
        if self.pump is not None:
            self.pump.cancel()

    def allow(self, seconds: float | None) -> None:
        """The pump may take this long from now; None: as long as it likes."""
        if self.deadline is not None and not self.deadline.expired():
            self.deadline.reschedule(None if seconds is None else asyncio.get_running_loop().time() + seconds)

    def take(self, chunk: Chunk, token_timeout: float) -> None:
        if chunk.usage is not None:
            self._believe(chunk.usage)
        self.tokens += chunk.tokens
        self._unshown += chunk.tokens
        if text := self._stops.feed(chunk.text):
            self.put(TextDelta(text, max(1, self._unshown)))
            self._unshown = 0
        reason = "stop" if self._stops.hit else chunk.finish_reason
        if reason is not None:
            self.reason = reason
        if chunk.tokens or reason is not None:
            self.allow(token_timeout if self.reason is None else min(token_timeout, GRACE_SECONDS))

    def end(self, *, done: bool = False) -> bool:
        """Put the Finished, if the answer is whole: it gave a reason, or was `done` after some tokens."""
        if self.reason is None and done and self.tokens:
            self.reason = "length" if self.usage.completion_tokens >= self.max_tokens else "stop"
        if self.reason is not None and not self.ended:
            self.ended = True
            if text := self._stops.flush():
                self.put(TextDelta(text, max(1, self._unshown)))
            self.put(Finished(self.reason, self.usage))
        return self.ended

    def _believe(self, usage: Usage) -> None:
        """Servers have been seen to tell nonsense; then our own count holds."""
        prompt, cached = usage.prompt_tokens, usage.cached_tokens
        self.corrected = (
            not 0 <= usage.completion_tokens <= self.max_tokens + TOKENS_OVER
            or (prompt is not None and prompt < 0)
            or (cached is not None and not 0 <= cached <= (cached if prompt is None else prompt))
        )
        known = self._prompt_tokens if prompt is None else prompt
        self._told = None if self.corrected else Usage(known, usage.completion_tokens, cached)
