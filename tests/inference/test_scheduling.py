"""Who goes first, for how long, and who makes way: the policy, where the machine only sees that nothing breaks."""

from __future__ import annotations

import pytest

from inference.engine.cost import StepCost, fit, with_decodes
from kernels import BLOCK_SIZE
from tests.inference.integer_model import add, drain, expected, make_core, tokens_of
from tests.inference.test_engine_core import prompt_of

COST = StepCost(fixed=0.02, per_token=0.001, per_pair=1e-6)


def order_of_first_tokens(core) -> list[str]:
    first: list[str] = []
    while core.has_work:
        for output in core.step():
            if output.request_id not in first:
                first.append(output.request_id)
    return first


def test_the_least_work_goes_first():
    core = make_core(blocks=400, max_tokens=64, max_running=1, ageing_seconds=1e9)
    add(core, "running", prompt_of(32), 4)
    core.step()
    add(core, "long", prompt_of(900, 1), 1)
    add(core, "short", prompt_of(40, 2), 1)
    add(core, "middle", prompt_of(300, 3), 1)
    assert order_of_first_tokens(core) == ["running", "short", "middle", "long"]


def test_what_the_cache_holds_is_no_work():
    core = make_core(blocks=400, max_tokens=64, max_running=1, ageing_seconds=1e9)
    add(core, "before", prompt_of(900, 1), 1)
    drain(core)
    add(core, "running", prompt_of(32), 4)
    core.step()
    add(core, "unknown", prompt_of(300, 2), 1)
    add(core, "known", prompt_of(900, 1), 1)
    assert order_of_first_tokens(core) == ["running", "known", "unknown"]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("budget", [48, 64, 1000])
def test_a_crowd_over_the_same_documents_computes_them_once(budget: int, overlap: bool):
    documents, crowd = 20 * BLOCK_SIZE, 32
    core = make_core(blocks=400, max_tokens=budget, overlap=overlap)
    prompts = {f"{i}": prompt_of(documents) + prompt_of(5 + i % 20, i) for i in range(crowd)}
    for name, prompt in prompts.items():
        add(core, name, prompt, 2)
    told = drain(core)
    for name, prompt in prompts.items():
        assert tokens_of(told[name]) == expected(prompt, 2)
    once = documents + sum(len(prompt) - documents + 1 for prompt in prompts.values())
    assert core.counters.computed_tokens == once


def test_while_one_waits_for_a_sibling_others_are_admitted():
    core = make_core(blocks=400, max_tokens=64, ageing_seconds=1e9)
    add(core, "first", prompt_of(320), 1)
    core.step()
    add(core, "sibling", [*prompt_of(320), 1], 1)
    add(core, "other", prompt_of(350, 1), 1)
    core.step()
    assert list(core.scheduler.running) == ["first"]  # which takes the whole step
    while "first" in core.scheduler.running:
        core.step()
    drain(core)
    assert core.counters.computed_tokens == 320 + 1 + 350


def test_who_waits_for_a_sibling_that_leaves_goes_on_from_there():
    core = make_core(blocks=400, max_tokens=64)
    add(core, "first", prompt_of(320), 1)
    add(core, "second", prompt_of(320), 1)
    core.step()
    core.step()
    core.abort("first")
    drain(core)
    assert core.counters.computed_tokens == 320


def test_nothing_is_adopted_in_the_middle_of_a_block():
    """Where the sibling decodes what another's prompt says, nobody waits for it."""
    core = make_core(blocks=40, max_tokens=6)
    prompt = prompt_of(BLOCK_SIZE)
    said = expected(prompt, 2 * BLOCK_SIZE)
    add(core, "decodes", prompt, 2 * BLOCK_SIZE)
    for _ in range(BLOCK_SIZE):
        core.step()
    add(core, "reads", prompt + said, 3)
    core.step()
    decodes, reads = core.scheduler.running.values()
    assert decodes.computed < 2 * BLOCK_SIZE
    assert reads.computed % BLOCK_SIZE
    while decodes.published < 2:
        core.step()
    assert BLOCK_SIZE < reads.computed < 2 * BLOCK_SIZE
    told = drain(core)
    assert tokens_of(told["reads"]) == expected(prompt + said, 3)


def test_waiting_lifts_a_request_and_age_puts_it_first():
    """The clock of these cores ticks once for every look at it."""
    for limits, first in (
        ({"ageing_seconds": 1e9, "age_limit_seconds": 1e9}, "short"),
        ({"ageing_seconds": 5.0, "age_limit_seconds": 1e9}, "long"),
        ({"ageing_seconds": 1e9, "age_limit_seconds": 30.0}, "long"),
    ):
        core = make_core(blocks=400, max_tokens=64, max_running=1, **limits)
        add(core, "running", prompt_of(32), 60)
        core.step()
        add(core, "long", prompt_of(900, 1), 1, priority=1 if limits["ageing_seconds"] > 1e8 else 0)
        for _ in range(40):
            core.step()
        add(core, "short", prompt_of(40, 2), 1)
        assert order_of_first_tokens(core)[1] == first, limits


