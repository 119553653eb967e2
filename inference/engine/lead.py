"""What stands before a document that is computed for others (`engine.segments`): documents about nothing in particular.

They are the same for all who ask and come from nobody's library, so that nothing of what one client sends is ever read
behind by another, and an answer does not depend on who asked first.  An operator may give others, that are more like
the documents of the house (`document_lead` in the configuration): the more alike, markers and all, the less reuse
disturbs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from inference.models.config import ModelError

LEAST, MOST = 256, 512  # tokens

NEUTRAL = Path(__file__).with_suffix(".txt")


def lead_of(path: str, encode: Callable[[str], list[int]], most: int = MOST) -> tuple[int, ...]:
    """The tokens of the neutral documents (`lead.txt`), or of those in the text file at `path`; the last `most` of
    them.  Raises ModelError where the file can't be read or says too little."""
    try:
        text = (Path(path).expanduser() if path else NEUTRAL).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        raise ModelError(f"document_lead: {path} can't be read as text: {error}") from error
    tokens = encode(text.rstrip() + "\n\n")  # as documents end, so that the next one looks like one
    if len(tokens) < min(LEAST, most):
        raise ModelError(
            f"document_lead: {path} has {len(tokens)} tokens: give some pages like your documents, {LEAST} tokens at "
            "least"
        )
    return tuple(tokens[-most:])
