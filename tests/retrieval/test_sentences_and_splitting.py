"""Sentence spans and passages lie exactly in their text, and cover it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.formats.parsed import Parsed, Section
from retrieval.formats.underlined import read_text
from retrieval.sentences import MAX_SENTENCE, sentences
from retrieval.splitting import split

PROSE = st.text(
    st.sampled_from(list("ab Ab.  !?\n\n-*1)'\"“”,;:…。é日😀\t#")) | st.characters(exclude_categories=["Cs"]),
    max_size=2500,
)


def texts(text: str) -> list[str]:
    return [text[start:end] for start, end in sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        (
            "Dr. Smith met J. R. Jones at 5 p.m. sharp. They left.",
            ["Dr. Smith met J. R. Jones at 5 p.m. sharp.", "They left."],
        ),
        ("It costs 3.50 euros, e.g. at noon. Ask.", ["It costs 3.50 euros, e.g. at noon.", "Ask."]),
        ("He lives in the U.S. Army base. Fine.", ["He lives in the U.S. Army base.", "Fine."]),
        (
            "The Revd . Adam Sedgwick wrote . He felt `` pain . '' Then he left .",
            ["The Revd . Adam Sedgwick wrote .", "He felt `` pain . ''", "Then he left ."],
        ),
        (
            "Apples\n\n- red ones\n- green ones\n1. first\n2. second",
            ["Apples", "- red ones", "- green ones", "1. first", "2. second"],
        ),
        ("She said “Stop.” Then she ran.", ["She said “Stop.”", "Then she ran."]),
        ("wrapped\nover lines. Next\none.", ["wrapped\nover lines.", "Next\none."]),
        ("今日は雨です。明日は晴れ。", ["今日は雨です。", "明日は晴れ。"]),
        ("He waited ... and left. See Fig. 3 and No. 5.", ["He waited ... and left.", "See Fig. 3 and No. 5."]),
        ("   \n ", []),
        ("", []),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text: str, expected: list[str]):
    assert texts(text) == expected


@settings(derandomize=True, max_examples=200, deadline=None)
@given(PROSE)
def test_sentence_spans_are_ordered_trimmed_and_cover_the_text(text: str):
    last = 0
    for start, end in sentences(text):
        assert last <= start < end <= len(text)
        assert not text[last:start].strip()
        assert text[start:end] == text[start:end].strip()
        assert end - start <= MAX_SENTENCE
        last = end
    assert not text[last:].strip()


def test_a_huge_run_without_stops_is_cut():
    assert all(len(piece) <= MAX_SENTENCE for piece in texts("word " * 20_000 + "x" * 20_000))


def count_words(text: str) -> int:
    return len(text) // 4 + 1


@settings(derandomize=True, max_examples=150, deadline=None)
@given(PROSE, st.lists(st.integers(0, 2500), max_size=5), st.integers(10, 60))
def test_passages_tile_the_text(text: str, cuts: list[int], target: int):
    starts = sorted({0, *(cut for cut in cuts if cut < len(text))})
    parsed = Parsed(text, "t", "text/plain", [Section(start, (f"h{start}",)) for start in starts], starts)
    last = 0
    for passage in split(parsed, count_words, target, target + 10):
        assert passage.text == text[passage.start : passage.end]
        assert passage.text.strip()
        assert last <= passage.start
        assert not text[last : passage.start].strip()
        assert passage.page == sum(start <= passage.start for start in starts)
        last = passage.end
    assert not text[last:].strip()


def test_passages_fit_the_embedder_whatever_the_script():
    dense = "".join(chr(0x4E00 + i % 5000) for i in range(6000))
    one_per_character = split(Parsed(dense, "", "text/plain", [Section(0, ())]), len, 180, 220)
    assert max(len(passage.text) for passage in one_per_character) <= 220


def test_a_file_of_one_huge_line_is_split_in_bounded_pieces():
    parsed = read_text("word " * 60_000 + "x" * 50_000, "")
    passages = split(parsed, lambda text: len(text.split()), 180, 220)
    assert max(len(passage.text) for passage in passages) <= 220 * 9


def test_headings_give_the_path_and_small_sections_share_a_passage():
    lines = "Guide\n*****\n\nIntro.\n\n\nFirst\n=====\n\n" + "A fact of the first part. " * 60
    lines += "\n\n\nSecond\n======\n\nShort.\n\n\nThird\n=====\n\nShort too.\n"
    parsed = read_text(lines, "", "text/x-rst")
    assert parsed.title == "Guide"
    assert "====" not in parsed.text
    passages = split(parsed, count_words, 100, 130)
    assert [section.path for section in parsed.sections] == [
        ("Guide",), ("Guide", "First"), ("Guide", "Second"), ("Guide", "Third")
    ]  # fmt: skip
    assert passages[-1].text.endswith("Short too.")
    assert passages[-1].heading == "Guide"
    assert any(passage.heading == "Guide > First" for passage in passages) or passages[0].heading == "Guide"
