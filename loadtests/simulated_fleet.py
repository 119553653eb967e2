"""Simulated time: a router over replicas, each the real engine core over a model that costs nothing, on a clock that
the measured cost of their steps moves.

An engine's step happens when it begins, and its news are told when it ends: the router hears of a first token, and of
what was cached, as late as it would.  What a replica is given while a step runs waits for the next one.
"""

from __future__ import annotations

import csv
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from inference import Sampling
from inference.backend import Usage
from inference.engine import EngineCore, EngineOptions, Policy
from inference.engine.batch import Batch
from inference.engine.core import Launched, Output
from inference.engine.cost import StepCost
from inference.routing.path import Asked, Chain, Piece
from inference.routing.record import Record
from inference.routing.rendezvous import claim
from inference.routing.router import Replica, Router, Ticket
from kernels import BLOCK_SIZE, bytes_per_block
from loadtests.free import NoText
from loadtests.gpu_engine import STEP_SECONDS, Setup, llama
from loadtests.waiting import COST

TRACES = Path(__file__).parents[2] / "shared/data/traces"
GPU_RESULTS = Path(__file__).parent / "results/gpu/gpu.json"
TOPICS, PER_TOPIC = 80, 32
LENGTHS = (200, 400)  # tokens of a document, evenly
ALIEN, STRANGERS = 0.1, 20_000  # the share of documents that come from elsewhere, and how many there are
HEAD, QUESTION = 60, 30  # tokens; a question takes what no document fills
MISJUDGED = 0.2  # the router knows a document's length by its characters alone: so much off, at most


CONTEXT = 8192  # tokens


class Machine(NamedTuple):
    """A replica: what its steps take, what it caches, and how its engine is set: the seconds and tokens of a step, and
    how many requests run at once."""

    name: str
    cost: StepCost
    cache_tokens: int
    step_seconds: float
    step_tokens: int
    running: int


# SmolLM2-135M in bf16 with the step costs of `loadtests.waiting`, and what the engine takes by default on a CPU: 1024
# MB of keys and values.  `python -m loadtests.routing --measure` says what steps take here.
CPU = Machine("SmolLM2-135M, two cores", COST, 46_592, 0.17, 512, 64)


def gpu() -> Machine | None:
    """Llama-3.1-8B's shape in bf16 with 40 GiB of cache, as `loadtests.gpu_check` measured it; None where it hasn't."""
    if not GPU_RESULTS.exists():
        return None
    found = json.loads(GPU_RESULTS.read_text(encoding="utf-8"))
    setup, shape = Setup(), llama("8B")
    each = bytes_per_block(shape.layers, shape.kv_heads, shape.head_dim, torch.bfloat16) // BLOCK_SIZE
    return Machine(
        f"8B bf16, {found['device']['name']}",
        StepCost(**found["8B bf16"]["cost"]),
        setup.cache_bytes // each,
        STEP_SECONDS,
        setup.chunk,
        max(setup.batches),
    )


class Arrival(NamedTuple):
    """When, in seconds; `documents` by number and relevance; tokens of the rest."""

    at: float
    documents: tuple[int, ...]
    question: int
    answer: int


class Request(NamedTuple):
    """A trace's: when, in seconds from its first, and tokens."""

    at: float
    prompt: int
    answer: int


