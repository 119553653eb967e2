"""Faults inside the engine, each by the number of the catalogue it comes from; the rest of that group is elsewhere:

E1   a client goes at any moment            gateway/test_disconnect.py, test_engine_core.py (abort at any moment)
E2   a reader that never reads              gateway/test_disconnect.py, gateway/test_streams.py
E5   the engine dies or hangs               test_embedded.py (dead, hung)
E6   the pool is exhausted                  test_engine_core.py, engine_machine.py
E9   published before it is computed        engine_machine.py (I5, I17)
E13  a producer that never waits            gateway/test_streams.py
"""

from __future__ import annotations

import random

import pytest

from inference import GenerationFailed
from inference.engine.blocks import BlockPool, root_name
from inference.engine.sampler import Choices
from tests.inference.integer_model import EOS, IntegerModel, add, drain, expected, make_core, tokens_of
from tests.inference.test_engine_core import assert_idle, prompt_of


class Breaks:
    """Every method of it raises."""

    stopped = False

    def __getattr__(self, name):
        def broken(*args, **kwargs):
            raise RuntimeError(f"planted in {name}")

        return broken


@pytest.mark.parametrize("part", ["text", "grammar", "sampler"])
def test_e3_an_error_in_one_requests_own_parts_is_its_own(part, monkeypatch):
    core = make_core()
    add(core, "bad", prompt_of(40, 1), 8)
    add(core, "good", prompt_of(40, 2), 8)
    bad = core._sequences["bad"]
    if part in ("text", "grammar"):
        setattr(bad, part, Breaks())
    if part == "sampler":
        whole = Choices.token

        def broken(self, row, sequence):
            if sequence is bad:
                raise RuntimeError("planted in the sampler")
            return whole(self, row, sequence)

        monkeypatch.setattr(Choices, "token", broken)
    outputs = drain(core)
    assert isinstance(outputs["bad"][-1].error, GenerationFailed)
    assert tokens_of(outputs["good"]) == expected(prompt_of(40, 2), 8)
    assert_idle(core)


def test_e3_guesses_that_break_cost_nothing_but_themselves():
    core = make_core(draft_rows=8)
    add(core, "bad", prompt_of(40, 1), 8, drafter=Breaks())
    assert tokens_of(drain(core)["bad"]) == expected(prompt_of(40, 1), 8)


def test_e4_a_step_that_breaks_fails_its_own_and_the_next_ones_go_on():
    model = IntegerModel()
    core = make_core(model=model, max_tokens=48, max_running=1, ageing_seconds=1e9)
    add(core, "first", prompt_of(40, 1), 4)
    add(core, "waits", prompt_of(40, 2), 4)
    core.step()

    def break_once():
        model.after_step = lambda: None
        raise MemoryError("planted")

    model.after_step = break_once
    outputs = drain(core)
    assert isinstance(outputs["first"][-1].error, GenerationFailed)
    assert tokens_of(outputs["waits"]) == expected(prompt_of(40, 2), 4)
    assert_idle(core)


def test_e7_names_can_not_be_made_to_collide():
    """128 bits of blake2b over the parent's name and the tokens: nothing shorter, nothing of Python's own."""
    assert len(root_name("model", "scope")) == 16
    assert root_name("a", "bc") != root_name("ab", "c")


def test_e8_a_block_given_back_twice_is_noticed_and_counted_once():
    pool = BlockPool(8)
    blocks = pool.allocate(3)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.release(blocks)
    assert pool.free_blocks == pool.capacity
    pool.check()


@pytest.mark.parametrize("count", [1, 5])
def test_e10_an_answer_that_ends_at_once(count, monkeypatch):
    core = make_core()
    add(core, "a", prompt_of(40), count)
    monkeypatch.setattr(Choices, "token", lambda self, row, sequence: EOS)
    [output] = drain(core)["a"]
    assert (output.text, output.finish, output.usage.completion_tokens) == ("", "stop", 1)
    assert_idle(core)


def test_e11_choices_of_one_prompt_share_its_blocks_and_nothing_else():
    core = make_core(blocks=200, max_tokens=64)
    prompt = prompt_of(160)
    for i in range(4):
        add(core, f"choice {i}", prompt, 10)
    outputs = drain(core)
    assert all(tokens_of(outputs[f"choice {i}"]) == expected(prompt, 10) for i in range(4))
    assert core.counters.computed_tokens < 160 + 4 * (16 + 10)


def test_e12_a_storm_of_aborts_leaves_nothing_and_takes_no_longer_each():
    core = make_core(blocks=300, max_queued=10_000)
    rng = random.Random(3)
    for i in range(500):
        add(core, f"r{i}", prompt_of(rng.randrange(1, 90), i % 7), 20)
        if i % 5 == 0:
            core.step()
        core.abort(f"r{rng.randrange(i + 1)}")
    for i in range(500):
        core.abort(f"r{i}")
    assert not core.has_work
    assert_idle(core)


def test_e14_draws_and_penalties_are_each_requests_own():
    """The same request in a slot that others used before it, and in company."""

    def said(core, name):
        return [output.text for output in drain(core)[name]]

    alone = make_core()
    add(alone, "a", prompt_of(30, 1), 12)
    truth = said(alone, "a")
    busy = make_core(max_running=2)
    for i in range(6):
        add(busy, f"other {i}", prompt_of(30, 50 + i), 3 + i)
    for _ in range(5):
        busy.step()
    add(busy, "a", prompt_of(30, 1), 12)
    assert said(busy, "a") == truth
