"""Every file becomes text with structure, or is refused with a reason that a person understands."""

from __future__ import annotations

import pypdfium2
import pytest

from retrieval import UnreadableFile, sample_documents
from retrieval.formats.decoding import is_utf8
from retrieval.formats.reading import read_file

MARKDOWN = b"""---
title: "Ordering a laptop"
redirect_from: [/laptops/]
---
<!-- a note -->
Ask **IT** for a [laptop](https://example.org/form).
It takes a week.

## Before you start

1. Find your *cost centre*
2. Choose a model

| Model | Price |
|-------|-------|
| Small | 900 |

```sh
order --now
```
"""


def empty_pdf(pages: int = 1) -> bytes:
    import io

    document = pypdfium2.PdfDocument.new()
    for _ in range(pages):
        document.new_page(200, 200)
    buffer = io.BytesIO()
    document.save(buffer)
    document.close()
    return buffer.getvalue()


def test_markdown_reads_as_text_with_headings_at_their_offsets():
    parsed = read_file("laptop.md", MARKDOWN)
    assert parsed.title == "Ordering a laptop"
    assert parsed.text.startswith("Ask IT for a laptop. It takes a week.\n")
    assert "1. Find your cost centre\n2. Choose a model" in parsed.text
    assert "Small | 900" in parsed.text
    assert "order --now" in parsed.text
    assert not any(mark in parsed.text for mark in ("**", "](", "<!--", "redirect_from", "```"))
    section = parsed.sections[-1]
    assert section.path == ("Before you start",)
    assert parsed.text[section.start :].startswith("Before you start\n")


def test_nested_headings_make_a_path():
    parsed = read_file("a.md", b"# A\n\nx\n\n## B\n\ny\n\n### C\n\nz\n\n## D\n\nw\n")
    assert [section.path for section in parsed.sections] == [("A",), ("A", "B"), ("A", "B", "C"), ("A", "D")]
    assert parsed.title == "A"


@pytest.mark.parametrize("front", ["---\ntitle: [broken\n---\n", "---\n- list\n---\n", "---\ntitle:\n---\n"])
def test_odd_front_matter_does_not_stop_a_file(front: str):
    assert "Hello there" in read_file("a.md", (front + "Hello there").encode()).text


def test_html_keeps_the_main_text_and_its_headings():
    body = "".join(
        f"<p>Paragraph {i} of the page tells one more thing about the subject at hand.</p>" for i in range(9)
    )
    body = f"<nav>Home</nav><h1>Top</h1>{body}<h2>Next</h2>{body}"
    page = f"<html><head><title>Subject</title></head><body>{body}</body></html>"
    parsed = read_file("page.html", page.encode())
    assert parsed.title == "Subject"
    assert ("Top", "Next") in [section.path for section in parsed.sections]
    assert "Paragraph 3" in parsed.text
    assert "<p>" not in parsed.text


def test_html_without_a_main_text_gives_what_is_visible():
    parsed = read_file(
        "x.html", b"<html><body><script>secret()</script><td>cell one</td><td>cell two</td></body></html>"
    )
    assert "cell one" in parsed.text
    assert "secret" not in parsed.text


def test_a_page_without_a_main_text_keeps_its_headings_and_tables():
    rows = "".join(f"<tr><td><a href='/{room}'>Room {room}</a></td><td>{room} chairs</td></tr>" for room in range(9))
    table = f"<table><tr><th>Name</th><th>Chairs</th></tr>{rows}</table>"
    page = f"<p>Hello.</p><div class='footer'><h1>Rooms</h1>{table}<ul><li>one</li></ul></div>"
    parsed = read_file("x.html", f"<html><body>{page}</body></html>".encode())
    assert parsed.text.startswith("Hello.\n\nRooms\n\nName | Chairs\nRoom 0 | 0 chairs\nRoom 1 | 1 chairs\n")
    assert parsed.text.endswith("Room 8 | 8 chairs\n\n- one\n\n")
    assert [section.path for section in parsed.sections] == [(), ("Rooms",)]
    assert len(parsed.blocks) == 1


def test_html_of_another_name_is_still_html():
    assert "<p>" not in read_file("x.txt", b"<!DOCTYPE html><html><body><p>Just a paragraph.</p></body></html>").text


