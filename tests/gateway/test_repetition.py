"""A model that loops is stopped at its first repeated sentence, and nobody sees the repetition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.repetition import RepetitionGuard

RAISE = 'The "raise" statement raises exceptions.'


def guarded(text: str, size: int = 1) -> tuple[str, bool]:
    guard = RepetitionGuard()
    shown = "".join(guard.feed(text[at : at + size]) for at in range(0, len(text), size))
    return shown + guard.finish(), guard.repeating


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_loop_ends_at_its_first_turn(size: int):
    loop = f"First of all.\n- {RAISE}\n- {RAISE}\n- {RAISE}\n"
    assert guarded(loop, size) == (f"First of all.\n- {RAISE}", True)


@pytest.mark.parametrize(
    "text",
    [
        "Yes. Yes. Yes. No.",
        "Use it e.g. for the files of the house. Use it e.g. for the sockets of the house.",
        f'{RAISE} The "raise" statement raises exceptions, or raises them again.',
        "",
    ],
)
def test_what_only_begins_alike_is_left_alone(text: str):
    assert guarded(text) == (text, False)


def test_a_loop_cut_by_the_token_limit_leaves_no_half_repetition():
    assert guarded(f"{RAISE} {RAISE[:-5]}") == (RAISE, False)


@pytest.mark.parametrize(("text", "left"), [("One.\n-", "One."), ("One.\n 2.", "One."), ("One.\n-1", "One.\n-1")])
def test_an_answer_cut_short_ends_in_no_lone_bullet(text: str, left: str):
    guard = RepetitionGuard()
    assert guard.feed(text) + guard.finish(cut=True) == left
    guard = RepetitionGuard()
    assert guard.feed(text) + guard.finish() == text


@pytest.mark.parametrize("period", ["dynamic, ", "Microsoft Corporation | ", "ID: TM-447821 and "])
@pytest.mark.parametrize("size", [1, 7])
def test_a_few_words_that_follow_themselves_are_stopped(period: str, size: int):
    shown, repeating = guarded(f"Python is a {period * 40}", size)
    assert repeating
    assert shown.rstrip(" |") == f"Python is a {period * 4}".rstrip(" |")


@pytest.mark.parametrize(
    "text", ["It is very, very, very good. ", "1 1 1 1 1 0 0 0 0 0 1 1 ", "no no no no no no yes "]
)
def test_a_little_emphasis_is_left_alone(text: str):
    assert guarded(text) == (text, False)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(alphabet='ab. \n"', max_size=80), st.integers(1, 10))
def test_cutting_the_stream_changes_nothing(text: str, size: int):
    assert guarded(text, size) == guarded(text, 1)
