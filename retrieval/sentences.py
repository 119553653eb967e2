"""Where sentences begin and end, in prose, lists, code and text with its punctuation spaced out."""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_SENTENCE = 600  # characters; longer ones (tables, code, run-on text) are cut where it hurts least

Span = tuple[int, int]

# A block ends at a blank line, and before a list item.
_BLOCK_END = re.compile(r"\n[ \t]*(?:\n\s*|(?=(?:[-*•+–]|\d{1,3}[.)])[ \t]+\S))")
_STOP = re.compile(r"(?:[.!?…]+|[。！？]+)(?:\s?(?:''|[\"”’'»)\]]))*")
_OPENS = re.compile(r"[\s\"“‘«(\[`'*_-]*(.)", re.DOTALL)
_SHORTENED = (
    "mr mrs ms dr prof rev revd hon st sr jr gen col lt sgt capt gov sen rep pres fig figs no nos vol vols pp ed eds "
    "eg ie e.g i.e cf vs v al approx dept est inc ltd co corp jan feb mar apr jun jul aug sep sept oct nov dec ca "
    "op cit ch sec art messrs mt ft"
)
_ABBREVIATIONS = frozenset(_SHORTENED.split())
# After these a capital letter is as likely a new sentence as not; a full stop that stands apart decides.
_MAY_END = frozenset(("inc", "ltd", "co", "corp", "jr", "sr", "al", "no"))
_WORD_BEFORE = re.compile(r"([^\s(\[\"“'`]*)\s?$")
_CUTS = ("\n", "; ", " ; ", ": ", ", ", " , ", " ")


def sentences(text: str) -> list[Span]:
    """The sentences of `text` as (start, end) in characters, in order, not overlapping, trimmed; every character
    that is not white space lies in exactly one."""
    return [
        piece for block in _blocks(text) for sentence in _in_block(text, *block) for piece in _bounded(text, *sentence)
    ]


def _blocks(text: str) -> Iterator[Span]:
    start = 0
    for end in _BLOCK_END.finditer(text):
        yield start, end.start()
        start = end.end()
    yield start, len(text)


def _in_block(text: str, start: int, end: int) -> Iterator[Span]:
    begin = start
    for stop in _STOP.finditer(text, start, end):
        if stop.start() >= begin and _ends_sentence(text, begin, stop, end):
            yield begin, stop.end()
            begin = stop.end()
    yield begin, end


def _ends_sentence(text: str, begin: int, stop: re.Match[str], end: int) -> bool:
    mark, after = stop[0][0], stop.end()
    if mark in "。！？":
        return True
    if after >= end:
        return False  # the block's end ends it
    if not text[after].isspace():
        return False
    opens = _OPENS.match(text, after, end)
    following = opens[1] if opens else ""
    if mark == "." or mark == "…":
        # A lower-case word goes on with the sentence ("approx. ten"; "he said ... and left").
        if following.islower():
            return False
        if not stop[0].startswith("..") and _abbreviated(text, begin, stop.start(), following):
            return False
    elif following.islower():
        return False  # "Yahoo! is", "what? he asked"
    return True


def _abbreviated(text: str, begin: int, stop: int, following: str) -> bool:
    apart = stop > begin and text[stop - 1].isspace()
    found = _WORD_BEFORE.search(text, max(begin, stop - 40), stop)
    word = found[1] if found else ""
    lowered = word.lower()
    if lowered in _ABBREVIATIONS:
        # "No . 5" stays together, "in May . No ." doesn't matter; "et al . They" ends.
        return following.isdigit() or lowered not in _MAY_END or not apart
    if apart:
        return False
    if len(word) == 1 and word.isupper():
        return True  # an initial: J. Smith
    if re.fullmatch(r"(?:[A-Za-z]\.)+[A-Za-z]", word):
        return True  # U.S. Army, a.m. Monday
    # "1." at the start of a line is a number of a list, not a sentence.
    return word.isdigit() and not text[begin : stop - len(word)].strip()


def _bounded(text: str, start: int, end: int) -> Iterator[Span]:
    """Trimmed, and cut to at most MAX_SENTENCE characters."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    while end - start > MAX_SENTENCE:
        cut = _cut(text, start, start + MAX_SENTENCE)
        last = cut
        while last > start and text[last - 1].isspace():
            last -= 1
        if last > start:
            yield start, last
        start = cut
        while start < end and text[start].isspace():
            start += 1
    if start < end:
        yield start, end


def _cut(text: str, start: int, limit: int) -> int:
    for mark in _CUTS:
        at = text.rfind(mark, start + MAX_SENTENCE // 3, limit)
        if at >= 0:
            return at + len(mark)
    return limit
