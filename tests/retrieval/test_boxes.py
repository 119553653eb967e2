"""A piece of a PDF's text is marked where it stands: against the ink of the rendered page, turned or cropped."""

from __future__ import annotations

import io
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pypdfium2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.long_pdf import A4, LEADING, MARGIN, pdf_of
from retrieval import Box, Library, Principal, UnknownDocument
from retrieval.boxes import PageBoxes, marked, pack, unpack
from retrieval.formats.parsed import Parsed
from retrieval.formats.reading import read_file
from retrieval.sandbox import Sandbox

PAGES = [
    ["The north gate closes at nine.", "The south gate stays open.", "Ask the porter."],
    ["Second page, second gate."],
]


def boxes_of(parsed: Parsed, words: str) -> list[Box]:
    start = parsed.text.index(words)
    end = start + len(words)
    return [box for number, page in enumerate(parsed.boxes, 1) for box in marked(number, page, start, end)]


def changed(data: bytes, rotation: int, crop: tuple[float, float, float, float] | None = None) -> bytes:
    document = pypdfium2.PdfDocument(data)
    for page in document:
        page.set_rotation(rotation)
        if crop:
            page.set_cropbox(*crop)
    buffer = io.BytesIO()
    document.save(buffer)
    document.close()
    return buffer.getvalue()


def ink(data: bytes, number: int, scale: float = 4.0) -> np.ndarray:
    """Where a page is dark, bool [height, width] in pixels of 1 / scale points."""
    document = pypdfium2.PdfDocument(data)
    shown = document[number].render(scale=scale, grayscale=True).to_numpy()
    document.close()
    return shown.reshape(shown.shape[:2]) < 128


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("crop", [None, (40, 500, 400, 830)])
def test_what_is_marked_is_where_the_ink_is(rotation: int, crop: tuple | None):
    data = changed(pdf_of(PAGES), rotation, crop)
    parsed = read_file("a.pdf", data)
    dark = ink(data, 0)
    for line in PAGES[0]:
        (box,) = boxes_of(parsed, line) if rotation in (0, 180) else [joined(boxes_of(parsed, line))]
        assert (box.page_width * 4, box.page_height * 4) == pytest.approx(dark.shape[::-1], abs=4)
        inside = slice(round(box.y0 * 4), round(box.y1 * 4)), slice(round(box.x0 * 4), round(box.x1 * 4))
        assert dark[inside].any()
        dark[inside] = False
    assert not dark.any(), "nothing stands outside of what was marked"


def joined(boxes: list[Box]) -> Box:
    first, last = min(boxes, key=lambda box: (box.x0, box.y0)), max(boxes, key=lambda box: (box.x1, box.y1))
    return Box(first.page, first.x0, first.y0, last.x1, last.y1, first.page_width, first.page_height)


def test_a_word_is_marked_alone_and_a_sentence_on_each_of_its_lines():
    parsed = read_file("a.pdf", pdf_of(PAGES))
    (gate,) = boxes_of(parsed, "gate")
    (line,) = boxes_of(parsed, PAGES[0][0])
    assert line.x0 == pytest.approx(MARGIN, abs=1)
    assert line.x0 < gate.x0 < gate.x1 < line.x1
    assert (gate.y0, gate.y1) == (line.y0, line.y1)
    over_two = boxes_of(parsed, "at nine.\nThe south")
    assert len(over_two) == 2
    assert over_two[1].y0 - over_two[0].y0 == pytest.approx(LEADING, abs=0.2)
    over_pages = boxes_of(parsed, "porter.\n\nSecond")
    assert [box.page for box in over_pages] == [1, 2]
    assert {(box.page_width, box.page_height) for box in over_pages} == {A4}
    assert boxes_of(parsed, "\n\n") == []


def test_lines_that_touch_and_columns_are_marked_apart_and_a_raised_letter_with_its_line():
    line = (10, 10, 20, 20), (20, 10, 30, 20), (30, 7, 34, 15)
    column = (90, 10, 99, 20), (60, 10, 70, 20)  # written to the left
    rows = *line, *column, (10, 25, 20, 35), (10, 33, 20, 43), (90, 33, 99, 43), (10, 33, 20, 43)
    page = PageBoxes(100, 100, 7, 7 + len(rows), pack(np.array(rows)))
    found = [(box.x0, box.y0, box.x1, box.y1) for box in marked(1, page, 0, 99)]
    assert found == [(10, 7, 34, 20), (60, 10, 99, 20), *rows[5:]]


def pdf_with(content: bytes, unicode_of: bytes = b"") -> bytes:
    """One page of 600 by 800 points with this content; `unicode_of` maps letters to others (lines of bfchar)."""
    cmap = b"/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /X def /CMapType 2 def\n"
    cmap += b"1 begincodespacerange <00> <FF> endcodespacerange\n"
    cmap += b"%d beginbfchar %s endbfchar\nendcmap end end" % (max(1, unicode_of.count(b"\n") + 1), unicode_of)
    mapped = b"/ToUnicode 6 0 R" if unicode_of else b""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica%s>>" % mapped,
        b"<</Length %d>>stream\n%s\nendstream" % (len(cmap), cmap),
    ]
    written = b"".join(b"%d 0 obj\n%s\nendobj\n" % (at, each) for at, each in enumerate(objects, 1))
    return b"%%PDF-1.4\n%s\ntrailer<</Size 7/Root 1 0 R>>\n%%%%EOF" % written


