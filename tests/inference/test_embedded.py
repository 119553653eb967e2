"""Our engine behind the seam: the suite of every backend over a tiny model, and what only it promises."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing, asynccontextmanager

import msgspec
import pytest

from inference import (
    EngineConfig,
    GenerationFailed,
    Overloaded,
    PromptTooLong,
    RequestRefused,
    TextDelta,
    Unavailable,
    open_backend,
)
from inference.models import ModelError
from tests.inference.conformance import BackendConformance, Case, ask, chat, collect, eventually, nothing_runs, text_of
from tests.inference.tiny import save_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


def open_tiny(folder: str, **options):
    return open_backend(
        EngineConfig(model=folder, dtype="float32", kv_cache_mb=options.pop("kv_cache_mb", 8), **options)
    )


def idle(backend) -> bool:
    core = backend._thread.core
    return not core.has_work and core.pool.free_blocks == core.pool.capacity


class EmbeddedSubject:
    def __init__(self, folder: str):
        self.folder = folder

    @asynccontextmanager
    async def open(self, case: Case):
        if case == "unknown_model":
            pytest.skip("the engine serves the one model that it has loaded; a missing one stops the start")
        backend = open_tiny(self.folder, max_context_tokens=256 if case == "small_context" else None)
        forward = backend._thread.core._model.forward
        steps = iter(range(10**9))
        gate = threading.Event()

        def broken(*args):
            if case == "silent":
                gate.wait()
            if case == "fails_before" or (case == "fails_after" and next(steps) % 6 == 5):
                raise RuntimeError("planted")
            return forward(*args)

        backend._thread.core._model.forward = broken
        try:
            if case == "silent":  # the first step lasts until a command waits
                put = backend._thread._inbox.put
                count = iter(range(10**9))

                class Inbox:
                    def put(self, command):
                        put(command)
                        if next(count):
                            gate.set()

                    def __getattr__(self, name):
                        return getattr(inbox, name)

                inbox, backend._thread._inbox = backend._thread._inbox, Inbox()
            yield backend
            await eventually(lambda: idle(backend))
            backend._thread.core.pool.check()
        finally:
            gate.set()
            await backend.close()
        assert not backend._thread._thread.is_alive()
        assert not backend._thread._mailboxes


class TestEmbedded(BackendConformance):
    @pytest.fixture
    def subject(self, model_folder) -> EmbeddedSubject:
        return EmbeddedSubject(model_folder)


@pytest.fixture
async def backend(model_folder):
    backend = open_tiny(model_folder)
    yield backend
    await backend.close()


async def test_documents_in_the_same_order_are_computed_once(backend):
    documents = tuple(f"Document {i}: " + "words of it " * 30 + "\n\n" for i in range(3))
    _, first = await collect(backend, ask("a", prompt=chat("Why?", documents)))
    _, second = await collect(backend, ask("b", prompt=chat("When, and how?", documents)))
    assert first.usage.cached_tokens == 0
    shared = await backend.count_tokens(chat("", documents))
    assert second.usage.cached_tokens >= shared - 16 - 10
    _, other_scope = await collect(backend, ask("c", prompt=chat("Why?", documents)))
    assert other_scope.usage.cached_tokens >= second.usage.cached_tokens


async def test_the_event_loop_is_free_while_the_engine_works(backend):
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    await collect(backend, ask(max_tokens=30, ignore_eos=True))
    ticking.cancel()
    assert ticks > 100


async def test_a_reader_that_does_not_read_costs_one_merged_delta(backend, monkeypatch):
    core, read, mailboxes = backend._thread.core, threading.Event(), []
    forward, submit, steps = core._model.forward, backend._thread.submit, iter(range(10**9))

    def held(*args):
        if next(steps) == 20:  # far from the end, until the first delta is read
            read.wait()
        return forward(*args)

    def noted(*args):
        mailboxes.append(submit(*args))
        return mailboxes[-1]

    monkeypatch.setattr(core._model, "forward", held)
    monkeypatch.setattr(backend._thread, "submit", noted)
    stream = backend.generate(ask(max_tokens=60, ignore_eos=True))
    first = await anext(stream)
    read.set()
    await eventually(lambda: mailboxes[0]._news is not None and mailboxes[0]._news.finish)
    rest = [event async for event in stream]
    assert len(rest) == 2
    assert isinstance(rest[0], TextDelta)
    assert first.tokens + rest[0].tokens <= 60
    whole, _ = await collect(backend, ask("again", max_tokens=60, ignore_eos=True))
    assert first.text + rest[0].text == text_of(whole)


async def test_a_full_queue_is_overload(model_folder):
    backend = open_tiny(model_folder, max_queued=1, max_running=1)
    try:
        async with aclosing(backend.generate(ask("first", max_tokens=800, ignore_eos=True))) as running:
            await anext(running)
            waiting = asyncio.create_task(collect(backend, ask("second")))
            await eventually(lambda: backend.metrics()["requests_waiting"] == 1)
            with pytest.raises(Overloaded):
                await collect(backend, ask("third"))
        await waiting
        await nothing_runs(backend)
    finally:
        await backend.close()


async def test_a_dead_engine_says_so(backend, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)

    def die():
        raise SystemExit

    backend._thread.core.step = die
    with pytest.raises(Exception, match="died"):
        await collect(backend, ask())
    backend._thread._thread.join()
    assert not (await backend.health()).ready
    with pytest.raises(Exception, match="stopped"):
        await collect(backend, ask("later"))


async def test_a_hung_step_is_not_ready(backend, monkeypatch):
    monkeypatch.setattr("inference.embedded.HUNG_AFTER_SECONDS", -1.0)
    assert not (await backend.health()).ready


async def test_a_failed_step_ends_its_requests_with_a_clear_error(backend, monkeypatch):
    monkeypatch.setattr(backend._thread.core._model, "forward", lambda *a: 1 / 0)
    with pytest.raises(GenerationFailed, match="ZeroDivisionError"):
        await collect(backend, ask())
    monkeypatch.undo()
    await collect(backend, ask("after"))


def test_a_cache_too_small_for_the_model_is_refused_with_what_would_do(model_folder):
    with pytest.raises(ModelError, match="give it at least"):
        open_tiny(model_folder, kv_cache_mb=0)


async def test_sampling_with_a_seed_repeats(backend):
    sampling = {"max_tokens": 20, "temperature": 1.0, "ignore_eos": True}
    texts = [
        text_of((await collect(backend, ask(f"r{i}", seed=seed, **sampling)))[0]) for i, seed in enumerate([1, 1, 2])
    ]
    assert texts[0] == texts[1] != texts[2]


async def test_a_request_handed_in_while_the_engine_ends_is_refused_not_forgotten(model_folder):
    thread = open_tiny(model_folder)._thread
    inbox, put = thread._inbox, thread._inbox.put

    class Inbox:
        """The engine ends between the look at it and the command's arrival."""

        def put(self, command):
            if command is not None:
                thread.close()
            put(command)

        def __getattr__(self, name):
            return getattr(inbox, name)

    thread._inbox = Inbox()
    with pytest.raises(Unavailable):
        thread.submit("late", lambda core: None)
    assert not thread._mailboxes


