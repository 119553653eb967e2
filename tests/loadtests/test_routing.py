"""Simulated fleets, small ones."""

from __future__ import annotations

import random

import pytest

from inference import Sampling
from kernels import BLOCK_SIZE
from loadtests import routing
from loadtests.free import Free, core_over
from loadtests.simulated_fleet import CONTEXT, CPU, HEAD, QUESTION, Fleet, FreeEngine, Request, arrivals, prompt

BY = ("round_robin", "least_loaded", "affinity", "hashed")


def asked(count: int = 120, seed: int = 0, each_second: float = 1.5) -> list:
    rng, at, trace = random.Random(seed), 0.0, []
    for _ in range(count):
        at += rng.expovariate(each_second)
        trace.append(Request(at, rng.randint(50, 3000), rng.randint(1, 20)))
    return arrivals(trace, seed)


def fleet(by: str, replicas: int = 4, gateways: int = 1) -> Fleet:
    one = Fleet([routing.router_by(by, "planned") for _ in range(gateways)], CPU)
    for number in range(replicas):
        one.join(f"{number}")
    return one


def check(one: Fleet, some: list, served: list) -> None:
    """Everyone is answered once, with all tokens, or cut off; nothing is left anywhere."""
    assert len(served) == len(some)
    for number, (arrival, each) in enumerate(zip(some, served, strict=True)):
        if each.cut:
            continue
        assert 0 < each.first <= each.whole
        assert each.prompt_tokens == len(prompt(number, arrival, range(len(arrival.documents))))
        assert 0 <= each.cached_tokens < each.prompt_tokens
        assert each.answer_tokens == arrival.answer
    alive = [server for server in one.servers.values() if server.alive]
    for server in alive:
        server.core.pool.check()
        assert not server.running
        assert not server.core.has_work
        assert server.core.pool.free_blocks == server.core.pool.capacity
    names = {server.name for server in alive}
    for router in one.routers:
        for replica in [replica for replica in router.replicas if replica.name in names]:
            assert replica.running == 0
            assert replica.unread == pytest.approx(0, abs=1e-6)


def cached(served: list) -> int:
    return sum(each.cached_tokens for each in served)


@pytest.mark.parametrize("by", BY)
def test_everyone_is_answered_once(by: str):
    one, some = fleet(by, gateways=2), asked()
    served = one.run(some)
    check(one, some, served)
    assert {each.tries for each in served} == {1}
    finished = sum(server.core.counters.finished_requests for server in one.servers.values())
    computed = sum(server.core.counters.computed_tokens for server in one.servers.values())
    assert finished == len(some)
    assert computed == sum(s.prompt_tokens - s.cached_tokens + s.answer_tokens - 1 for s in served)


def test_documents_are_found_where_they_were_sent():
    some = asked(400)
    hits = {by: cached(fleet(by).run(some)) for by in ("round_robin", "affinity")}
    assert hits["affinity"] > 1.3 * hits["round_robin"]


def test_the_same_run_twice():
    some = asked()
    assert fleet("affinity").run(some) == fleet("affinity").run(some)


def test_what_a_dead_replica_had_is_asked_elsewhere():
    one, some = fleet("affinity", replicas=3), asked(200, each_second=4)
    dies, joins = some[60].at, some[120].at
    one.at(dies, lambda: one.die("0"))
    one.at(joins, lambda: one.join("3"))
    served = one.run(some)
    check(one, some, served)
    assert sum(each.tries > 1 and each.at < dies for each in served) > 5
    assert any(each.cut for each in served)
    assert {each.replica for each in served if each.at > joins} == {"1", "2", "3"}
    assert all(each.cut or each.at + each.whole <= dies for each in served if each.replica == "0")


def test_a_replica_that_was_dead_before_costs_a_try():
    one, some = fleet("round_robin", replicas=3), asked(30)
    one.at(0.0, lambda: one.die("0"))
    served = one.run(some)
    check(one, some, served)
    assert sum(each.tries > 1 for each in served) == 3  # then its circuit is open
    assert {each.replica for each in served} == {"1", "2"}


def test_an_engine_without_a_model_does_as_one_with_it():
    """As the core that builds batches and chooses from logits: the same steps, tokens and hits."""
    some = asked(40)
    policy = {"max_tokens": CPU.step_tokens, "max_running": CPU.running, "step_seconds": CPU.step_seconds}
    with_it = core_over(Plain(), 1 + CPU.cache_tokens // BLOCK_SIZE, clock=lambda: 0.0, cost=CPU.cost, **policy)
    without = FreeEngine(CPU, lambda: 0.0)
    for core in (with_it, without):
        for number, arrival in enumerate(some):
            tokens = prompt(number, arrival, range(len(arrival.documents)))
            core.add(f"{number}", tokens, Sampling(max_tokens=arrival.answer, ignore_eos=True), "", 0)
            if number % 4 == 3:
                core.step()
        while core.has_work:
            core.step()
    assert without.counters == with_it.counters
    assert without.counters.cached_tokens > HEAD * len(some) / 2


class Plain(Free):
    """Doesn't copy blocks, as no remote server does."""

    copy = property()  # hasattr says no


def test_prompts_are_as_long_as_the_trace_says():
    trace = [Request(0.0, tokens, answer) for tokens, answer in ((3, 1), (2048, 10), (7437, 1899), (14050, 1000))]
    prompts = [
        prompt(number, arrival, range(len(arrival.documents))) for number, arrival in enumerate(arrivals(trace, 1))
    ]
    assert [len(tokens) for tokens in prompts] == [90, 2048, CONTEXT - 1899, CONTEXT - 1000]
    questions = [set(tokens[-QUESTION:]) for tokens in prompts]
    assert len(set().union(*questions)) == 4 * QUESTION


def test_other_fleets_get_as_much_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(routing, "read_trace", lambda name: [Request(at**2 / 160, 100, 1) for at in range(161)])
    counts = {replicas: len(routing.requests(routing.Case("", replicas=replicas))) for replicas in (4, 16, 64)}
    assert counts == {4: 41, 16: 161, 64: 644}
    part = routing.requests(routing.Case("", replicas=64, part=0.25))
    assert max(request.at for request in part) <= 40
    assert len(part) == pytest.approx(644 / 4, abs=8)


def test_a_case_is_run_bounded_and_told(monkeypatch: pytest.MonkeyPatch):
    rng = random.Random(3)
    trace = [Request(at / 2, rng.randint(50, 3000), rng.randint(1, 9)) for at in range(150)]
    monkeypatch.setattr(routing, "read_trace", lambda name: trace)
    cases = [routing.BAR._replace(replicas=4, seeds=1), routing.Case("changes", replicas=4, seeds=1, changes=True)]
    rows, bounds = routing.simulated(cases)
    assert all(routing.hits(row) <= bounds[0]["without end"] for row in rows)
    assert bounds[0]["as large"] <= bounds[0]["without end"]
    lines = routing.markdown("", cases, rows, bounds)
    assert len([line for line in lines if "affinity" in line]) == 4
