"""The real scheduler and block pool under a model that notices every wrong read."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import GenerationFailed, Overloaded, PromptTooLong, RequestRefused
from inference.engine.blocks import BlockPool, extend_names, root_name
from kernels import BLOCK_SIZE
from tests.inference.integer_model import IntegerModel, add, drain, expected, make_core, tokens_of


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, 90), k=length)


def assert_idle(core) -> None:
    core.pool.check()
    assert core.pool.free_blocks == core.pool.capacity
    assert not core._sequences


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_generates_what_its_prefix_says(length):
    core = make_core()
    add(core, "a", prompt_of(length), 20)
    outputs = drain(core)["a"]
    assert tokens_of(outputs) == expected(prompt_of(length), 20)
    assert outputs[-1].finish == "length"
    assert outputs[-1].usage.prompt_tokens == length
    assert outputs[-1].usage.completion_tokens == 20
    assert_idle(core)


def test_the_second_request_reads_what_the_first_one_computed():
    core = make_core()
    shared = prompt_of(100)
    add(core, "a", shared + [1, 2, 3])
    drain(core)
    before = core.counters.computed_tokens
    add(core, "b", shared + [4, 5, 6])
    outputs = drain(core)["b"]
    assert tokens_of(outputs) == expected(shared + [4, 5, 6], 8)
    assert outputs[-1].usage.cached_tokens == 96
    assert core.counters.computed_tokens - before == 103 - 96 + 7


def test_at_least_one_token_is_computed_on_a_full_hit():
    core = make_core()
    for name in ("a", "b"):
        add(core, name, prompt_of(64), 1)
        outputs = drain(core)[name]
    assert outputs[-1].usage.cached_tokens == 48
    assert tokens_of(outputs) == expected(prompt_of(64), 1)


def test_scopes_share_nothing():
    core = make_core()
    add(core, "a", prompt_of(64), scope="sales")
    drain(core)
    add(core, "b", prompt_of(64), scope="law")
    assert drain(core)["b"][-1].usage.cached_tokens == 0


def test_a_running_prefill_adopts_what_a_sibling_computes():
    core = make_core(max_tokens=64)
    shared = prompt_of(320)
    add(core, "a", shared + [1])
    core.step()
    add(core, "b", shared + [2])
    outputs = drain(core)
    assert tokens_of(outputs["b"]) == expected(shared + [2], 8)
    assert outputs["b"][-1].usage.cached_tokens == 320
    assert core.counters.computed_tokens <= 320 + 2 + 2 * 8


def test_decodes_are_never_held_back_by_a_prefill():
    core = make_core(max_tokens=32, blocks=256)
    add(core, "stream", prompt_of(20), 60)
    while not core.step():
        pass
    add(core, "long", prompt_of(1500, 1), 4)
    for _ in range(40):
        assert [o.request_id for o in core.step()] == ["stream"]


def test_short_of_blocks_the_newest_goes_back_and_all_finish_alike():
    core = make_core(blocks=14, max_tokens=48)
    prompts = {f"r{i}": prompt_of(30 + 7 * i, i) for i in range(4)}
    for name, prompt in prompts.items():
        add(core, name, prompt, 60)
    outputs = drain(core)
    assert core.scheduler.preempted_total > 0
    for name, prompt in prompts.items():
        assert tokens_of(outputs[name]) == expected(prompt, 60)
    assert_idle(core)


def test_what_can_never_fit_is_refused_with_both_numbers():
    core = make_core(blocks=5, max_context_tokens=128)
    with pytest.raises(PromptTooLong, match="68 tokens, but the KV cache holds 64"):
        add(core, "a", prompt_of(60), 8)
    with pytest.raises(PromptTooLong, match="208 tokens, but the context holds 128"):
        add(core, "a", prompt_of(200), 8)
    with pytest.raises(RequestRefused, match="empty"):
        add(core, "a", [], 8)
    with pytest.raises(RequestRefused, match="max_tokens"):
        add(core, "a", [1], 0)
    assert not core.has_work


def test_a_full_queue_says_so():
    core = make_core(max_queued=2)
    add(core, "a", [1])
    add(core, "b", [1])
    with pytest.raises(Overloaded):
        add(core, "c", [1])


def test_a_failed_step_fails_its_own_requests_and_publishes_nothing():
    model = IntegerModel()
    core = make_core(model=model)
    add(core, "a", prompt_of(64))

    def break_once():
        model.before_step = lambda: None
        raise RuntimeError("kernel error")

    model.before_step = break_once
    [output] = core.step()
    assert isinstance(output.error, GenerationFailed)
    assert_idle(core)
    add(core, "b", prompt_of(64))
    outputs = drain(core)["b"]
    assert outputs[-1].usage.cached_tokens == 0
    assert tokens_of(outputs) == expected(prompt_of(64), 8)


def test_a_row_without_finite_logits_fails_alone():
    model = IntegerModel()
    model.poisoned.add(89)
    core = make_core(model=model)
    add(core, "bad", [89, 1, 2])
    add(core, "good", [3, 1, 2])
    outputs = drain(core)
    assert isinstance(outputs["bad"][-1].error, GenerationFailed)
    assert tokens_of(outputs["good"]) == expected([3, 1, 2], 8)
    assert_idle(core)


def test_an_error_after_the_step_fails_that_request_alone(monkeypatch):
    core = make_core()
    add(core, "bad", [5, 1, 2])
    add(core, "good", [3, 1, 2])

    def push(token):
        raise ValueError("detokeniser")

    monkeypatch.setattr(core._sequences["bad"].text, "push", push, raising=False)
    outputs = drain(core)
    assert isinstance(outputs["bad"][-1].error, GenerationFailed)
    assert tokens_of(outputs["good"]) == expected([3, 1, 2], 8)
    assert_idle(core)


@pytest.mark.parametrize("steps", [0, 1, 3, 6, 100])
def test_abort_at_any_moment_frees_everything(steps):
    core = make_core(max_tokens=32)
    add(core, "a", prompt_of(100), 50)
    add(core, "b", prompt_of(100), 5)
    outputs = []
    for _ in range(steps):
        outputs += core.step()
    before = core.abort("a")
    if steps < 6:  # neither has finished
        assert before.finish == "abort"
        assert before.usage.prompt_tokens == 100
        assert (before.queued_seconds is None) == (steps == 0)
    assert core.abort("a") is None
    assert core.abort("nobody") is None
    rest = drain(core)
    assert "a" not in rest
    assert tokens_of([o for o in outputs if o.request_id == "b"] + rest.get("b", [])) == expected(prompt_of(100), 5)
    assert_idle(core)


action = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 3), st.integers(1, 70), st.integers(1, 12), st.sampled_from(["x", "y"])),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("abort"), st.integers(0, 20)),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(action, max_size=40), st.integers(7, 30), st.integers(1, 64), st.integers(1, 6))
def test_no_schedule_changes_an_answer(actions, blocks, budget, max_running):
    """Arrivals with shared prefixes, aborts, tiny pools, every chunk size: answers depend on the prompt alone."""
    core = make_core(blocks=blocks, max_tokens=budget, max_running=max_running)
    asked: dict[str, tuple[list[int], int]] = {}
    scopes: dict[str, str] = {}
    got: dict[str, list] = {}
    aborted = set()
    for number, (kind, *values) in enumerate(actions):
        if kind == "add":
            seed, length, count, scope = values
            if length + count <= core.pool.capacity * BLOCK_SIZE:
                asked[f"r{number}"] = (prompt_of(length, seed), count)
                scopes[f"r{number}"] = scope
                add(core, f"r{number}", prompt_of(length, seed), count, scope)
        elif kind == "step":
            for _ in range(values[0]):
                had_work = core.has_work
                planned = core.counters.computed_tokens
                for output in core.step():
                    got.setdefault(output.request_id, []).append(output)
                core.pool.check()
                assert not had_work or core.counters.computed_tokens > planned, "a step with work advanced nobody"
        else:
            aborted.add(f"r{values[0]}")
            core.abort(f"r{values[0]}")
    for name, outputs in drain(core).items():
        got.setdefault(name, []).extend(outputs)
    for name, (prompt, count) in asked.items():
        answer = tokens_of(got.get(name, []))
        assert answer == expected(prompt, count, scopes[name])[: len(answer)]
        if name not in aborted:
            assert len(answer) == count
            assert got[name][-1].finish == "length"
    assert_idle(core)


def test_documents_in_many_orders_through_a_small_pool():
    """The traffic that sharing and eviction live on."""
    core = make_core(blocks=24, max_tokens=40)
    rng = random.Random(7)
    documents = [prompt_of(BLOCK_SIZE * 2, seed) for seed in range(5)]
    asked = {}
    outputs: dict[str, list] = {}
    for i in range(60):
        prompt = [t for d in rng.sample(documents, 3) for t in d] + prompt_of(rng.randrange(1, 20), 100 + i)
        asked[f"r{i}"] = prompt
        add(core, f"r{i}", prompt, 4)
        for _ in range(rng.randrange(4)):
            for output in core.step():
                outputs.setdefault(output.request_id, []).append(output)
            core.pool.check()
        if rng.random() < 0.3:
            gone = f"r{rng.randrange(i + 1)}"
            core.abort(gone)
            asked.pop(gone, None)
    for name, more in drain(core).items():
        outputs.setdefault(name, []).extend(more)
    for name, prompt in asked.items():
        assert tokens_of(outputs[name]) == expected(prompt, 4)


def test_a_gap_ends_a_hit():
    """What lies behind an evicted block can't be used, even if it is still there."""
    pool = BlockPool(8)
    names = [bytes([n]) for n in range(4)]
    blocks = pool.allocate(4)
    for block, name in zip(blocks, names, strict=True):
        pool.publish(block, name)
    assert pool.match(names) == blocks
    assert pool.match(names[:1] + [b"evicted"] + names[2:]) == blocks[:1]


