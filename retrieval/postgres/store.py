"""Documents, passages and embeddings in PostgreSQL (`contracts.Store`).  Permission is part of every query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from psycopg import Cursor

from retrieval.access import Principal
from retrieval.boxes import PageBoxes
from retrieval.errors import UnknownDocument
from retrieval.postgres.change import hash_of
from retrieval.postgres.database import Database
from retrieval.records import Document, DocumentText, Passage
from retrieval.stored import FoundPassage, PassageRow, StoredVersion

_DOCUMENT = (
    "d.document_id, d.title, d.source, d.media_type, d.collection, d.content_hash, d.characters, d.passages, d.pages, "
    "d.added_at, d.owner, d.modified_at, a.readers, ARRAY(SELECT tag FROM tags WHERE document = d.id) "
    "FROM documents d JOIN access a ON a.id = d.access"
)
_PASSAGE = (
    "p.id, d.document_id, d.title, d.source, p.heading, p.page, p.starts, p.ends, p.text, d.collection, d.media_type"
)
_ACCESS = "SELECT DISTINCT access FROM access_readers WHERE reader = ANY(%s) ORDER BY 1"


class Store:
    """All methods may be called from any thread."""

    def __init__(self, database: Database):
        self._database = database

    def close(self) -> None:
        self._database.close()

    def counts(self) -> tuple[int, int]:
        return self._rows("SELECT count(*), coalesce(sum(passages), 0)::bigint FROM documents")[0]

    def collections(self, principal: Principal) -> list[str]:
        seen, values = seen_by(principal)
        rows = self._rows(
            f'SELECT collection FROM documents d WHERE {seen} GROUP BY collection ORDER BY collection COLLATE "C"',
            values,
        )
        return [name for (name,) in rows]

    def documents(
        self, principal: Principal, collection: str | None, offset: int, limit: int
    ) -> tuple[list[Document], int]:
        where, values = seen_by(principal)
        if collection is not None:
            where, values = f"{where} AND d.collection = %s", [*values, collection]

        def look(db: Cursor) -> tuple[list[Document], int]:
            (total,) = db.execute(f"SELECT count(*) FROM documents d WHERE {where}", values).fetchone()  # type: ignore
            rows = db.execute(
                f'SELECT {_DOCUMENT} WHERE {where} ORDER BY lower(d.title COLLATE "C"), d.id LIMIT %s OFFSET %s',
                [*values, limit, offset],
            ).fetchall()
            return [_document(row) for row in rows], total

        return self._database.read(look)

    def document(self, principal: Principal, document_id: str) -> DocumentText:
        seen, values = seen_by(principal)

        def look(db: Cursor) -> DocumentText:
            row = db.execute(
                f"SELECT d.text, {_DOCUMENT} WHERE d.document_id = %s AND {seen}", [document_id, *values]
            ).fetchone()
            if row is None:
                raise UnknownDocument(document_id)
            return DocumentText(_document(row[1:]), row[0])

        return self._database.read(look)

    def version(self, collection: str, source: str, owner: str) -> StoredVersion | None:
        rows = self._rows(
            "SELECT d.document_id, d.content_hash, d.recipe, a.readers, "
            "ARRAY(SELECT tag FROM tags WHERE document = d.id) FROM documents d JOIN access a ON a.id = d.access "
            "WHERE d.hash = %s",
            [hash_of(collection, source, owner)],
        )
        if not rows:
            return None
        *fields, readers, tags = rows[0]
        return StoredVersion(*fields, tuple(sorted(_lines(readers))), tuple(sorted(tags)))

    def sources(self, collection: str, owner: str, path: str) -> set[str]:
        rows = self._rows(
            "SELECT source FROM documents WHERE collection = %s AND owner = %s "
            "AND (source = %s OR starts_with(source, %s))",
            [collection, owner, path, f"{path}/"],
        )
        return {source for (source,) in rows}

    def same_content(self, collection: str, owner: str, content_hash: str) -> list[Document]:
        rows = self._rows(
            f"SELECT {_DOCUMENT} WHERE d.content_hash = %s AND d.collection = %s AND d.owner = %s ORDER BY d.id",
            [content_hash, collection, owner],
        )
        return [_document(row) for row in rows]

    def access_of(self, principal: Principal) -> list[int] | None:
        if principal.readers is None:
            return None
        return [access for (access,) in self._rows(_ACCESS, [sorted(principal.readers)])]

    def passages(self, principal: Principal, numbers: Sequence[int]) -> dict[int, PassageRow]:
        seen, values = seen_by(principal)
        rows = self._rows(
            f"SELECT {_PASSAGE} FROM passages p JOIN documents d ON d.id = p.document "
            f"WHERE p.id = ANY(%s::bigint[]) AND {seen}",
            [list(numbers), *values],
        )
        return {row[0]: _passage_row(row) for row in rows}

    def around(self, principal: Principal, number: int, before: int, after: int) -> list[Passage]:
        seen, values = seen_by(principal)
        rows = self._rows(
            f"SELECT {_PASSAGE} FROM passages one JOIN passages p ON p.document = one.document "
            "AND p.ordinal BETWEEN one.ordinal - %s AND one.ordinal + %s JOIN documents d ON d.id = p.document "
            f"WHERE one.id = %s AND {seen} ORDER BY p.ordinal",
            [before, after, number, *values],
        )
        return [_passage_row(row).passage for row in rows]

    def boxes(self, principal: Principal, document_id: str, start: int, end: int) -> list[tuple[int, PageBoxes]]:
        seen, values = seen_by(principal)

        def look(db: Cursor) -> list[tuple[int, PageBoxes]]:
            row = db.execute(
                f"SELECT d.id FROM documents d WHERE d.document_id = %s AND {seen}", [document_id, *values]
            ).fetchone()
            if row is None:
                raise UnknownDocument(document_id)
            pages = db.execute(
                "SELECT page, width, height, starts, ends, boxes FROM page_boxes "
                "WHERE document = %s AND starts < %s AND ends > %s ORDER BY page",
                [row[0], end, start],
            )
            return [(page, PageBoxes(*fields)) for page, *fields in pages]

        return self._database.read(look)

    def vectors_of(self, numbers: Sequence[int]) -> dict[int, np.ndarray]:
        rows = self._rows(
            "SELECT passage, vector FROM embeddings WHERE passage = ANY(%s::bigint[]) "
            "AND generation = (SELECT generation FROM refdesk)",
            [[int(number) for number in numbers]],
        )
        return {number: vector.to_numpy() for number, vector in rows}

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        return self._database.read(lambda db: db.execute(query, values).fetchall())  # type: ignore[arg-type]


def found(db: Cursor, principal: Principal, numbers: Sequence[int], generation: int) -> dict[int, FoundPassage]:
    """Passages with their embeddings of a generation, of those that may be read."""
    seen, values = seen_by(principal)
    rows = db.execute(
        f"SELECT {_PASSAGE}, e.vector, e.sentences FROM passages p JOIN documents d ON d.id = p.document "
        "LEFT JOIN embeddings e ON e.passage = p.id AND e.generation = %s "
        f"WHERE p.id = ANY(%s::bigint[]) AND {seen}",
        [generation, list(numbers), *values],
    )
    return {
        row[0]: FoundPassage(_passage_row(row), None if vector is None else vector.to_numpy(), sentences or b"")
        for *row, vector, sentences in rows
    }


def seen_by(principal: Principal) -> tuple[str, list[Any]]:
    """A condition on documents `d`, and its values."""
    if principal.readers is None:
        return "true", []
    return "d.access IN (SELECT access FROM access_readers WHERE reader = ANY(%s))", [sorted(principal.readers)]


def readable_by(db: Cursor, principal: Principal) -> tuple[str, list[Any]]:
    """The same by the rows of `access` that there are at the moment of this transaction."""
    if principal.readers is None:
        return "true", []
    rows = db.execute(_ACCESS, [sorted(principal.readers)])
    return "d.access = ANY(%s::integer[])", [[access for (access,) in rows]]


def _document(row: Sequence[Any]) -> Document:
    *fields, readers, tags = row
    return Document(*fields, sorted(_lines(readers)), sorted(tags))


def _lines(text: str) -> list[str]:
    return text.split("\n") if text else []


def _passage_row(row: Sequence[Any]) -> PassageRow:
    number, *fields, collection, media_type = row
    return PassageRow(Passage(f"p{number}", *fields, 0.0), collection, media_type)
