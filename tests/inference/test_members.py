"""Who is in a fleet: what is opened is closed, what changes is taken on, and nothing loses a replica."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from contextlib import asynccontextmanager

import pytest

from inference import (
    Capabilities,
    FleetConfig,
    Health,
    OpenAIConfig,
    ReplicaConfig,
    ScriptedConfig,
    Unavailable,
    open_backend,
)
from inference.routing import FleetBackend
from inference.routing.members import Members
from inference.routing.router import Router
from inference.routing.standing import Circuit
from tests.inference.conformance import chat, eventually


class Part:
    """A backend of which only its opening, its looks and its closing are of interest."""

    def __init__(self, config):
        self.capabilities = Capabilities(model=config.model, counts_tokens=True)
        self.closed = 0
        self.ready = asyncio.Event()
        self.ready.set()
        self.may_close = asyncio.Event()
        self.may_close.set()

    async def health(self) -> Health:
        await self.ready.wait()
        return Health(not self.closed)

    async def count_tokens(self, prompt) -> int | None:
        await self.ready.wait()
        return None if self.closed else 7

    def metrics(self) -> dict[str, float]:
        return {"requests_running": 0.0, "requests_total": 5.0}

    async def close(self) -> None:
        await self.may_close.wait()
        self.closed += 1


class Opener:
    """Opens parts, and remembers them by their model; `refuses` is what can't be opened."""

    def __init__(self, refuses: str = ""):
        self.refuses = refuses
        self.parts: dict[str, Part] = {}

    def __call__(self, config) -> Part:
        if config.model == self.refuses:
            raise Unavailable(f"no {config.model}")
        part = self.parts[config.model] = Part(config)
        return part


def configs(*models: str, **settings) -> list[ReplicaConfig]:
    return [ReplicaConfig(backend=ScriptedConfig(model=model), name=model, **settings) for model in models]


@asynccontextmanager
async def members_of(replicas: list[ReplicaConfig], find: Callable[[str, int], list[str]] | None = None):
    opener = Opener()
    members = Members(replicas, Router(), opener, asyncio.get_running_loop().time, find)
    members.opener = opener
    try:
        yield members
    finally:
        await members.close()
        assert not members._tasks
        assert all(part.closed for part in opener.parts.values())


def names(members: Members) -> list[str]:
    return [replica.name for replica in members._router.replicas]


async def test_where_one_can_not_be_opened_none_stays_open():
    opener = Opener(refuses="c")
    with pytest.raises(Unavailable, match="no c"):
        Members(configs("a", "b", "c"), Router(), opener, lambda: 0.0)
    assert [part.closed for part in opener.parts.values()] == [1, 1]
    async with members_of(configs("a")) as members:
        members.opener.refuses = "c"
        with pytest.raises(Unavailable, match="no c"):
            await members.update(configs("a", "b", "c"))
        assert names(members) == ["a"]
        assert {model: part.closed for model, part in members.opener.parts.items()} == {"a": 0, "b": 1}


async def test_limits_and_caches_are_as_configured_at_once():
    async with members_of(configs("a", max_concurrency=64)) as members:
        (replica,) = members._router.replicas
        for most, tokens in ((8, 5000), (128, None)):
            await members.update(configs("a", max_concurrency=most, cache_tokens=tokens))
            assert members._router.replicas == [replica]
            assert (replica.limit.value, replica.record.capacity) == (most, tokens)
        replica.limit.refused(running=31, now=0.0)
        await members.update(configs("a", max_concurrency=128, weight=2.0))
        assert replica.limit.value == 16  # what was learned stays, where the limit is the same


async def test_the_first_replica_is_the_first_of_the_configuration():
    """Its model names the fleet: a swap must not give the name of a fallback."""
    opener = Opener()
    fleet = FleetBackend(FleetConfig(replicas=configs("large") + configs("small", tier=1)), opener)
    try:
        swapped = [ReplicaConfig(backend=ScriptedConfig(model="large", length=9), name="large")]
        await fleet.update(FleetConfig(replicas=swapped + configs("small", tier=1)))
        assert [replica.name for replica in fleet.router.replicas] == ["large", "small"]
        assert fleet.capabilities.model == "large"
    finally:
        await fleet.close()


async def test_what_changes_in_the_fleet_itself_is_told():
    fleet = FleetBackend(FleetConfig(replicas=configs("a")), Opener())
    try:
        news = await fleet.update(FleetConfig(replicas=configs("a"), route_by="round_robin", served_name="ours"))
        assert news == ["route_by is 'round_robin' now", "served_name is 'ours' now"]
    finally:
        await fleet.close()


