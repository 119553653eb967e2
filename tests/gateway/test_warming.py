"""Popular passages are in the cache before anybody asks, and whoever asks waits for nothing of it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from functools import partial
from pathlib import Path

import msgspec
import pytest
from litestar.testing import TestClient

from gateway import warming as room
from gateway.answering import Ask, Spent, answer
from gateway.app import create_app
from gateway.composing import SHAPES, document_segment
from gateway.config import AnswersConfig, Config
from gateway.desk import Desk
from gateway.metering import Metrics
from gateway.warming import FILE_NAME, Popularity, Remembered, Warming, beginning
from inference import EngineConfig, GenerationFailed, open_backend
from kernels import BLOCK_SIZE
from retrieval import Passage, UnknownPassage
from tests.gateway.conftest import until
from tests.gateway.fakes import FakeBackend, FakeLibrary
from tests.inference.conformance import eventually
from tests.inference.tiny import save_model

PUMP, LADDER = "When must the pump be primed?", "When are ladders inspected by the safety officer?"


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(data=str(tmp_path), answers=AnswersConfig(prompt="listed"))


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(shares_documents=True)


@pytest.fixture
def popular(library, tmp_path) -> list[Passage]:
    """All passages of the library, the file says in which order."""
    passages = library._passages(None)[::-1]
    write(tmp_path, {p.passage_id: float(9 - place) for place, p in enumerate(passages)})
    return passages


def write(folder, counts: dict[str, float]) -> None:
    (folder / FILE_NAME).write_bytes(msgspec.json.encode({"passages": dict(sorted(counts.items()))}))


def written(folder) -> dict[str, float]:
    return msgspec.json.decode((folder / FILE_NAME).read_bytes(), type=Remembered).passages


def warmed(backend: FakeBackend) -> list[str]:
    """The passages that were asked for, by id."""
    return [s.document_id for r in backend.requests for m in r.prompt.messages for s in m.segments if s.document_id]


def fetching(library):
    async def fetch(passage_id: str) -> Passage:
        return library.whole.passage(passage_id)

    return fetch


async def asked(desk: Desk, question: str, request_id: str = "asked", **more) -> Spent:
    async with aclosing(answer(desk, Ask(request_id=request_id, question=question, **more))) as events:
        (spent,) = [event async for event in events if isinstance(event, Spent)]
        return spent


def test_what_is_read_more_often_and_later_is_more_popular():
    popularity = Popularity(half_life=2)
    for read in ("old", "old", "old", "often", "late", "often", "late", "late"):
        popularity.note([read])
    assert list(popularity.counts()) == ["late", "often", "old"]
    assert popularity.counts()["old"] == pytest.approx(2**-2.5 + 2**-3 + 2**-3.5)


def test_what_was_counted_before_decays_with_the_rest():
    popularity = Popularity(half_life=1)
    popularity.add({"a": 4.0, "b": 1.0})
    popularity.note(["b"])
    assert popularity.counts() == {"a": pytest.approx(2.0), "b": pytest.approx(1.5)}
    popularity.forget("a")
    assert list(popularity.counts()) == ["b"]


def test_a_bounded_number_of_passages_is_kept_and_newcomers_get_a_chance():
    popularity = Popularity(most=10, half_life=100)
    for read in range(3000):
        popularity.note([f"popular {read % 3}", f"once {read}"])
        assert len(popularity._counts) <= 20
    ranked = list(popularity.counts())
    assert len(ranked) == 10
    assert set(ranked[:3]) == {"popular 0", "popular 1", "popular 2"}
    for _ in range(300):
        popularity.note(["new"])
    assert next(iter(popularity.counts())) == "new"


def test_counts_survive_any_number_of_answers():
    popularity = Popularity(half_life=1)
    for _ in range(5000):
        popularity.note(["a"])
    assert popularity.counts() == {"a": pytest.approx(2.0)}


async def test_answers_are_remembered_across_restarts_as_ids_and_counts_alone(config, library, backend, tmp_path):
    for _ in range(2):
        desk = Desk(config, library=library, backend=backend)
        await asked(desk, PUMP)
        await asked(desk, LADDER)
        await asked(desk, PUMP)
        await asked(desk, "Do zebras dream?")  # refused: nothing is read
        await desk.close()
    (first, more), (second, less) = written(tmp_path).items()
    assert library.whole.passage(first).text.startswith("The pump")
    assert library.whole.passage(second).text.startswith("Ladders")
    assert (more, less) == (pytest.approx(4, rel=0.01), pytest.approx(2, rel=0.01))
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    saved = (tmp_path / FILE_NAME).read_text()
    assert not any(word in saved for word in ("pump", "Pump", "primed", "ladder", "Ladder"))


async def test_what_is_read_in_another_scope_is_not_remembered(config, library, backend, tmp_path):
    desk = Desk(config, library=library, backend=backend)
    library.reads = "board"
    await asked(desk, PUMP)
    assert backend.requests[0].scope not in ("public", "board")
    await desk.close()
    assert not list(tmp_path.iterdir())


async def test_changes_are_saved_after_a_while_once(config, library, backend, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "SAVE_SECONDS", 0.0)
    saves = []
    monkeypatch.setattr(room, "write_atomically", lambda path, data: saves.append(data))
    desk = Desk(config, library=library, backend=backend)
    desk.warming.note(library._passages(None), "public", backend.capabilities)
    desk.warming.note(library._passages(None), "public", backend.capabilities)
    await eventually(lambda: saves)
    await desk.close()
    assert len(saves) == 1


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b'{"passages": {"a": -1}}', b'{"passages": {"a": 1', b"[]"])
async def test_a_damaged_file_is_ignored_and_replaced(config, library, backend, tmp_path, damage, caplog):
    (tmp_path / FILE_NAME).write_bytes(damage)
    desk = Desk(config, library=library, backend=backend)
    await desk.warming.run(backend, fetching(library))
    assert not backend.requests
    assert sum("is ignored" in line for line in caplog.messages) == 1
    await asked(desk, PUMP)
    await desk.close()
    assert len(written(tmp_path)) == 1


async def test_a_file_that_cannot_be_written_fails_nothing(config, library, backend, tmp_path, caplog):
    (tmp_path / FILE_NAME).mkdir()
    desk = Desk(config, library=library, backend=backend)
    await asked(desk, PUMP)
    await desk.close()
    assert any("not saved" in line for line in caplog.messages)


async def test_the_most_popular_goes_first_in_the_background_of_answers(config, library, backend, popular):
    desk = Desk(config, library=library, backend=backend)
    desk.open()
    await asyncio.gather(*desk._opening)
    assert warmed(backend) == [p.passage_id for p in popular]
    assert {(r.priority, r.scope, r.sampling.max_tokens) for r in backend.requests} == {("batch", "public", 1)}
    assert len({r.request_id for r in backend.requests}) == len(popular)
    get = desk.metrics.registry.get_sample_value
    assert get("refdesk_warmed_tokens_total") == 6 * len(popular)
    assert get("refdesk_warming") == 0
    assert get("refdesk_prompt_tokens_total") == 0
    assert get("refdesk_answers_total", {"outcome": "answered"}) is None
    await desk.close()


async def test_passages_that_are_gone_are_skipped_and_forgotten(config, library, backend, popular, tmp_path):
    library.whole.remove(popular[0].document_id)
    left = [p for p in popular if p.document_id != popular[0].document_id]
    desk = Desk(config, library=library, backend=backend)
    await desk.warming.run(backend, fetching(library))
    assert warmed(backend) == [p.passage_id for p in left]
    await asked(desk, PUMP)
    await desk.close()
    assert popular[0].passage_id not in written(tmp_path)


async def test_the_budget_is_seconds_on_the_clock(config, library, backend, popular):
    now = 0.0

    async def fetch(passage_id: str) -> Passage:
        nonlocal now
        now += 20.0
        return library.whole.passage(passage_id)

    await Warming(config, Metrics(), clock=lambda: now).run(backend, fetch)
    assert warmed(backend) == [p.passage_id for p in popular[:2]]  # at 0 and 20 of 30 s


async def test_half_of_the_cache_is_left_to_those_who_ask(config, library, backend, popular):
    backend.capabilities = msgspec.structs.replace(backend.capabilities, cache_tokens=20)
    await Warming(config, Metrics()).run(backend, fetching(library))
    assert len(backend.requests) == 2  # 6 tokens each


async def nothing_is_warmed_or_remembered(desk: Desk, backend: FakeBackend, folder: Path) -> None:
    before = (folder / FILE_NAME).read_bytes()
    desk.open()
    await asyncio.gather(*desk._opening)
    assert not backend.requests
    await asked(desk, PUMP)
    await desk.close()
    assert (folder / FILE_NAME).read_bytes() == before


async def test_without_a_budget_nothing_is_warmed_or_remembered(config, library, backend, popular, tmp_path):
    settings = msgspec.structs.replace(config.answers, warm_seconds=0.0)
    desk = Desk(msgspec.structs.replace(config, answers=settings), library=library, backend=backend)
    await nothing_is_warmed_or_remembered(desk, backend, tmp_path)


async def test_not_for_a_backend_that_does_not_share_documents(config, library, popular, tmp_path):
    backend = FakeBackend()
    await nothing_is_warmed_or_remembered(Desk(config, library=library, backend=backend), backend, tmp_path)


async def test_a_failure_of_the_backend_ends_it_with_one_line(config, library, backend, popular, caplog):
    backend.error = GenerationFailed("planted")
    desk = Desk(config, library=library, backend=backend)
    desk.open()
    await asyncio.gather(*desk._opening)
    assert len(backend.requests) == 1
    (line,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "planted" in line.message
    assert desk.failure is None
    await desk.close()


async def test_an_arrival_aborts_at_once_and_for_good(config, library, backend, popular):
    backend.gate = asyncio.Event()
    desk = Desk(config, library=library, backend=backend)
    run = asyncio.create_task(desk.warming.run(backend, fetching(library)))
    await eventually(lambda: backend.running)
    (running,) = backend.running
    desk.give_way()
    assert backend.aborted == [running]  # synchronously
    await run
    await desk.warming.run(backend, fetching(library))
    assert len(backend.requests) == 1
    assert desk.metrics.registry.get_sample_value("refdesk_warmed_tokens_total") == 0
    await desk.close()


async def test_an_arrival_between_two_passages_lets_no_other_begin(config, library, backend, popular):
    warming = Warming(config, Metrics())

    async def fetch(passage_id: str) -> Passage:
        if passage_id == popular[1].passage_id:
            warming.stop()
        return library.whole.passage(passage_id)

    await warming.run(backend, fetch)
    assert warmed(backend) == [popular[0].passage_id]


async def test_an_arrival_ends_the_search_for_passages_that_are_gone(config, backend, popular):
    warming, looked = Warming(config, Metrics()), []

    async def fetch(passage_id: str) -> Passage:
        looked.append(passage_id)
        warming.stop()
        raise UnknownPassage(passage_id)

    await warming.run(backend, fetch)
    assert len(looked) == 1


MESSAGES = [{"role": "user", "content": PUMP}]
ARRIVALS = {
    "/v1/answers": {"question": PUMP},
    "/v1/answers streaming": {"question": PUMP, "stream": True},
    "/v1/chat/completions": {"model": "refdesk", "messages": MESSAGES},
    "/v1/chat/completions of the model": {"model": "fake", "messages": MESSAGES},
    "/v1/completions": {"model": "fake", "prompt": "Once"},
}


@pytest.mark.parametrize("arrival", ARRIVALS)
def test_every_way_of_asking_is_an_arrival_and_looking_is_none(config, library, backend, popular, arrival):
    backend.gate = asyncio.Event()
    app = create_app(config, library=library, backend=backend)
    with TestClient(app, raise_server_exceptions=False) as client:
        until(lambda: backend.running)
        for path in ("/health/ready", "/metrics", "/v1/models", "/v1/documents", "/"):
            assert client.get(path).status_code == 200
        assert client.post("/v1/search", json={"query": PUMP}).status_code == 200
        assert not backend.aborted
        assert client.post(arrival.split()[0], json=ARRIVALS[arrival]).status_code == 200
        warm, *asked = backend.requests
        assert backend.aborted[0] == warm.request_id
        assert [r.priority for r in asked] == ["interactive"]
        until(lambda: "refdesk_warming 0.0" in client.get("/metrics").text.splitlines())


async def test_who_asks_before_anything_can_be_answered_is_no_arrival(config, library, backend, popular, monkeypatch):
    loading = asyncio.Event()
    monkeypatch.setattr("gateway.desk.in_daemon_thread", lambda opener: opened())

    async def opened() -> FakeBackend:
        await loading.wait()
        return backend

    desk = Desk(config, library=library)
    desk.open()
    desk.give_way()
    loading.set()
    await asyncio.gather(*desk._opening)
    assert len(backend.requests) == len(popular)
    await desk.close()


async def test_closing_ends_it_and_leaves_nothing(config, library, backend, popular, tmp_path):
    backend.gate = asyncio.Event()
    desk = Desk(config, library=library, backend=backend)
    desk.open()
    await eventually(lambda: backend.running)
    desk.warming.note(popular, "public", backend.capabilities)
    await desk.close()
    assert not backend.running
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert desk.metrics.registry.get_sample_value("refdesk_warming") == 0
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert written(tmp_path)[popular[0].passage_id] == pytest.approx(10, rel=0.01)  # what it had loaded counts on


@pytest.mark.parametrize("shape", SHAPES)
def test_an_answers_prompt_begins_with_what_was_warmed(shape, library, backend):
    (passage,) = library.whole.search(PUMP, top_k=1).passages
    prompt = beginning(shape, passage, backend.capabilities)
    system, user = prompt.messages
    assert system.text == SHAPES[shape].system
    assert user.text == document_segment(passage).text
    assert prompt.reply_prefix == ""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(("shape", "reads"), [("listed", 1), ("plain", 2)])
async def test_the_answer_after_a_restart_finds_its_document_in_the_cache(tmp_path, model_folder, shape, reads):
    library = FakeLibrary()
    library.add("Pumps", "The pump must be primed before it is started. " * 9)
    library.add("Ladders", "Ladders are inspected every twelve months by the safety officer. " * 6)
    config = Config(data=str(tmp_path), answers=AnswersConfig(prompt=shape, reads=reads, max_tokens=4))
    cached = []
    for _ in range(2):
        backend = open_backend(EngineConfig(model=model_folder, dtype="float32", kv_cache_mb=8))
        try:
            desk = Desk(config, library=library, backend=backend)
            await desk.warming.run(backend, partial(desk.read, library.whole.passage))
            assert backend.metrics()["kv_free_blocks"] == backend.metrics()["kv_blocks"]
            cached.append((await asked(desk, PUMP)).usage.cached_tokens)
            (first,) = library.whole.search(PUMP, top_k=1).passages
            tokens = await backend.count_tokens(beginning(shape, first, backend.capabilities))
            document_end = tokens - len(backend._encoder._template(("system", "user"))[-1])
            await desk.close()
        finally:
            await backend.close()
    assert document_end > 10 * BLOCK_SIZE
    assert cached == [0, document_end // BLOCK_SIZE * BLOCK_SIZE]
