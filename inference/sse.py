"""Server-sent events out of bytes that may be cut anywhere (WHATWG HTML, section 9.2.6)."""

from __future__ import annotations

import re

import msgspec

_LINE_END = re.compile(rb"\r\n|\n|\r")


class ServerEvent(msgspec.Struct, frozen=True):
    """`data` stays bytes: what reads it decides on its encoding."""

    event: str
    data: bytes


class EventTooLarge(Exception):
    """An event outgrew the reader's bound, so that a broken server can't fill the memory."""


class EventReader:
    """Feed it bytes as they arrive; it gives the events that became complete.

    Lines end in LF, CRLF or CR; the space after the colon may be missing; comments, ids and
    unknown fields are skipped; a character split between two reads is whole again in its line.
    """

    def __init__(self, max_event_bytes: int = 1 << 20):
        self._max_event_bytes = max_event_bytes
        self._rest = b""
        self._started = False
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._event = ""

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that `chunk` completes.  Raises EventTooLarge."""
        buffer = self._rest + chunk if self._rest else chunk
        searched = max(0, len(self._rest) - 1)  # a CR may wait at the end of the rest
        events: list[ServerEvent] = []
        start = 0
        for end in _LINE_END.finditer(buffer, searched):
            if end.group() == b"\r" and end.end() == len(buffer):
                break  # its LF may be on the way
            event = self._line(buffer[start : end.start()])
            start = end.end()
            if event is not None:
                events.append(event)
        self._rest = buffer[start:]
        if len(self._rest) + self._data_bytes > self._max_event_bytes:
            raise EventTooLarge(f"a server-sent event is longer than {self._max_event_bytes} bytes")
        return events

    def flush(self) -> ServerEvent | None:
        """What a server left without its empty line at the end of the stream: perhaps half an event."""
        rest, self._rest = self._rest.rstrip(b"\r"), b""
        return (self._line(rest) if rest else None) or self._line(b"")

    def _line(self, line: bytes) -> ServerEvent | None:
        if not self._started:
            self._started = True
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(value) + 1
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        return None

    def _dispatch(self) -> ServerEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._data_bytes = [], "", 0
        return ServerEvent(event or "message", b"\n".join(data)) if data else None
