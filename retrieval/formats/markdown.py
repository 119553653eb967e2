"""Markdown to plain text that reads well: markup gone, structure kept as lines, headings with their offsets."""

from __future__ import annotations

import re
from functools import cache

import yaml
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, html_inline
from markdown_it.token import Token

from retrieval.formats.parsed import Parsed, TextBuilder, clean_text

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.{0,16384}?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_COMMENT = re.compile(r"<!--(?:-?>|.*?-->)", re.DOTALL)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_BREAK = re.compile(r"<(?:br|/p|/div|/tr|/li|/h[1-6]|/table|/ul|/ol)\b[^<>]*>", re.IGNORECASE)
_HIDDEN = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|\Z)", re.DOTALL | re.IGNORECASE)


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    parser.inline.ruler.at("html_inline", _html_or_comment)
    return parser


def _html_or_comment(state: StateInline, silent: bool) -> bool:
    """markdown-it's rule, but for comments: its pattern runs past "--->", then to the end of the text from each of
    many comments (quadratic).  What a comment is: CommonMark 0.31, section 6.6."""
    if not state.src.startswith("<!--", state.pos):
        return html_inline(state, silent)
    if state.html_terminator_last("-->") < state.pos + 2:
        return False
    end = state.src.find("-->", state.pos + 2) + 3  # "<!-->" is a whole comment
    if not silent:
        state.push("html_inline", "", 0).content = state.src[state.pos : end]
    state.pos = end
    return True


def read_markdown(text: str, title: str = "", media_type: str = "text/markdown") -> Parsed:
    """`title` "" takes the front matter's title, else the first heading."""
    text = clean_text(text).removeprefix("\ufeff")
    front = _FRONT_MATTER.match(text)
    if front:
        title = title or _front_title(front[1])
        text = text[front.end() :]
    builder = TextBuilder()
    _write_blocks(_parser().parse(text), builder)
    return builder.parsed(title, media_type)


def _front_title(matter: str) -> str:
    try:
        # Strings only: no merge keys (which multiply: a bomb), and a date or a number stays what was written.
        fields = yaml.load(matter, yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        found = re.search(r"^title:\s*(.+)$", matter, re.MULTILINE)
        return found[1].strip().strip("'\"")[:300] if found else ""
    title = fields.get("title") if isinstance(fields, dict) else None
    return " ".join(title.split())[:300] if isinstance(title, str) and title not in ("~", "null") else ""


def _write_blocks(tokens: list[Token], builder: TextBuilder) -> None:
    lists: list[int | None] = []  # per open list the next number, None for bullets
    item_begins = False
    rows: list[list[str]] = []
    row: list[str] | None = None
    heading: int | None = None
    for token in tokens:
        match token.type:
            case "heading_open":
                heading = int(token.tag[1])
            case "heading_close":
                heading = None
            case "bullet_list_open":
                lists.append(None)
            case "ordered_list_open":
                lists.append(int(token.attrGet("start") or 1))
            case "bullet_list_close" | "ordered_list_close":
                lists.pop()
                if not lists:
                    builder.write("\n")
            case "list_item_open":
                item_begins = True
            case "tr_open":
                row = []
            case "tr_close":
                rows.append(row or [])
                row = None
            case "table_close":
                builder.table(rows)
                rows = []
            case "inline":
                content = _inline_text(token.children or [])
                if heading is not None and not lists:
                    builder.heading(heading, content)
                elif row is not None:
                    row.append(" ".join(content.split()))
                elif content.strip():
                    _write_paragraph(content, lists, item_begins, builder)
                    item_begins = False
            case "fence" | "code_block":
                builder.code(token.content)
            case "html_block":
                # A comment that ends mid-block leaves its rest as text; tags go, lines stay.
                plain = strip_tags(token.content)
                if plain:
                    builder.write(plain + "\n\n")


def _write_paragraph(content: str, lists: list[int | None], item_begins: bool, builder: TextBuilder) -> None:
    if not lists:
        builder.write(content.strip() + "\n\n")
        return
    indent = "  " * (len(lists) - 1)
    if item_begins:
        number = lists[-1]
        mark = "- " if number is None else f"{number}. "
        if number is not None:
            lists[-1] = number + 1
    else:
        mark = "  "
    builder.write(indent + mark + content.strip() + "\n")


def _inline_text(tokens: list[Token]) -> str:
    parts: list[str] = []
    for token in tokens:
        match token.type:
            case "text" | "code_inline":
                parts.append(token.content)
            case "softbreak":
                parts.append(" ")
            case "hardbreak":
                parts.append("\n")
            case "image":
                parts.append(token.content)
            case "html_inline" if _BREAK.match(token.content) or token.content.lower().startswith("<br"):
                parts.append("\n")
    return "".join(parts)


def strip_tags(html: str) -> str:
    """HTML as plain text: comments, scripts and tags gone, blocks on lines of their own."""
    from html import unescape

    # Up to the last comment's end only: behind it each "<!--" would be followed to the end of the text (quadratic).
    end = html.rfind("-->") + len("-->")
    html = _COMMENT.sub("", html[:end]) + html[end:]
    html = _TAG.sub("", _BREAK.sub("\n", _HIDDEN.sub(" ", html)))
    lines = (" ".join(line.split()) for line in unescape(html).split("\n"))
    return "\n".join(line for line in lines if line)
