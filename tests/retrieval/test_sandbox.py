"""Reading files in a process of its own: a bomb, a crash or a hang costs that file, and the next one is read."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import zipfile
from collections.abc import Iterator

import pytest

from retrieval import Library, UnreadableFile
from retrieval.formats import archive, progress
from retrieval.formats.reading import read_file
from retrieval.sandbox import Sandbox
from tests.retrieval.making import docx_file, pptx_file, xlsx_file, zipped
from tests.retrieval.test_parsing import empty_pdf

MEGABYTE = 1024 * 1024


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox(seconds=60, megabytes=256)
    yield sandbox
    sandbox.close()
    assert sandbox._process is None


def refused(sandbox: Sandbox, name: str, data: bytes) -> UnreadableFile:
    """Why `data` is refused; and then another file is read."""
    with pytest.raises(UnreadableFile) as error:
        sandbox.read_file(name, data)
    assert sandbox.read_file("next.md", b"# Next\n\nIt goes on.").title == "Next"
    return error.value


def test_it_reads_what_the_readers_read(sandbox: Sandbox):
    for name, data in (("a.docx", docx_file()), ("a.md", b"# A\n\nb"), ("a.txt", "Grüße".encode("cp1252"))):
        assert sandbox.read_file(name, data) == read_file(name, data)
    assert sandbox.read_source("x.rst", "Title\n=====\n\nText", "text/x-rst", "Given").title == "Given"
    error = refused(sandbox, "a.json", b"{")
    assert (error.name, error.code) == ("a.json", "unreadable_file")


def test_a_process_that_dies_or_stops_costs_one_file(sandbox: Sandbox):
    sandbox.read_file("a.md", b"hello")
    assert sandbox._process is not None
    sandbox._process.kill()
    sandbox._process.wait()
    assert sandbox.read_file("b.md", b"hello").text.strip() == "hello"
    os.kill(sandbox._process.pid, signal.SIGSTOP)
    sandbox._channel.settimeout(0.2)
    assert refused(sandbox, "slow.md", b"hello").code == "parse_timeout"


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("a.pdf", empty_pdf(3), 3),
        ("a.pptx", pptx_file(), 2),
        ("a.xlsx", xlsx_file(), 2),
        ("a.zip", zipped({"a.pptx": pptx_file(), "b.md": "# B", "c.pdf": empty_pdf(4)}), 3),
        ("a.md", b"# A", 0),
    ],
)
def test_how_far_it_is_is_told_part_by_part(sandbox: Sandbox, name: str, data: bytes, parts: int):
    told: list[tuple[int, int]] = []
    with progress.listening(lambda done, of: told.append((done, of))), contextlib.suppress(UnreadableFile):
        sandbox.read_file(name, data)
    assert told == ([(done, parts) for done in range(parts + 1)] if parts else [])


def test_who_listens_may_end_it(sandbox: Sandbox):
    class Enough(BaseException):
        pass

    def stop(done: int, parts: int) -> None:
        if done == 2:
            raise Enough

    with progress.listening(stop), pytest.raises(Enough):
        sandbox.read_file("a.pdf", empty_pdf(50))
    assert sandbox.read_file("next.md", b"# Next\n\nIt goes on.").title == "Next", "not the rest of the first"


def test_answers_go_before_it(sandbox: Sandbox):
    sandbox.read_file("a.md", b"hello")
    assert os.getpriority(os.PRIO_PROCESS, sandbox._process.pid) >= min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)


def test_parts_that_come_too_slowly_in_all(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("retrieval.sandbox._PATIENCE", 0)
    assert refused(sandbox, "a.pdf", empty_pdf(3)).code == "parse_timeout"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("import os; os.abort()", "parser_crashed"),
        ("import os; os._exit(0)", "parser_crashed"),
        ("exec('while True: pass')", "parse_timeout"),
        ("bytearray(2**40)", "parse_memory"),
        ("keep = [bytearray(2**20) for _ in range(2**12)]", "parse_memory"),
        ("import socket; socket.create_connection(('127.0.0.1', 1))", "parser_crashed"),
        ("import tempfile; tempfile.TemporaryFile().write(b'0' * 2**22)", "parser_crashed"),
        ("keep = [open('/dev/null') for _ in range(100)]", "parser_crashed"),
    ],
)
def test_readers_that_misbehave(body: str, code: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A `sitecustomize` puts the misbehaviour in the reader's place, for files named "bad"."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if any(word.startswith('retrieval.formats.worker') for word in sys.orig_argv):\n"
        "    from retrieval.formats import reading\n"
        "    well = reading.read_file\n"
        "    def badly(name, data):\n"
        f"        if name == 'bad': {body}\n"
        "        return well(name, data)\n"
        "    reading.read_file = badly\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sandbox = Sandbox(seconds=6 if code == "parse_timeout" else 60, megabytes=256)
    try:
        assert refused(sandbox, "bad", b"x").code == code
    finally:
        sandbox.close()


def test_a_bomb_is_noticed_by_what_comes_out(sandbox: Sandbox):
    """600 MB in 600 kB."""
    data = zipped(dict.fromkeys(("word/document.xml", "word/styles.xml"), b"0" * (300 * MEGABYTE)))
    assert len(data) < MEGABYTE
    assert refused(sandbox, "bomb.docx", data).code == "too_large_expanded"


def test_too_many_files_and_too_deep(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UnreadableFile, match="more than 10000 files") as error:
        read_file("many.zip", zipped({f"{i}.txt": "" for i in range(10_001)}, zipfile.ZIP_STORED))
    assert error.value.code == "too_large_expanded"
    nested = b"hello"
    for _ in range(8):
        nested = zipped({"inner.zip" if nested[:2] == b"PK" else "a.txt": nested})
    with pytest.raises(UnreadableFile, match="too deep"):
        read_file("nested.zip", nested)
    monkeypatch.setattr(archive, "MAX_EXPANDED", 10)
    with pytest.raises(UnreadableFile, match="unfolds to more") as error:
        read_file("a.zip", zipped({"a.txt": "more than ten letters"}))
    assert error.value.code == "too_large_expanded"


@pytest.mark.parametrize("member", ["word/document.xml", "word/footnotes.xml", "word/styles.xml"])
def test_no_entity_is_followed(member: str, tmp_path):
    """An entity that names a file, or that grows, in a Word document (XXE, "billion laughs")."""
    canary = tmp_path / "canary.txt"
    canary.write_text("canary-content")
    laughs = '<!ENTITY a0 "ha">' + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    for entity, use in ((f'<!ENTITY x SYSTEM "file://{canary}">', "&x;"), (laughs, "&a9;")):
        whole = archive.Archive("a.docx", docx_file())
        members: dict[str, bytes | str] = {name: whole.read(name) for name in whole.names}
        xml = (
            f'<?xml version="1.0"?><!DOCTYPE d [{entity}]><w:document xmlns:w='
            '"http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body><w:p><w:r>'
            f"<w:t>before {use} after</w:t></w:r></w:p></w:body></w:document>"
        )
        try:
            parsed = read_file("a.docx", zipped(members | {member: xml}))
        except UnreadableFile:
            continue
        assert "canary-content" not in parsed.text
        assert "haha" not in parsed.text


def test_nothing_is_imported_from_where_one_stands(sandbox: Sandbox, tmp_path, monkeypatch: pytest.MonkeyPatch):
    for name in ("msgspec.py", "csv.py", "retrieval.py"):
        (tmp_path / name).write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET_KEY", "canary")
    assert sandbox.read_file("a.csv", b"a,b\n1,2\n").text
    environment = open(f"/proc/{sandbox._process.pid}/environ", "rb").read()  # noqa: SIM115
    assert b"canary" not in environment


def test_what_files_left_behind_is_not_held_against_the_next(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A reader that keeps memory of every file: the one at which it is full is read by a fresh process."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if any(word.startswith('retrieval.formats.worker') for word in sys.orig_argv):\n"
        "    from retrieval.formats import reading\n"
        "    well, kept = reading.read_file, []\n"
        "    def keeping(name, data):\n"
        "        kept.append(bytearray(100 * 2**20))\n"
        "        return well(name, data)\n"
        "    reading.read_file = keeping\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sandbox = Sandbox(seconds=60, megabytes=256)
    try:
        assert [sandbox.read_file(f"{i}.txt", b"hello").text for i in range(5)] == ["hello"] * 5
    finally:
        sandbox.close()


def test_a_library_reads_in_a_process_of_its_own(tmp_path, embedder):
    with Library.open(tmp_path / "data", embedder=embedder) as library:
        library.ingest_bytes("a.md", b"# Hello\n\nThere you are.")
        process = library._sandbox._process
        assert process is not None
        assert process.poll() is None
        with pytest.raises(UnreadableFile, match="not valid JSON"):
            library.ingest_bytes("a.json", b"{")
    assert process.poll() is not None
    assert sys.executable in process.args
