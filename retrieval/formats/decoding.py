"""Bytes to text, in whatever encoding they were written."""

from __future__ import annotations

import codecs
import re

import charset_normalizer

from retrieval.errors import UnreadableFile

_SAMPLE_BYTES = 256 * 1024  # what an encoding is guessed from, and a little more:
# In no encoding is one of these the second byte of a letter, so a sample that ends at one has no half letters.
_WHOLE_LETTER = re.compile(rb"[\x00-\x2f]")
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode(name: str, data: bytes) -> str:
    """Raises UnreadableFile for what is no text, or in an encoding that can't be told."""
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError as error:
                raise UnreadableFile(name, f"begins as {encoding}, but is not valid {encoding}") from error
    # Text has no NUL; NULs at every other byte would have been UTF-16, but without a mark that is a guess.
    if b"\0" in data:
        raise UnreadableFile(name, "it is binary, not text")
    text = data.decode("utf-8", "replace")
    if is_utf8(data, text):
        return text
    end = _WHOLE_LETTER.search(data, _SAMPLE_BYTES)
    sample = data[: end.end()] if end else data
    best = charset_normalizer.from_bytes(sample, preemptive_behaviour=True).best()
    if best is None:
        raise UnreadableFile(name, "it is binary, or in an encoding that can't be told; save it as UTF-8")
    try:
        return data.decode(best.encoding)
    except UnicodeDecodeError as error:
        raise UnreadableFile(
            name, f"it looks like {best.encoding}, but breaks off from it; save it as UTF-8"
        ) from error


def is_utf8(data: bytes, text: str) -> bool:
    """Whether `text` (`data` as UTF-8, with U+FFFD for what is invalid) is what was meant: a few bad bytes, as
    damage and cut files leave them, make no other encoding.  Of text in another encoding next to nothing is valid
    UTF-8 by chance, in the worst (EUC-JP, TIS-620) one sequence in three: four in five is far from that."""
    bad = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
    valid = len(text) - len(text.encode("ascii", "ignore")) - bad
    return valid >= 4 * bad
