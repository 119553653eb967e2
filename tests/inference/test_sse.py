"""Server-sent events read the same however the network cuts them, and can't fill the memory."""

from __future__ import annotations

import collections
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.sse import EventReader, EventTooLarge, ServerEvent


def read(pieces: list[bytes]) -> list[ServerEvent]:
    reader = EventReader()
    events = [event for piece in pieces for event in reader.feed(piece)]
    last = reader.flush()
    return [*events, last] if last else events


line = st.sampled_from(
    [b"data: a", b"data:b", b"data", b"event: error", b": ping", b"id: 1", b"data:  c", b"junk", b""]
)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(line, st.sampled_from([b"\n", b"\r\n", b"\r"])), max_size=12),
    st.lists(st.integers(0, 120), max_size=8),
)
def test_cuts_change_nothing(lines: list[tuple[bytes, bytes]], cuts: list[int]):
    data = b"".join(text + end for text, end in lines)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    assert read(pieces) == read([data]) == read([data[n : n + 1] for n in range(len(data))])


def test_fields_by_the_standard():
    data = b"\xef\xbb\xbfevent: x\ndata: one\ndata:two\n\n: c\n\nevent: lost\n\ndata:  three\r\n\r\ndata\r\rdata: end"
    assert [(e.event, e.data) for e in read([data])] == [
        ("x", b"one\ntwo"),
        ("message", b" three"),
        ("message", b""),
        ("message", b"end"),
    ]


@pytest.mark.parametrize("piece", [b"x" * 100, b"data: x\n" * 10, b"data:\n" * 100])
def test_an_endless_event_is_refused(piece: bytes):
    feed = EventReader(max_event_bytes=10_000).feed
    with pytest.raises(EventTooLarge, match="10000 bytes"):
        collections.deque(map(feed, itertools.repeat(piece, 10_000)))
