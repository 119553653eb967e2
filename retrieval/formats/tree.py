"""Elements of a page, a book's chapter or a mail, written as text with headings, lists and tables."""

from __future__ import annotations

from typing import Any

from lxml import etree
from lxml import html as lxml_html

from retrieval.formats.parsed import TextBuilder

_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_HIDDEN = frozenset(("script", "style", "noscript", "template", "svg", "head", "title"))
_BLOCK_NAMES = (
    "p div li ul ol dl dt dd table thead tbody tr td th section article header footer main aside nav figure figcaption "
    "blockquote pre hr body form"
)
_BLOCKS = frozenset(_BLOCK_NAMES.split())


def html_tree(source: str) -> lxml_html.HtmlElement | None:
    """None where there is nothing in it."""
    try:
        # Bytes with the encoding said: an XML declaration inside a str would be refused.
        return lxml_html.document_fromstring(
            source.encode(), parser=lxml_html.HTMLParser(encoding="utf-8", huge_tree=True, no_network=True)
        )
    except (etree.ParserError, ValueError):
        return None


def safe_xml(data: bytes) -> etree._Element:
    """The root.  No entity is followed, no file or address opened.  Raises etree.XMLSyntaxError."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    return etree.fromstring(data, parser)


def local_name(node: Any) -> str:
    """The tag without its namespace, in small letters; "" for comments and the like."""
    return etree.QName(node).localname.lower() if isinstance(node.tag, str) else ""


def _rows_for_layout(root: Any) -> set[Any]:
    """Rows with tables in their cells: these put things on a page, as in mails, and are none of a table."""
    rows = set()
    for node in root.iter():
        if local_name(node) == "table":
            for above in node.iterancestors():
                if local_name(above) == "table":  # which has told of the rows that it is in
                    break
                if local_name(above) == "tr":
                    rows.add(above)
    return rows


def write_tree(root: Any, builder: TextBuilder, below: int = 0) -> None:
    """`below`: how many levels of headings are above those of the tree.  Iterative: pages nest deeper than Python's
    stack."""
    line: list[str] = []
    rows: list[list[str]] = []
    row: list[str] | None = None
    heading = preformatted = 0
    lists: list[int] = []  # per open list the number of the next item, -1 for bullets
    mark = ""
    layout = _rows_for_layout(root)

    def end_line(after: str = "\n") -> None:
        nonlocal mark
        text = "".join(line)
        line.clear()
        text = text.strip("\n") if preformatted else " ".join(text.split())
        if not text.strip():
            return
        end_table()
        indent = "  " * max(0, len(lists) - 1) + mark
        mark = ""
        if preformatted and not indent:
            builder.code(text)
        else:
            builder.write(indent + text + after)

    def end_table() -> None:
        if rows:
            builder.table(rows)
            rows.clear()

    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, leaving = stack.pop()
        if isinstance(node, str):
            line.append(node)
            continue
        name = local_name(node)
        if leaving:
            if name in _HEADINGS and row is None:
                title = "".join(line)
                line.clear()
                end_table()
                builder.heading(below + _HEADINGS[name], title)
                heading -= 1
            elif row is not None and name in ("td", "th"):
                row.append(" ".join("".join(line).split()))
                line.clear()
            elif row is not None and name == "tr":
                rows.append(row)
                row = None
            elif name in _BLOCKS and row is None and not heading:
                end_line("\n" if lists else "\n\n")
                if name in ("ul", "ol") and lists:
                    lists.pop()
                    if not lists:
                        builder.write("\n")
                elif name == "table":
                    end_table()
                preformatted -= name == "pre"
            continue
        if not name or name in _HIDDEN:
            continue
        if name == "br":
            line.append("\n" if preformatted else " ")
            if row is None and not heading and not preformatted:
                end_line()
        elif name in _HEADINGS and row is None:
            end_line()
            heading += 1
        elif name == "tr" and row is None and node not in layout:
            end_line()
            row = []
        elif name in _BLOCKS and row is None and not heading:
            end_line()
            preformatted += name == "pre"
            if name in ("ul", "ol"):
                lists.append(1 if name == "ol" else -1)
            elif name == "li" and lists:
                mark = "- " if lists[-1] < 0 else f"{lists[-1]}. "
                lists[-1] += lists[-1] > 0
        elif name in _BLOCKS:
            line.append(" ")
        stack.append((node, True))
        for child in reversed(node):
            if child.tail:
                stack.append((child.tail, False))
            stack.append((child, False))
        if node.text:
            stack.append((node.text, False))
    end_line("\n\n")
    end_table()
