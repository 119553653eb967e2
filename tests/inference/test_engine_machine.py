"""The real scheduler and pool under every schedule hypothesis can think of, and every planted bug noticed."""

from __future__ import annotations

import logging

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.inference.engine_machine import EngineMachine
from tests.inference.mutants import MUTANTS, Mutant, noticed


@pytest.fixture(autouse=True)
def quiet():
    """The machine breaks thousands of steps on purpose, and the core logs each."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_every_schedule_keeps_every_invariant():
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(max_examples=400, stateful_step_count=40, deadline=None, derandomize=True),
    )


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_every_planted_bug_is_noticed(mutant: Mutant):
    assert noticed(mutant)
