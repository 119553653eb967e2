"""XML: feeds (RSS, Atom), whose entries are sections; of any other document the text."""

from __future__ import annotations

from lxml import etree

from retrieval.errors import UnreadableFile
from retrieval.formats.media_types import ATOM, RSS, XML
from retrieval.formats.parsed import Parsed, TextBuilder, clean_text
from retrieval.formats.tree import html_tree, local_name, safe_xml, write_tree

_ENTRIES = ("item", "entry")
_BODIES = ("encoded", "content", "description", "summary")  # the fullest first
_DATES = ("pubdate", "published", "updated", "date")


def read_xml(name: str, data: bytes, title: str = "") -> Parsed:
    """`title` "" takes the feed's.  Raises UnreadableFile: not well formed, or it declares entities of its own, which
    text has no need of and bombs are made of."""
    try:
        root = safe_xml(data)
    except etree.XMLSyntaxError as error:
        raise UnreadableFile(name, f"the XML is damaged ({error})") from error
    if root.getroottree().docinfo.internalDTD is not None and any(
        True for _ in root.getroottree().docinfo.internalDTD.iterentities()
    ):
        raise UnreadableFile(name, "its XML declares entities, which are not followed: save it without them")
    builder = TextBuilder()
    kind = local_name(root)
    if kind not in ("rss", "feed", "rdf"):
        _write_plain(root, builder)
        return builder.parsed(title, XML)
    own = next((_text(node) for node in root.iter() if local_name(node) == "title"), "")
    for entry in root.iter():
        if local_name(entry) not in _ENTRIES:
            continue
        fields = {local_name(child): child for child in reversed(entry)}
        builder.heading(1, _text(fields["title"]) if "title" in fields else "Untitled")
        if date := next((_text(fields[each]) for each in _DATES if each in fields), ""):
            builder.write(date + "\n\n")
        body = next((fields[each] for each in _BODIES if each in fields and _text(fields[each])), None)
        if body is not None and (tree := html_tree(_text(body))) is not None:
            write_tree(tree, builder, below=1)
    return builder.parsed(title or own, ATOM if kind == "feed" else RSS)


def _text(node: etree._Element) -> str:
    return clean_text("".join(node.itertext())).strip()


def _write_plain(root: etree._Element, builder: TextBuilder) -> None:
    """The text of each element on lines of its own, but that of elements within a sentence in it."""
    line: list[str] = []

    def end_line() -> None:
        text = " ".join("".join(line).split())
        line.clear()
        builder.write(clean_text(text) + "\n" if text else "")

    mixed = 0  # open elements that hold text beside elements
    for event, node in etree.iterwalk(root, events=("start", "end", "comment", "pi")):
        if event in ("comment", "pi"):  # nothing of them but what follows
            line.append(node.tail or "")
            continue
        within = len(node) and bool((node.text or "").strip() or any((child.tail or "").strip() for child in node))
        if event == "start":
            if not mixed:
                end_line()
            mixed += within
            line.append(node.text or "" if isinstance(node.tag, str) else "")
        else:
            mixed -= within
            if not mixed:
                end_line()
            line.append(node.tail or "")
    end_line()