def test_nobody_starves_under_a_stream_of_short_ones():
    core = make_core(blocks=400, max_tokens=64, max_running=2, age_limit_seconds=50.0)
    add(core, "long", prompt_of(1500, 1), 1)
    waited = None
    for i in range(200):
        add(core, f"short {i}", prompt_of(20, i), 2)
        if any(output.request_id == "long" for output in core.step()):
            waited = i
            break
    assert waited is not None
    drain(core)


def test_the_urgent_class_goes_first_and_the_other_makes_way():
    core = make_core(blocks=400, max_tokens=64, max_running=1, ageing_seconds=1e9)
    add(core, "running", prompt_of(32), 4)
    core.step()
    add(core, "batch", prompt_of(40, 1), 1, priority=1)
    add(core, "asked", prompt_of(400, 2), 1)
    assert order_of_first_tokens(core) == ["running", "asked", "batch"]
    core = make_core(blocks=14)
    add(core, "asked", prompt_of(60, 1), 80)
    add(core, "batch", prompt_of(60, 2), 80, priority=1)
    add(core, "also asked", prompt_of(60, 3), 20)
    outputs = drain(core)
    assert core.scheduler.preempted_total > 0
    for name, seed, count in (("asked", 1, 80), ("batch", 2, 80), ("also asked", 3, 20)):
        assert tokens_of(outputs[name]) == expected(prompt_of(60, seed), count)
    assert next(iter(outputs)) == "asked"


def chunks_beside_a_stream(**policy) -> list[int]:
    core = make_core(blocks=400, max_tokens=512, cost=COST, **policy)
    add(core, "stream", prompt_of(16), 300)
    core.step()
    add(core, "long", prompt_of(1600, 1), 1)
    seen = []
    while "long" in core._sequences:
        before = core.counters.computed_tokens
        core.step()
        seen.append(core.counters.computed_tokens - before - 1)
    return seen


def test_a_step_beside_a_stream_takes_no_longer_than_it_may():
    chunks = chunks_beside_a_stream(step_seconds=0.2)
    assert sum(chunks) == 1600
    assert all(chunk % BLOCK_SIZE == 0 for chunk in chunks[:-1])
    start = 0
    for chunk in chunks[:-1]:
        assert COST.fixed + COST.chunk(16, 1) + COST.chunk(start, chunk) <= 0.2
        assert COST.fixed + COST.chunk(16, 1) + COST.chunk(start, chunk + 2 * BLOCK_SIZE) > 0.2
        start += chunk
    assert chunks[0] > chunks[-2], "later tokens have more to attend to"


def test_a_prefill_advances_however_little_time_there_is():
    assert set(chunks_beside_a_stream(step_seconds=1e-9, min_chunk=32)[:-1]) == {32}


def test_without_streams_a_step_is_as_long_as_it_can_be():
    core = make_core(blocks=400, max_tokens=512, cost=COST, step_seconds=0.1)
    add(core, "long", prompt_of(1600, 1), 1)
    core.step()
    assert core.counters.computed_tokens == 512


def test_guesses_fall_to_none_under_load():
    class Eager:
        def propose(self, tokens, most):
            return [1] * most

        def learn(self, proposed, accepted):
            pass

    for streams, guessed in ((1, 5), (2, 4), (4, 2), (8, 1), (9, 0)):
        core = make_core(blocks=400, draft_rows=8, max_tokens=512)
        for i in range(streams):
            add(core, f"r{i}", prompt_of(40, i), 40, drafter=Eager())
        core.step()
        core.step()
        assert core.counters.drafted_tokens == guessed * streams


def test_the_fit_finds_the_cost_again():
    samples = [(s, t, COST.fixed + COST.chunk(s, t)) for s, t in ((0, 32), (0, 192), (512, 192), (512, 64))]
    found = fit(samples)
    for name in ("fixed", "per_token", "per_pair"):
        assert getattr(found, name) == pytest.approx(getattr(COST, name), rel=1e-6)
    with pytest.raises(ValueError, match="several lengths"):
        fit(samples[:1] * 3)


def test_a_decode_costs_the_keys_that_it_reads():
    reading = with_decodes(COST, streams=4, context=1000, seconds=0.02 + 4 * 0.001 + 4 * 1000 * 5e-6)
    assert reading.chunk(999, 1) == pytest.approx(0.001 + 1000 * 5e-6)
    assert reading.chunk(996, 4) == pytest.approx(0.004 + 1000 * 5e-6)  # its guesses read them together
    assert reading.chunk(0, 100) == COST.chunk(0, 100)
    assert with_decodes(COST, 4, 1000, 0.0).per_read == COST.per_pair  # timed too well to be true
