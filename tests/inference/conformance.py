"""What every backend promises, as one suite.

A test module subclasses `BackendConformance` and gives a `subject` fixture: an object whose
`open(case)` is an async context manager of a Backend made for that case (or skips, with a reason).

    class TestMine(BackendConformance):
        @pytest.fixture
        def subject(self): return MySubject()
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Literal, Protocol

import pytest

from inference import (
    Backend,
    BackendError,
    ChatPrompt,
    Finished,
    GenerationRequest,
    Message,
    PromptTooLong,
    RequestRefused,
    Sampling,
    Segment,
    TextDelta,
    TextPrompt,
    UnknownModel,
)

Case = Literal[
    "plain",  # answers of at least 8 tokens, as fast as it can
    "endless",  # can make 400 tokens, and is not done with them before an abort gets in
    "silent",  # no first token for a long time
    "fails_before",  # every request fails before its first token
    "fails_after",  # every request fails after some tokens
    "small_context",  # capabilities.max_context_tokens, or 256 tokens where that is unknown
    "unknown_model",  # the server lacks the configured model
]

HANG_SECONDS = 60.0  # a guard against waiting for ever, not a measurement

# What tells of live requests in `Backend.metrics`: remote and scripted backends count them all, the engine by state.
RUNNING = ("requests_running", "engine_running_requests", "engine_waiting_requests")

DOCUMENTS = (
    "The garden opens at nine in the morning and closes at dusk. Visitors leave bags at the gate. ",
    "Tickets are sold at the north entrance until one hour before closing. Children enter for free. ",
)


class Subject(Protocol):
    def open(self, case: Case) -> AbstractAsyncContextManager[Backend]: ...


def chat(question: str = "When does the garden open?", documents: tuple[str, ...] = DOCUMENTS) -> ChatPrompt:
    blocks = tuple(Segment(text, "document", f"doc-{n}") for n, text in enumerate(documents))
    return ChatPrompt(
        (
            Message("system", (Segment("Answer from the documents.", "system"),)),
            Message("user", (*blocks, Segment(question))),
        )
    )


def ask(request_id: str = "r1", prompt=None, **sampling) -> GenerationRequest:
    sampling.setdefault("max_tokens", 8)
    return GenerationRequest(request_id=request_id, prompt=prompt or chat(), sampling=Sampling(**sampling))


async def collect(backend: Backend, request: GenerationRequest) -> tuple[list[TextDelta], Finished]:
    """The deltas and the Finished of a whole stream; checks that it has the shape of one."""
    events = []
    async with asyncio.timeout(HANG_SECONDS), aclosing(backend.generate(request)) as stream:
        async for event in stream:
            events.append(event)
    return split(events)


def split(events: list) -> tuple[list[TextDelta], Finished]:
    assert events, "a stream ends with a Finished"
    *deltas, finished = events
    assert isinstance(finished, Finished)
    assert all(isinstance(delta, TextDelta) and (delta.text or delta.logprobs) for delta in deltas)
    return deltas, finished


def text_of(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


async def rest_of(stream) -> list:
    async with asyncio.timeout(HANG_SECONDS):
        return [event async for event in stream]


class BackendConformance:
    """The suite.  Every test opens its own backend and must leave nothing running in it.  `lacks`: what of `Sampling`
    the backend refuses; its answers are long enough without."""

    lacks: frozenset[str] = frozenset()

    def ask(self, request_id: str = "r1", prompt=None, **sampling) -> GenerationRequest:
        return ask(request_id, prompt, **{name: value for name, value in sampling.items() if name not in self.lacks})

    # ---- a stream -------------------------------------------------------------------------

    async def test_answers_in_deltas_with_one_finished_at_the_end(self, subject: Subject):
        async with subject.open("plain") as backend:
            deltas, finished = await collect(backend, self.ask(max_tokens=8, ignore_eos=True))
            assert len(deltas) > 1
            assert finished.reason == "length"
            assert text_of(deltas).strip()

    async def test_the_same_greedy_request_gives_the_same_text(self, subject: Subject):
        async with subject.open("plain") as backend:
            first, _ = await collect(backend, self.ask("a"))
            second, _ = await collect(backend, self.ask("b"))
            assert text_of(first) == text_of(second)

    async def test_raw_text_prompts_are_answered_too(self, subject: Subject):
        async with subject.open("plain") as backend:
            deltas, _ = await collect(backend, self.ask(prompt=TextPrompt("The garden opens at"), ignore_eos=True))
            assert text_of(deltas)

    async def test_max_tokens_ends_an_answer_with_length(self, subject: Subject):
        async with subject.open("plain") as backend:
            for limit in (1, 3):
                _, finished = await collect(backend, self.ask(max_tokens=limit, ignore_eos=True))
                assert finished.reason == "length"
                assert finished.usage.completion_tokens == limit

    async def test_usage_counts_prompt_and_answer(self, subject: Subject):
        async with subject.open("plain") as backend:
            _, finished = await collect(backend, self.ask(max_tokens=5, ignore_eos=True))
            usage = finished.usage
            assert usage.completion_tokens == 5
            assert usage.prompt_tokens >= 20
            assert usage.cached_tokens is None or 0 <= usage.cached_tokens < usage.prompt_tokens
            counted = await backend.count_tokens(chat())
            if backend.capabilities.counts_tokens:
                assert counted == usage.prompt_tokens
            else:
                assert counted is None

    async def test_a_stop_string_ends_the_answer_and_is_not_in_it(self, subject: Subject):
        async with subject.open("plain") as backend:
            whole, _ = await collect(backend, self.ask(max_tokens=8, ignore_eos=True))
            text = text_of(whole)
            words = text.split()
            stop = words[len(words) // 2][-2:]
            deltas, finished = await collect(
                backend, self.ask(max_tokens=8, ignore_eos=True, stop=(stop, "never said"))
            )
            assert finished.reason == "stop"
            assert text_of(deltas) == text[: text.index(stop)]

    async def test_the_beginning_of_a_reply_is_continued_and_not_repeated(self, subject: Subject):
        async with subject.open("plain") as backend:
            if not backend.capabilities.continues_reply:
                pytest.skip("the backend continues no reply")
            prompt = ChatPrompt(chat().messages, reply_prefix="According to the documents, the garden")
            deltas, _ = await collect(backend, self.ask(prompt=prompt, max_tokens=8, ignore_eos=True))
            assert text_of(deltas)
            assert "According to" not in text_of(deltas)

    # ---- errors ---------------------------------------------------------------------------

    async def test_a_failure_before_the_first_token_is_raised_and_gives_no_events(self, subject: Subject):
        async with subject.open("fails_before") as backend:
            stream = backend.generate(self.ask())
            with pytest.raises(BackendError) as raised:
                await anext(stream)
            assert str(raised.value)
            assert raised.value.code != BackendError.code
            await stream.aclose()

    async def test_a_failure_in_the_middle_is_raised_after_the_deltas_and_without_finished(self, subject: Subject):
        async with subject.open("fails_after") as backend:
            events: list = []
            with pytest.raises(BackendError):
                await collect_into(events, backend.generate(self.ask(max_tokens=64, ignore_eos=True)))
            assert events
            assert not any(isinstance(event, Finished) for event in events)

    async def test_a_failure_harms_no_later_request(self, subject: Subject):
        async with subject.open("fails_after") as backend:
            for n in range(5):
                with pytest.raises(BackendError):
                    await collect(backend, self.ask(f"r{n}", max_tokens=64, ignore_eos=True))
            await nothing_runs(backend)

    async def test_an_oversize_prompt_is_refused_with_its_numbers(self, subject: Subject):
        async with subject.open("small_context") as backend:
            limit = backend.capabilities.max_context_tokens or 256
            with pytest.raises(PromptTooLong) as raised:
                await collect(backend, self.ask(prompt=chat(documents=("word " * limit,))))
            assert raised.value.limit_tokens == limit
            assert raised.value.needed_tokens > limit
            await collect(backend, self.ask("after"))

    async def test_an_unknown_model_is_named(self, subject: Subject):
        async with subject.open("unknown_model") as backend:
            with pytest.raises(UnknownModel, match="model"):
                await collect(backend, self.ask())
            assert issubclass(UnknownModel, RequestRefused)

    # ---- stopping -------------------------------------------------------------------------

    async def test_abort_before_the_stream_is_read(self, subject: Subject):
        async with subject.open("endless") as backend:
            stream = backend.generate(self.ask(max_tokens=400, ignore_eos=True))
            backend.abort("r1")
            deltas, finished = split(await rest_of(stream))
            assert finished.reason == "abort"
            assert not deltas

    async def test_abort_before_the_first_token(self, subject: Subject):
        async with subject.open("silent") as backend:
            stream = backend.generate(self.ask(max_tokens=400, ignore_eos=True))
            reading = asyncio.create_task(rest_of(stream))
            for _ in range(5):
                await asyncio.sleep(0)
            backend.abort("r1")
            _, finished = split(await reading)
            assert finished.reason == "abort"

    @pytest.mark.parametrize("after", [1, 20])
    async def test_abort_in_the_middle(self, subject: Subject, after: int):
        async with subject.open("endless") as backend:
            stream = backend.generate(self.ask(max_tokens=400, ignore_eos=True))
            events = [await anext(stream) for _ in range(after)]
            backend.abort("r1")
            backend.abort("r1")
            _, finished = split(events + await rest_of(stream))
            assert finished.reason == "abort"
            assert finished.usage.completion_tokens < 400

    async def test_abort_from_another_thread(self, subject: Subject):
        async with subject.open("endless") as backend:
            stream = backend.generate(self.ask(max_tokens=400, ignore_eos=True))
            first = await anext(stream)
            reading = asyncio.create_task(rest_of(stream))
            await asyncio.sleep(0)
            thread = threading.Thread(target=backend.abort, args=("r1",))
            thread.start()
            _, finished = split([first, *await reading])
            thread.join()
            assert finished.reason == "abort"

    async def test_abort_after_the_end_and_of_unknown_ids_does_nothing(self, subject: Subject):
        async with subject.open("plain") as backend:
            backend.abort("never seen")
            _, finished = await collect(backend, self.ask())
            backend.abort("r1")
            backend.abort("r1")
            assert finished.reason != "abort"
            _, again = await collect(backend, self.ask())
            assert again.reason != "abort"

    async def test_leaving_the_stream_stops_the_request(self, subject: Subject):
        async with subject.open("endless") as backend:
            async with aclosing(backend.generate(self.ask(max_tokens=400, ignore_eos=True))) as stream:
                await anext(stream)
            await nothing_runs(backend)

    async def test_cancelling_the_reader_stops_the_request(self, subject: Subject):
        async with subject.open("silent") as backend:
            reading = asyncio.create_task(collect(backend, self.ask(max_tokens=400, ignore_eos=True)))
            for _ in range(5):
                await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await nothing_runs(backend)

    @pytest.mark.parametrize("how", ["abort", "aclose", "cancel"])
    @pytest.mark.parametrize("point", ["unread", "before the first token", "first", "middle", "last"])
    async def test_stopped_at_any_point_it_ends_at_once(self, subject: Subject, point: str, how: str):
        """Unread, before the first token, after the first, in the middle, and with only the Finished to come."""
        early = point in ("unread", "before the first token")
        limit = 8 if point == "last" else 400
        async with subject.open("silent" if early else "endless") as backend:
            stream = backend.generate(self.ask(max_tokens=limit, ignore_eos=True))
            said = 0
            wanted = {"first": 1, "middle": 5, "last": limit}.get(point, 0)
            while said < wanted:
                said += (await anext(stream)).tokens
            reading = None
            if point != "unread":
                reading = asyncio.create_task(rest_of(stream))
                for _ in range(3 if early else 0):
                    await asyncio.sleep(0)
            if how == "abort":
                backend.abort("r1")
                events = await (reading or rest_of(stream))
                finished = events[-1]
                assert isinstance(finished, Finished)
                assert finished.reason == "abort" or point == "last"
            elif reading is not None:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
            await stream.aclose()
            await nothing_runs(backend)

    async def test_twenty_at_once_with_some_aborted(self, subject: Subject):
        async with subject.open("endless") as backend:
            alone, _ = await collect(backend, self.ask("alone", max_tokens=6, ignore_eos=True))

            async def one(n: int) -> tuple[str, Finished]:
                request = self.ask(f"r{n}", max_tokens=400 if n % 4 == 0 else 6, ignore_eos=True)
                stream = backend.generate(request)
                events = [await anext(stream)]
                if n % 4 == 0:
                    backend.abort(f"r{n}")
                deltas, finished = split(events + await rest_of(stream))
                return text_of(deltas), finished

            for n, (text, finished) in enumerate(await asyncio.gather(*map(one, range(20)))):
                assert finished.reason == ("abort" if n % 4 == 0 else "length")
                if n % 4:
                    assert text == text_of(alone)
            await nothing_runs(backend)

    # ---- the rest of the seam -------------------------------------------------------------

    async def test_health_says_ready_and_close_ends_it(self, subject: Subject):
        async with subject.open("endless") as backend:
            assert isinstance(backend, Backend)
            assert (await backend.health()).ready
            assert backend.capabilities.model
            stream = backend.generate(self.ask(max_tokens=400, ignore_eos=True))
            first = await anext(stream)
            await backend.close()
            _, finished = split([first, *await rest_of(stream)])
            assert finished.reason == "abort"
            assert not (await backend.health()).ready
            with pytest.raises(BackendError):
                await collect(backend, self.ask("late"))


async def collect_into(events: list, stream) -> None:
    async for event in stream:
        events.append(event)


async def eventually(holds: Callable[[], object]) -> None:
    """Wait until `holds()`, however long that takes, short of a hang."""
    async with asyncio.timeout(HANG_SECONDS):
        while not holds():  # noqa: ASYNC110  (nothing to wait on: the state belongs to others)
            await asyncio.sleep(0.001)


async def nothing_runs(backend: Backend) -> None:
    """Wait until the backend holds no request."""
    await eventually(lambda: not any(backend.metrics().get(name, 0) for name in RUNNING))
