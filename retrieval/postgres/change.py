"""One write to PostgreSQL (`contracts.Change`): what it puts, replaces and takes away, all at once."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from psycopg import Cursor

from retrieval import lexical
from retrieval.access import checked
from retrieval.embedding import Embedded
from retrieval.errors import UnknownDocument
from retrieval.postgres import words
from retrieval.postgres.schema import State, drop_vectors, index_vectors, read_state
from retrieval.stored import NewDocument, day_of


class Change:
    def __init__(self, db: Cursor):
        self._db = db
        self.state: State = read_state(db)

    # documents

    def put(self, document: NewDocument, embedded: Sequence[Embedded], generation: int) -> None:
        """Add a document or replace the one of the same collection, source and owner; `embedded` has one for each of
        its passages, of this generation."""
        fields = {
            "collection": document.collection,
            "source": document.source,
            "owner": document.owner,
            "hash": hash_of(document.collection, document.source, document.owner),
            "title": document.title,
            "media_type": document.media_type,
            "content_hash": document.content_hash,
            "recipe": document.recipe,
            "characters": len(document.text),
            "passages": len(document.passages),
            "pages": document.pages,
            "added_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "modified_at": document.modified_at,
            "modified": day_of(document.modified_at),
            "text": document.text,
            "access": access_row(self._db, document.readers),
        }
        old = self._db.execute("SELECT id FROM documents WHERE hash = %(hash)s", fields).fetchone()
        if old:
            for table in ("passages", "postings", "page_boxes", "tags"):
                self._db.execute(f"DELETE FROM {table} WHERE document = %s", old)
            sets = ", ".join(f"{name} = %({name})s" for name in fields)
            self._db.execute(f"UPDATE documents SET {sets} WHERE id = %(id)s", fields | {"id": old[0]})
        else:
            fields["document_id"] = secrets.token_hex(8)
            values = ", ".join(f"%({name})s" for name in fields)
            old = self._db.execute(
                f"INSERT INTO documents ({', '.join(fields)}) VALUES ({values}) RETURNING id", fields
            ).fetchone()
        (row,) = old  # type: ignore[misc]
        numbers = self._numbers(len(document.passages))
        parts = [(document.title, each.heading, each.text) for each in document.passages]
        counted = [(number, *lexical.encode(*each)) for number, each in zip(numbers, parts, strict=True)]
        self._copy(
            "passages (id, document, ordinal, starts, ends, page, title, heading, text, words, found)",
            (
                (number, row, ordinal, each.start, each.end, each.page, *texts, length, words.tsvector(*texts))
                for ordinal, (each, texts, (number, length, _)) in enumerate(
                    zip(document.passages, parts, counted, strict=True)
                )
            ),
        )
        put_postings(self._db, row, counted)
        self.set_embeddings(list(zip(numbers, [row] * len(numbers), embedded, strict=True)), generation)
        self._copy(
            "page_boxes",
            (
                (row, page, each.width, each.height, each.start, each.end, each.packed)
                for page, each in enumerate(document.boxes, 1)
            ),
        )
        self._copy("tags", ((tag, row) for tag in dict.fromkeys(document.tags)))

    def remove(self, document_id: str) -> None:
        if self._db.execute("DELETE FROM documents WHERE document_id = %s", [document_id]).rowcount == 0:
            raise UnknownDocument(document_id)

    def move(self, document_id: str, source: str, title: str) -> None:
        """The file of a document has another name now.  Its passages stay what they are, but for their title."""
        found = self._db.execute(
            "SELECT id, title, collection, owner FROM documents WHERE document_id = %s", [document_id]
        ).fetchone()
        if found is None:
            raise UnknownDocument(document_id)
        row, old_title, collection, owner = found
        self._db.execute(
            "UPDATE documents SET source = %s, title = %s, hash = %s WHERE id = %s",
            [source, title, hash_of(collection, source, owner), row],
        )
        if title != old_title:
            self._db.execute("UPDATE passages SET title = %s WHERE document = %s", [title, row])
            count_words(self._db, row)

    def set_readers(self, document_id: str, readers: Sequence[str]) -> None:
        """From the commit on these may read it and nobody else."""
        access = access_row(self._db, readers)
        changed = self._db.execute("UPDATE documents SET access = %s WHERE document_id = %s", [access, document_id])
        if changed.rowcount == 0:
            raise UnknownDocument(document_id)

    # embeddings

    def set_embeddings(self, rows: Sequence[tuple[int, int, Embedded]], generation: int) -> None:
        """(passage, document, what is embedded of it), of passages that have none of this generation."""
        self._copy(
            "embeddings (passage, generation, document, vector, sentences)",
            ((number, generation, row, each.vector, each.sentences) for number, row, each in rows),
        )

    def describe_embedder(self, identity: str, dim: int, opened_by: str) -> None:
        """Whose vectors will serve, while there are none."""
        generation = self.state.generation + 1
        drop_vectors(self._db, self.state.generation)
        drop_vectors(self._db, generation)
        index_vectors(self._db, generation, dim)
        self._set(embedder=identity, dim=dim, opened_by=opened_by, generation=generation, next_embedder=None)

    def begin_generation(self, maker: str, dim: int) -> None:
        """The next generation's embeddings are made by this model from now on; those that another had begun go."""
        generation = self.state.generation + 1
        drop_vectors(self._db, generation)
        index_vectors(self._db, generation, dim)
        self._set(next_embedder=maker)

    def change_generation(self, identity: str, dim: int, opened_by: str) -> None:
        """The next generation, of this model, serves from the commit on."""
        generation = self.state.generation + 1
        self._set(embedder=identity, dim=dim, opened_by=opened_by, generation=generation, next_embedder=None)

    def sweep(self) -> None:
        """Away with the embeddings of the generation that served before; after the commit that changed it, which waits
        for nobody."""
        drop_vectors(self._db, self.state.generation - 1)

    # inside

    def _set(self, **fields: object) -> None:
        sets = ", ".join(f"{name} = %s" for name in fields)
        self._db.execute(f"UPDATE refdesk SET {sets}", list(fields.values()))
        self.state = self.state._replace(**fields)  # type: ignore[arg-type]

    def _numbers(self, count: int) -> list[int]:
        rows = self._db.execute(
            "SELECT nextval(pg_get_serial_sequence('passages', 'id')) FROM generate_series(1, %s)", [count]
        )
        return sorted(number for (number,) in rows)

    def _copy(self, table: str, rows: Iterable[Sequence[object]]) -> None:
        with self._db.copy(f"COPY {table} FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)


def count_words(db: Cursor, row: int) -> None:
    """Put the words of a document's passages in their indexes again."""
    passages = db.execute(
        "SELECT id, title, heading, text FROM passages WHERE document = %s ORDER BY id", [row]
    ).fetchall()
    counted = [(number, *lexical.encode(*parts)) for number, *parts in passages]
    db.executemany(
        "UPDATE passages SET words = %s, found = %s::tsvector WHERE id = %s",
        [
            (length, words.tsvector(*parts), number)
            for (number, length, _), (_, *parts) in zip(counted, passages, strict=True)
        ],
    )
    db.execute("DELETE FROM postings WHERE document = %s", [row])
    put_postings(db, row, counted)


def put_postings(db: Cursor, row: int, counted: Sequence[tuple[int, int, bytes]]) -> None:
    """(number, length, codes) of the passages of a document that has none yet."""
    db.execute("UPDATE documents SET words = %s WHERE id = %s", [sum(length for _, length, _ in counted), row])
    with db.copy("COPY postings (word, document, part, passages) FROM STDIN") as copy:
        for word, part, packed in words.postings(counted):
            copy.write_row((word, row, part, packed))


def access_row(db: Cursor, readers: Sequence[str]) -> int:
    """The row of those who share these readers, which is made where there is none."""
    names = sorted({checked(reader) for reader in readers})
    together = "\n".join(names)
    hashed = hash_of(together)
    row = db.execute("SELECT id FROM access WHERE hash = %s", [hashed]).fetchone()
    if row is not None:
        return row[0]
    (access,) = db.execute(  # type: ignore[misc]
        "INSERT INTO access (readers, hash) VALUES (%s, %s) RETURNING id", [together, hashed]
    ).fetchone()
    db.execute("INSERT INTO access_readers SELECT unnest(%s::text[]), %s", [names, access])
    return access


def hash_of(*names: str) -> bytes:
    return hashlib.sha256("\0".join(name.replace("\0", "\ufffd") for name in names).encode()).digest()
