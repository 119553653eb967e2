"""How soon a PDF of 300 pages is searchable, and the memory that reading it takes.

    python -m loadtests.long_pdf               writes long_pdf.md and .json

Pages of about 400 words, drawn from the words of the sample documents, are added to an empty library whose model is
loaded already, as an upload is; the file is searchable when a search for its last page's words finds that page.  The
memory is the most that the process which reads files ever had resident (VmHWM).
"""

from __future__ import annotations

import argparse
import ctypes
import io
import random
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pypdfium2
import pypdfium2.raw as pdfium

from loadtests import report
from loadtests.run import RESULTS
from retrieval import Library, sample_documents

PAGES, WORDS = 300, 400
BAR_SECONDS, BAR_MB = 30, 500
A4 = 595.0, 842.0  # points
MARGIN, TYPE, LEADING = 60.0, 10.0, 14.0


def pdf_of(pages: Iterable[Sequence[str]], size: tuple[float, float] = A4) -> bytes:
    """A PDF with these lines on its pages."""
    document = pypdfium2.PdfDocument.new()
    for lines in pages:
        page = document.new_page(*size)
        for at, line in enumerate(lines):
            text = pdfium.FPDFPageObj_NewTextObj(document, b"Helvetica", TYPE)
            letters = ctypes.create_string_buffer(f"{line}\0".encode("utf-16-le"))
            pdfium.FPDFText_SetText(text, ctypes.cast(letters, ctypes.POINTER(ctypes.c_ushort)))
            pdfium.FPDFPageObj_Transform(text, 1, 0, 0, 1, MARGIN, size[1] - MARGIN - at * LEADING)
            pdfium.FPDFPage_InsertObject(page, text)
        pdfium.FPDFPage_GenerateContent(page)
        page.close()
    buffer = io.BytesIO()
    document.save(buffer)
    document.close()
    return buffer.getvalue()


def prose(chance: random.Random) -> list[list[str]]:
    """Sentences of 6 to 20 words, nine words to a line."""
    known = [word for _, _, text, _ in sample_documents() for word in re.findall(r"[a-z]+", text)]
    pages = []
    for _ in range(PAGES):
        words: list[str] = []
        while len(words) < WORDS:
            sentence = chance.choices(known, k=chance.randint(6, 20))
            words += [sentence[0].capitalize(), *sentence[1:-1], sentence[-1] + "."]
        pages.append([" ".join(words[at : at + 9]) for at in range(0, WORDS, 9)])
    return pages


def peak_mb(process: int) -> float:
    """The most memory that a process had resident.  Not ru_maxrss: there a child starts with what its parent had."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.long_pdf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    pages = prose(random.Random(options.seed))
    data = pdf_of(pages)
    with tempfile.TemporaryDirectory() as folder, Library.open(Path(folder)) as library:
        library.warm()
        began, worked = time.monotonic(), time.process_time()
        document = library.ingest_bytes("long.pdf", data)
        found = library.whole.search(pages[-1][0], top_k=1).passages
        seconds, worked = time.monotonic() - began, time.process_time() - worked
        peak = peak_mb(library._sandbox._process.pid)
        assert found
        assert found[0].page == PAGES, found[0]
        began = time.monotonic()
        read = library._sandbox.read_file("long.pdf", data)
        read_seconds = time.monotonic() - began
    command = shlex.join(["python", "-m", "loadtests.long_pdf", *sys.argv[1:]])
    boxes_bytes = sum(len(page.packed) for page in read.boxes)
    computer = report.machine()
    lines = [
        "# A long PDF",
        "",
        f"`{command}`: {PAGES} pages of {WORDS} words, {len(data) / 2**20:.1f} MiB, which become {document.passages} "
        f"passages; {computer['cores']} cores ({computer['cpu']}); commit {report.commit()}.",
        "",
        "| what | measured | at most |",
        "|---|---:|---:|",
        f"| until it is searchable | {seconds:.1f} s | {BAR_SECONDS} s |",
        f"| processor time of that, but for reading: of all cores, mostly for embedding | {worked:.1f} s | |",
        f"| reading the file, in its process | {read_seconds:.1f} s | |",
        f"| memory of that process | {peak:.0f} MiB | {BAR_MB} MB |",
        f"| boxes of its {document.characters} characters | {boxes_bytes / 2**20:.1f} MiB | |",
    ]
    print("\n".join(lines))
    record = {
        "command": command,
        "pages": PAGES,
        "words": PAGES * WORDS,
        "file_bytes": len(data),
        "characters": document.characters,
        "passages": document.passages,
        "searchable_seconds": round(seconds, 1),
        "processor_seconds": round(worked, 1),
        "reading_seconds": round(read_seconds, 1),
        "reader_peak_mib": round(peak),
        "boxes_bytes": boxes_bytes,
    }
    report.write(options.out, "long_pdf", lines, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
