"""Both suites against real servers, which are given by address; faults come from a proxy before them.

    REFDESK_TEST_BACKENDS='[{"kind": "openai", "dialect": "vllm", "base_url": "http://127.0.0.1:8000"}]' \\
        python -m pytest tests/inference/test_real_servers.py

Each entry is a `[backend]` section as JSON, with what the suites must know of the server beside it: `lacks` names what
of `Sampling` it refuses, `every` at which bytes answers are cut (a real model takes its time), and `gauges` where it
counts what it does: `{"url": ..., "running": name, "generated": name}`, Prometheus' names of the requests that run
and the tokens that were made; `keeps_going` says why it goes on with what nobody reads.  `make test-backends` starts
servers and fills this in (tests/backends).
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import aclosing, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from inference import BackendConfig, open_backend
from tests.inference.conformance import BackendConformance, Case, ask, collect, text_of
from tests.inference.fault_proxy import FaultProxy, Toxics
from tests.inference.remote_conformance import RemoteConformance, hang_up

ABOUT = ("lacks", "every", "gauges", "keeps_going")
EVERY = 40  # bytes
LEFT, LONG = 8, 400  # streams that are left, and how many tokens each would have had
GIVEN: list[dict[str, Any]] = json.loads(os.environ.get("REFDESK_TEST_BACKENDS", "[]"))


class RealServer:
    def __init__(self, given: dict[str, Any]):
        self._settings = {name: value for name, value in given.items() if name not in ABOUT}
        self.lacks = frozenset(given.get("lacks", ()))
        self.every = given.get("every", EVERY)
        self.gauges = given.get("gauges")
        parts = urlsplit(given["base_url"])
        self._path = parts.path
        self.address = parts.port or 80, parts.hostname or "127.0.0.1"

    def connect(self, url: str, **changed):
        return open_backend(msgspec.convert(self._settings | {"base_url": url + self._path} | changed, BackendConfig))

    def ask(self, **sampling):
        return ask(**{name: value for name, value in sampling.items() if name not in self.lacks})

    @asynccontextmanager
    async def serve(self):
        yield self.address

    @asynccontextmanager
    async def open(self, case: Case, **changed):
        async with FaultProxy(*self.address) as proxy:
            changed |= {"model": "absent"} if case == "unknown_model" else {}
            backend = self.connect(proxy.url, **changed)
            try:
                health = await backend.health()
                assert health.ready or case == "unknown_model", health.detail
                if case == "small_context" and backend.capabilities.max_context_tokens is None:
                    pytest.skip("the server doesn't tell how long its context is")
                proxy.toxics = await self._toxics(case, backend, proxy)
                await hang_up(backend)
                yield backend
            finally:
                await backend.close()

    async def _toxics(self, case: Case, backend, proxy: FaultProxy) -> Toxics:
        match case:
            case "silent":
                return Toxics(after=0, then="stall")
            case "fails_before":
                return Toxics(refuse=True)
            case "fails_after":
                await hang_up(backend)
                await collect(backend, self.ask(max_tokens=64, ignore_eos=True))
                return Toxics(after=proxy.passed // 2)
            case _:
                return Toxics()

    async def gauge(self, name: str) -> float:
        """By the server's own count, over all of its labels."""
        async with httpx.AsyncClient() as client:
            told = await client.get(self.gauges["url"])
        samples = (each for family in text_string_to_metric_families(told.text) for each in family.samples)
        return sum(sample.value for sample in samples if sample.name == self.gauges[name])

    async def idle(self) -> None:
        """Wait until the server runs nothing any more."""
        async with asyncio.timeout(60):
            while await self.gauge("running"):  # noqa: ASYNC110  (nothing to wait on: the state is the server's)
                await asyncio.sleep(0.05)


given_servers = pytest.mark.parametrize(
    "given",
    GIVEN,
    ids=lambda given: "-".join(given[key] for key in ("kind", "dialect", "flavour", "model") if key in given),
)
needs_a_server = pytest.mark.skipif(not GIVEN, reason="no real server is given in REFDESK_TEST_BACKENDS")


@needs_a_server
@given_servers
class TestRealServers(BackendConformance):
    @pytest.fixture
    def subject(self, given: dict[str, Any]) -> RealServer:
        server = RealServer(given)
        self.lacks = server.lacks
        return server


@needs_a_server
@given_servers
class TestRealServersBreak(RemoteConformance):
    @pytest.fixture
    def remote(self, given: dict[str, Any]) -> RealServer:
        server = RealServer(given)
        self.lacks, self.every = server.lacks, server.every
        return server


@needs_a_server
@given_servers
@pytest.mark.parametrize("how", ["abort", "leave"])
async def test_a_server_stops_making_what_nobody_reads(given: dict[str, Any], how: str):
    """By its own count it makes fewer tokens than half of those that were asked for."""
    server = RealServer(given)
    if server.gauges is None or "keeps_going" in given:
        pytest.skip(given.get("keeps_going", "the server doesn't tell what it runs"))
    async with server.open("endless") as backend:
        await server.idle()
        before = await server.gauge("generated")

        async def one(n: int) -> None:
            request = server.ask(request_id=f"r{n}", max_tokens=LONG, ignore_eos=True)
            async with aclosing(backend.generate(request)) as stream:
                await anext(stream)
                if how == "abort":
                    backend.abort(request.request_id)
                    assert [event.reason async for event in stream] == ["abort"]

        await asyncio.gather(*map(one, range(LEFT)))
        await server.idle()
        assert 0 < await server.gauge("generated") - before < LEFT * LONG / 2


@needs_a_server
@given_servers
async def test_an_answer_in_one_piece_is_the_streamed_one(given: dict[str, Any]):
    if given["kind"] != "triton":
        pytest.skip("only models behind Triton are asked for an answer in one piece")
    server = RealServer(given)
    async with server.open("plain") as streaming, server.open("plain", streams=False) as whole:
        request = server.ask(max_tokens=8, ignore_eos=True)
        deltas, finished = await collect(streaming, request)
        assert len(deltas) > 1
        [piece], at_once = await collect(whole, request)
        assert piece.text == text_of(deltas)
        assert at_once == finished
