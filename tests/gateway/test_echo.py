"""The prompt's own words stay out of the answer."""

from __future__ import annotations

import pytest

from gateway.echo import EchoFilter


def shown(text: str, size: int = 1) -> tuple[str, bool]:
    echo = EchoFilter()
    out = "".join(echo.feed(text[at : at + size]) for at in range(0, len(text), size))
    return out + echo.finish(), echo.ended


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("text", "left", "ended"),
    [
        ("You get 13 days.\n\nQuestion: How much leave?\nAnswer: 13", "You get 13 days.\n\n", True),
        ('"The sentences closest to the question:\n- Tuples are.', "\n- Tuples are.", False),
        ("The conversation so far:\nUser: hi", "\nUser: hi", False),
        ("Question: what is it? It is a list.", " what is it? It is a list.", False),
        ("Answer: It is a list.", " It is a list.", False),
        ("It is.\nQuestions are answered on Monday.", "It is.\nQuestions are answered on Monday.", False),
        ("One.\n- The sentences close", "One.\n- The sentences close", False),
        ('He asked the "Question: why" of it.\n\n"Answer', 'He asked the "Question: why" of it.\n\n"Answer', False),
        ("", "", False),
    ],
)
def test_the_prompts_own_headings_are_not_shown(text: str, left: str, ended: bool, size: int):
    assert shown(text, size) == (left, ended)
