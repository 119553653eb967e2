"""Several backends as one: every request goes to one of them, and to another where that fails before its first token.

Owns the replicas' backends, opens and closes them while requests run; which replica gets a request is the `Router`'s.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial

import msgspec
from msgspec import structs

from inference.backend import Capabilities, Finished, GenerationEvent, GenerationRequest, Health, TextDelta, Usage
from inference.config import FleetConfig
from inference.errors import BackendError, Overloaded, RequestRefused, TimedOut, Unavailable, UnknownModel
from inference.prompt import ChatPrompt, Prompt
from inference.routing.members import Members, Open
from inference.routing.path import Chain, asked_of, reordered
from inference.routing.router import Replica, Router, Ticket
from inference.running import Run, Running

log = logging.getLogger(__name__)

TRIES = 3  # of one request
RETURN_SECONDS = 5.0  # after which a replica that failed it, and is asked by others again, is as good as any
LOOK_SECONDS = 0.5  # for all replicas' health, where one of them is ready: probes of Kubernetes wait 1 s


class FleetBackend:
    """The replicas of `config`, each opened by `open_one`.  Takes as long as these do together; raises what they do."""

    def __init__(self, config: FleetConfig, open_one: Open, clock: Callable[[], float] = time.monotonic):
        self._served_name = config.served_name
        self._clock = clock
        self._running = Running()
        self._counts: Counter[str] = Counter()
        self._closed = False
        self.router = Router(by=config.route_by, order=config.document_order)
        self._members = Members(config.replicas, self.router, open_one, clock)

    async def update(self, config: FleetConfig) -> list[str]:
        """Become the fleet of `config` without dropping a request.  What changed, in words.  Raises what keeps a new
        replica from being opened, or Unavailable where one isn't ready, and then nothing has changed."""
        before = self.router.by, self.router.order, self._served_name
        news = await self._members.update(config.replicas)
        self._served_name = config.served_name
        self.router.by, self.router.order = config.route_by, config.document_order
        names = ("route_by", "document_order", "served_name")
        for name, was in zip(names, before, strict=True):
            if (now := getattr(config, name)) != was:
                news.append(f"{name} is {now!r} now")
        return news

    # ---- a backend -------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What all replicas can do; the context is the shortest of the first tier."""
        each = {replica: self._members.backend(replica).capabilities for replica in self.router.replicas}
        first = min(replica.tier for replica in each)
        contexts = [c.max_context_tokens for replica, c in each.items() if replica.tier == first]
        caches = [c.cache_tokens for c in each.values()]
        return Capabilities(
            model=self._served_name or next(iter(each.values())).model,
            max_context_tokens=min((c for c in contexts if c is not None), default=None),
            continues_reply=all(c.continues_reply for c in each.values()),
            counts_tokens=any(c.counts_tokens for c in each.values()),
            shares_documents=all(c.shares_documents for c in each.values()),
            cache_tokens=sum(c for c in caches if c is not None) if None not in caches else None,
        )

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        return self._serve(request, self._running.open(request.request_id))

    def abort(self, request_id: str) -> None:
        self._running.abort(request_id)

    async def count_tokens(self, prompt: Prompt) -> int | None:
        """As the first replica says that can be asked and can tell."""
        by_tier = sorted(self.router.replicas, key=lambda replica: replica.tier)
        backends = [self._members.backend(replica) for replica in by_tier if replica.circuit.state == "closed"]
        able = [backend for backend in backends if backend.capabilities.counts_tokens]
        for backend in able[:TRIES]:  # one that leaves meanwhile knows nothing any more
            if (counted := await backend.count_tokens(prompt)) is not None:
                return counted
        return None

    async def health(self) -> Health:
        """Ready as long as one replica is; the detail names those that aren't.  One that hangs is waited for only while
        no other is ready: whoever asks for readiness has no patience."""
        if self._closed:
            return Health(False, "closed")
        self._members.begin()
        looks = {asyncio.create_task(self._members.backend(r).health()): r for r in self.router.replicas}
        waiting = set(looks)
        try:
            done, waiting = await asyncio.wait(looks, timeout=LOOK_SECONDS)
            while waiting and not any(look.result().ready for look in done):
                more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                done |= more
        finally:
            for look in waiting:
                look.cancel()
        health = {
            replica: look.result() if look in done else Health(False, "does not answer yet")
            for look, replica in looks.items()
        }
        trouble = [
            f"{replica.name}: {each.detail or 'not ready'}" for replica, each in health.items() if not each.ready
        ]
        return Health(any(each.ready for each in health.values()), "; ".join(trouble))

    def metrics(self) -> dict[str, float]:
        """The replicas' own added up, and of each what the router knows of it."""
        totals = Counter(self._members.past)
        for backend in self._members.all.values():
            totals.update(backend.metrics())
        mine = {f"fleet_{name}_total": float(self._counts[name]) for name in ("requests", "retries", "refused")}
        for replica in self._members.all:
            label = f"{{replica={msgspec.json.encode(replica.name).decode()}}}"
            mine |= {
                f"replica_running{label}": float(replica.running),
                f"replica_unread_tokens{label}": max(0.0, replica.unread),
                f"replica_limit{label}": float(replica.limit.value),
                f"replica_open{label}": float(replica.circuit.state == "open"),
                f"replica_draining{label}": float(replica.draining),
                f"replica_requests_total{label}": float(replica.sent),
            }
        return totals | mine

    async def close(self) -> None:
        """Abort what runs and close every replica."""
        self._closed = True
        self._running.abort_all()
        await self._members.close()

    # ---- one request -----------------------------------------------------------------------

    async def _serve(self, request: GenerationRequest, run: Run) -> AsyncGenerator[GenerationEvent, None]:
        self._members.begin()
        chain = Chain(asked_of(request.prompt, request.scope))
        tried: list[tuple[Replica, float]] = []
        failure: BackendError | None = None
        self._counts["requests"] += 1
        while not run.aborted:
            ticket = self._ticket(request, chain, tried, failure)
            self._counts["retries"] += bool(tried)
            backend = self._members.backend(ticket.replica)
            answered = False
            try:
                async with aclosing(backend.generate(_as_ordered(request, ticket))) as stream:
                    run.attach(partial(backend.abort, request.request_id))
                    if run.aborted:
                        backend.abort(request.request_id)
                    async for event in stream:
                        ended = isinstance(event, Finished) and event.reason != "abort"
                        if isinstance(event, Finished) and not (ended or answered or run.aborted):
                            raise Unavailable("the inference server ended the request before its first token")
                        if not answered and (ended or isinstance(event, TextDelta)):
                            answered = True
                            ticket.first_token()
                        if ended:
                            ticket.usage(event.usage.prompt_tokens, event.usage.cached_tokens)
                            ticket.ended()
                        yield event
                return
            except BackendError as error:
                self._note(ticket, error)
                tried.append((ticket.replica, self._clock()))
                if answered or not _may_go_elsewhere(error) or len(tried) == TRIES:
                    raise
                failure = error
                log.warning("replica %s, before the first token: %s", ticket.replica.name, error)
            finally:
                ticket.left()
                self._members.let_go(ticket.replica)
        yield Finished("abort", Usage(None, 0))

    def _ticket(
        self, request: GenerationRequest, chain: Chain, tried: list[tuple[Replica, float]], failure: BackendError | None
    ) -> Ticket:
        if self._closed:
            raise Unavailable("the backend is closed: the server is shutting down")
        now = self._clock()
        just_failed = [replica for replica, at in tried if now - at < RETURN_SECONDS]
        try:
            return self.router.route(chain, now, just_failed, request.document_order)
        except BackendError as error:
            self._counts["refused"] += 1
            raise (failure or error) from None

    def _note(self, ticket: Ticket, error: BackendError) -> None:
        """What an error says of the replica that raised it."""
        match error:
            case Overloaded():
                ticket.refused(self._clock(), error.retry_after_seconds)
            case RequestRefused() if not isinstance(error, UnknownModel):
                pass
            case _:
                ticket.failed(self._clock(), overloaded=isinstance(error, TimedOut))
                self._members.failed(ticket.replica)


def _as_ordered(request: GenerationRequest, ticket: Ticket) -> GenerationRequest:
    if not isinstance(request.prompt, ChatPrompt) or ticket.order == tuple(range(len(ticket.order))):
        return request
    return structs.replace(request, prompt=reordered(request.prompt, ticket.order))


def _may_go_elsewhere(error: BackendError) -> bool:
    """Not what any replica would refuse, nor what has taken its time already."""
    return isinstance(error, UnknownModel) or not isinstance(error, RequestRefused | TimedOut)