def test_deep_html_does_not_exhaust_the_stack():
    page = b"<html><body>" + b"<div>" * 1500 + b"deep down" + b"</div>" * 1500 + b"</body></html>"
    assert read_file("x.html", page).text == "deep down"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t ", "empty"),
        ("a.md", b"---\ntitle: only\n---\n<!-- nothing -->\n", "no text"),
        ("a.pdf", b"just text", "not a PDF"),
        ("a.pdf", b"<html></html>", "HTML page"),
        ("a.pdf", b"%PDF-1.7\ngarbage", "damaged"),
        ("scan.pdf", empty_pdf(), "no text"),
        ("a.txt", b"text\0with\x01binary", "binary"),
        ("a.md", b"PK\x03\x04rest", "archive is damaged"),
        ("a.txt", b"\xff\xfe\x00\xd8", "utf-16"),
    ],
)
def test_what_cannot_be_read_says_why(name: str, data: bytes, reason: str):
    with pytest.raises(UnreadableFile, match=reason) as refused:
        read_file(name, data)
    assert refused.value.name == name


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Grüße aus Österreich, schöne Straße und süße Äpfel für alle", "utf-8-sig"),
        ("Grüße aus Österreich", "utf-16"),
        ("Die Straße nach Österreich führt über die Höhe. Grüße aus Köln und Düsseldorf.", "cp1252"),
    ],
)
def test_encodings_are_told(text: str, encoding: str):
    assert read_file("a.txt", text.encode(encoding)).text == text


JAPANESE = "日本語の文章です。これは試験のための長い文章であり、検出できるはずです。\n" * 8000
CHINESE = "这是一个测试文件，用来测试编码检测。\n" * 17_000


@pytest.mark.parametrize(("text", "encoding"), [(JAPANESE, "shift_jis"), (JAPANESE, "euc_jp"), (CHINESE, "gb18030")])
@pytest.mark.parametrize("before", ["", "a", "ab"])
def test_long_files_of_two_bytes_a_letter_are_read_whole(text: str, encoding: str, before: str):
    assert read_file("a.txt", (before + text).encode(encoding)).text == before + text
    line = before + text.replace("\n", "")
    assert read_file("a.txt", line.encode(encoding)).text == line


@pytest.mark.parametrize("damage", [b"\xff", b"\xc3", b"\xe2\x82"])
def test_a_bad_byte_costs_one_letter_of_a_utf8_file(damage: bytes):
    text = "Schöne Grüße aus München, das Übermaß ist groß. " * 50
    assert read_file("a.txt", text.encode() + damage + text.encode()).text == f"{text}\ufffd{text}"
    assert read_file("a.txt", text.encode() + damage).text == f"{text}\ufffd"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Die Straße nach Österreich führt über die Höhe. Grüße aus Köln und Düsseldorf.", "cp1252"),
        ("Привет, это проверка кодировки: её надо узнать. Ёлка стоит в углу большой комнаты.", "cp1251"),
        ("日本語の文章です。これは試験のための長い文章であり、検出できるはずです。", "euc_jp"),
        ("สวัสดีชาวโลก นี่คือการทดสอบ", "tis-620"),
    ],
)
def test_other_encodings_are_not_taken_for_damaged_utf8(text: str, encoding: str):
    data = text.encode(encoding)
    assert not is_utf8(data, data.decode("utf-8", "replace"))
    assert "\ufffd" not in read_file("a.txt", data * 3).text


@pytest.mark.parametrize("text", ["% see the %PDF- header of a file.", "%PDF- begins a PDF file.", "A %PDF-1.4 header"])
def test_a_text_about_pdf_is_a_text(text: str):
    assert read_file("a.txt", text.encode()).text == text


def test_a_pdf_is_told_whatever_its_name_and_what_stands_before_it():
    for name, data in (("a.txt", b"\r\n" + empty_pdf()), ("a.pdf", b"sent by the scanner\n" + empty_pdf())):
        with pytest.raises(UnreadableFile, match="OCR"):
            read_file(name, data)


def test_controls_and_line_ends_are_made_harmless():
    assert read_file("a.txt", b"one\r\ntwo\rthree\x07\n").text == "one\ntwo\nthree \n"


def test_sample_topics_have_titles_and_headings():
    documents = list(sample_documents())
    titles = {name.split("/")[1]: title for name, title, _, _ in documents}
    assert len(documents) > 60
    assert titles["while.rst"] == "The while statement"
    assert len({text for _, _, text, _ in documents}) == len(documents)
    assert all(title and not title.startswith(("*", "=")) for title in titles.values())
