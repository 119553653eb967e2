"""Who decides the order of a prompt's documents, and what it saves.

Requests that retrieved the same documents rarely rank them alike, and a prefix cache serves documents only in the order
in which they were computed.  So the documents of a prompt are put into the order whose beginning lies in the cache
already, or is being computed for somebody else, as far as that saves more than it disturbs the ranking.

The tree's edges are documents, its root an access scope and what stands before the first document.  A node holds the
names of the blocks that its document completes behind its path, and nothing about where they are: whether they are
resident is asked of the block pool itself, so the tree can't be wrong about it.  (Trees of documents: RAGCache, Jin et
al. 2024; reordering for the cache: ContextPilot, CacheWeaver.  Those walk a proxy of the cache, this one the cache.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from inference.engine.blocks import BlockName, BlockPool, extend_names, name_behind
from inference.prompt import DocumentOrder


class Document(NamedTuple):
    """`key` names its content: equal keys mean equal tokens."""

    key: bytes
    tokens: Sequence[int]


class Parts(NamedTuple):
    """A prompt whose documents may change places: `head`, `documents` by relevance, `tail`.

    `hint(order)`: tokens that tell the ranking of documents which stand in another order, `order` being their ranks.
    """

    head: Sequence[int]
    documents: tuple[Document, ...]
    tail: Sequence[int]
    hint: Callable[[tuple[int, ...]], Sequence[int]] | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The order of relevance."""
        return tuple(range(len(self.documents)))

    def tokens(self, order: tuple[int, ...]) -> list[int]:
        """The prompt with its documents in `order`."""
        tokens = list(self.head)
        for rank in order:
            tokens += self.documents[rank].tokens
        if self.hint is not None and order != self.ranks:
            tokens += self.hint(order)
        return tokens + list(self.tail)


class Plan(NamedTuple):
    """`order` by rank; `expected` tokens that need not be computed in it, `plain` those in the order of relevance."""

    order: tuple[int, ...]
    expected: int
    plain: int


@dataclass(slots=True, eq=False)
class Node:
    """A document behind a path of others.  `names` of the blocks that it completes, `last` the chain's name by then,
    `rest` the tokens that no block holds yet, `ends` their name; it ends `length` tokens from the beginning.  `held` by
    requests that have not ended: what they have not computed yet, they will."""

    names: list[BlockName]
    last: BlockName
    rest: list[int]
    length: int
    ends: BlockName
    children: dict[bytes, Node] = field(default_factory=dict)
    held: int = 0


@dataclass(frozen=True, slots=True)
class Weights:
    """In tokens of work: `displacement` for each place that a document stands from its rank; what an order must save
    over the order of relevance to be taken at all, `margin`; the most nodes `visits` looked at for a plan."""

    displacement: float = 2.0
    margin: int = 16
    visits: int = 2000