def test_a_chain_is_evicted_from_its_end():
    pool = BlockPool(8)
    names = [bytes([n]) for n in range(4)]
    blocks = pool.allocate(4)
    for block, name in zip(blocks, names, strict=True):
        pool.publish(block, name)
    pool.release(blocks)
    pool.allocate(3 + 2)  # the three that held nothing, and two of the chain
    assert pool.match(names) == blocks[:2]


def test_waste_is_the_last_block_alone():
    core = make_core(blocks=600)
    for i in range(8):
        add(core, f"r{i}", prompt_of(400 + 37 * i, i), 64)
    wasted = []

    def look():
        used, allocated = core.slots
        if allocated:
            wasted.append(1 - used / allocated)

    drain(core, look)
    assert max(wasted) < 0.04


def test_names_depend_on_everything_that_makes_a_block():
    def names(*identity, tokens):
        found: list[bytes] = []
        extend_names(found, root_name(*identity), tokens, len(tokens), BLOCK_SIZE)
        return found

    tokens = prompt_of(48)
    base = names("model", "scope", tokens=tokens)
    assert len(base) == 3
    assert names("model", "scope", tokens=tokens[:47]) == base[:2]
    assert not set(base) & set(names("model", "other", tokens=tokens))
    assert not set(names("ab", "c", tokens=tokens)) & set(names("a", "bc", tokens=tokens))
    changed = names("model", "scope", tokens=[tokens[0] + 1, *tokens[1:]])
    assert not set(base) & set(changed)


def test_slots_are_counted_while_the_engine_admits():
    """/metrics looks from the event loop's thread: a request that is admitted meanwhile must not break it."""
    core = make_core(blocks=200)
    add(core, "a", prompt_of(40))
    core.step()
    first = core.scheduler.running["a"]

    class Blocks(list):
        def __iter__(self):
            core.scheduler.running.setdefault("b", first)
            return super().__iter__()

    first.blocks = Blocks(first.blocks)
    used, allocated = core.slots
    assert 0 < used <= allocated
    assert "b" in core.scheduler.running
