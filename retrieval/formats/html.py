"""Web pages: the main text with its headings, without menus and scripts."""

from __future__ import annotations

from lxml import html as lxml_html

from retrieval.formats.markdown import read_markdown, strip_tags
from retrieval.formats.parsed import Parsed, TextBuilder, clean_text
from retrieval.formats.tree import html_tree, write_tree
from retrieval.formats.underlined import read_text

_BLOCKS = ("p", "div", "li", "tr", "br", "h1", "h2", "h3", "h4", "h5", "h6", "section", "article", "td", "th", "pre")
_HIDDEN = ("script", "style", "noscript", "template", "svg", "head")
_BESIDE = ("nav", "footer", "aside", "select", "button")  # what a page itself marks as not its main text
_DEEPEST = 200  # elements within each other; real pages stay far below


def read_html(source: str, title: str = "") -> Parsed:
    """`title` "" takes the page's own.  Where no main text is found, all visible text is taken."""
    import trafilatura  # a fifth of a second, and only pages need it

    source = clean_text(source)
    tree = html_tree(source)
    if tree is None:
        return read_text("", title, "text/html")
    title = title or _title(tree)
    if _deeper_than(tree, _DEEPEST):
        # libxml2 and trafilatura drop what lies too deep, and all that follows it, without a word.
        return read_text(strip_tags(source), title, "text/html")
    main = trafilatura.extract(
        tree, output_format="markdown", include_comments=False, include_formatting=True, favor_recall=True
    )
    visible = _visible_text(tree)
    if main and main.strip():
        parsed = read_markdown(main, title, "text/html")
        # A page that is mostly one table or list may lose nearly everything: then all of it is better.
        least = len(visible if len(parsed.text) < 200 else _visible_text(tree, _HIDDEN + _BESIDE)) / 4
        if len(parsed.text) >= least:
            return parsed
    builder = TextBuilder()
    write_tree(tree, builder)
    return builder.parsed(title, "text/html")


def _title(tree: lxml_html.HtmlElement) -> str:
    for path in ("//meta[@property='og:title']/@content", "//title/text()", "//h1//text()"):
        if text := " ".join(" ".join(tree.xpath(path)[:1]).split()):
            return text[:300]
    return ""


def _deeper_than(root: lxml_html.HtmlElement, most: int) -> bool:
    level = [root]
    for _ in range(most):
        level = [child for node in level for child in node]
    return bool(level)


def _visible_text(tree: lxml_html.HtmlElement, without: tuple[str, ...] = _HIDDEN) -> str:
    parts: list[str] = []

    def walk(root: lxml_html.HtmlElement) -> None:
        # Iterative: a page can nest deeper than Python's stack.
        stack: list[tuple[object, bool]] = [(root, False)]
        while stack:
            node, leaving = stack.pop()
            if isinstance(node, str):
                parts.append(node)
                continue
            hidden = not isinstance(node.tag, str) or node.tag in without
            if leaving:
                parts.append("\n" if node.tag in _BLOCKS else "")
                continue
            if not hidden:
                if node.tag in _BLOCKS:
                    parts.append("\n")
                stack.append((node, True))
                for child in reversed(node):
                    if child.tail:
                        stack.append((child.tail, False))
                    stack.append((child, False))
                if node.text:
                    stack.append((node.text, False))

    walk(tree)
    lines = (" ".join(line.split()) for line in "".join(parts).split("\n"))
    return "\n".join(line for line in lines if line)