async def test_an_aborted_request_tells_how_long_it_waited(model_folder):
    backend = open_tiny(model_folder)
    try:
        async with aclosing(backend.generate(ask(max_tokens=400, ignore_eos=True))) as stream:
            await anext(stream)
            backend.abort("r1")
            *_, finished = [event async for event in stream]
        assert finished.reason == "abort"
        assert finished.queued_seconds >= 0
        assert finished.usage.completion_tokens > 0
    finally:
        await backend.close()


async def test_an_id_in_use_is_refused_and_its_owner_goes_on(model_folder):
    backend = open_tiny(model_folder)
    try:
        async with aclosing(backend.generate(ask(max_tokens=300, ignore_eos=True))) as stream:
            await anext(stream)
            with pytest.raises(RequestRefused, match="already running"):
                await collect(backend, ask(max_tokens=2))
            *_, finished = [event async for event in stream]
        assert finished.reason == "length"
    finally:
        await backend.close()


async def test_deltas_tell_of_every_token(model_folder):
    backend = open_tiny(model_folder)
    try:
        deltas, finished = await collect(backend, ask(max_tokens=200, ignore_eos=True, temperature=2.0, seed=1))
        assert sum(delta.tokens for delta in deltas) == finished.usage.completion_tokens == 200
    finally:
        await backend.close()


async def test_a_long_prompt_is_tokenised_beside_the_event_loop(model_folder, monkeypatch):
    backend = open_tiny(model_folder)
    encode, threads = backend._encoder.encode, set()

    def noted(prompt):
        threads.add(threading.current_thread())
        return encode(prompt)

    monkeypatch.setattr(backend._encoder, "encode", noted)
    try:
        with pytest.raises(PromptTooLong):
            await collect(backend, ask(prompt=chat("word " * 5000)))
        assert threading.main_thread() not in threads
    finally:
        await backend.close()


def test_more_cache_than_memory_is_refused(model_folder):
    with pytest.raises(ModelError, match="this machine has"):
        open_tiny(model_folder, kv_cache_mb=10**9)


async def test_documents_in_the_order_that_is_cached(model_folder):
    """The server's way, and the request's where it says one."""
    texts = tuple(f"document {n}: " + "words and more words, " * 8 + "\n\n" for n in range(3))
    backend = open_tiny(model_folder, document_order="planned", tell_ranking=True)
    try:
        await collect(backend, ask("first", chat(documents=texts)))
        turned = chat(documents=texts[1::-1] + texts[2:])
        _, planned = await collect(backend, ask("second", turned))
        kept = msgspec.structs.replace(ask("third", turned), document_order="relevance")
        _, relevance = await collect(backend, kept)
        assert await backend.count_tokens(turned) == relevance.usage.prompt_tokens
        assert planned.usage.prompt_tokens > relevance.usage.prompt_tokens, "a line tells the ranking"
        assert planned.usage.cached_tokens > relevance.usage.cached_tokens + 100
    finally:
        await backend.close()


async def test_segments_are_refused_where_nobody_tried_them(model_folder):
    backend = open_tiny(model_folder)
    try:
        with pytest.raises(RequestRefused, match="document_reuse"):
            await collect(
                backend, msgspec.structs.replace(ask("r", chat(documents=("a", "b"))), document_reuse="segments")
            )
    finally:
        await backend.close()
