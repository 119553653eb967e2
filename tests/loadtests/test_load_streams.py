"""How the load test reads an answer: milestones at the first byte, and nothing cut counts as an answer."""

from __future__ import annotations

import itertools
import json

import pytest

from loadtests.questions import QUESTIONS, ZipfChoice
from loadtests.report import markdown, summarise
from loadtests.shapes import Spikes
from loadtests.streams import StreamFailed, read_events, watch_answer
from tests.loadtests.fake_desk import SOURCES, event

SOURCE = event("sources", SOURCES)
DELTA = event("delta", {"text": "héllo"})
USAGE = event("usage", {"usage": {"prompt_tokens": 9, "cached_tokens": None, "completion_tokens": 2}})
DONE = event("done", {"finish_reason": "stop"})


def ticking():
    return itertools.count(0).__next__


def test_milestones_are_the_first_bytes_of_their_events():
    pieces = [b": ping\n\n", SOURCE[:9], SOURCE[9:], DELTA, DELTA, b": ping\n\n", USAGE + DONE]
    seen = watch_answer(pieces, ticking())
    assert (seen.first_source, seen.first_token, seen.last_token, seen.done) == (1, 3, 4, 6)
    assert (seen.characters, seen.prompt_tokens, seen.cached_tokens, seen.completion_tokens) == (10, 9, 0, 2)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_events_read_the_same_wherever_they_are_cut(end: bytes):
    data = (SOURCE + DELTA + DONE).replace(b"\n", end)
    whole = [(e.name, e.data) for e in read_events([data], ticking())]
    assert [name for name, _ in whole] == ["sources", "delta", "done"]
    for at in range(len(data)):
        assert [(e.name, e.data) for e in read_events([data[:at], data[at:]], ticking())] == whole


def test_a_stream_cut_at_any_byte_is_truncated():
    data = SOURCE + DELTA + USAGE + DONE
    for at in range(len(data)):
        with pytest.raises(StreamFailed, match="truncated"):
            watch_answer([data[:at]], ticking())
    watch_answer([data], ticking())


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (SOURCE + event("error", {"code": "bad_upstream"}), "error event: bad_upstream"),
        (SOURCE + event("error", {}), "without a code"),
        (DELTA + DONE, "before the sources"),
        (SOURCE + DONE, "without sources or text"),
        (SOURCE + DELTA + event("done", {"finish_reason": "abort"}), "aborted"),
        (b"event: sources\ndata: {oops\n\n", "sources event is not JSON"),
    ],
)
def test_what_is_no_answer_fails_with_its_cause(data: bytes, says: str):
    with pytest.raises(StreamFailed, match=says):
        watch_answer([data], ticking())


def test_popular_questions_repeat_and_a_seed_repeats_the_choice():
    first, second = ZipfChoice(3), ZipfChoice(3)
    drawn = [first() for _ in range(2000)]
    assert drawn == [second() for _ in range(2000)]
    counts = [drawn.count(question) for question in QUESTIONS]
    assert counts[0] == max(counts) > 5 * counts[-1]
    assert len(set(QUESTIONS)) == len(QUESTIONS) >= 30


def test_spikes_rise_and_fall_and_end():
    spikes = Spikes(seconds=40, users=2, burst_users=10, every_seconds=20, burst_seconds=4)
    users = [spikes.users_at(second) for second in range(41)]
    assert users[:40] == 2 * ([2] * 8 + [12] * 4 + [2] * 8)
    assert users[40] is None
    assert Spikes(seconds=10, every_seconds=60, burst_seconds=2).users_at(5) == 10


def test_spikes_come_from_the_environment_and_name_a_bad_value():
    assert Spikes.from_environment({"LOAD_USERS": "5", "LOAD_SECONDS": "7.5"}) == Spikes(seconds=7.5, users=5)
    with pytest.raises(ValueError, match="LOAD_USERS='many'"):
        Spikes.from_environment({"LOAD_USERS": "many"})


def test_percentiles_are_measured_values():
    row = summarise([float(n) for n in range(1, 101)])
    assert (row["count"], row["p50_ms"], row["p99_ms"], row["max_ms"]) == (100, 50, 99, 100)
    assert summarise([7.0])["p95_ms"] == 7


def test_the_report_is_a_table_with_its_failures():
    record = {
        "command": "python -m loadtests.run",
        "backend": "scripted",
        "shape": {"seconds": 1.0, "users": 1, "burst_users": 1, "burst_seconds": 1.0, "every_seconds": 1.0},
        "milestones": {"answer": summarise([1.0, 2.0])},
        "failed": 2,
        "failures": {"answer: truncated": 2},
        "tokens": {},
        "environment": {
            "versions": {"python": "3"},
            "commit": "abc",
            "machine": {"cpu": "x", "cores": 2, "ram_gib": 4.0, "system": "Linux"},
        },
    }
    text = markdown(json.loads(json.dumps(record)))
    assert "| answer | 2 | 1.5 | 1 | 2 | 2 | 2 | 2 |" in text
    assert "- 2 × answer: truncated" in text
