"""Documents reused at other places than they were computed at: approximate, so only behind a gate.

A document is computed once right behind the system prompt, as a request of its own, whose blocks anybody finds who
begins with it.  Elsewhere it is a segment: a request copies its keys and values into blocks of its own, the keys turned
to where it stands there, and computes some of its tokens again: the first block, which took the beginning's attention
when it was computed (EPIC, Hu et al. 2024), and those that the question attends to most (ProphetKV, arXiv 2602.02579).
What comes out of it is never published: nothing approximate is ever taken for exact.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence as Of
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from inference.engine.blocks import BlockName, BlockPool, extend_names
from inference.engine.ordering import Parts
from kernels import AttentionPlan

LEAST = 48  # tokens: a shorter document is computed in its place
LONGEST_TAIL = 512  # tokens behind the documents: they are looked from in one step


class Looks(Protocol):
    """What a model must be able to do beside `forward`: as `inference.models.Llama`."""

    def look(self, tokens: torch.Tensor, plan: AttentionPlan, cache: object, layers: range) -> torch.Tensor: ...

    def splice(self, cache: object, source: torch.Tensor, target: torch.Tensor, by: torch.Tensor) -> None: ...


class Reusing(NamedTuple):
    """How documents are reused: `share` of the tokens of those at another place are computed again; the question is
    followed through the model's layers up to the last of `layers`, in which its attention counts."""

    share: float
    layers: range


class Span(NamedTuple):
    """A document from token `start` to `end` of the prompt; as a segment the blocks `names` hold it, behind the head
    and before what fills its last block: `compiled` is all of it."""

    start: int
    end: int
    names: list[BlockName]
    compiled: list[int]


@dataclass(slots=True, eq=False)
class Reuse:
    """How a request reuses its documents.  It waits for the requests `awaits`, which compute what is missing.

    Once it is admitted: `skips`, (start, end) of the tokens that were copied; nothing is exact from `exact` on;
    `approximate` tokens were copied to another place, `again` of the documents at another place were computed again.
    """

    head: int
    spans: list[Span]
    awaits: set[str] = field(default_factory=set)
    skips: list[tuple[int, int]] = field(default_factory=list)
    exact: int = 0
    approximate: int = 0
    again: int = 0

    @property
    def tail(self) -> int:
        """Where the documents end."""
        return self.spans[-1].end


class Segments:
    """Plans and carries out the reuse of documents over `pool`, `how` the model allows it."""

    def __init__(self, pool: BlockPool, model: Looks, cache: object, how: Reusing):
        self.share = how.share
        self._pool = pool
        self._model = model
        self._cache = cache
        self._layers = how.layers

    def plan(self, root: BlockName, parts: Parts, order: tuple[int, ...], now: float) -> Reuse | None:
        """None where reuse would cost more than it saves: too many of the documents were never seen before."""
        block, head = self._pool.block_size, len(parts.head)
        if len(order) < 2 or len(parts.tail) > LONGEST_TAIL:
            return None
        at, spans, known, strange = head, [], 0, 0
        for rank in order:
            document = parts.documents[rank].tokens
            fill = -(head + len(document)) % block
            compiled = [*parts.head, *document, *document[-1:] * fill]
            names: list[BlockName] = []
            extend_names(names, root, compiled, len(compiled), block)
            spans.append(Span(at, at + len(document), names, compiled))
            at += len(document)
            if self._pool.popularity(names[-1]) or self._resident(names):
                known += len(document)
            else:
                strange += len(document)
        self._pool.asked([name for span in spans for name in span.names], now)
        # What is strange is computed a little more often than without reuse, and may never be asked for again.
        if (1 - self.share) * known < self.share * strange or any(s.end - s.start < LEAST for s in spans):
            return None
        return Reuse(head, spans)

    def missing(self, reuse: Reuse) -> list[Span]:
        """The documents that no blocks hold as a segment."""
        return [span for span in reuse.spans if not self._resident(span.names)]

    def sources(self, reuse: Reuse, computed: int) -> list[list[int]]:
        """The blocks of each segment that reaches beyond the first `computed` tokens of the prompt."""
        return [self._pool.match(span.names) for span in reuse.spans if span.end > computed]

    def splice(self, tokens: Of[int], blocks: list[int], computed: int, reuse: Reuse) -> None:
        """Copy what the documents beyond the first `computed` of `tokens` need into `blocks`, and choose what is
        computed again."""
        size = self._pool.block_size
        source: list[int] = []
        places: list[int] = []  # of the copied tokens in the prompt
        by: list[int] = []
        first: list[int] = []  # of each document at another place, what is computed again in any case
        beyond = [span for span in reuse.spans if span.end > computed]
        for span, held in zip(beyond, self.sources(reuse, computed), strict=True):
            begin = max(span.start, computed)
            there = range(begin - span.start + reuse.head, span.end - span.start + reuse.head)
            source += [held[place // size] * size + place % size for place in there]
            places += range(begin, span.end)
            by += [span.start - reuse.head] * len(there)
            if span.start > reuse.head:
                first += range(begin, min(span.start + size, span.end))
        moved = [place for place, turn in zip(places, by, strict=True) if turn]
        reuse.skips, reuse.approximate, reuse.again = [], 0, 0
        reuse.exact = moved[0] if moved else sys.maxsize
        if not places:
            return
        target = [blocks[place // size] * size + place % size for place in places]
        self._model.splice(self._cache, *(torch.tensor(column) for column in (source, target, by)))
        again = set(first)
        more = min(round(self.share * len(moved)), len(moved)) - len(again)
        if more > 0:
            rest = torch.tensor([place for place in moved if place not in again])
            again.update(rest[self._received(tokens, blocks, reuse)[rest].topk(more).indices].tolist())
        reuse.skips = side_by_side([place for place in places if place not in again])
        reuse.approximate, reuse.again = len(moved) - len(again), len(again)

    def _received(self, tokens: Of[int], blocks: list[int], reuse: Reuse) -> torch.Tensor:
        """How much the question attends to each token, [tokens] float32 on the host."""
        tail = torch.tensor(tokens[reuse.tail :], dtype=torch.int64)
        plan = AttentionPlan.of([len(tail)], [len(tokens)], np.array([blocks], dtype=np.int32), self._pool.block_size)
        return self._model.look(tail, plan, self._cache, self._layers).cpu()

    def _resident(self, names: list[BlockName]) -> bool:
        return len(self._pool.match(names)) == len(names)


def looked_at(layers: int) -> range:
    """In which of a model's layers what the question attends to is told best for what it costs: the middle ones know
    as much as all the later ones do."""
    return range(round(0.4 * layers), max(1, round(0.53 * layers)))


def side_by_side(places: list[int]) -> list[tuple[int, int]]:
    """Ascending places as (start, end) of those that stand side by side."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return runs
