"""Several replicas behind one name, over fake servers: the suite of all backends, and what holds when some fail."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import pytest

from inference import (
    BadUpstream,
    FleetConfig,
    OpenAIConfig,
    Overloaded,
    PromptTooLong,
    ReplicaConfig,
    ScriptedConfig,
    TimedOut,
    Unavailable,
    open_backend,
)
from inference.errors import BackendError
from inference.routing import FleetBackend
from inference.routing.members import Members
from inference.routing.router import Router
from tests.inference.conformance import (
    HANG_SECONDS,
    BackendConformance,
    Case,
    ask,
    chat,
    collect,
    eventually,
    nothing_runs,
    text_of,
)
from tests.inference.fake_servers import VLLM
from tests.inference.fake_upstream import FakeUpstream


def replica(url: str, **settings) -> ReplicaConfig:
    of_server = {"dialect": "vllm", "model": "fake"} | settings.pop("backend", {})
    return ReplicaConfig(backend=OpenAIConfig(base_url=url, **of_server), **settings)


class Subject:
    @asynccontextmanager
    async def open(self, case: Case):
        knobs = {"hold_first": asyncio.Event()} if case == "silent" else {}
        async with AsyncExitStack() as opened:
            servers = [
                await opened.enter_async_context(
                    FakeUpstream(
                        VLLM(
                            max_context=256 if case == "small_context" else 4096,
                            fail_before=case == "fails_before",
                            fail_after=3 if case == "fails_after" else None,
                            endless_after=100 if case == "endless" else None,
                            cached_tokens=4,
                            **knobs,
                        )
                    )
                )
                for _ in range(2)
            ]
            model = "absent" if case == "unknown_model" else "fake"
            settings = {"model": model, "continues_reply": True}
            backend = open_backend(FleetConfig(replicas=[replica(server.url, backend=settings) for server in servers]))
            try:
                yield backend
            finally:
                await backend.close()
            assert backend.metrics()["requests_running"] == 0
            assert {r.running for r in backend.router.replicas} == {0}
            assert {r.unread for r in backend.router.replicas} == {0}


class TestFleet(BackendConformance):
    @pytest.fixture
    def subject(self) -> Subject:
        return Subject()


@asynccontextmanager
async def fleet(*answers, **settings):
    """(a fleet of a server for each of `answers`, called a, b, c; those servers)."""
    async with AsyncExitStack() as opened:
        servers = [await opened.enter_async_context(FakeUpstream(answer)) for answer in answers]
        each = settings.pop("each", [{}] * len(servers))
        replicas = [
            replica(server.url, **{"name": "abc"[n]} | more)
            for n, (server, more) in enumerate(zip(servers, each, strict=True))
        ]
        backend = open_backend(FleetConfig(replicas=replicas, **settings))
        try:
            yield backend, servers
        finally:
            await backend.close()
        await nothing_runs(backend)


def asked(server: FakeUpstream) -> int:
    """Questions that a server was asked, looks at it left out."""
    return sum(request.path.endswith("/completions") for request in server.requests)


def state(backend: FleetBackend, name: str) -> str:
    return next(r.circuit.state for r in backend.router.replicas if r.name == name)


async def test_what_fails_before_its_first_token_is_answered_by_another():
    async with fleet(VLLM(fail_before=True), VLLM(), route_by="round_robin") as (backend, servers):
        for n in range(8):
            deltas, finished = await collect(backend, ask(f"r{n}"))
            assert text_of(deltas)
            assert finished.reason == "length"
        metrics = backend.metrics()
        assert asked(servers[1]) == 8
        assert metrics["fleet_retries_total"] == asked(servers[0]) > 0
        assert metrics["fleet_refused_total"] == 0


async def test_a_request_that_a_server_ends_unasked_before_its_first_token_is_answered_by_another():
    """As vLLM does where it shuts down."""

    async def end(wire, request) -> None:
        if not request.path.endswith("/completions"):
            return await VLLM()(wire, request)
        await wire.stream_head()
        await wire.event(VLLM().chunk(True, {}, "abort"))
        await wire.done()

    async with fleet(end, VLLM(), each=[{}, {"tier": 1}]) as (backend, servers):
        deltas, finished = await collect(backend, ask())
        assert text_of(deltas)
        assert finished.reason == "length"
        assert [asked(server) for server in servers] == [1, 1]


async def test_only_what_was_asked_elsewhere_is_counted_as_that():
    async with fleet(VLLM(fail_before=True)) as (backend, _):
        with pytest.raises(BadUpstream):
            await collect(backend, ask())
        assert backend.metrics()["fleet_retries_total"] == 0


async def test_a_replica_that_hangs_does_not_keep_the_fleet_from_being_ready():
    async def hang(wire, request) -> None:
        await asyncio.Event().wait()

    patient = {"backend": {"connect_timeout": 600.0}}
    async with fleet(VLLM(), hang, each=[{}, patient]) as (backend, (_, hung)), asyncio.timeout(HANG_SECONDS):
        health = await backend.health()
        assert health.ready
        assert health.detail == "b: does not answer yet"
        await hung.client_left()


async def test_what_breaks_off_after_a_token_is_not_asked_again():
    async with fleet(VLLM(fail_after=3), VLLM(fail_after=3)) as (backend, servers):
        with pytest.raises(BadUpstream):
            await collect(backend, ask())
        assert sum(map(asked, servers)) == 1


async def test_what_any_replica_would_refuse_is_asked_once():
    async with fleet(VLLM(max_context=64), VLLM(max_context=64)) as (backend, servers):
        with pytest.raises(PromptTooLong):
            await collect(backend, ask(prompt=chat(documents=("word " * 64,))))
        assert sum(map(asked, servers)) == 1
        assert {r.circuit.state for r in backend.router.replicas} == {"closed"}


async def test_a_request_waits_for_no_replica_that_is_gone_and_finds_it_when_it_is_back():
    async with fleet(VLLM(), VLLM(), route_by="round_robin") as (backend, (first, _)):
        port = int(first.url.rpartition(":")[2])
        await first.__aexit__()
        for n in range(8):
            await collect(backend, ask(f"r{n}"))
        assert state(backend, "a") == "open"
        again = FakeUpstream(VLLM())
        again._server = await asyncio.start_server(again._connected, "127.0.0.1", port)
        try:
            await eventually(lambda: state(backend, "a") == "half_open")
            for n in range(4):
                await collect(backend, ask(f"s{n}"))
            assert state(backend, "a") == "closed"
            assert asked(again) == 2
        finally:
            await backend.close()
            await again.__aexit__()


async def test_a_replica_that_dies_loses_nothing_before_its_first_token():
    """Of fifty at each, ten have a first token when one of the two dies; the others are answered elsewhere."""
    held = [VLLM(hold_first=asyncio.Event()), VLLM(hold_first=asyncio.Event())]
    speaking = [VLLM(hold_after_first=asyncio.Event()), VLLM(hold_after_first=asyncio.Event())]

    def answer(number: int):
        def of_both(wire, request):
            begun = b"begun" in request.body
            return (speaking if begun else held)[number](wire, request)

        return of_both

    async with fleet(answer(0), answer(1), route_by="round_robin") as (backend, servers):
        begun = [backend.generate(ask(f"b{n}", prompt=chat("begun?"))) for n in range(20)]
        for stream in begun:
            await anext(stream)
        waiting = [asyncio.create_task(collect(backend, ask(f"w{n}"))) for n in range(80)]
        await eventually(lambda: [asked(server) for server in servers] == [50, 50])
        await servers[0].__aexit__()
        await eventually(lambda: asked(servers[1]) == 90)
        held[1].hold_first.set()
        assert len(await asyncio.gather(*waiting)) == 80
        speaking[1].hold_after_first.set()
        outcomes = []
        for stream in begun:
            try:
                outcomes.append([event async for event in stream][-1].reason)
            except BadUpstream:
                outcomes.append("cut")
        assert sorted(outcomes) == ["cut"] * 10 + ["length"] * 10
        assert backend.metrics()["fleet_retries_total"] == 40


async def test_the_next_tier_is_asked_where_nobody_of_the_first_can_be():
    tiers = [{}, {"tier": 1}]
    async with fleet(VLLM(), VLLM(), each=tiers) as (backend, servers):
        for n in range(4):
            await collect(backend, ask(f"r{n}"))
        assert [asked(server) for server in servers] == [4, 0]
        await servers[0].__aexit__()
        for n in range(4):
            await collect(backend, ask(f"s{n}"))
        assert asked(servers[1]) == 4
        health = await backend.health()
        assert health.ready
        assert health.detail.startswith("a: ")
        await servers[1].__aexit__()
        with pytest.raises(Unavailable):
            await collect(backend, ask("t"))
        assert not (await backend.health()).ready


class Busy:
    """A server that says how long to wait, `times` times, then answers."""

    def __init__(self, times: int):
        self._left = times
        self._answer = VLLM()

    async def __call__(self, wire, request) -> None:
        if request.path.endswith("/completions") and self._left:
            self._left -= 1
            await wire.reply(503, {"error": {"message": "too much to do"}}, Retry_After="7")
            return
        await self._answer(wire, request)


async def test_a_busy_replica_is_left_alone_for_as_long_as_it_said():
    async with fleet(Busy(1), VLLM(), route_by="round_robin") as (backend, servers):
        for n in range(8):
            await collect(backend, ask(f"r{n}"))
        assert [asked(server) for server in servers] == [1, 8]
        a = backend.router.replicas[0]
        assert (a.limit.value, a.circuit.state) == (1, "closed")
    async with fleet(Busy(9), Busy(9)) as (backend, servers):
        for n in range(2):
            with pytest.raises(Overloaded) as raised:
                await collect(backend, ask(f"r{n}"))
            assert 0 < raised.value.retry_after_seconds <= 7
        assert [asked(server) for server in servers] == [1, 1]


async def test_a_replica_that_is_too_slow_is_asked_for_less_and_then_not_at_all():
    slow = {"backend": {"first_token_timeout": 0.05}}
    async with fleet(VLLM(hold_first=asyncio.Event()), VLLM(), each=[slow, {"tier": 1}]) as (backend, servers):
        for n in range(3):
            with pytest.raises(TimedOut):
                await collect(backend, ask(f"r{n}"))
        assert backend.router.replicas[0].limit.value == 1
        await collect(backend, ask("r3"))
        assert [asked(server) for server in servers] == [3, 1]


async def test_requests_follow_their_documents():
    async with fleet(VLLM(), VLLM(), VLLM()) as (backend, servers):
        for n in range(30):
            await collect(backend, ask(f"r{n}", prompt=chat(question=f"{n}?", documents=(f"About {n % 6}. " * 50,))))
        by_server = [{r.json()["messages"][1]["content"][:8] for r in s.requests if asked(s)} for s in servers]
        assert sum(map(len, by_server)) == 6  # each topic at one server


async def test_documents_are_sent_in_the_planned_order():
    one, other = ("One. " * 50, "Other. " * 50)
    async with fleet(VLLM(), document_order="planned") as (backend, (server,)):
        for n, documents in enumerate([(one, other), (other, one)]):
            await collect(backend, ask(f"r{n}", prompt=chat(documents=documents)))
        sent = [request.json()["messages"][1]["content"] for request in server.requests if request.body]
        assert sent[0] == sent[1]


async def test_a_replica_that_leaves_ends_what_it_has_begun():
    held = VLLM(hold_after_first=asyncio.Event())
    async with fleet(held, VLLM(), each=[{}, {"tier": 1}]) as (backend, (first, second)):
        async with aclosing(backend.generate(ask("begun"))) as stream:
            await anext(stream)
            news = await backend.update(FleetConfig(replicas=[replica(second.url, name="b")]))
            assert any("a ends" in each for each in news)
            await collect(backend, ask("later"))
            assert [asked(first), asked(second)] == [1, 1]
            held.hold_after_first.set()
            events = [event async for event in stream]
            assert events[-1].reason == "length"
        await eventually(lambda: first.busy == 0)
        assert [r.name for r in backend.router.replicas] == ["b"]
        assert not any('"a"' in name for name in backend.metrics())


async def test_a_replica_is_swapped_only_for_one_that_is_ready():
    async with fleet(VLLM(), VLLM()) as (backend, (first, second)):
        for url, wrong in ((second.url, {"model": "absent"}), ("http://127.0.0.1:9", {})):
            with pytest.raises(Unavailable, match="not ready"):
                await backend.update(FleetConfig(replicas=[replica(url, name="a", backend=wrong)]))
        assert [r.name for r in backend.router.replicas] == ["a", "b"]
        config = FleetConfig(replicas=[replica(second.url, name="a"), replica(first.url, name="b", weight=2.0)])
        assert len(await backend.update(config)) == 4
        assert await backend.update(config) == []
        drained = FleetConfig(replicas=[replica(second.url, name="a"), replica(first.url, name="b", drain=True)])
        assert await backend.update(drained) == ["replica b is set up anew"]
        before = asked(first)
        for n in range(4):
            await collect(backend, ask(f"r{n}", prompt=chat(documents=(str(n),))))
        assert asked(first) == before


async def test_every_address_of_a_name_is_a_replica():
    found = ["10.0.0.1", "10.0.0.2"]
    router = Router()
    config = replica("http://models:8000/v1", resolve=True, name="models")
    members = Members([config], router, open_backend, lambda: 0.0, lambda host, port: list(found))
    try:
        assert [r.name for r in router.replicas] == ["models at 10.0.0.1", "models at 10.0.0.2"]
        found[:] = ["10.0.0.2", "[fd00::1]"]
        wanted = members._expanded([config])
        assert [each.backend.base_url for each in wanted] == ["http://10.0.0.2:8000/v1", "http://[fd00::1]:8000/v1"]
        await members._become(wanted, must_be_ready=False)
        assert [r.name for r in router.replicas] == ["models at 10.0.0.2", "models at [fd00::1]"]
    finally:
        await members.close()
    members = Members([config], Router(), open_backend, lambda: 0.0, lambda host, port: [])
    assert [replica.name for replica in members._router.replicas] == ["models"]  # until it has one
    await members.close()


async def test_an_abort_between_two_replicas_ends_the_request():
    async with fleet(VLLM(fail_before=True), VLLM(fail_before=True)) as (backend, servers):
        route = backend.router.route

        def route_and_abort(*arguments):
            backend.abort("r1")
            return route(*arguments)

        backend.router.route = route_and_abort
        async with aclosing(backend.generate(ask("r1"))) as stream:
            assert [event.reason async for event in stream] == ["abort"]
        assert sum(map(asked, servers)) <= 1


async def test_local_backends_are_replicas_too():
    config = FleetConfig(
        replicas=[
            ReplicaConfig(backend=ScriptedConfig(fail_before_first=True, time_to_first_token=0), name="broken"),
            ReplicaConfig(backend=ScriptedConfig(token_interval=0, time_to_first_token=0), tier=1),
        ],
        served_name="ours",
    )
    backend = open_backend(config)
    try:
        assert backend.capabilities.model == "ours"
        assert await backend.count_tokens(chat()) > 10
        deltas, _ = await collect(backend, ask())
        assert deltas
    finally:
        await backend.close()
    with pytest.raises(BackendError):
        await collect(backend, ask("after"))


async def test_a_request_that_outlives_two_deaths_comes_back_to_the_first_replica():
    """It waits at one, which dies; at the other, which dies while the first one is back."""
    now, back = 0.0, asyncio.Event()
    async with (
        FakeUpstream(VLLM(hold_first=back)) as first,
        FakeUpstream(VLLM(hold_first=asyncio.Event())) as second,
    ):
        replicas = [replica(first.url, name="a"), replica(second.url, name="b", tier=1)]
        backend = FleetBackend(FleetConfig(replicas=replicas), open_backend, clock=lambda: now)
        try:
            answer = asyncio.create_task(collect(backend, ask()))
            for server in (first, second):
                await eventually(lambda server=server: asked(server) == 1)
                now += 6.0
                for connection in list(server._connections):
                    connection.cancel()
                back.set()
            await answer
            assert [asked(first), asked(second)] == [2, 1]
        finally:
            await backend.close()
