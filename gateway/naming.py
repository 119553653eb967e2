"""What a collection may be called, the same at every door."""

from __future__ import annotations

DEFAULT_COLLECTION = "default"
MAX_CHARACTERS = 200


def collection_name(text: str) -> str:
    """The name without blanks around it.  Raises ValueError that says what a name may be."""
    name = text.strip()
    if not 1 <= len(name) <= MAX_CHARACTERS or not is_text(name):
        raise ValueError(f"give the collection a name of 1 to {MAX_CHARACTERS} characters")
    return name


def is_text(text: str) -> bool:
    """Whether it can be stored: no NUL, and none of the halves that a shell's or a client's odd bytes leave behind."""
    return not any(char == "\x00" or "\ud800" <= char <= "\udfff" for char in text)