def test_letters_of_two_halves_ligatures_broken_words_and_unseen_marks_keep_their_places():
    content = b"BT /F1 20 Tf 50 700 Td (xAyBzCw) Tj 0 -25 Td (hy-) Tj 0 -25 Td (phen) Tj ET"
    data = pdf_with(content, b"<41> <D83DDE00>\n<42> <00660069>\n<43> <200B>")
    parsed = read_file("a.pdf", data)
    assert parsed.text == "x😀yfizw\nhyphen"
    (page,) = parsed.boxes
    assert (page.start, page.end) == (0, len(parsed.text))
    lefts = [marked(1, page, at, at + 1)[0].x0 for at in range(6)]
    assert lefts[0] == 50
    assert lefts == sorted(lefts)
    assert lefts[3] == lefts[4], "one glyph that is two letters"
    first, second = boxes_of(parsed, "hyphen")
    assert second.y0 > first.y1
    assert [box.x0 for box in (first, second)] == [50, 50]


def test_what_stands_off_the_page_is_not_read():
    parsed = read_file(
        "a.pdf", pdf_with(b"BT /F1 20 Tf 50 700 Td (seen) Tj -900 -50 Td (hidden) Tj 900 -50 Td (too) Tj ET")
    )
    assert parsed.text.split() == ["seen", "too"]
    assert [round(box.x0) for box in boxes_of(parsed, parsed.text)] == [50, 50]


def test_boxes_come_out_of_the_process_that_reads_files():
    sandbox = Sandbox(60, 512)
    try:
        data = pdf_of(PAGES)
        assert sandbox.read_file("a.pdf", data) == read_file("a.pdf", data)
    finally:
        sandbox.close()


def test_pages_that_are_scans_are_named():
    document = pypdfium2.PdfDocument(pdf_of([["One."], ["x"], ["Three."], [], ["x"], ["x"]]))
    picture = pypdfium2.PdfBitmap.new_native(10, 10, 4)
    for number in (1, 4, 5):
        page = document[number]
        for each in list(page.get_objects()):
            page.remove_obj(each)
        image = pypdfium2.PdfImage.new(document)
        image.set_bitmap(picture)
        page.insert_obj(image)
        page.gen_content()
    buffer = io.BytesIO()
    document.save(buffer)
    document.close()
    parsed = read_file("a.pdf", buffer.getvalue())
    assert len(parsed.page_starts) == 6
    assert len(parsed.unread) == 1, "an empty page is no scan"
    assert parsed.unread[0].startswith("no text on pages 2, 5-6 (scanned images?)")


COORDINATES = st.floats(-1e6, 1e6, width=32) | st.sampled_from([float("nan"), float("inf")])


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(*[COORDINATES] * 4), max_size=40))
def test_boxes_are_kept_to_a_tenth_of_a_point(rows: list[tuple]):
    boxes = np.array(rows, dtype=np.float32).reshape(len(rows), 4)
    kept = unpack(pack(boxes), len(rows))
    assert kept.shape == boxes.shape
    usual = np.abs(np.nan_to_num(boxes)) < 1e5
    assert np.all(np.abs(kept - boxes)[usual & np.isfinite(boxes)] <= 0.06)


@pytest.mark.parametrize("packed", [b"", b"damaged", pack(np.zeros((3, 4))), pack(np.zeros((10**6, 4)))])
def test_damaged_boxes_are_none(packed: bytes):
    assert marked(1, PageBoxes(100, 100, 5, 9, packed), 0, 100) == []


@pytest.mark.every_place
def test_boxes_are_kept_with_their_document_and_read_by_its_readers(library: Library):
    ada, bob = library.seen_by(Principal.of("ada", ["hr"])), library.seen_by(Principal.of("bob"))
    document = library.ingest_bytes("a.pdf", pdf_of(PAGES), readers=["group:hr"])
    text = ada.document(document.document_id).text
    parsed = read_file("a.pdf", pdf_of(PAGES))
    assert ada.boxes(document.document_id, 0, len(text)) == boxes_of(parsed, text)
    start = text.index("Second")
    assert ada.boxes(document.document_id, start, start + 6) == boxes_of(parsed, "Second")
    assert ada.boxes(document.document_id, 5, 5) == ada.boxes(document.document_id, 9, 5) == []
    for who, document_id in ((bob, document.document_id), (ada, "0" * 16)):
        with pytest.raises(UnknownDocument):
            who.boxes(document_id, 0, 10)
    notes = library.ingest_bytes("a.md", b"# Notes\n\nNo pages here.")
    assert bob.boxes(notes.document_id, 0, 10) == []


def test_boxes_go_with_their_document(library: Library, tmp_path: Path):
    def stored() -> list[int]:
        with closing(sqlite3.connect(tmp_path / "data" / "library.sqlite3")) as database:
            return [page for (page,) in database.execute("SELECT page FROM page_boxes ORDER BY page")]

    document = library.ingest_bytes("a.pdf", pdf_of(PAGES))
    assert stored() == [1, 2]
    library.ingest_bytes("a.pdf", pdf_of(PAGES[1:]))
    assert stored() == [1]
    library.whole.remove(document.document_id)
    assert stored() == []
