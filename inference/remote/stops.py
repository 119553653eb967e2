"""Stop strings for servers that leave them in their text, or know them only as tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """`feed` returns the text that may be shown: what could begin a stop string is held back."""

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(each for each in stop if each)
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        if not self._stop or self.hit:
            return "" if self.hit else text
        self._held += text
        # A stop string acts at the character that completes it, so the one that ends first wins.
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.hit = True
            shown, self._held = self._held[: min(found)[1]], ""
            return shown
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back for a stop string that never came."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
