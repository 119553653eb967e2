"""Documents reused at other places than they were computed at: approximate, so only behind a gate.

A document is computed once, as a request of its own, behind the system prompt and a lead: other documents, the same for
all (`engine.lead`).  What is computed right behind the system prompt looks like the first document to a model, and
where each of a prompt's documents does, they draw attention off the one that is: with a lead like the documents answers
are disturbed several times less (`python -m loadtests.disturbance`).  Such a document is a segment: a request copies
its keys and values into blocks of its own, the keys turned to where it stands there, and computes again those of its
tokens that the question attends to most (ProphetKV, arXiv 2602.02579).  A prompt's first document is computed without a
lead and copied to where it was computed, so it is exact.
What comes out of a segment is never published: nothing
approximate is ever taken for exact.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence as Of
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from inference.engine.blocks import BlockName, BlockPool, extend_names, name_behind
from inference.engine.ordering import Parts
from kernels import AttentionPlan

LEAST = 48  # tokens: a shorter document is computed in its place
HEADS = 256  # system prompts, the names of whose blocks are remembered
LONGEST_TAIL = 512  # tokens behind the documents: they are looked from in one step


class Looks(Protocol):
    """What a model must be able to do beside `forward`: as `inference.models.Llama`."""

    def look(self, tokens: torch.Tensor, plan: AttentionPlan, cache: object, layers: range) -> torch.Tensor: ...

    def splice(self, cache: object, source: torch.Tensor, target: torch.Tensor, by: torch.Tensor) -> None: ...


class Reusing(NamedTuple):
    """How documents are reused: `share` of the tokens of those at another place are computed again; the question is
    followed through the model's layers up to the last of `layers`, in which its attention counts; documents are
    computed behind the tokens `lead`, but for a prompt's first one."""

    share: float
    layers: range
    lead: tuple[int, ...]


class Span(NamedTuple):
    """A document from token `start` to `end` of the prompt, computed for all `by` tokens before that: the blocks
    `names` hold it from there, behind the tokens `before` it and in front of what fills its last block."""

    start: int
    end: int
    by: int
    names: list[BlockName]
    before: list[int]
    document: Of[int]

    @property
    def request_id(self) -> str:
        """Of the request that computes it for all."""
        return f"document {self.names[-1].hex()}"

    def compiled(self, block_size: int) -> list[int]:
        """What is computed for it: whole blocks."""
        tokens = [*self.before, *self.document]
        return tokens + [tokens[-1]] * (-len(tokens) % block_size)


@dataclass(slots=True, eq=False)
class Reuse:
    """How a request reuses its documents.  It waits for the requests `awaits`, which compute what is missing.

    Once it is admitted: `skips`, (start, end) of the tokens that were copied; nothing is exact from `exact` on;
    `approximate` tokens were copied to another place, `again` of the documents at another place were computed again.
    """

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
        self._lead = how.lead
        self._heads: OrderedDict[tuple[BlockName, tuple[int, ...]], tuple[list[int], list[BlockName]]] = OrderedDict()

    def plan(self, root: BlockName, parts: Parts, order: tuple[int, ...], now: float) -> Reuse | None:
        """None where reuse would cost more than it saves: too many of the documents were never seen before."""
        block = self._pool.block_size
        if len(order) < 2 or len(parts.tail) > LONGEST_TAIL:
            return None
        led, led_names = self._led(root, parts.head)
        at, spans, asked, known, strange = len(parts.head), [], [], 0, 0
        for rank in order:
            document = parts.documents[rank].tokens
            before, named = (led, led_names) if spans else (list(parts.head), [])
            span = Span(at, at + len(document), at - len(before), list(named), before, document)
            rest = span.compiled(block)[len(named) * block :]
            extend_names(more := [], named[-1] if named else root, rest, len(rest), block)
            span.names.extend(more)
            spans.append(span)
            at += len(document)
            asked.append(name_behind(root, document))  # wherever it stands
            if self._pool.popularity(asked[-1]) or self._resident(span.names):
                known += len(document)
            else:
                strange += len(document)
        asked += dict.fromkeys(name for span in spans for name in span.names)
        self._pool.asked(asked, now)
        if any(span.end - span.start < LEAST for span in spans):
            return None
        # What is strange is computed a little more often than without reuse, and may never be asked for again.
        return Reuse(spans) if (1 - self.share) * known >= self.share * strange else None

    def missing(self, reuse: Reuse, computed: int) -> list[Span]:
        """The documents beyond the first `computed` tokens of the prompt that no blocks hold as a segment."""
        return [span for span in reuse.spans if span.end > computed and not self._resident(span.names)]

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
        beyond = [span for span in reuse.spans if span.end > computed]
        for span, held in zip(beyond, self.sources(reuse, computed), strict=True):
            begin = max(span.start, computed)
            there = range(begin - span.by, span.end - span.by)
            source += [held[place // size] * size + place % size for place in there]
            places += range(begin, span.end)
            by += [span.by] * len(there)
        moved = [place for place in places if place >= reuse.spans[0].end]
        reuse.skips, reuse.approximate, reuse.again = [], 0, 0
        reuse.exact = moved[0] if moved else sys.maxsize
        if not places:
            return
        target = [blocks[place // size] * size + place % size for place in places]
        self._model.splice(self._cache, *(torch.tensor(column) for column in (source, target, by)))
        again: set[int] = set()
        if count := round(self.share * len(moved)):
            among = torch.tensor(moved)
            again.update(among[self._received(tokens, blocks, reuse)[among].topk(count).indices].tolist())
        reuse.skips = side_by_side([place for place in places if place not in again])
        reuse.approximate, reuse.again = len(moved) - len(again), len(again)

    def _received(self, tokens: Of[int], blocks: list[int], reuse: Reuse) -> torch.Tensor:
        """How much the question attends to each token, [tokens] float32 on the host."""
        tail = torch.tensor(tokens[reuse.tail :], dtype=torch.int64)
        plan = AttentionPlan.of([len(tail)], [len(tokens)], np.array([blocks], dtype=np.int32), self._pool.block_size)
        return self._model.look(tail, plan, self._cache, self._layers).cpu()

    def _led(self, root: BlockName, head: Of[int]) -> tuple[list[int], list[BlockName]]:
        """`head` and the lead, whole blocks of them, so that none is both of the lead and of a document; and the
        blocks' names, hashed once for all documents.  What is too much is cut off the lead's beginning: its end is the
        end of a document, and what follows is to look like the next one."""
        key = (root, tuple(head))
        if key not in self._heads:
            block = self._pool.block_size
            tokens = [*head, *self._lead[(len(head) + len(self._lead)) % block :]]
            names: list[BlockName] = []
            extend_names(names, root, tokens, len(tokens), block)
            self._heads[key] = tokens, names
        self._heads.move_to_end(key)
        if len(self._heads) > HEADS:
            self._heads.popitem(last=False)
        return self._heads[key]

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
