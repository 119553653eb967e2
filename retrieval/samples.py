"""The sample corpus: the Python manual's topics, which every interpreter carries."""

from __future__ import annotations

import sys
from collections.abc import Iterator

SAMPLE_COLLECTION = "python"


def sample_documents() -> Iterator[tuple[str, str, str, str]]:
    """(name, title, text, media type), ready for `Library.ingest_documents`; sorted, without exact repeats."""
    from pydoc_data.topics import topics

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    seen: set[str] = set()
    for topic in sorted(topics):
        text = topics[topic].strip("\n")
        if text in seen:
            continue
        seen.add(text)
        yield f"python-{version}/{topic}.rst", _title(text, topic), text, "text/x-rst"


def _title(text: str, topic: str) -> str:
    """The first heading, without the quotes that stand for code: The "if" statement → The if statement."""
    first = next((line.strip() for line in text.split("\n") if line.strip()), topic)
    return first.replace('"', "") or topic
