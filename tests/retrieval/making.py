"""Files of each format, made here."""

from __future__ import annotations

import io
import zipfile
from email.message import EmailMessage
from pathlib import Path

import docx
import pptx
import xlsxwriter
from docx.opc.packuri import PackURI
from docx.opc.part import Part
from docx.oxml import OxmlElement
from docx.oxml.ns import qn

RELATIONS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def zipped(members: dict[str, bytes | str], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def docx_file() -> bytes:
    """Headings, a list, a table in a content control, an insertion, a deletion."""
    document = docx.Document()
    document.core_properties.title = "Travel rules"
    document.add_heading("Trains", 1)
    document.add_paragraph("Trains are booked by the office.")
    for item in ("First class for long ways", "Second class else"):
        document.add_paragraph(item, style="List Bullet")
    document.add_heading("Flights", 2)
    changed = document.add_paragraph("Flights need ")
    for tag, letters, text in (("w:ins", "w:t", "consent"), ("w:del", "w:delText", "luck")):
        change, run, word = OxmlElement(tag), OxmlElement("w:r"), OxmlElement(letters)
        word.text = text
        run.append(word)
        change.append(run)
        changed._p.append(change)
    table = document.add_table(rows=2, cols=2)
    for row, (left, right) in zip(table.rows, (("Class", "Price"), ("First", "90")), strict=True):
        row.cells[0].text, row.cells[1].text = left, right
    control, content = OxmlElement("w:sdt"), OxmlElement("w:sdtContent")
    table._tbl.addprevious(control)
    content.append(table._tbl)
    control.append(content)
    assert control.find(qn("w:sdtContent")) is not None
    return saved(document)


def docx_with_notes() -> bytes:
    """A paragraph with a footnote and an endnote."""
    document = docx.Document()
    paragraph = document.add_paragraph("Trains are late")
    word = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    for kind in ("endnote", "footnote"):
        mark = OxmlElement(f"w:{kind}Reference")
        mark.set(qn("w:id"), "1")
        paragraph.add_run()._r.append(mark)
        notes = "".join(
            f'<w:{kind} w:id="{number}"{more}><w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:{kind}>'
            for number, more, text in ((0, ' w:type="separator"', "---"), (1, "", f"The {kind}."))
        )
        part = Part(
            PackURI(f"/word/{kind}s.xml"),
            f"application/vnd.openxmlformats-officedocument.wordprocessingml.{kind}s+xml",
            f"<w:{kind}s {word}>{notes}</w:{kind}s>".encode(),
            document.part.package,
        )
        document.part.relate_to(part, f"{RELATIONS}/{kind}s")
    return saved(document)


def pptx_file() -> bytes:
    presentation = pptx.Presentation()
    for title, body, notes in (("Plans", "We build\nWe sell", "Speak slowly"), ("Costs", "Ten", "")):
        slide = presentation.slides.add_slide(presentation.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text_frame.text = body
        if notes:
            slide.notes_slide.notes_text_frame.text = notes
    return saved(presentation)


def saved(document) -> bytes:
    buffer = io.BytesIO()
    document.save(buffer)
    return buffer.getvalue()


def xlsx_file() -> bytes:
    buffer = io.BytesIO()
    book = xlsxwriter.Workbook(buffer)
    staff, numbers = book.add_worksheet("Staff"), book.add_worksheet("Numbers")
    for at, row in enumerate((["Our staff"], ["Name", "Room", "Since"], ["Ada", 12, "May"], ["Grace", "", "June"])):
        staff.write_row(at, 0, row)
    for at, row in enumerate(((1, 2.5), (3, 4))):
        numbers.write_row(at, 0, row)
    book.close()
    return buffer.getvalue()


def epub_file() -> bytes:
    container = '<container><rootfiles><rootfile full-path="OPS/book.opf"/></rootfiles></container>'
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata>'
        "<dc:title>A book</dc:title></metadata><manifest>"
        '<item id="b" href="two%20b.xhtml" media-type="application/xhtml+xml"/>'
        '<item id="a" href="one.xhtml" media-type="application/xhtml+xml"/></manifest>'
        '<spine><itemref idref="a"/><itemref idref="b"/></spine></package>'
    )
    page = "<html><head><title>x</title></head><body><h1>{}</h1><p>{}</p></body></html>"
    return zipped(
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": container,
            "OPS/book.opf": package,
            "OPS/two b.xhtml": page.format("Second", "It ends."),
            "OPS/one.xhtml": page.format("First", "It begins."),
        }
    )


def eml_file(html: bool = False, attachment: bytes = b"") -> bytes:
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "Ada <ada@example.org>", "grace@example.org", "The übliche meeting"
    mail["Date"] = "Mon, 02 Nov 2026 09:30:00 +0000"
    text = "We meet at ten."
    mail.set_content(f"<h2>Agenda</h2><p>{text}</p>" if html else text, subtype="html" if html else "plain")
    if attachment:
        mail.add_attachment(attachment, maintype="application", subtype="octet-stream", filename="rules.docx")
    return mail.as_bytes()


def tiny_cross_encoder(folder: Path) -> Path:
    """A cross-encoder with random weights, as sentence-transformers saves one."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(c) for c in range(97, 123)), "train", "##s", "dog"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, num_labels=1,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
