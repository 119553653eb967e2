"""Sentence spans and passages lie exactly in their text, and cover it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.formats.parsed import Block, Parsed, Section
from retrieval.formats.reading import read_file
from retrieval.formats.underlined import read_text
from retrieval.sentences import MAX_SENTENCE, sentences
from retrieval.splitting import split
from retrieval.stored import NewPassage

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
@given(
    PROSE, st.lists(st.integers(0, 2500), max_size=5), st.integers(10, 60), st.sets(st.integers(0, 2500), max_size=6)
)
def test_passages_tile_the_text(text: str, cuts: list[int], target: int, edges: set[int]):
    starts = sorted({0, *(cut for cut in cuts if cut < len(text))})
    parsed = Parsed(text, "t", "text/plain", [Section(start, (f"h{start}",)) for start in starts], starts)
    edges = sorted(min(edge, len(text)) for edge in edges)
    parsed.blocks = [
        Block(*pair, named=True) for pair in zip(edges[::2], edges[1::2], strict=False) if pair[0] < pair[1]
    ]
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


ROWS = [f"Pump {number} | {number * 7} litres | tested on day {number}" for number in range(40)]


def table(rows: int) -> str:
    return "\n".join(["| Name | Volume | Tests |", "|-|-|-|", *(f"| {row} |" for row in ROWS[:rows])])


def passages_of(text: str, target: int = 100, most: int = 130, name: str = "a.md") -> list[NewPassage]:
    return split(read_file(name, text.encode()), count_words, target, most)


@pytest.mark.parametrize("before", range(0, 60, 3))
def test_a_table_that_fits_a_passage_is_in_one(before: int):
    prose = "The pumps are old and loud. " * before
    text = f"# Pumps\n\n{prose}\n\nThese are tested:\n\n{table(9)}\n\n{prose}"
    whole = "Name | Volume | Tests\n" + "\n".join(ROWS[:9])
    passages = passages_of(text)
    assert [whole in passage.text for passage in passages].count(True) == 1
    assert max(count_words(passage.text) for passage in passages) <= 130


@pytest.mark.parametrize("before", [0, 14_000, 19_800])
def test_a_table_is_whole_wherever_a_long_text_is_cut(before: int):
    parsed = Parsed(
        "word " * (before // 5) + "\n" + "\n".join(ROWS[:9]) + "\n" + "word\n" * 4000, "", "", [Section(0, ())]
    )
    start = parsed.text.index(ROWS[0])
    parsed.blocks = [Block(start, start + len("\n".join(ROWS[:9])))]
    assert any("\n".join(ROWS[:9]) in passage.text for passage in split(parsed, count_words, 100, 130))


def test_a_longer_table_is_cut_between_rows_and_its_parts_name_the_columns():
    passages = passages_of(f"# Pumps\n\nThese are tested:\n\n{table(40)}\n\nThat is all.\n")
    for row in ROWS:
        assert [row in passage.text.split("\n") for passage in passages].count(True) == 1
    assert [passage.heading for passage in passages] == [
        "Pumps",
        *["Pumps > Name | Volume | Tests"] * (len(passages) - 1),
    ]
    sizes = [count_words(passage.text) for passage in passages]
    assert min(sizes) > 60, "even parts"
    assert max(sizes) <= 130
    assert passages[0].text.startswith("Pumps\n\nThese are tested:\n\nName | Volume | Tests\nPump 0 |")
    assert passages[-1].text.endswith("\n\nThat is all.")


def test_a_row_is_cut_only_where_it_fits_no_passage():
    cell = "It was mended in spring. " * 30
    rows = ["Name,Note", "Pump 1,short", f"Pump 2,{cell}", "Pump 3,short"]
    passages = passages_of("\n".join(rows), name="a.csv")
    assert passages[0].text.startswith("Name: Pump 1 | Note: short")
    assert passages[-1].text.endswith("Name: Pump 3 | Note: short")
    assert len(passages) > 1
    assert {passage.heading for passage in passages} == {""}, "each row names its columns itself"


def test_code_is_cut_between_lines():
    lines = [f"value_{number} = compute({number}, more={number * 3})" for number in range(60)]
    small = "\n\n".join(lines[:6])
    passages = passages_of(
        f"{'Words about code. ' * 20}\n\n```\n{small}\n```\n\nMore.\n\n```\n{chr(10).join(lines)}\n```\n"
    )
    assert any(small in passage.text for passage in passages), "whole, though it has blank lines"
    for line in lines[6:]:
        assert [line in passage.text.split("\n") for passage in passages].count(True) == 1


def test_a_heading_goes_with_its_table():
    text = "".join(f"## Part {part}\n\n{table(12)}\n\n" for part in range(6))
    passages = passages_of(text)
    assert [passage.text.split("\n")[0] for passage in passages] == [f"Part {part}" for part in range(6)]


def test_a_last_line_goes_with_the_table_before_it():
    assert len(passages_of(f"{table(12)}\n\nThat is all.\n")) == 1


def test_rows_of_any_length_that_fits_are_whole():
    rows = [
        f"{letter} | {letter * 70 * size}" for size, letter in zip((7, 1, 7, 1, 2, 3, 5, 6), "abcdefgh", strict=True)
    ]
    parsed = Parsed("\n".join(rows) + "\n", "", "", [Section(0, ())])
    parsed.blocks = [Block(0, len(parsed.text))]
    lines = [line for passage in split(parsed, count_words, 100, 130) for line in passage.text.split("\n")]
    assert lines == rows