class DocumentTree:
    """The orders in which documents were served, over the blocks of `pool`.

    `per_pair`: what a token costs more to compute for each one before it, over what it costs alone: a cached token far
    from the beginning saves more.
    """

    def __init__(self, pool: BlockPool, per_pair: float = 0.0, weights: Weights = Weights()):
        self._pool = pool
        self._weights = weights
        self._per_pair = per_pair
        self._roots: dict[tuple[BlockName, tuple[int, ...]], Node] = {}
        self._nodes = 0
        self._sweep_at = 4096

    def __len__(self) -> int:
        return self._nodes

    def plan(self, root: BlockName, parts: Parts, order: DocumentOrder = "planned") -> Plan:
        """The order for `parts` under `root`.  The same question of the same cache gets the same answer; what a plan
        expects is never less than the order of relevance does.  "best_first" plans all but the most relevant document,
        which stays where it is."""
        ranks = parts.ranks
        if order == "canonical":
            chosen = tuple(sorted(ranks, key=lambda rank: (parts.documents[rank].key, rank)))
            return Plan(chosen, self._along(root, parts, chosen)[0], self._along(root, parts, ranks)[0])
        plain, worth = self._along(root, parts, ranks)
        start = self._roots.get((root, tuple(parts.head)))
        if order == "relevance" or start is None or len(ranks) < 2:
            return Plan(ranks, plain, plain)
        best, most, saved = ranks, worth + self._weights.margin, plain
        stack = [(start, (), self._worth(0, self._there(start)), self._there(start))]
        visits = 0
        while stack and visits < self._weights.visits:
            node, path, path_worth, tokens = stack.pop()
            visits += 1
            whole = path + tuple(rank for rank in ranks if rank not in path)
            score = path_worth - self._weights.displacement * sum(abs(at - rank) for at, rank in enumerate(whole))
            if path and score > most and tokens >= plain:
                best, most, saved = whole, score, tokens
            if tokens < node.length - len(node.rest):
                continue  # what comes behind a gap can't be hit
            ahead = whole[len(path) :] if path or order != "best_first" else ranks[:1]
            for rank in reversed(ahead):  # the most relevant first
                child = node.children.get(parts.documents[rank].key)
                if child is None:
                    continue
                there = self._there(child)
                if there or not child.names:  # a short one may complete no block
                    more = self._worth(node.length - len(node.rest), there)
                    stack.append((child, (*path, rank), path_worth + more, tokens + there))
        return Plan(best, saved, plain)

    def hold(self, root: BlockName, parts: Parts, order: tuple[int, ...]) -> list[Node]:
        """Note that a request is served in `order`; its path, to be given back by `leave`."""
        block = self._pool.block_size
        key = (root, tuple(parts.head))
        node = self._roots.get(key)
        if node is None:
            node = self._roots[key] = _extended(root, [], 0, parts.head, block)
            self._nodes += 1
        path = [node]
        for rank in order:
            document = parts.documents[rank]
            child = node.children.get(document.key)
            if child is None:
                child = _extended(node.last, node.rest, node.length, document.tokens, block)
                node.children[document.key] = child
                self._nodes += 1
            node = child
            path.append(node)
        for node in path:
            node.held += 1
        if self._nodes > self._sweep_at:
            self._sweep()
        return path

    def leave(self, path: list[Node]) -> None:
        """A request has ended, or is served in another order."""
        for node in path:
            node.held -= 1

    def _along(self, root: BlockName, parts: Parts, order: tuple[int, ...]) -> tuple[int, float]:
        """(tokens that are there, what they are worth) in this very order."""
        node = self._roots.get((root, tuple(parts.head)))
        tokens, worth = 0, 0.0
        for rank in (*order, None):
            if node is None:
                break
            there = self._there(node)
            worth += self._worth(tokens, there)
            tokens += there
            if rank is None or tokens < node.length - len(node.rest):
                break
            node = node.children.get(parts.documents[rank].key)
        return tokens, worth

    def _there(self, node: Node) -> int:
        """Tokens of `node`'s blocks that are resident, or will be."""
        count = len(node.names) if node.held else len(self._pool.match(node.names))
        return count * self._pool.block_size

    def _worth(self, start: int, tokens: int) -> float:
        return tokens + self._per_pair * tokens * (start + (tokens + 1) / 2)

    def _sweep(self) -> None:
        """Drop what can't be hit any more, blocks of which the pool has taken back."""

        def kept(nodes: dict) -> dict:
            return {key: node for key, node in nodes.items() if useful(node)}

        def useful(node: Node) -> bool:
            there = node.held or self._pool.match(node.names[:1])
            node.children = kept(node.children) if there or not node.names else {}
            self._nodes += bool(there or node.children)
            return bool(there or node.children)

        self._nodes = 0
        self._roots = kept(self._roots)
        self._sweep_at = max(4096, 2 * self._nodes)


def _extended(last: BlockName, rest: list[int], length: int, more: Sequence[int], block_size: int) -> Node:
    """`more` tokens behind a chain that ends with the name `last` and `rest` tokens without one."""
    tokens = [*rest, *more]
    names: list[BlockName] = []
    extend_names(names, last, tokens, len(tokens), block_size)
    last, rest = names[-1] if names else last, tokens[len(names) * block_size :]
    return Node(names, last, rest, length + len(more), name_behind(last, rest))
