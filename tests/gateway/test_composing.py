"""Prompts share: two questions over the same passages have the same text up to the question."""

from __future__ import annotations

import pytest

from gateway.composing import SHAPES, Turn, compose
from inference import Capabilities
from tests.gateway.fakes import FakeLibrary

CONTINUES = Capabilities(model="m", continues_reply=True)


@pytest.fixture
def passages():
    library = FakeLibrary()
    library.add("Pumps", "The pump must be primed.\n\nThe valve opens at two bars.")
    return library.whole.search("pump", top_k=2).passages


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_documents_come_first_and_never_change(shape, passages):
    hints = FakeLibrary().quotes("pump", passages, count=3)
    first = compose(shape, "When?", passages, hints=hints, capabilities=CONTINUES)
    second = compose(
        shape, "Why?", passages, history=[Turn("user", "Hello?")], instructions="Be kind.", capabilities=CONTINUES
    )
    for prompt in (first, second):
        documents = [s for m in prompt.messages for s in m.segments if s.kind == "document"]
        assert [s.document_id for s in documents] == [p.passage_id for p in passages]
        assert not any(char.isdigit() for s in documents for char in s.text)
        assert prompt.messages[-1].segments[-1].kind == "question"
    assert first.messages[0] == second.messages[0]
    shared = len(passages)
    assert first.messages[1].segments[:shared] == second.messages[1].segments[:shared]


def test_every_block_ends_with_its_own_separator(passages):
    prompt = compose(SHAPES["plain"], "When?", passages, capabilities=CONTINUES)
    user = prompt.messages[1]
    assert user.text == "".join(s.text for s in user.segments)
    assert all(s.text.endswith("\n\n") for s in user.segments if s.kind == "document")
    assert user.text.endswith("Question: When?")


def test_the_closest_sentences_are_repeated_before_the_question(passages):
    hints = FakeLibrary().quotes("pump", passages, count=3)
    text = (
        compose(SHAPES["quoted"], "When?", passages, hints=hints, capabilities=CONTINUES).messages[1].segments[-1].text
    )
    assert text.index("- The pump must be primed.") < text.index("Question: When?")
    assert "closest" not in compose(SHAPES["quoted"], "When?", passages, capabilities=CONTINUES).messages[1].text


def test_history_and_instructions_stand_between_documents_and_question(passages):
    prompt = compose(
        SHAPES["plain"],
        "And why?",
        passages,
        history=[Turn("user", "When?"), Turn("assistant", "Before starting.")],
        instructions="Be kind.",
        capabilities=CONTINUES,
    )
    kinds = [s.kind for s in prompt.messages[1].segments]
    assert kinds == ["document", "document", "history", "history", "question"]
    assert "User: When?\nAssistant: Before starting." in prompt.messages[1].text


def test_the_reply_is_begun_only_where_the_backend_can_continue_it(passages):
    begun = compose(SHAPES["quoted"], "When?", passages, capabilities=CONTINUES)
    plain = compose(SHAPES["quoted"], "When?", passages, capabilities=Capabilities(model="m"))
    assert begun.reply_prefix == "According to the document,"
    assert plain.reply_prefix == ""


def test_braces_in_a_question_are_only_text(passages):
    prompt = compose(SHAPES["plain"], "What is {question} or {0}?", passages, capabilities=CONTINUES)
    assert prompt.messages[1].text.endswith("Question: What is {question} or {0}?")
