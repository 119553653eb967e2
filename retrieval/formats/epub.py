"""Books (EPUB): their chapters in the order of the spine."""

from __future__ import annotations

import posixpath
from urllib.parse import unquote

from lxml import etree

from retrieval.errors import UnreadableFile
from retrieval.formats.archive import Archive
from retrieval.formats.media_types import EPUB
from retrieval.formats.parsed import Parsed, TextBuilder, clean_text
from retrieval.formats.tree import html_tree, local_name, safe_xml, write_tree


def read_epub(name: str, archive: Archive, title: str = "") -> Parsed:
    """`title` "" takes the book's own.  Raises UnreadableFile: damaged, or with rights managed."""
    if "META-INF/encryption.xml" in archive.names and "META-INF/rights.xml" in archive.names:
        raise UnreadableFile(name, "the book is locked (DRM)")
    try:
        package = _rootfile(archive)
        root = safe_xml(archive.read(package))
    except etree.XMLSyntaxError as error:
        raise UnreadableFile(name, f"the book is damaged ({error})") from error
    manifest = {
        item.get("id"): posixpath.normpath(posixpath.join(posixpath.dirname(package), unquote(item.get("href", ""))))
        for item in root.iter("{*}item")
        if "html" in item.get("media-type", "") and "nav" not in item.get("properties", "").split()
    }
    builder = TextBuilder()
    for chapter in root.iter("{*}itemref"):
        path = manifest.get(chapter.get("idref"))
        if path is None or path not in archive.names:
            continue
        tree = html_tree(clean_text(archive.read(path).decode("utf-8", "replace")))
        if tree is not None:
            write_tree(tree, builder)
    own = next((node.text for node in root.iter("{*}title") if node.text), "")
    return builder.parsed(title or clean_text(own), EPUB)


def _rootfile(archive: Archive) -> str:
    for node in safe_xml(archive.read("META-INF/container.xml")).iter():
        if local_name(node) == "rootfile" and node.get("full-path"):
            return node.get("full-path")
    return "content.opf"
