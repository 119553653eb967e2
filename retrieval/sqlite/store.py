"""The truth: documents, passages, embeddings and full text in one SQLite file (`contracts.Store`).

Whatever else retrieval keeps can be rebuilt from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from retrieval.access import Principal
from retrieval.boxes import PageBoxes
from retrieval.errors import UnknownDocument
from retrieval.records import Document, DocumentText, Passage
from retrieval.sqlite.database import Database, marks
from retrieval.sqlite.table import PassageFacts
from retrieval.stored import FoundPassage, PassageRow, StoredVersion, day_of


class Store(Database):
    """All methods may be called from any thread."""

    def counts(self) -> tuple[int, int]:
        """(documents, passages)"""
        with self.reading() as db:
            return db.execute("SELECT (SELECT count(*) FROM documents), (SELECT count(*) FROM passages)").fetchone()

    def collections(self, principal: Principal) -> list[str]:
        seen, values = _seen_by(principal)
        with self.reading() as db:
            rows = db.execute(f"SELECT DISTINCT collection FROM documents d WHERE {seen} ORDER BY collection", values)
            return [name for (name,) in rows]

    def documents(
        self, principal: Principal, collection: str | None, offset: int, limit: int
    ) -> tuple[list[Document], int]:
        where, values = _seen_by(principal)
        if collection is not None:
            where, values = f"{where} AND d.collection = ?", [*values, collection]
        with self.reading() as db:
            (total,) = db.execute(f"SELECT count(*) FROM documents d WHERE {where}", values).fetchone()
            rows = db.execute(
                f"SELECT {_DOCUMENT} FROM documents d JOIN access a ON a.id = d.access WHERE {where} "
                "ORDER BY d.title COLLATE NOCASE, d.id LIMIT ? OFFSET ?",
                [*values, limit, offset],
            ).fetchall()
        return [_document(row) for row in rows], total

    def document(self, principal: Principal, document_id: str) -> DocumentText:
        """Raises UnknownDocument, also for one that the principal may not read."""
        seen, values = _seen_by(principal)
        with self.reading() as db:
            row = db.execute(
                f"SELECT {_DOCUMENT}, d.text FROM documents d JOIN access a ON a.id = d.access "
                f"WHERE d.document_id = ? AND {seen}",
                [document_id, *values],
            ).fetchone()
        if row is None:
            raise UnknownDocument(document_id)
        return DocumentText(_document(row[:-1]), row[-1])

    def version(self, collection: str, source: str, owner: str) -> StoredVersion | None:
        """Which version of an owner's source is stored, if any."""
        with self.reading() as db:
            row = db.execute(
                f"SELECT d.document_id, d.content_hash, d.recipe, a.readers, {_TAGS} FROM documents d "
                "JOIN access a ON a.id = d.access WHERE d.collection = ? AND d.source = ? AND d.owner = ?",
                [collection, source, owner],
            ).fetchone()
        return StoredVersion(*row[:3], *(tuple(sorted(_lines(each))) for each in row[3:])) if row else None

    def sources(self, collection: str, owner: str, path: str) -> set[str]:
        """Those that are this path or lie below it."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT source FROM documents WHERE collection = ? AND owner = ? "
                "AND (source = ? OR source >= ? AND source < ?)",
                [collection, owner, path, f"{path}/", f"{path}0"],  # "0" comes next after "/"
            )
            return {source for (source,) in rows}

    def same_content(self, collection: str, owner: str, content_hash: str) -> list[Document]:
        """The documents of an owner with this very content."""
        with self.reading() as db:
            rows = db.execute(
                f"SELECT {_DOCUMENT} FROM documents d JOIN access a ON a.id = d.access "
                "WHERE d.content_hash = ? AND d.collection = ? AND d.owner = ? ORDER BY d.id",
                [content_hash, collection, owner],
            )
            return [_document(row) for row in rows]

    def access_of(self, principal: Principal) -> list[int] | None:
        """The rows of `access` that let this principal read; None for all."""
        if principal.readers is None:
            return None
        with self.reading() as db:
            rows = db.execute(
                f"SELECT DISTINCT access FROM access_readers WHERE reader IN ({marks(principal.readers)}) ORDER BY 1",
                sorted(principal.readers),
            )
            return [access for (access,) in rows]

    def passages(self, principal: Principal, numbers: Sequence[int]) -> dict[int, PassageRow]:
        """The passages that are there and may be read, by number."""
        found: dict[int, PassageRow] = {}
        for number, *fields in self._passage_rows(principal, numbers, "", ""):
            found[number] = _passage_row(number, fields)
        return found

    def found(self, principal: Principal, numbers: Sequence[int]) -> dict[int, FoundPassage]:
        """The same with the embeddings that serve."""
        join = f"LEFT JOIN embeddings e ON e.passage = p.id AND e.generation = {self.generation}"
        found: dict[int, FoundPassage] = {}
        rows = self._passage_rows(principal, numbers, ", e.vector, e.sentences", join)
        for number, *fields, vector, sentences in rows:
            whole = isinstance(vector, bytes) and len(vector) == 4 * (self.dim or 0)
            found[number] = FoundPassage(
                _passage_row(number, fields),
                np.frombuffer(vector, dtype="<f4") if whole else None,
                sentences if isinstance(sentences, bytes) else b"",
            )
        return found

    def _passage_rows(self, principal: Principal, numbers: Sequence[int], columns: str, join: str) -> Iterator[tuple]:
        seen, values = _seen_by(principal)
        with self.reading() as db:
            for start in range(0, len(numbers), 500):
                some = list(numbers[start : start + 500])
                yield from db.execute(
                    'SELECT p.id, d.document_id, d.title, d.source, p.heading, p.page, p."start", p."end", p.text, '
                    f"d.collection, d.media_type{columns} FROM passages p JOIN documents d ON d.id = p.document {join} "
                    f"WHERE p.id IN ({marks(some)}) AND {seen}",
                    [*some, *values],
                ).fetchall()

    def around(self, principal: Principal, number: int, before: int, after: int) -> list[Passage]:
        """A passage with so many before and behind it in its document, in order; none at all where it may not be read
        or isn't there."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT n.id FROM passages p JOIN passages n ON n.document = p.document "
                "AND n.ordinal BETWEEN p.ordinal - ? AND p.ordinal + ? WHERE p.id = ? ORDER BY n.ordinal",
                [before, after, number],
            ).fetchall()
        found = self.passages(principal, [each for (each,) in rows])
        return [found[each].passage for (each,) in rows if each in found]

    def boxes(self, principal: Principal, document_id: str, start: int, end: int) -> list[tuple[int, PageBoxes]]:
        """(page, its boxes) of those that have a part of the text from `start` to `end`.  Raises UnknownDocument, also
        for one that the principal may not read."""
        seen, values = _seen_by(principal)
        with self.reading() as db:
            row = db.execute(
                f"SELECT d.id FROM documents d WHERE d.document_id = ? AND {seen}", [document_id, *values]
            ).fetchone()
            if row is None:
                raise UnknownDocument(document_id)
            pages = db.execute(
                'SELECT page, width, height, "start", "end", boxes FROM page_boxes '
                'WHERE document = ? AND "start" < ? AND "end" > ? '
                "AND typeof(boxes) = 'blob' ORDER BY page",
                [row[0], end, start],
            )
            return [(page, PageBoxes(*fields)) for page, *fields in pages]

    def matching(self, principal: Principal, tags: Sequence[str], sources: Sequence[str]) -> np.ndarray | None:
        """The documents with any of these tags and with a source that begins with any of these, of those that may be
        read: int64 [n]; None where neither is asked for."""
        if not tags and not sources:
            return None
        seen, values = _seen_by(principal)
        conditions = [seen]
        if tags:
            conditions.append(f"id IN (SELECT document FROM tags WHERE tag IN ({marks(tags)}))")
            values += tags
        if sources:
            begins = " OR ".join("substr(source, 1, ?) = ?" for _ in sources)
            conditions.append(f"({begins})")
            values += [value for source in sources for value in (len(source), source)]
        with self.reading() as db:
            rows = db.execute(f"SELECT id FROM documents d WHERE {' AND '.join(conditions)}", values)
            return np.fromiter((row[0] for row in rows), dtype=np.int64)

    def containing(self, principal: Principal, match: str) -> np.ndarray:
        """The passages that match an FTS5 expression, made safe already, of those that may be read: int64 [n]."""
        seen, values = _seen_by(principal)
        with self.reading() as db:
            rows = db.execute(
                "SELECT p.id FROM passage_text JOIN passages p ON p.id = passage_text.rowid "
                f"JOIN documents d ON d.id = p.document WHERE passage_text MATCH ? AND {seen}",
                [match, *values],
            )
            return np.fromiter((row[0] for row in rows), dtype=np.int64)

    def facts(self) -> list[PassageFacts]:
        """Of all passages, in order of number."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT p.id, d.id, d.access, d.collection, d.media_type, d.modified_at "
                "FROM passages p JOIN documents d ON d.id = p.document ORDER BY p.id"
            )
            return [PassageFacts(*row[:-1], day_of(row[-1])) for row in rows]

    def words(self, recipe: int) -> dict[int, tuple[int, bytes]]:
        """(length, codes) by passage number, of those that were made by this recipe and are whole."""
        with self.reading() as db:
            rows = db.execute("SELECT passage, length, codes FROM words WHERE recipe = ?", [recipe])
            return {
                number: (length, codes)
                for number, length, codes in rows
                if isinstance(length, int) and isinstance(codes, bytes) and len(codes) % 5 == 0
            }

    def vectors(self, generation: int, dim: int, batch: int = 4096) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All sound embeddings of a generation in order of number: int64 [n], float32 [n, dim].  What was damaged
        (another length, not finite) is left out."""
        length = 4 * dim
        last = -1
        while True:
            with self.reading() as db:
                rows = db.execute(
                    "SELECT passage, vector FROM embeddings WHERE generation = ? AND passage > ? "
                    "ORDER BY passage LIMIT ?",
                    [generation, last, batch],
                ).fetchall()
            if not rows:
                return
            last = rows[-1][0]
            whole = [(number, data) for number, data in rows if isinstance(data, bytes) and len(data) == length]
            numbers = np.array([number for number, _ in whole], dtype=np.int64)
            vectors = np.frombuffer(b"".join(data for _, data in whole), dtype="<f4").reshape(len(whole), dim)
            finite = np.isfinite(vectors).all(axis=1)
            yield numbers[finite], vectors[finite]

    def vectors_of(self, numbers: Sequence[int]) -> dict[int, np.ndarray]:
        """float32 [dim] by passage, of those that have a sound embedding of the generation that serves."""
        length = 4 * (self.dim or 0)
        found: dict[int, np.ndarray] = {}
        with self.reading() as db:
            for start in range(0, len(numbers), 500):
                some = [int(number) for number in numbers[start : start + 500]]
                for number, data in db.execute(
                    f"SELECT passage, vector FROM embeddings WHERE generation = ? AND passage IN ({marks(some)})",
                    [self.generation, *some],
                ):
                    if isinstance(data, bytes) and len(data) == length:
                        found[number] = np.frombuffer(data, dtype="<f4")
        return found

    def lacking(self, generation: int, after: int, limit: int) -> list[int]:
        """The first passages behind `after` that have no embedding of this generation."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT id FROM passages p WHERE id > ? AND NOT EXISTS (SELECT 1 FROM embeddings "
                "WHERE passage = p.id AND generation = ?) ORDER BY id LIMIT ?",
                [after, generation, limit],
            )
            return [number for (number,) in rows]


_TAGS = "(SELECT group_concat(tag, char(10)) FROM tags WHERE document = d.id)"
_DOCUMENT = (
    "d.document_id, d.title, d.source, d.media_type, d.collection, d.content_hash, d.characters, d.passages, d.pages, "
    f"d.added_at, d.owner, d.modified_at, a.readers, {_TAGS}"
)


def _document(row: Sequence) -> Document:
    *fields, readers, tags = row
    return Document(*fields, sorted(_lines(readers)), sorted(_lines(tags)))


def _lines(text: str | None) -> list[str]:
    return text.split("\n") if text else []


def _passage_row(number: int, fields: Sequence) -> PassageRow:
    *fields, collection, media_type = fields
    return PassageRow(Passage(f"p{number}", *fields, 0.0), collection, media_type)


def _seen_by(principal: Principal) -> tuple[str, list[str]]:
    """A condition on documents `d`, and its values.  Permission is part of every query, never a filter afterwards."""
    if principal.readers is None:
        return "1", []
    readers = sorted(principal.readers)
    return f"d.access IN (SELECT access FROM access_readers WHERE reader IN ({marks(readers)}))", readers
