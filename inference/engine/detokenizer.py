"""Tokens to text while they stream: never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Text of one answer as its tokens arrive.

    `push` returns what may be shown now.  What could still turn out to be the start of a stop string is held
    back; so are the bytes of an unfinished character (by `DecodeStream`, which looks at a bounded window).
    Once `stopped`, the text ends before the stop string and further tokens are not wanted.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self._shown: list[int] = []  # the tokens of the last piece
        self._unshown: list[int] = []  # those since: they end inside a character, so far
        self.stopped = False

    def push(self, token: int) -> str:
        if self.stopped:
            return ""
        self._unshown.append(token)
        piece = self._stream.step(self._tokenizer, token)
        if not piece:
            return ""
        self._shown, self._unshown = self._unshown, []
        return self._without_stop(piece)

    def _without_stop(self, piece: str) -> str:
        if not self._stop:
            return piece
        self._held += piece
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max(_overlap(self._held, s) for s in self._stop)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """What was held back for a stop string that never came, or stands before a character that never ended."""
        text = ""
        if self._unshown and not self.stopped:
            decode = self._tokenizer.decode
            text = decode(self._shown + self._unshown)[len(decode(self._shown)) :].rstrip("\ufffd")
            text = self._without_stop(text) if text else ""
        text, self._held = text + self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
