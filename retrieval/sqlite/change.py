"""One write to the store: what it puts, replaces and takes away, all at once, and what the indexes do to follow."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np

from retrieval import lexical
from retrieval.access import checked
from retrieval.embedding import Embedded
from retrieval.errors import UnknownDocument
from retrieval.sqlite.table import PassageFacts
from retrieval.stored import NewDocument, day_of


class Added(NamedTuple):
    """A passage as the indexes take it; `vector` float32 [dim], `codes` of its words as `lexical.encode` makes them."""

    facts: PassageFacts
    vector: np.ndarray
    length: int
    codes: bytes


class Reworded(NamedTuple):
    """A passage whose title is another one now; `codes` of its words as `lexical.encode` makes them."""

    facts: PassageFacts
    length: int
    codes: bytes


class Change:
    """One write transaction, and what the vector index must do to follow it."""

    def __init__(self, db: sqlite3.Connection, meta: dict[str, str]):
        self._db = db
        self._meta = meta
        self._new_meta: dict[str, str] = {}
        self.removed: list[int] = []
        self.added: dict[int, Added] = {}  # by passage number
        self.reworded: list[Reworded] = []
        self.readable: list[tuple[list[int], int]] = []  # passage numbers that get another access

    @property
    def generation(self) -> int:
        """That of the embeddings that serve."""
        return int(self._new_meta.get("generation") or self._meta.get("generation", "1"))

    def describe_embedder(self, identity: str, dim: int, opened_by: str) -> None:
        """Whose vectors those of this generation are, and the name in the settings by which it is opened."""
        self._new_meta |= {"embedder": identity, "dim": str(dim), "opened_by": opened_by}

    def put(
        self, document: NewDocument, embedded: Sequence[Embedded], generation: int | None = None
    ) -> tuple[str, bool]:
        """Add a document or replace the one of the same collection, source and owner: (document id, was there before).
        `embedded` has one for each of its passages, of this generation (the one that serves)."""
        old = self._db.execute(
            "SELECT id, document_id FROM documents WHERE collection = ? AND source = ? AND owner = ?",
            [document.collection, document.source, document.owner],
        ).fetchone()
        access = access_row(self._db, document.readers)
        fields = {
            "collection": document.collection,
            "source": document.source,
            "title": document.title,
            "media_type": document.media_type,
            "content_hash": document.content_hash,
            "recipe": document.recipe,
            "characters": len(document.text),
            "passages": len(document.passages),
            "pages": document.pages,
            "added_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "text": document.text,
            "owner": document.owner,
            "access": access,
            "modified_at": document.modified_at,
        }
        if old:
            row, document_id = old
            self._drop_passages(row)
            self._db.execute(
                f"UPDATE documents SET {', '.join(f'{name} = :{name}' for name in fields)} WHERE id = :id",
                {**fields, "id": row},
            )
        else:
            document_id = secrets.token_hex(8)
            fields["document_id"] = document_id
            row = self._db.execute(
                f"INSERT INTO documents ({', '.join(fields)}) VALUES ({', '.join(f':{name}' for name in fields)})",
                fields,
            ).lastrowid
        for ordinal, (passage, each) in enumerate(zip(document.passages, embedded, strict=True)):
            number = self._db.execute(
                'INSERT INTO passages (document, ordinal, "start", "end", page, title, heading, text) '
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [row, ordinal, passage.start, passage.end, passage.page, document.title, passage.heading, passage.text],
            ).lastrowid
            self.set_embeddings([number], [each], generation)
            length, codes = lexical.encode(document.title, passage.heading, passage.text)
            self._db.execute("INSERT INTO words VALUES (?, ?, ?, ?)", [number, lexical.WORDS_RECIPE, length, codes])
            facts = PassageFacts(
                number, row, access, document.collection, document.media_type, day_of(document.modified_at)
            )
            self.added[number] = Added(facts, each.vector, length, codes)
        self._db.execute("DELETE FROM page_boxes WHERE document = ?", [row])
        self._db.executemany(
            "INSERT INTO page_boxes VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (row, page, each.width, each.height, each.start, each.end, each.packed)
                for page, each in enumerate(document.boxes, 1)
            ],
        )
        self._db.execute("DELETE FROM tags WHERE document = ?", [row])
        self._db.executemany("INSERT INTO tags VALUES (?, ?)", [(tag, row) for tag in dict.fromkeys(document.tags)])
        return document_id, old is not None

    def remove(self, document_id: str) -> None:
        row = self._db.execute("SELECT id FROM documents WHERE document_id = ?", [document_id]).fetchone()
        if row is None:
            raise UnknownDocument(document_id)
        self._drop_passages(row[0])
        self._db.execute("DELETE FROM documents WHERE id = ?", row)

    def move(self, document_id: str, source: str, title: str) -> None:
        """The file of a document has another name now.  Its passages stay what they are, but for their title."""
        row, old_title, *facts, modified_at = self._db.execute(
            "SELECT id, title, id, access, collection, media_type, modified_at FROM documents WHERE document_id = ?",
            [document_id],
        ).fetchone()
        self._db.execute("UPDATE documents SET source = ?, title = ? WHERE id = ?", [source, title, row])
        if title == old_title:
            return
        self._db.execute("UPDATE passages SET title = ? WHERE document = ?", [title, row])
        passages = self._db.execute("SELECT id, heading, text FROM passages WHERE document = ?", [row]).fetchall()
        for number, heading, text in passages:
            words = lexical.encode(title, heading, text)
            self.set_words([(number, *words)])
            self.reworded.append(Reworded(PassageFacts(number, *facts, day_of(modified_at)), *words))

    def set_readers(self, document_id: str, readers: Sequence[str]) -> None:
        """From the commit on these may read it and nobody else."""
        row = self._db.execute("SELECT id FROM documents WHERE document_id = ?", [document_id]).fetchone()
        if row is None:
            raise UnknownDocument(document_id)
        access = access_row(self._db, readers)
        self._db.execute("UPDATE documents SET access = ? WHERE id = ?", [access, row[0]])
        numbers = self._db.execute("SELECT id FROM passages WHERE document = ?", row).fetchall()
        self.readable.append(([number for (number,) in numbers], access))

    def set_words(self, rows: Sequence[tuple[int, int, bytes]]) -> None:
        """(passage number, length, codes): replace stored words, or put those that are missing."""
        self._db.executemany(
            "INSERT OR REPLACE INTO words VALUES (?, ?, ?, ?)",
            [(number, lexical.WORDS_RECIPE, length, codes) for number, length, codes in rows],
        )

    def set_embeddings(
        self, numbers: Sequence[int], embedded: Sequence[Embedded], generation: int | None = None
    ) -> None:
        """Replace stored embeddings of a generation (the one that serves), or put those that are missing; nothing for
        passages that are gone."""
        generation = self.generation if generation is None else generation
        self._db.executemany(
            "INSERT OR REPLACE INTO embeddings SELECT id, ?, ?, ? FROM passages WHERE id = ?",
            [
                (generation, each.vector.astype("<f4").tobytes(), each.sentences, int(number))
                for number, each in zip(numbers, embedded, strict=True)
            ],
        )

    def begin_generation(self, maker: str) -> None:
        """The next generation's embeddings are made by this model from now on; those that another had begun go."""
        self._db.execute("DELETE FROM embeddings WHERE generation > ?", [self.generation])
        self._new_meta["next_embedder"] = maker

    def change_generation(self, identity: str, dim: int, opened_by: str) -> None:
        """The next generation, of this model, serves from the commit on; the one that served is gone."""
        generation = self.generation
        self._db.execute("DELETE FROM embeddings WHERE generation <= ?", [generation])
        self.describe_embedder(identity, dim, opened_by)
        self._new_meta |= {"generation": str(generation + 1), "next_embedder": "none"}

    def commit(self, mirrored: bool = True) -> None:
        """Not `mirrored`: nothing that indexes mirror has changed."""
        if mirrored:
            self._new_meta["state"] = secrets.token_hex(16)
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", self._new_meta.items())
        self._db.execute("COMMIT")
        self._meta.update(self._new_meta)

    def _drop_passages(self, row: int) -> None:
        for (number,) in self._db.execute("SELECT id FROM passages WHERE document = ?", [row]):
            self.removed.append(number)
            self.added.pop(number, None)  # put by this very change
        # The embedding goes by trigger after the passage; the reference is checked when the statement ends.
        self._db.execute("DELETE FROM passages WHERE document = ?", [row])


def access_row(db: sqlite3.Connection, readers: Sequence[str]) -> int:
    """The row of those who share these readers, which is made where there is none."""
    named = "\n".join(sorted({checked(reader) for reader in readers}))
    row = db.execute("SELECT id FROM access WHERE readers = ?", [named]).fetchone()
    if row is not None:
        return row[0]
    access = db.execute("INSERT INTO access (readers) VALUES (?)", [named]).lastrowid
    assert access is not None
    db.executemany(
        "INSERT INTO access_readers VALUES (?, ?)", [(reader, access) for reader in named.split("\n") if reader]
    )
    return access
