"""The scripted backend: the suite of every backend, and what its script promises."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

from inference import GenerationFailed, ScriptedConfig, open_backend
from tests.inference.conformance import BackendConformance, Case, ask, chat, collect, collect_into, text_of

CONFIGS: dict[str, dict] = {
    "plain": {},
    "endless": {"length": 400},
    "silent": {"time_to_first_token": 3600.0},
    "fails_before": {"fail_before_first": True},
    "fails_after": {"fail_after_tokens": 3},
    "small_context": {"max_context_tokens": 256},
}
NOT_HERE = {
    "unknown_model": "a script has no models to lack",
}


class ScriptedSubject:
    @asynccontextmanager
    async def open(self, case: Case):
        if case in NOT_HERE:
            pytest.skip(NOT_HERE[case])
        backend = open_backend(ScriptedConfig(**{"time_to_first_token": 0, "token_interval": 0} | CONFIGS[case]))
        try:
            yield backend
        finally:
            await backend.close()


class TestScripted(BackendConformance):
    @pytest.fixture
    def subject(self) -> ScriptedSubject:
        return ScriptedSubject()


def fast(**knobs):
    return open_backend(ScriptedConfig(**{"time_to_first_token": 0, "token_interval": 0} | knobs))


async def test_every_word_comes_from_the_documents():
    deltas, finished = await collect(fast(length=30), ask(max_tokens=100))
    said = {word.strip(".,") for word in text_of(deltas).split()}
    documents = [s.text for m in chat().messages for s in m.segments if s.kind == "document"]
    given = {word.strip(".,") for text in documents for word in text.split()}
    assert said <= given
    assert finished.reason == "stop"
    assert len(deltas) == finished.usage.completion_tokens == 30


async def test_seed_and_prompt_choose_the_text():
    backend = fast(length=40)
    texts = {text_of((await collect(backend, ask(max_tokens=99, seed=seed)))[0]) for seed in range(8)}
    assert len(texts) > 1


async def test_a_prompt_without_documents_or_words_is_answered():
    backend = fast(length=5)
    for prompt in (chat(documents=()), chat(question="", documents=("",))):
        deltas, _ = await collect(backend, ask(prompt=prompt))
        assert text_of(deltas).strip()


@pytest.mark.parametrize("tokens", [0, 4])
async def test_the_fault_comes_after_the_tokens_asked_for(tokens: int):
    events: list = []
    with pytest.raises(GenerationFailed, match=f"after {tokens} tokens"):
        await collect_into(events, fast(fail_after_tokens=tokens).generate(ask(max_tokens=64)))
    assert len(events) == tokens


async def test_a_stop_string_may_span_words():
    backend = fast(length=40)
    text = text_of((await collect(backend, ask(max_tokens=40)))[0])
    stop = text[10:22]
    deltas, finished = await collect(backend, ask(max_tokens=40, stop=(stop,)))
    assert text_of(deltas) == text[: text.index(stop)]
    assert finished.reason == "stop"
