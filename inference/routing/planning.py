"""In which order a prompt's documents are best sent to a replica: the one whose beginning it holds already.

The same question that `inference.engine.ordering` answers over the engine's own blocks, asked of a record of what a
server elsewhere was sent.
"""

from __future__ import annotations

from inference.prompt import DocumentOrder
from inference.routing.path import Chain
from inference.routing.record import Record

DISPLACEMENT = 2.0  # tokens that a place from its rank must save
MARGIN = 16.0  # tokens that another order than that of relevance must save
VISITS = 200

Order = tuple[int, ...]


def plan(chain: Chain, record: Record, how: DocumentOrder) -> Order:
    """The documents' ranks in the order to send them in.  "best_first" leaves the most relevant where it is; what the
    replica holds is all one to "relevance" and "canonical"."""
    ranks = chain.asked.ranks
    if how == "canonical":
        return chain.canonical
    if how == "relevance" or len(ranks) < 2 or not all(name in record for name, _ in chain.head):
        return ranks
    documents = chain.asked.documents
    best, most = ranks, _along(chain, record, ranks) + MARGIN
    stack: list[tuple[Order, float]] = [((), 0.0)]
    for _ in range(VISITS):
        if not stack:
            break
        path, tokens = stack.pop()
        ahead = chain.documents_behind(path)
        if tokens > most:
            whole = path + tuple(rank for rank, _ in ahead)
            score = tokens - DISPLACEMENT * sum(abs(at - rank) for at, rank in enumerate(whole))
            if score > most:
                best, most = whole, score
        held = record.held_of(ahead if path or how == "planned" else ahead[:1])
        for rank in reversed(held):  # the most relevant first
            stack.append(((*path, rank), tokens + documents[rank].tokens))
    return best


def _along(chain: Chain, record: Record, order: Order) -> float:
    tokens = 0.0
    for end, rank in enumerate(order, 1):
        if chain.through(order[:end]) not in record:
            break
        tokens += chain.asked.documents[rank].tokens
    return tokens