async def test_counters_never_go_back():
    fleet = FleetBackend(FleetConfig(replicas=configs("a", "b")), Opener())
    try:
        await fleet.update(FleetConfig(replicas=configs("b")))
        await eventually(lambda: len(fleet._members.all) == 1)
        assert fleet.metrics()["requests_total"] == 10
    finally:
        await fleet.close()


async def test_a_replica_may_leave_while_it_counts_or_is_looked_at():
    opener = Opener()
    fleet = FleetBackend(FleetConfig(replicas=configs("a", "b")), opener)
    try:
        b = fleet.router.replicas[1]
        opener.parts["a"].ready.clear()
        counting = asyncio.create_task(fleet.count_tokens(chat()))
        b.circuit = Circuit(opens_after=1, open_seconds=0.001)
        b.circuit.failed(fleet._clock())
        fleet._members.failed(b)
        (watching,) = fleet._members._tasks
        await asyncio.sleep(0)
        await fleet.update(FleetConfig(replicas=configs("c")))
        await eventually(lambda: len(fleet._members.all) == 1)
        opener.parts["a"].ready.set()
        assert await counting is None
        await watching
        assert not fleet._members._watched
    finally:
        await fleet.close()


async def test_closing_closes_what_is_leaving_and_what_comes_meanwhile():
    opener = Opener()
    fleet = FleetBackend(FleetConfig(replicas=configs("a", "b")), opener)
    opener.parts["a"].may_close.clear()
    await fleet.update(FleetConfig(replicas=configs("b")))
    new = configs("c")
    opener.parts["c"] = coming = Part(new[0].backend)
    fleet._members._open_one = lambda config: coming
    coming.ready.clear()
    updating = asyncio.create_task(fleet.update(FleetConfig(replicas=new)))
    await eventually(lambda: coming.ready._waiters)
    closing = asyncio.create_task(fleet.close())
    await eventually(lambda: opener.parts["b"].closed)
    opener.parts["a"].may_close.set()
    await closing
    coming.ready.set()
    with pytest.raises(Unavailable, match="closed"):
        await updating
    assert all(part.closed for part in opener.parts.values())
    late = fleet.router.replicas[0]
    for _ in range(3):
        late.circuit.failed(0.0)
    fleet._members.failed(late)
    assert not fleet._members._tasks


# ---- names with many addresses ---------------------------------------------------------------------


def found_by_name(name: str = "models", **settings) -> ReplicaConfig:
    backend = OpenAIConfig(base_url=f"http://me:secret@{name}:8000/v1", model="m")
    return ReplicaConfig(backend=backend, name=name, resolve=True, **settings)


async def test_a_name_without_an_address_for_a_moment_loses_nobody():
    answers = [["10.0.0.1", "10.0.0.2"], OSError("temporary failure"), [], ["10.0.0.2"]]

    def find(host: str, port: int) -> list[str]:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    both = ["models at 10.0.0.1", "models at 10.0.0.2"]
    async with members_of([found_by_name()], find) as members:
        for _ in range(3):
            assert names(members) == both
            wanted = members._expanded(members._configs)
            await members._become(wanted, must_be_ready=False)
        assert names(members) == both[1:]
        assert wanted[0].backend.base_url == "http://me:secret@10.0.0.2:8000/v1"


async def test_all_addresses_of_a_canary_have_its_share_together():
    def find(host: str, port: int) -> list[str]:
        return [f"10.0.0.{n}" for n in range(8)] if host == "new" else ["10.0.1.1"]

    async with members_of([found_by_name("old"), found_by_name("new", share=0.2)], find) as members:
        shares = [replica.share for replica in members._router.replicas]
        assert shares[0] is None
        assert sum(shares[1:]) == pytest.approx(0.2)


async def test_what_can_not_be_opened_is_looked_for_again(monkeypatch):
    monkeypatch.setattr("inference.routing.members.FIND_SECONDS", 0.0)
    addresses = ["10.0.0.1"]
    async with members_of([found_by_name()], lambda host, port: list(addresses)) as members:
        members.opener.refuses = "m"
        asked = []
        find = members._find
        members._find = lambda host, port: asked.append(host) or find(host, port)
        members.begin()
        addresses.append("10.0.0.2")
        await eventually(lambda: len(asked) > 2)
        members.opener.refuses = ""
        await eventually(lambda: len(names(members)) == 2)


def test_a_name_tells_no_password():
    assert ReplicaConfig(backend=found_by_name().backend).own_name == "http://models:8000/v1"


async def test_certificates_are_read_once_for_all_replicas(monkeypatch):
    read, really = [], ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda *a, **k: read.append(a) or really(*a, **k))
    servers = [ReplicaConfig(backend=OpenAIConfig(base_url=f"https://{n}:1", model="m")) for n in "abc"]
    fleet = open_backend(FleetConfig(replicas=servers))
    await fleet.close()
    assert len(read) <= 1
