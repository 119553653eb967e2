"""Every kind of remote server: the suite of all backends, and what holds when the network breaks."""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from inference import OpenAIConfig, TritonConfig, open_backend
from tests.inference.conformance import BackendConformance, Case, ask, eventually, nothing_runs
from tests.inference.fake_servers import TRTLLM, VLLM, Faithful, LlamaCpp, SGLang, Triton
from tests.inference.fake_upstream import FakeUpstream
from tests.inference.remote_conformance import RemoteConformance
from tests.inference.tiny import save_tokenizer

SERVERS = {
    "generic": (Faithful, {"continues_reply": True}, {}),
    "vllm": (VLLM, {"dialect": "vllm", "continues_reply": True}, {}),
    "trtllm": (TRTLLM, {"dialect": "trtllm"}, {}),
    "sglang": (SGLang, {"dialect": "sglang", "continues_reply": True}, {}),
    "llamacpp": (LlamaCpp, {"dialect": "llamacpp", "continues_reply": True}, {}),
    "triton trtllm": (Triton, {"flavour": "trtllm"}, {"flavour": "trtllm"}),
    "triton llmapi": (Triton, {"flavour": "llmapi"}, {"flavour": "llmapi", "text_mode": "cumulative"}),
    "triton vllm": (Triton, {"flavour": "vllm"}, {"flavour": "vllm"}),
    "triton vllm, cumulative": (
        Triton,
        {"flavour": "vllm", "text_mode": "cumulative"},
        {"flavour": "vllm", "text_mode": "cumulative"},
    ),
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Kind:
    """A fake server of one kind, and the settings of a backend for it."""

    def __init__(self, name: str, tokenizer: Path):
        self._server, self._settings, self._knobs = SERVERS[name]
        if self._server is Triton:
            self._settings = self._settings | {"tokenizer": str(tokenizer)}
            encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
            self._knobs = self._knobs | {"count": lambda text: len(encoder.encode(text).ids)}

    def server(self, **knobs):
        return self._server(**self._knobs, **knobs)

    def connect(self, url: str, **settings):
        config = TritonConfig if self._server is Triton else OpenAIConfig
        return open_backend(config(**{"base_url": url, "model": "fake"} | self._settings | settings))

    @asynccontextmanager
    async def serve(self):
        async with FakeUpstream(self.server()) as server:
            yield int(server.url.rpartition(":")[2]), "127.0.0.1"

    @asynccontextmanager
    async def open(self, case: Case):
        knobs = {"hold_first": asyncio.Event()} if case == "silent" else {}
        answer = self.server(
            max_context=256 if case == "small_context" else 4096,
            fail_before=case == "fails_before",
            fail_after=3 if case == "fails_after" else None,
            endless_after=100 if case == "endless" else None,
            cached_tokens=4,
            **knobs,
        )
        async with FakeUpstream(answer) as server:
            backend = self.connect(server.url, model="absent" if case == "unknown_model" else "fake")
            try:
                yield backend
            finally:
                await backend.close()
        assert backend.metrics()["requests_running"] == 0
        if isinstance(answer, Triton):
            assert not answer.parameters  # what is no input of the model's would be lost without a word


def suites(name: str) -> tuple[type, type]:
    lacks = frozenset({"ignore_eos"}) if name == "triton llmapi" else frozenset()

    class Answers(BackendConformance):
        @pytest.fixture
        def subject(self, tokenizer: Path) -> Kind:
            return Kind(name, tokenizer)

    class Breaks(RemoteConformance):
        @pytest.fixture
        def remote(self, tokenizer: Path) -> Kind:
            return Kind(name, tokenizer)

    Answers.lacks = Breaks.lacks = lacks
    Breaks.every = 1 if name in ("generic", "llamacpp", "triton llmapi") else 5
    return Answers, Breaks


TestGeneric, TestGenericBreaks = suites("generic")
TestVLLM, TestVLLMBreaks = suites("vllm")
TestTRTLLM, TestTRTLLMBreaks = suites("trtllm")
TestSGLang, TestSGLangBreaks = suites("sglang")
TestLlamaCpp, TestLlamaCppBreaks = suites("llamacpp")
TestTritonEnsemble, TestTritonEnsembleBreaks = suites("triton trtllm")
TestTritonLLMAPI, TestTritonLLMAPIBreaks = suites("triton llmapi")
TestTritonVLLM, TestTritonVLLMBreaks = suites("triton vllm")
TestTritonCumulative, _ = suites("triton vllm, cumulative")


@pytest.mark.parametrize("name", ["vllm", "triton vllm"])
async def test_a_thousand_cancelled_streams_leave_no_descriptor_and_no_connection(name: str, tokenizer: Path):
    """Some are aborted, some closed, some cancelled, all after their first token."""
    kind = Kind(name, tokenizer)
    async with FakeUpstream(kind.server(hold_after_first=asyncio.Event())) as server:
        backend = kind.connect(server.url)
        assert (await backend.health()).ready
        await eventually(lambda: server.busy == 1)  # the one that was asked for its health stays open
        before = _descriptors()

        async def one(n: int) -> None:
            request = ask(f"r{n}")
            async with aclosing(backend.generate(request)) as stream:
                await anext(stream)
                if n % 3 == 0:
                    backend.abort(request.request_id)
                    assert [event.reason async for event in stream] == ["abort"]
                elif n % 3 == 1:
                    reading = asyncio.create_task(anext(stream))
                    await asyncio.sleep(0)
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)

        for start in range(0, 1000, 25):
            await asyncio.gather(*map(one, range(start, start + 25)))
        await server.client_left(1000)
        await nothing_runs(backend)
        await eventually(lambda: not server.busy)
        assert not backend._client._transport._pool.connections
        await eventually(lambda: _descriptors() <= before)
        await backend.close()


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
