"""Which of several replicas a request goes to, and what is known of each.  Pure: no I/O, no clock of its own.

    route(chain, now)       counts the request at its replica in the same step that chooses it: a Ticket
    ticket.first_token()    its prompt has been read
    ticket.ended(...)       takes it off again, and notes how it went

By affinity the replica is chosen at which the first token is expected soonest, in tokens of work: those that others
wait for there, those of this prompt that it doesn't hold yet, and something for each stream that runs.  What it doesn't
hold is dearer, since computing again what another replica holds is lost to all, and the dearer the more prompts wait:
each of them waits for it.  Where nobody is known to hold a document, a part of it is taken to lie where rendezvous
hashing puts it: so gateways that know nothing of each other send it to the same replica.  (The sum is Dynamo's; that a
replica may have somewhat more to do than the mean, consistent hashing with bounded loads, Mirrokni et al. 2018.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from inference.config import RouteBy
from inference.errors import Overloaded, Unavailable
from inference.prompt import DocumentOrder
from inference.routing.path import Chain, Name
from inference.routing.planning import Order, plan
from inference.routing.record import Record
from inference.routing.rendezvous import claim, fraction
from inference.routing.standing import Circuit, Limit

MOST_RETRY_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Weights:
    """In tokens of prefill: `miss` for each token that must be computed though another replica may hold it, over one
    that waits, and as much again for each prompt of this length that waits at a replica, on average; `stream` for each
    answer that is being written; `home`: the share of a prompt's first document that is taken to lie at its home."""

    miss: float = 2.0
    stream: float = 32.0
    home: float = 0.5


@dataclass(eq=False, slots=True)
class Replica:
    """One server, as the router sees it.  `weight`: how much it bears over others.  `tier`: those of the next are
    asked only where none of one can be.  `share`: a canary, that gets this share of all documents and nothing else
    while others can be asked; None for the others.  `draining`: nothing new is sent to it."""

    name: str
    weight: float = 1.0
    tier: int = 0
    share: float | None = None
    draining: bool = False
    record: Record = field(default_factory=Record)
    circuit: Circuit = field(default_factory=Circuit)
    limit: Limit = field(default_factory=lambda: Limit(1024))
    running: int = 0
    sent: int = 0
    unread: float = 0.0  # tokens of prompts whose first token has not come
    rests_until: float = 0.0  # it said when to come again

    def admits(self, now: float, trusted: bool = False) -> bool:
        """Whether it can be asked; `trusted`: also beside one that tries it."""
        circuit = self.circuit.admits or (trusted and self.circuit.state == "half_open")
        return circuit and not self.draining and self.running < self.limit.value and now >= self.rests_until


class Ticket:
    """A request at its replica, from being chosen to its end.  `order`: of its documents."""

    __slots__ = ("_along", "_open", "_promised", "_tries", "_uncached", "order", "replica")

    def __init__(self, replica: Replica, order: Order, along: list[tuple[Name, float]], held: float):
        self.replica = replica
        self.order = order
        self._along = along
        whole = sum(tokens for _, tokens in along)
        self._promised = replica.record.promised(along) / whole if whole else 0.0
        self._uncached = whole - held
        self._open = True
        self._tries = replica.circuit.sent()
        replica.running += 1
        replica.sent += 1
        replica.unread += self._uncached
        replica.record.note(along)

    def first_token(self) -> None:
        """Its prompt has been read: what it took stands before nobody any more."""
        self.replica.unread -= self._uncached
        self._uncached = 0.0
        self.replica.record.settle(self._along)
        self.replica.circuit.answered()

    def usage(self, prompt_tokens: int | None, cached_tokens: int | None) -> None:
        """What the server said of its cache."""
        if prompt_tokens and cached_tokens is not None:
            self.replica.record.correct(self._along, self._promised, cached_tokens / prompt_tokens)

    def ended(self) -> None:
        """The answer is whole."""
        if self._leave():
            self.replica.circuit.succeeded()
            self.replica.limit.ended_well(self.replica.running + 1)

    def left(self) -> None:
        """Nobody wants the answer any more, or the caller was at fault.  After any other end it does nothing."""
        if self._leave():
            self.replica.record.forget(self._along)

    def failed(self, now: float, overloaded: bool = False) -> None:
        """The replica is at fault; `overloaded`: it may be that it has too much to do."""
        if self._leave():
            if overloaded:
                self.replica.limit.refused(self.replica.running, now)
            self.replica.circuit.failed(now)
            self.replica.record.forget(self._along)

    def refused(self, now: float, retry_after: float | None) -> None:
        """The replica has too much to do."""
        if self._leave():
            self.replica.limit.refused(self.replica.running, now)
            self.replica.record.forget(self._along)
            if retry_after is not None:
                self.replica.rests_until = now + min(retry_after, MOST_RETRY_SECONDS)

    def _leave(self) -> bool:
        was_open, self._open = self._open, False
        if was_open:
            self.replica.running -= 1
            self.replica.unread -= self._uncached
            if self._tries:
                self.replica.circuit.tried()
        return was_open


