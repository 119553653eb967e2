"""JSON, JSON lines and notebooks: each value on a line with the path of keys that leads to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from retrieval.errors import UnreadableFile
from retrieval.formats.markdown import read_markdown
from retrieval.formats.media_types import JSON, JSON_LINES, NOTEBOOK
from retrieval.formats.parsed import Parsed, TextBuilder, clean_text

_MOST_OUTPUT = 4000  # characters of what a cell printed


def read_json(name: str, text: str, title: str = "") -> Parsed:
    """A notebook, or any other JSON.  Raises UnreadableFile where it is none, with the line."""
    value = _loaded(name, text)
    if isinstance(value, dict) and isinstance(value.get("cells"), list) and "nbformat" in value:
        return _notebook(value, title)
    builder = TextBuilder()
    for part in value if isinstance(value, list) else [value]:  # records apart from each other
        builder.write("".join(f"{line}\n" for line in _lines(part)) + "\n")
    named = value.get("title") if isinstance(value, dict) else None
    return builder.parsed(title or (clean_text(named) if isinstance(named, str) else ""), JSON)


def read_json_lines(name: str, text: str, title: str = "") -> Parsed:
    """A record on each line.  Raises UnreadableFile where one is none, with its number."""
    builder = TextBuilder()
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            value = _loaded(f"{name}, line {number}", line)
            builder.write("".join(f"{each}\n" for each in _lines(value)) + "\n")
    return builder.parsed(title, JSON_LINES)


def _loaded(name: str, text: str) -> Any:
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except ValueError as error:
        raise UnreadableFile(name, f"it is not valid JSON: {error}") from error
    except RecursionError as error:
        raise UnreadableFile(name, "its JSON is nested too deep") from error


def _lines(value: Any) -> Iterator[str]:
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict) and value:
            stack += [(f"{path}.{key}" if path else str(key), each) for key, each in reversed(value.items())]
        elif isinstance(value, list) and value:
            if all(not isinstance(each, (dict, list)) for each in value):
                yield _line(path, ", ".join(_word(each) for each in value))
            else:
                stack += [(f"{path}[{i}]", each) for i, each in reversed(list(enumerate(value)))]
        else:
            yield _line(path, _word(value))


def _line(path: str, text: str) -> str:
    return clean_text(f"{path}: {text}" if path else text)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _notebook(value: dict[str, Any], title: str) -> Parsed:
    builder = TextBuilder()
    first = ""
    for cell in value["cells"]:
        if not isinstance(cell, dict):
            continue
        source = _joined(cell.get("source"))
        if cell.get("cell_type") == "markdown":
            part = read_markdown(source)
            first = first or part.title
            builder.embed(part)
        elif source.strip():
            builder.code(clean_text(source))
        for output in cell.get("outputs") or []:
            data = output.get("data") if isinstance(output, dict) else None
            printed = _joined(output.get("text") if isinstance(output, dict) else "")
            printed = printed or _joined(data.get("text/plain") if isinstance(data, dict) else "")
            if printed.strip():
                builder.code(clean_text(printed[:_MOST_OUTPUT]))
    return builder.parsed(title or first, NOTEBOOK)


def _joined(text: Any) -> str:
    if isinstance(text, list):
        return "".join(each for each in text if isinstance(each, str))
    return text if isinstance(text, str) else ""
