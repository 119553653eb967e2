"""Searching in PostgreSQL (`contracts.Finder`): vectors by pgvector, words by postings, of what may be seen alone.

Each search is one transaction that sees one moment, and reads there whose vectors serve, too.  Nothing of what is
stored is kept in memory, so what another process commits is found by the next search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from psycopg import Cursor

from retrieval import lexical
from retrieval.access import Principal
from retrieval.embedding import Embedded, SharedEmbedder
from retrieval.errors import StoreError
from retrieval.postgres import words
from retrieval.postgres.change import Change
from retrieval.postgres.database import Database
from retrieval.postgres.reindexing import Reindexing, differs, maker_of
from retrieval.postgres.schema import MOST_INDEXED, State, read_state
from retrieval.postgres.store import found, readable_by
from retrieval.search import Found, Question, StageTimer, found_passages
from retrieval.stored import NewDocument

# Among so few all vectors are compared; so they are where fewer than one in so many may be seen, since an index would
# look at many that may not.
EXACT = 10_000
SHARE = 50
_SCANNED = 20_000  # vectors that the index may look at; all are compared where it finds too few that may be seen

Earlier = Callable[[str, str | None], SharedEmbedder | None]


class Finder:
    def __init__(self, database: Database, embedder: SharedEmbedder, opened_by: str, earlier: Earlier):
        """`embedder` is the model of the settings, of that name there; `earlier` finds the one of an identity and of
        the name by which it was opened, where the vectors are of another one."""
        self._database = database
        self._wanted = embedder
        self._opened_by = opened_by
        self._earlier = earlier
        self._others: dict[str, SharedEmbedder | None] = {}
        self._reindexing = Reindexing(database, embedder, opened_by)
        if differs(self._state(), embedder):
            self._reindexing.begin()

    @property
    def embedder(self) -> SharedEmbedder | None:
        state = self._state()
        return self._serving(state) if state.filled else None

    @property
    def writing(self) -> SharedEmbedder:
        return self._serving(self._state()) or self._wanted

    def find(self, principal: Principal, question: Question, count: int, timer: StageTimer) -> dict[int, Found]:
        return self._database.read(lambda db: self._find(db, principal, question, count, timer))

    def put(self, documents: Sequence[tuple[NewDocument, Sequence[Embedded]]], embedder: SharedEmbedder) -> bool:
        with self._database.write() as db:
            change = Change(db)
            state = change.state
            serving = self._serving(state)
            if embedder is not (serving or self._wanted):
                return False  # another model has come into place since
            if not state.filled:
                if (state.embedder, state.dim) != (embedder.identity, embedder.dim):
                    change.describe_embedder(embedder.identity, embedder.dim, self._opened_by)
                generation = change.state.generation
            elif serving is None:
                if state.next_embedder != maker_of(embedder):
                    raise StoreError(
                        f"the documents are embedded by {state.embedder!r}, which can't be opened here: give all "
                        "servers of one database the same setting retrieval.embedder",
                        code="bad_embedder",
                    )
                generation = state.generation + 1
            else:
                self._check_dim(state, embedder)
                generation = state.generation
            for document, embedded in documents:
                change.put(document, embedded, generation)
        return True

    @contextmanager
    def change(self) -> Iterator[Change]:
        with self._database.write() as db:
            yield Change(db)

    def save(self) -> None:
        """All is saved."""

    def settle(self) -> None:
        self._reindexing.wait()

    def close(self) -> None:
        self._reindexing.stop()

    # inside

    def _state(self) -> State:
        return self._database.read(read_state)

    def _serving(self, state: State) -> SharedEmbedder | None:
        """The model whose vectors serve, None where it can't be opened."""
        identity = state.embedder
        if not state.filled or identity is None:
            return self._wanted
        if self._wanted.gives(identity):
            found = self._wanted
        else:
            if identity not in self._others:
                self._others[identity] = self._earlier(identity, state.opened_by)
            found = self._others[identity]
        return found if found is not None and found.dim_at_hand in (None, state.dim) else None

    def _check_dim(self, state: State, embedder: SharedEmbedder) -> None:
        """A model that is loaded late was known by its name alone."""
        if state.dim != embedder.dim:
            raise StoreError(
                f"the embedding model {embedder.name!r} gives vectors of {embedder.dim} numbers, those stored have "
                f"{state.dim}: use the model that they were made with, or ingest into another database",
                code="bad_embedder",
            )

    def _find(
        self, db: Cursor, principal: Principal, question: Question, count: int, timer: StageTimer
    ) -> dict[int, Found]:
        state = read_state(db)
        seen = _Seen.of(db, principal, question)
        near: list[int] = []
        if question.vector is not None and state.filled:
            if len(question.vector) != state.dim:
                serving = self._serving(state)
                if serving is not None:
                    self._check_dim(state, serving)
                return {}  # another model has come into place since; who asks asks again
            near = _near(db, state, question.vector, count, seen)
        timer.done("vectors")
        worded = _worded(db, question.words, count, seen, near)
        timer.done("text")
        stored = found(db, principal, list(dict.fromkeys([*near, *worded])), state.generation)
        return found_passages(question, stored, worded)