def read_trace(name: str) -> list[Request]:
    """Azure's "code" or "conv" of 2023, an hour."""
    with (TRACES / f"azure_llm_2023_{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    times = [datetime.fromisoformat(row[0][:26]) for row in rows]
    return [
        Request((when - times[0]).total_seconds(), int(prompt), int(answer))
        for when, (_, prompt, answer) in zip(times, rows, strict=True)
    ]


def arrivals(trace: Sequence[Request], seed: int) -> list[Arrival]:
    """The trace with something to ask: documents of a topic that Zipf's law draws, each request ranking them anew, as
    many as its prompt has room for, and in the rest a question of its own.  A prompt holds no less than the head and a
    question, and with its answer no more than CONTEXT."""
    rng = random.Random(f"fleet/{seed}")
    order = rng.sample(range(TOPICS), TOPICS)
    weights = [1 / (place + 1) for place in range(TOPICS)]
    found = []
    for at, prompt, answer in trace:
        room = min(max(prompt, HEAD + QUESTION), CONTEXT - answer) - HEAD
        topic = rng.choices(order, weights)[0]
        close = {topic * PER_TOPIC + d: -d / 4 + rng.gauss(0, 1) for d in range(PER_TOPIC)}
        documents: dict[int, None] = {}
        for document in sorted(close, key=close.__getitem__, reverse=True):
            if rng.random() < ALIEN:
                document = 10**6 + rng.randrange(STRANGERS)
            if document in documents:
                continue
            if room - length(document) < QUESTION:
                break
            documents[document] = None
            room -= length(document)
        found.append(Arrival(at, tuple(documents), room, max(1, answer)))
    return found


@cache
def length(document: int) -> int:
    return random.Random(document).randint(*LENGTHS)


class FreeEngine(EngineCore):
    """The engine core without a model: all but the tensors happens, in no time."""

    def __init__(self, machine: Machine, clock: Callable[[], float]):
        policy = Policy(
            max_tokens=machine.step_tokens,
            max_running=machine.running,
            step_seconds=machine.step_seconds,
            cost=machine.cost,
        )
        options = EngineOptions(
            identity=machine.name,
            blocks=1 + machine.cache_tokens // BLOCK_SIZE,
            max_context_tokens=CONTEXT,
            eos_token_ids=frozenset(),
            policy=policy,
            max_queued=10**9,
        )
        super().__init__(None, options, lambda stop: NoText(), clock, cache=())
        self.step_seconds = 0.0  # of the last step

    def _launch(self, plan, earlier):
        cost = self.options.policy.cost
        self.step_seconds = cost.fixed + sum(cost.chunk(s.start, s.tokens) for s in plan)
        self.counters.steps += 1
        self.counters.computed_tokens += sum(s.tokens for s in plan)
        sampled = [s for s in plan if s.end == len(s.sequence.tokens)]
        unfinished = [s for s in plan if s.end < len(s.sequence.tokens)]
        for scheduled in unfinished:
            self.scheduler.commit(scheduled)
        return Launched(Batch(None, None, None, sampled, unfinished), SAME)


class Same:
    """Whatever is asked, the next token is 1."""

    def wait(self) -> None:
        pass

    def token(self, row: int, sequence) -> int:
        return 1


SAME = Same()


class Hashed(Router):
    """Plain consistent hashing on the first document, whatever the load: to compare with."""

    def route(self, chain: Chain, now: float, without=(), **more) -> Ticket:
        able = [replica for replica in self.replicas if replica not in without and replica.admits(now)]
        home = max(able, key=lambda replica: claim(chain.key, replica.name), default=None)
        return super().route(chain, now, [replica for replica in self.replicas if replica is not home], **more)


@dataclass(slots=True)
class Served:
    """What became of an arrival.  `first`: seconds to its first token; `tries`: replicas that were asked; `cut`: its
    replica died when the answer had begun."""

    at: float
    first: float = math.nan
    whole: float = math.nan
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    replica: str = ""
    tries: int = 0
    cut: bool = False


@dataclass(slots=True, eq=False)
class Server:
    """A replica as it is: `running` holds the tickets of its requests and which arrivals they are."""

    name: str
    machine: Machine
    core: FreeEngine
    alive: bool = True
    steps: bool = False
    busy_seconds: float = 0.0
    running: dict[str, tuple[Router, Ticket, int]] = field(default_factory=dict)


class Fleet:
    """`routers` share nothing but the replicas; each request comes to one of them by chance.  They know what a cache
    holds where `told`."""

    def __init__(self, routers: Sequence[Router], machine: Machine, seed: int = 0, told: bool = True):
        self.now = 0.0
        self.routers = list(routers)
        self.machine = machine
        self.told = told
        self.servers: dict[str, Server] = {}
        self.served: list[Served] = []
        self.routing_seconds: list[float] = []
        self._arrivals: Sequence[Arrival] = ()
        self._rng = random.Random(f"gateways/{seed}")
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def join(self, name: str) -> None:
        """A replica that holds nothing."""
        self.servers[name] = Server(name, self.machine, FreeEngine(self.machine, lambda: self.now))
        for router in self.routers:
            record = Record(self.machine.cache_tokens if self.told else None)
            router.replicas.append(Replica(name, record=record))

    def die(self, name: str) -> None:
        """A replica is gone; the routers find out as its requests fail."""
        server = self.servers[name]
        server.alive = False
        for router, ticket, number in server.running.values():
            ticket.failed(self.now)
            if math.isnan(self.served[number].first):
                self._send(router, number, [ticket.replica])
            else:
                self.served[number].cut = True
        server.running.clear()

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Have `what` happen then."""
        heappush(self._events, (when, next(self._numbers), what))

    def run(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Until all of them are answered."""
        self._arrivals = arrivals
        self.served = [Served(arrival.at) for arrival in arrivals]
        for number, arrival in enumerate(arrivals):
            self.at(arrival.at, lambda number=number: self._send(self._rng.choice(self.routers), number))
        while self._events:
            self.now, _, what = heappop(self._events)
            what()
        return self.served

    def _send(self, router: Router, number: int, without: Sequence[Replica] = ()) -> None:
        arrival, served = self._arrivals[number], self.served[number]
        asked = pieces(number, arrival)
        began = time.perf_counter()
        ticket = router.route(Chain(asked), self.now, without)
        self.routing_seconds.append(time.perf_counter() - began)
        server = self.servers[ticket.replica.name]
        served.tries += 1
        if not server.alive:
            ticket.failed(self.now)
            self._send(router, number, [*without, ticket.replica])
            return
        served.replica = server.name
        tokens = prompt(number, arrival, ticket.order)
        server.running[f"{number}"] = router, ticket, number
        server.core.add(f"{number}", tokens, Sampling(max_tokens=arrival.answer, ignore_eos=True), "", 0)
        if not server.steps:
            self._step(server)

    def _step(self, server: Server) -> None:
        server.steps = server.core.has_work
        if server.steps:
            outputs = server.core.step()
            server.busy_seconds += server.core.step_seconds
            self.at(self.now + server.core.step_seconds, lambda: self._stepped(server, outputs))

    def _stepped(self, server: Server, outputs: list[Output]) -> None:
        if not server.alive:
            return
        for output in outputs:
            assert output.error is None, output.error
            _, ticket, number = server.running[output.request_id]
            served = self.served[number]
            if math.isnan(served.first):
                served.first = self.now - served.at
                ticket.first_token()
            if output.finish is not None:
                usage: Usage = output.usage
                served.whole = self.now - served.at
                served.prompt_tokens, served.cached_tokens = usage.prompt_tokens, usage.cached_tokens
                served.answer_tokens = usage.completion_tokens
                ticket.usage(usage.prompt_tokens, usage.cached_tokens)
                ticket.ended()
                del server.running[output.request_id]
        self._step(server)


HEAD_PIECE = Piece(b"head", HEAD)


def pieces(number: int, arrival: Arrival) -> Asked:
    """An arrival as the router sees it."""
    documents = tuple(Piece(b"%d" % document, guessed(document)) for document in arrival.documents)
    return Asked((HEAD_PIECE,), documents, (Piece(b"q%d" % number, arrival.question),))


@cache
def guessed(document: int) -> float:
    return length(document) * random.Random(-document).uniform(1 - MISJUDGED, 1 + MISJUDGED)


def prompt(number: int, arrival: Arrival, order: Sequence[int]) -> list[int]:
    """The tokens that a replica is sent: equal for equal documents, and for no others."""
    tokens = list(range(HEAD))
    for rank in order:
        start = 512 * (1 + arrival.documents[rank])
        tokens += range(start, start + length(arrival.documents[rank]))
    start = 600_000_000 + CONTEXT * number
    return tokens + list(range(start, start + arrival.question))
