"""Both suites against real servers, which are given by address; faults come from a proxy before them.

    REFDESK_TEST_BACKENDS='[{"kind": "openai", "dialect": "vllm", "base_url": "http://127.0.0.1:8000"}]' \\
        python -m pytest tests/inference/test_real_servers.py

Each entry is a `[backend]` section as JSON; `lacks` beside it names what of `Sampling` the server refuses.
"""

from __future__ import annotations

import json
import os
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from inference import BackendConfig, open_backend
from tests.inference.conformance import BackendConformance, Case, collect
from tests.inference.fault_proxy import FaultProxy, Toxics
from tests.inference.remote_conformance import RemoteConformance, hang_up

GIVEN: list[dict[str, Any]] = json.loads(os.environ.get("REFDESK_TEST_BACKENDS", "[]"))


class RealServer:
    def __init__(self, settings: dict[str, Any], suite: BackendConformance | RemoteConformance):
        self._settings = {name: value for name, value in settings.items() if name != "lacks"}
        self._suite = suite
        suite.lacks = frozenset(settings.get("lacks", ()))
        parts = urlsplit(settings["base_url"])
        self._path = parts.path
        self.address = parts.port or 80, parts.hostname or "127.0.0.1"

    def connect(self, url: str, **changed):
        return open_backend(msgspec.convert(self._settings | {"base_url": url + self._path} | changed, BackendConfig))

    @asynccontextmanager
    async def serve(self):
        yield self.address

    @asynccontextmanager
    async def open(self, case: Case):
        async with FaultProxy(*self.address) as proxy:
            backend = self.connect(proxy.url, **({"model": "absent"} if case == "unknown_model" else {}))
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
                await collect(backend, self._suite.ask(max_tokens=64, ignore_eos=True))
                return Toxics(after=proxy.passed // 2)
            case _:
                return Toxics()


given_servers = pytest.mark.parametrize(
    "given", GIVEN, ids=lambda given: f"{given['kind']}-{given.get('dialect', given.get('flavour'))}"
)
needs_a_server = pytest.mark.skipif(not GIVEN, reason="no real server is given in REFDESK_TEST_BACKENDS")


@needs_a_server
@given_servers
class TestRealServers(BackendConformance):
    @pytest.fixture
    def subject(self, given: dict[str, Any]) -> RealServer:
        return RealServer(given, self)


@needs_a_server
@given_servers
class TestRealServersBreak(RemoteConformance):
    every = 40  # bytes: a real model takes its time

    @pytest.fixture
    def remote(self, given: dict[str, Any]) -> RealServer:
        return RealServer(given, self)