class Router:
    """Chooses among `replicas`, which may change between requests."""

    def __init__(
        self,
        replicas: Iterable[Replica] = (),
        by: RouteBy = "affinity",
        order: DocumentOrder = "relevance",
        weights: Weights = Weights(),
    ):
        self.replicas = list(replicas)
        self.by: RouteBy = by
        self.order: DocumentOrder = order
        self._weights = weights
        self._turn = 0

    def route(
        self, chain: Chain, now: float, without: Iterable[Replica] = (), order: DocumentOrder | None = None
    ) -> Ticket:
        """Choose a replica that isn't among those `without` and count the request there; its documents in `order`, or
        in the router's.  Raises Overloaded where those that could be asked have enough to do, Unavailable where none
        can be reached."""
        order = order or self.order
        others = [replica for replica in self.replicas if replica not in without]
        able = [replica for replica in others if replica.admits(now)]
        # Where there is nobody else, one that says it is ready is better than none.
        able = able or [replica for replica in others if replica.admits(now, trusted=True)]
        if not able:
            raise self._refusal(now)
        tier = min([replica.tier for replica in able if replica.share is None] or [replica.tier for replica in able])
        able = self._by_share([r for r in able if r.tier == tier or (r.tier < tier and r.share is not None)], chain)
        match self.by:
            case "affinity":
                return self._nearest(able, chain, order)
            case "least_loaded":
                chosen = min(able, key=lambda replica: (replica.running / replica.weight, replica.name))
            case "round_robin":
                self._turn += 1
                chosen = able[self._turn % len(able)]
        return self._ticket(chosen, chain, order)

    def _by_share(self, able: list[Replica], chain: Chain) -> list[Replica]:
        """The canary whose documents these are, or those that are none."""
        canaries = [replica for replica in able if replica.share is not None]
        if not canaries or len(canaries) == len(able):
            return able
        at = fraction(b"canary" + chain.key)
        for canary in canaries:
            at -= canary.share or 0.0
            if at < 0:
                return [canary]
        return [replica for replica in able if replica.share is None]

    def _nearest(self, able: list[Replica], chain: Chain, how: DocumentOrder) -> Ticket:
        weights, key, best = self._weights, chain.key, None
        claims = {replica: claim(key, replica.name, replica.weight) for replica in able}
        home = max(able, key=claims.__getitem__)
        documents, whole = chain.asked.documents, chain.asked.tokens
        at_home = sum(piece.tokens for piece in (*chain.asked.head, *documents[:1]))
        wait = sum(replica.unread / replica.weight for replica in able) / len(able)
        for replica in able:
            order = plan(chain, replica.record, how)
            along = chain.along(order)
            held = replica.record.overlap(along)
            missed = whole - (max(held, weights.home * at_home) if replica is home else held)
            work = replica.unread + weights.miss * missed + weights.stream * replica.running
            cost = work / replica.weight + weights.miss * wait * missed / max(1.0, whole), -claims[replica]
            if best is None or cost < best[0]:
                best = cost, replica, order, along, held
        assert best is not None
        return Ticket(*best[1:])

    def _ticket(self, replica: Replica, chain: Chain, how: DocumentOrder) -> Ticket:
        order = plan(chain, replica.record, how)
        along = chain.along(order)
        return Ticket(replica, order, along, replica.record.overlap(along))

    def _refusal(self, now: float) -> Overloaded | Unavailable:
        reached = [r for r in self.replicas if r.circuit.state != "open" and not r.draining]
        if reached:
            rests = min((r.rests_until - now for r in reached), default=0.0)
            return Overloaded("every replica that can be reached has enough to do", max(1.0, rests))
        return Unavailable(f"none of {len(self.replicas)} replicas can be reached: /health/ready tells why")
