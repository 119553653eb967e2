"""Steps that are launched before the tokens of the one in flight are known.  The state machine runs them too; here is
what it cannot do: requests that end by a token nobody could foresee."""

from __future__ import annotations

import pytest

from inference import GenerationFailed, Sampling
from inference.engine.core import EngineCore
from tests.inference.integer_model import IntegerModel, drain, expected, make_core, tokens_of

PROMPT = [5, 6, 7]
SAID = expected(PROMPT, 8)


def ends_at_the_third(core: EngineCore, name: str = "a") -> None:
    core._model.scope_of[name] = "public"
    core.add(name, PROMPT, Sampling(max_tokens=8, stop_token_ids=(SAID[2],)), "public", 0)


def ask(core: EngineCore, name: str, prompt: list[int], **sampling) -> None:
    core._model.scope_of[name] = "public"
    core.add(name, prompt, Sampling(max_tokens=8, **sampling), "public", 0)


def test_the_late_token_of_an_ended_request_is_dropped():
    core = make_core(overlap=True)
    ends_at_the_third(core)
    ask(core, "b", [9, 9])
    outputs = drain(core)
    last = outputs["a"][-1]
    assert (last.finish, last.usage.completion_tokens) == ("stop", 3)
    assert tokens_of(outputs["a"]) == SAID[:2]
    assert tokens_of(outputs["b"]) == expected([9, 9], 8)
    assert core.counters.computed_tokens == len(PROMPT) + 3 + 2 + 7, "the late token was computed, and no other"
    assert core.pool.free_blocks == core.pool.capacity


def test_a_request_that_ended_does_not_fail_with_the_step_after():
    core = make_core(overlap=True)
    ends_at_the_third(core)
    ask(core, "b", [9, 9])
    for _ in range(3):
        core.step()  # the third token of both is in flight

    def broken() -> None:
        raise MemoryError

    core._model.before_step = broken
    outputs = {output.request_id: output for output in core.step()}
    assert outputs["a"].finish == "stop"
    assert isinstance(outputs["b"].error, GenerationFailed)
    core._model.before_step = lambda: None
    assert not core.has_work
    assert core.pool.free_blocks == core.pool.capacity


def test_a_step_that_fails_on_the_device_fails_its_requests_and_is_not_found_again():
    core = make_core(overlap=True)
    ask(core, "a", list(range(1, 41)))
    core.step()
    assert core.pool.published_blocks == 2

    def broken() -> None:
        raise RuntimeError("CUDA error")

    core._in_flight.choices.wait = broken
    (output,) = core.step()
    assert isinstance(output.error, GenerationFailed)
    assert core.pool.published_blocks == 0
    assert core.step() == []  # the step behind it
    assert not core.has_work


@pytest.mark.parametrize(
    "sampling", [{"presence_penalty": 0.5}, {"logprobs": 1}], ids=["penalties", "log probabilities"]
)
def test_what_the_host_chooses_is_known_before_the_next_step(sampling: dict):
    core = make_core(overlap=True)
    ask(core, "plain", [4, 4])
    assert core.step() == []
    ask(core, "host", [9], **sampling)
    told = {output.request_id for output in core.step()}
    assert told == {"plain", "host"}
    assert core._in_flight is None
    drain(core)


def test_without_overlap_nothing_is_left_in_flight():
    core = make_core(model=IntegerModel())
    ask(core, "a", PROMPT)
    assert core.step()[0].tokens == 1
    assert core._in_flight is None
