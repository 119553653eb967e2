"""Files made (or broken) so that reading them takes for ever: each is read in a moment, as every other file is.

Where a reader's time grows with the square of such a file, 100 KB take it from ten seconds to minutes: a test here
then crawls rather than fails, and a limit on the run's time turns that into a failure.
"""

from __future__ import annotations

import pytest

from retrieval import UnreadableFile
from retrieval.formats.markdown import read_markdown
from retrieval.formats.reading import read_file
from retrieval.sentences import sentences
from retrieval.splitting import split

SIZE = 100_000
REPEATED = {
    "comments that don't end": "<!--",
    "comments in a line": "a <!-- ",
    "comments with long ends": "a <!-- ---> ",
    "tags": "<a ",
    "closing tags": "</",
    "line breaks": "<br ",
    "scripts": "<script",
    "styles": "<style>a</styl",
    "declarations": "a <!a ",
    "instructions": "a <? ",
    "brackets": "[",
    "links": "[a](",
    "link definitions": "[a]: ",
    "quotes": ">",
    "lists": "- ",
    "stars": "*a **a ",
    "underscores": "_a ",
    "backticks": "`a`` ",
    "tildes": "~~a ",
    "entities": "&#",
    "front matter": "---\n",
    "underlines": "====\n",
    "full stops": ". \" '",
    "abbreviations": "U.S. ",
    "blank lines": "\n \n",
}


@pytest.mark.parametrize("name", ["a.md", "block.md", "a.txt", "a.html"])
@pytest.mark.parametrize("unit", REPEATED.values(), ids=REPEATED.keys())
def test_repeated_marks_are_read_in_a_moment(unit: str, name: str):
    start = "<div>\nA block of HTML\n" if name == "block.md" else "A text\n\n"
    parsed = read_file(name, (start + unit * (SIZE // len(unit))).encode())
    sentences(parsed.text)
    split(parsed, len, 800, 1000)


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("a.csv", ""),
        ("a.csv", '"'),
        ("a.json", "["),
        ("a.json", '{"a":"'),
        ("a.jsonl", "1\n"),
        ("a.xml", "<a>"),
        ("a.rss", "<rss><item><description>"),
        ("a.eml", "From: a\nTo: b\nSubject: c\n"),
        ("a.eml", "From: a\nSubject: "),
        ("a.eml", "From: a\nContent-Type: text/html\n\n"),
        ("a", ""),
    ],
)
@pytest.mark.parametrize(
    "unit", ["<a>", "a,", "[", '"', "a: b\n", "\n ", "<?xml ", "=?utf-8?q?a?= ", "&amp;", "<!--", "(", "a@", "<,"]
)
def test_other_texts_are_read_or_refused_in_a_moment(name: str, before: str, unit: str):
    try:
        parsed = read_file(name, (before + unit * (SIZE // len(unit))).encode())
    except UnreadableFile:
        return
    split(parsed, len, 800, 1000)


def test_runs_of_backticks_of_every_length_are_read_in_a_moment():
    runs = "".join("`" * length + " " for length in range(1, 600))
    assert read_file("a.md", runs.encode()).text


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("one <!-- gone --> two", "one  two"),
        ("one <!-- gone ---> two", "one  two"),
        ("one <!--> two <!---> three", "one  two  three"),
        ("one <!-- two", "one <!-- two"),
        ("<div>\none <!-- gone ---> two\n</div>", "one two"),
        ("<div>\n<!-- <script> -->one\n</div>", "one"),
        ("<div>\none <!-- two <!-- gone -->\n<!-- three\n</div>", "one\n<!-- three"),
        ("`<!-- code -->`", "<!-- code -->"),
    ],
)
def test_only_whole_comments_go(markdown: str, text: str):
    assert read_markdown(markdown).text.strip() == text


def test_merge_keys_in_front_matter_do_not_multiply():
    keys = "".join(f"k{i}: &k{i} {{<<: [{', '.join([f'*k{i - 1}'] * 10)}]}}\n" for i in range(1, 13))
    page = f"---\nk0: &k0 {{a: 1}}\n{keys}title: A bomb\n---\nhello\n"
    assert (read_markdown(page).title, read_markdown(page).text.strip()) == ("A bomb", "hello")


@pytest.mark.parametrize(
    ("written", "title"),
    [
        ('"Ordering: a laptop"', "Ordering: a laptop"),
        ("2024-01-31", "2024-01-31"),
        ("0x" + "f" * 8000, "0x" + "f" * 298),
        (">-\n  two\n  lines", "two lines"),
        ("null", ""),
        ("[a, list]", ""),
    ],
)
def test_titles_of_front_matter_are_taken_as_written(written: str, title: str):
    assert read_markdown(f"---\ntitle: {written}\n---\nhello\n").title == title


@pytest.mark.parametrize("tag", ["div", "blockquote", "ul><li", "table><tr><td", "span"])
@pytest.mark.parametrize("depth", [150, 300, 5000, 100_000])
def test_deep_pages_lose_no_text(tag: str, depth: int):
    end = "".join(f"</{name}>" for name in reversed(tag.split("><")))
    page = f"<html><body><p>Before.</p>{f'<{tag}>' * depth}deep down{end * depth}<p>After it.</p></body></html>"
    text = read_file("a.html", page.encode()).text
    assert [piece for piece in ("Before.", "deep down", "After it.") if piece not in text] == []


def test_a_long_page_whose_main_text_is_a_crumb_is_read_whole():
    article = "<article><h1>Rooms</h1>" + "<p>Rooms are booked at the desk, for a day at most.</p>" * 6 + "</article>"
    rooms = "".join(f"<form><label>Room {i} seats {i} people and has a window</label></form>" for i in range(200))
    page = f"<html><body><nav>{'<a>Menu</a>' * 9}</nav>{article}{rooms}</body></html>"
    assert "Room 150 seats" in read_file("a.html", page.encode()).text
