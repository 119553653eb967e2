"""What a request may ask of decoding, on a real tiny model: guesses, formats, logprobs, penalties."""

from __future__ import annotations

import json
import re

import pytest

from inference import Constraint, EngineConfig, RequestRefused, Sampling, TextPrompt, open_backend
from inference.engine.lookup import GRAM, PATIENCE, PromptLookup, TokenText
from tests.inference.conformance import ask, chat, collect, text_of
from tests.inference.tiny import save_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
async def backend(model_folder):
    backend = open_backend(EngineConfig(model=model_folder, dtype="float32", kv_cache_mb=8))
    yield backend
    await backend.close()


LOOP = TextPrompt("one two three four five one two three four five one two three four five one two")


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}, {"repetition_penalty": 1.1}])
async def test_guesses_change_no_token(model_folder, backend, sampling):
    without = open_backend(EngineConfig(model=model_folder, dtype="float32", kv_cache_mb=8, max_draft_tokens=0))
    for prompt in (LOOP, chat(documents=("the same words again, " * 12,))):
        request = ask(prompt=prompt, max_tokens=60, ignore_eos=True, **sampling)
        guessed, one_by_one = await collect(backend, request), await collect(without, request)
        assert text_of(guessed[0]) == text_of(one_by_one[0])
        assert guessed[1].usage.completion_tokens == one_by_one[1].usage.completion_tokens == 60
    assert without.metrics()["drafted_tokens_total"] == 0
    await without.close()


async def test_an_answer_that_quotes_the_prompt_takes_fewer_steps(backend):
    """The random model quotes because it must: its answer has a format."""
    quote = Constraint("regex", "( three four five one two){8}")
    deltas, finished = await collect(backend, ask(prompt=LOOP, max_tokens=400, constraint=quote))
    assert text_of(deltas) == " three four five one two" * 8
    metrics = backend.metrics()
    assert metrics["accepted_tokens_total"] > finished.usage.completion_tokens / 2
    assert metrics["steps_total"] < finished.usage.completion_tokens / 2


def test_a_text_knows_what_follows():
    text = TokenText([1, 2, 3, 4, 5, 1, 2, 3, 9])
    assert list(text.follows((1, 2, 3), 2)) == [4, 5]
    assert list(text.follows((5, 1, 2), 9)) == [3, 9]
    assert list(text.follows((2, 3, 9), 9)) == []
    assert list(TokenText([1, 2]).follows((1, 2, 3), 9)) == []


def test_wrong_guesses_bring_silence():
    lookup = PromptLookup([TokenText([1, 2, 3, 4, 5])])
    assert lookup.propose([7, 1, 2, 3], 5) == [4, 5]
    assert lookup.propose([1, 2, 3], 0) == lookup.propose([1] * (GRAM - 1), 5) == []
    lookup.learn(2, 0)
    assert [lookup.propose([1, 2, 3], 1) for _ in range(PATIENCE)] == [[]] * PATIENCE
    assert lookup.propose([1, 2, 3], 1) == [4]


async def test_an_answer_of_a_format(backend):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "yes": {"type": "boolean"}},
        "required": ["name", "yes"],
        "additionalProperties": False,
    }
    for sampling in ({}, {"temperature": 1.5, "seed": 1}):
        constraint = Constraint("json_schema", json.dumps(schema))
        deltas, finished = await collect(backend, ask(max_tokens=200, constraint=constraint, **sampling))
        assert finished.reason == "stop"
        made = json.loads(text_of(deltas))
        assert isinstance(made["yes"], bool)
        deltas, finished = await collect(
            backend, ask(max_tokens=60, constraint=Constraint("regex", "[a-c]{3}-[0-9]+x"))
        )
        assert re.fullmatch("[a-c]{3}-[0-9]+x?", text_of(deltas))


@pytest.mark.parametrize(
    "constraint", [Constraint("regex", "("), Constraint("json_schema", "{"), Constraint("json_schema", '{"type": 3}')]
)
async def test_a_format_that_is_none_is_refused(backend, constraint):
    with pytest.raises(RequestRefused, match=constraint.kind):
        await collect(backend, ask(constraint=constraint))


async def test_logprobs_tell_of_every_token(backend):
    deltas, finished = await collect(backend, ask(max_tokens=12, ignore_eos=True, logprobs=3))
    told = [each for delta in deltas for each in delta.logprobs]
    assert len(told) == finished.usage.completion_tokens == 12
    for each in told:
        assert each.logprob == each.top[0].logprob == max(other.logprob for other in each.top)
        assert len(each.top) == 3
        assert each.logprob < 0
    assert "".join(each.text for each in told).startswith(text_of(deltas)[:5])


async def test_bias_stop_tokens_and_penalties(backend):
    plain, _ = await collect(backend, ask(max_tokens=20, ignore_eos=True, logprobs=0))
    tokens = [each.token for delta in plain for each in delta.logprobs]
    banned, _ = await collect(backend, ask(max_tokens=20, ignore_eos=True, logprobs=0, logit_bias={tokens[0]: -100.0}))
    assert tokens[0] not in [each.token for delta in banned for each in delta.logprobs]
    _, stopped = await collect(backend, ask(max_tokens=20, ignore_eos=True, stop_token_ids=(tokens[2],)))
    assert stopped.reason == "stop"
    assert stopped.usage.completion_tokens == tokens.index(tokens[2]) + 1
    various, _ = await collect(backend, ask(max_tokens=40, ignore_eos=True, logprobs=0, presence_penalty=2.0))
    frequent, _ = await collect(backend, ask(max_tokens=40, ignore_eos=True, logprobs=0))

    def kinds(deltas):
        return len({each.token for delta in deltas for each in delta.logprobs})

    assert kinds(various) >= kinds(frequent)


def test_sampling_is_off_by_default():
    assert Sampling().constraint is None
    assert Sampling().logprobs is None