class _Seen(NamedTuple):
    """What a search may look at: a condition on documents `d` with its values, and where there are phrases the numbers
    of the passages that have them (int64, sorted).  `passages` are so many, of so many `words`, of `all` in the
    database."""

    where: str
    values: list[Any]
    numbers: np.ndarray | None
    passages: int
    words: int
    all: int

    @classmethod
    def of(cls, db: Cursor, principal: Principal, question: Question) -> _Seen:
        filters, collection = question.filters, question.collection
        # The rows of `access` are named, not looked for within the query: only so is it planned well.
        readable, values = readable_by(db, principal)
        conditions = [readable]
        collections = [collection] if collection is not None else list(filters.collections)
        for condition, wanted in (
            ("d.collection = ANY(%s)", collections),
            ("d.media_type = ANY(%s)", list(filters.media_types)),
            ("d.id IN (SELECT document FROM tags WHERE tag = ANY(%s))", list(filters.tags)),
            ("EXISTS (SELECT FROM unnest(%s::text[]) AS s WHERE starts_with(d.source, s))", list(filters.sources)),
        ):
            if wanted:
                conditions.append(condition)
                values.append(wanted)
        if filters.since_day is not None:
            conditions.append("d.modified >= %s")
            values.append(max(0, filters.since_day))
        if filters.until_day is not None:
            conditions.append("d.modified BETWEEN 0 AND %s")
            values.append(filters.until_day)
        where = " AND ".join(conditions)
        (everything,) = db.execute("SELECT coalesce(sum(passages), 0)::bigint FROM documents").fetchone()  # type: ignore
        phrases = [query for phrase in question.phrases if (query := words.tsquery(phrase))]
        if not phrases:
            counted = db.execute(
                "SELECT coalesce(sum(d.passages), 0)::bigint, coalesce(sum(d.words), 0)::bigint "
                f"FROM documents d WHERE {where}",
                values,
            ).fetchone()
            return cls(where, values, None, *counted, everything)  # type: ignore[misc]
        matching = " AND ".join("p.found @@ %s::tsquery" for _ in phrases)
        rows = db.execute(
            f"SELECT p.id, p.words FROM passages p JOIN documents d ON d.id = p.document WHERE {matching} AND {where}",
            [*phrases, *values],
        ).fetchall()
        numbers = np.sort(np.array([number for number, _ in rows], dtype=np.int64))
        return cls(where, values, numbers, len(rows), sum(length for _, length in rows), everything)


def _near(db: Cursor, state: State, vector: np.ndarray, count: int, seen: _Seen) -> list[int]:
    """The passages closest by meaning, best first."""
    if not seen.passages:
        return []
    few = seen.numbers is not None or seen.passages <= EXACT or seen.passages * SHARE < seen.all
    if not few and state.dim is not None and state.dim <= MOST_INDEXED:
        db.execute(
            "SELECT set_config('hnsw.iterative_scan', 'strict_order', true), set_config('hnsw.ef_search', %s, true), "
            "set_config('hnsw.max_scan_tuples', %s, true), set_config('enable_sort', 'off', true)",  # the index, then
            [str(min(1000, 2 * count)), str(_SCANNED)],
        )
        rows = db.execute(
            "SELECT e.passage FROM embeddings e JOIN documents d ON d.id = e.document "
            f"WHERE e.generation = {state.generation} AND {seen.where} "
            f"ORDER BY e.vector::halfvec({state.dim}) <#> %s::halfvec({state.dim}) LIMIT %s",
            [*seen.values, vector, count],
        ).fetchall()
        db.execute("SET LOCAL enable_sort = on")
        if len(rows) >= min(count, seen.passages):
            return [number for (number,) in rows]
    among, values = "", []
    if seen.numbers is not None:
        among, values = "AND e.passage = ANY(%s::bigint[])", [seen.numbers.tolist()]
    rows = db.execute(
        "SELECT e.passage FROM embeddings e JOIN documents d ON d.id = e.document "
        f"WHERE e.generation = %s AND {seen.where} {among} ORDER BY e.vector <#> %s, e.passage LIMIT %s",
        [state.generation, *seen.values, *values, vector, count],
    ).fetchall()
    return [number for (number,) in rows]


def _worded(db: Cursor, asked: Sequence[str], count: int, seen: _Seen, also: Sequence[int]) -> dict[int, float]:
    """BM25 by number, best first: of the best `count`, and of those of `also` that have any of the words."""
    if not seen.passages or not asked:
        return {}
    stored = db.execute(
        "SELECT w.word, string_agg(w.passages, ''::bytea) FROM postings w JOIN documents d ON d.id = w.document "
        f"WHERE w.word = ANY(%s::bigint[]) AND {seen.where} GROUP BY w.word",
        [sorted({lexical.code_of(word) for word in asked}), *seen.values],
    )
    mean = seen.words / seen.passages or 1.0
    return words.best(*words.scores(dict(stored), asked, seen.passages, mean, seen.numbers), count, also)
