"""What searches need to know of every passage, in columns: who may read it, and what filters ask for.

A passage has a slot, a row of the columns, for as long as the table lives.  A search makes one mask of slots, from its
principal and its filters, and every way of searching looks at nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class PassageFacts(NamedTuple):
    """`modified` is days since 1970, -1 unknown."""

    number: int
    document: int
    access: int
    collection: str
    media_type: str
    modified: int


class PassageTable:
    """The owner's lock keeps writers from searchers."""

    def __init__(self) -> None:
        self._size = 0
        self._columns = {
            "number": np.zeros(0, dtype=np.int64),
            "document": np.zeros(0, dtype=np.int64),
            "access": np.zeros(0, dtype=np.int32),
            "collection": np.zeros(0, dtype=np.int32),
            "media_type": np.zeros(0, dtype=np.int32),
            "modified": np.zeros(0, dtype=np.int32),
            "alive": np.zeros(0, dtype=bool),
        }
        self._codes: dict[str, int] = {}  # of collections and media types
        self._slots: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name][: self._size]

    @property
    def numbers(self) -> np.ndarray:
        """Of the passages that are there, in order of their slots: int64 [n]."""
        return self["number"][self["alive"]]

    @property
    def sparse(self) -> bool:
        """Whether most of it is what was removed."""
        return self._size > 4096 and len(self) < self._size / 2

    def add(self, facts: Sequence[PassageFacts]) -> list[int]:
        """The slots that they get."""
        first, self._size = self._size, self._size + len(facts)
        if self._size > len(self._columns["number"]):
            for name, column in self._columns.items():
                grown = np.zeros(max(self._size, 2 * len(column)), dtype=column.dtype)
                grown[:first] = column[:first]
                self._columns[name] = grown
        here = slice(first, self._size)
        for name in ("number", "document", "access", "modified"):
            self._columns[name][here] = [getattr(each, name) for each in facts]
        for name in ("collection", "media_type"):
            self._columns[name][here] = [self._code(getattr(each, name)) for each in facts]
        self._columns["alive"][here] = True
        slots = list(range(first, self._size))
        self._slots.update(zip((each.number for each in facts), slots, strict=True))
        return slots

    def remove(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if (slot := self._slots.pop(number, None)) is not None:
                self._columns["alive"][slot] = False

    def set_access(self, numbers: Iterable[int], access: int) -> None:
        self._columns["access"][self.slots_of(numbers)] = access

    def mask(
        self,
        access: Iterable[int] | None = None,
        collections: Iterable[str] | None = None,
        media_types: Iterable[str] | None = None,
        documents: np.ndarray | None = None,
        since: int | None = None,
        until: int | None = None,
    ) -> np.ndarray:
        """bool [slots]: the passages that are all of this; None asks for nothing.  `documents` int64 [n]; `since` and
        `until` are days, both included, and leave out passages without a date."""
        mask = self["alive"].copy()
        if access is not None:
            mask &= np.isin(self["access"], list(access))
        for name, wanted in (("collection", collections), ("media_type", media_types)):
            if wanted is not None:
                mask &= np.isin(self[name], [self._codes[each] for each in wanted if each in self._codes])
        if documents is not None:
            mask &= np.isin(self["document"], documents)
        if since is not None:
            mask &= self["modified"] >= max(0, since)
        if until is not None:
            mask &= (self["modified"] <= until) & (self["modified"] >= 0)
        return mask

    def numbers_of(self, slots: Iterable[int]) -> list[int]:
        return self["number"][list(slots)].tolist()

    def slots_of(self, numbers: Iterable[int]) -> list[int]:
        """Of those that are there."""
        return [self._slots[number] for number in numbers if number in self._slots]

    def _code(self, text: str) -> int:
        return self._codes.setdefault(text, len(self._codes))
