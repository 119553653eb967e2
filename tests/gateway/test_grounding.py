"""Markers that name no source never reach the reader, however the stream is cut; sentences find their source."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.grounding import MarkerFilter, ground
from tests.gateway.fakes import FakeLibrary, sentence_spans

MARKER = re.compile(r" ?\[(\d+(?:, ?\d+)*)\]")


def filtered(text: str, sources: int, sizes: list[int] | None = None) -> str:
    markers, out, at = MarkerFilter(sources), [], 0
    for size in sizes or [1] * len(text):
        out.append(markers.feed(text[at : at + size]))
        at += size
    out.append(markers.feed(text[at:]))
    return "".join(out) + markers.finish()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Prime it [1].", "Prime it [1]."),
        ("Prime it [7].", "Prime it."),
        ("Prime it [2, 7] now", "Prime it [2] now"),
        ("Prime it [1,2] now", "Prime it [1, 2] now"),
        ("[0] and [4]", " and"),
        ("an unfinished [12", "an unfinished [12"),
        ("no marker [1 2] [a] []", "no marker [1 2] [a] []"),
        ("[[9]]", "[]"),
        ("index `a[9]` but not [9].", "index `a[9]` but not."),
        ("```\nx[9]\n```\nand [9] out", "```\nx[9]\n```\nand out"),
        ("an open ` tick [9]\nnext [9] line", "an open ` tick [9]\nnext line"),
        ("eastern digits [٣]", "eastern digits [٣]"),
    ],
)
def test_only_markers_of_given_sources_survive(text: str, expected: str):
    assert filtered(text, sources=3) == expected


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(alphabet="[]0123459, `\nab", max_size=60), st.lists(st.integers(0, 9), max_size=30), st.integers(0, 5))
def test_cutting_the_stream_changes_nothing(text: str, sizes: list[int], sources: int):
    whole = MarkerFilter(sources)
    assert filtered(text, sources, sizes) == whole.feed(text) + whole.finish()


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(alphabet="[]0123459, \nab", max_size=60), st.integers(0, 5))
def test_outside_code_it_is_the_regular_expression(text: str, sources: int):
    def judge(match: re.Match[str]) -> str:
        known = [str(n) for n in map(int, match[1].split(",")) if 1 <= n <= sources]
        blank = " " if match[0].startswith(" ") else ""
        return f"{blank}[{', '.join(known)}]" if known else ""

    assert filtered(text, sources) == MARKER.sub(judge, text)


def test_a_long_run_of_digits_is_read_once():
    """Onyx's nested quantifier pinned a core on these; every character here is looked at once."""
    text = "[" + "1" * 200_000
    assert filtered(text, sources=3) == text
    assert filtered("[" + "1, " * 50_000 + "9]", sources=3).count("1") == 50_000


def test_sentences_are_tied_to_their_passage():
    library = FakeLibrary()
    library.add("Pumps", "The pump must be primed before starting.\n\nThe valve opens at two bars.")
    passages = library.whole.search("pump valve", top_k=4).passages
    answer = "According to the document, the pump must be primed before starting. Ice cream tastes wonderful. …"
    citations, unsupported = ground(
        answer, "According to the document, ", passages, sentences=sentence_spans, support=library.whole.support
    )
    assert [answer[c.answer_start : c.answer_end] for c in citations] == [answer[:67]]
    source = passages[citations[0].marker - 1]
    assert citations[0].passage_id == source.passage_id
    assert citations[0].quote == "The pump must be primed before starting."
    assert [u.text.strip() for u in unsupported] == ["Ice cream tastes wonderful."]


def test_the_begun_reply_is_not_part_of_the_claim():
    asked: list[str] = []

    def support(statements, passages):
        asked.extend(statements)
        return FakeLibrary().support(statements, passages)

    ground(
        "According to the document, yes.", "According to the document, ", [], sentences=sentence_spans, support=support
    )
    assert asked == ["yes."]
