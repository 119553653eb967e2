"""Documents reused at other places than they were computed at: what is copied, what is computed again, what is kept
apart from what is exact."""

from __future__ import annotations

import random

import pytest
import torch

from inference import Sampling
from inference.engine import EngineCore, EngineOptions, Policy
from inference.engine.blocks import extend_names
from inference.engine.ordering import Document, Parts
from inference.engine.segments import Reusing
from inference.models import Llama, open_checkpoint
from kernels import BLOCK_SIZE
from tests.inference.integer_model import TokensAsText
from tests.inference.tiny import save_model

HEAD = tuple(range(3, 26))  # ends within a block
LEAD = tuple(range(100, 341))


@pytest.fixture(scope="module", params=["llama", "qwen3 with qk norm"])
def model(request, tmp_path_factory):
    return Llama(open_checkpoint(str(save_model(tmp_path_factory.mktemp("model"), request.param))), torch.float64)


def document(number: int, length: int) -> Document:
    rng = random.Random(number)
    return Document(bytes([number]), tuple(rng.randrange(3, 512) for _ in range(length)))


DOCUMENTS = [document(i, length) for i, length in enumerate((50, 64, 71, 96))]


def parts_of(*order: int, tail: tuple[int, ...] = (7, 8, 9, 10)) -> Parts:
    return Parts(HEAD, tuple(DOCUMENTS[i] for i in order), tail)


def make(model: Llama, share: float | None, blocks: int = 200, eviction: str = "gdsf", **policy) -> EngineCore:
    return EngineCore(
        model,
        EngineOptions(
            identity="tiny",
            blocks=blocks,
            max_context_tokens=1024,
            eos_token_ids=frozenset(),
            policy=Policy(**policy),
            eviction=eviction,
            reuse=None if share is None else Reusing(share, range(1, len(model.layers)), LEAD),
        ),
        text_stream=TokensAsText,
        clock=lambda: 0.0,
    )


def ask(core: EngineCore, name: str, parts: Parts, answer: int = 6) -> None:
    core.add(name, parts, Sampling(max_tokens=answer, ignore_eos=True, logprobs=3), "public", 0)


def drain(core: EngineCore) -> dict[str, list]:
    told: dict[str, list] = {}
    while core.has_work:
        for output in core.step():
            assert output.error is None, output.error
            told.setdefault(output.request_id, []).append(output)
        core.pool.check()
    return told


def logprobs_of(outputs: list) -> list[float]:
    return [each.logprob for output in outputs for token in output.logprobs for each in token.top]


def seen_before(core: EngineCore) -> None:
    """Each document is known, some of them as segments."""
    for i, order in enumerate([(0, 1), (1, 2), (2, 3), (3, 0)]):
        ask(core, f"before {i}", parts_of(*order), 1)
        drain(core)


@pytest.mark.parametrize("budget", [512, 40])
def test_with_everything_computed_again_nothing_differs(model: Llama, budget: int):
    plain, core = make(model, None), make(model, 1.0, max_tokens=budget)
    seen_before(core)
    for order in ((3, 1, 2), (0, 2), (2, 1, 0, 3)):
        for each in (plain, core):
            ask(each, f"{order}", parts_of(*order))
        assert core._sequences[f"{order}"].reuse is not None
        exact, reused = (drain(each)[f"{order}"] for each in (plain, core))
        assert logprobs_of(reused) == pytest.approx(logprobs_of(exact), abs=1e-9)


@pytest.fixture
def one_layer(model: Llama):
    """Its keys and values depend on a token and its place alone, so reuse is exact if the copies are."""
    whole, model.layers = model.layers, model.layers[:1]
    yield model
    model.layers = whole


def reused_and_exact(model: Llama) -> tuple[list[float], list[float]]:
    plain, core = make(model, None), make(model, 0.0)
    seen_before(core)
    for each in (plain, core):
        ask(each, "r", parts_of(3, 1, 2))
    exact, reused = drain(plain)["r"], drain(core)["r"]
    assert reused[-1].usage.approximate_tokens == 64 + 71
    return logprobs_of(reused), logprobs_of(exact)


def test_what_is_copied_is_what_would_be_computed(one_layer: Llama):
    reused, exact = reused_and_exact(one_layer)
    assert reused == pytest.approx(exact, abs=1e-5)  # the turn is float32


@pytest.mark.parametrize(
    "change",
    [
        lambda source, target, by: (source, target, by + 1),
        lambda source, target, by: (source.roll(1), target, by),
        lambda source, target, by: (source[1:], target[1:], by[1:]),
    ],
    ids=["turned too far", "a place too far", "one is forgotten"],
)
def test_a_wrong_copy_is_noticed(one_layer: Llama, change, monkeypatch):
    splice = one_layer.splice
    monkeypatch.setattr(one_layer, "splice", lambda cache, *columns: splice(cache, *change(*columns)))
    monkeypatch.setattr(one_layer, "new_cache", zeroed(one_layer.new_cache))
    reused, exact = reused_and_exact(one_layer)
    assert reused != pytest.approx(exact, abs=1e-4)


def zeroed(new_cache):
    """Memory that was never written is no number by chance alone."""

    def new(blocks: int):
        cache = new_cache(blocks)
        for layer in cache:
            layer.keys.zero_()
            layer.values.zero_()
        return cache

    return new


def test_the_larger_the_share_the_more_is_computed_again(model: Llama):
    computed, off = [], []
    for share in (0.0, 0.5, 0.9, 1.0):
        core = make(model, share)
        seen_before(core)
        ask(core, "warm", parts_of(3, 1, 2), 1)  # all documents are segments by now
        drain(core)
        before = core.counters.computed_tokens
        ask(core, "r", parts_of(3, 1, 2), 1)
        usage = drain(core)["r"][-1].usage
        computed.append(core.counters.computed_tokens - before)
        assert usage.cached_tokens == usage.prompt_tokens - computed[-1]
        assert usage.approximate_tokens + usage.recomputed_tokens == 64 + 71
        off.append(usage.approximate_tokens)
    assert computed == sorted(computed)
    assert computed[0] == 4  # the question
    assert off[-1] == 0


def test_nothing_approximate_is_ever_found(model: Llama):
    core = make(model, 0.3)
    seen_before(core)
    ask(core, "r", parts_of(3, 1, 2), 40)
    drain(core)
    plain = make(model, None)
    for order in ((3, 1, 2), (3, 1), (1, 2)):
        for each in (core, plain):
            each.documents.segments = None
            ask(each, f"{order}", parts_of(*order, tail=(11, 12)))
        reused, exact = (drain(each)[f"{order}"] for each in (core, plain))
        assert logprobs_of(reused) == pytest.approx(logprobs_of(exact), abs=1e-9)


def test_a_crowd_in_many_orders_computes_each_document_once(model: Llama):
    core = make(model, 0.25, blocks=600)
    seen_before(core)
    core.pool.forget()  # they are known, but no longer there
    before = core.counters.computed_tokens
    orders = [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)] * 4
    for i, order in enumerate(orders):
        ask(core, f"{i}", parts_of(*order, tail=(i + 3, 5)), 1)
    told = drain(core)
    assert sorted(told) == sorted(f"{i}" for i in range(len(orders)))
    compiled = 2 * sum(len(d.tokens) for d in DOCUMENTS) + len(HEAD) + len(LEAD)  # as the first, and behind the lead
    compiled += 8 * 2 * BLOCK_SIZE  # the block in which each begins, what fills its last one
    again = sum(outputs[-1].usage.recomputed_tokens for outputs in told.values())
    assert again > 0
    assert core.counters.computed_tokens - before <= compiled + again + 2 * len(orders)


def test_strangers_are_computed_in_their_place(model: Llama):
    core = make(model, 0.25)
    ask(core, "r", parts_of(0, 1, 2))
    assert core._sequences["r"].reuse is None
    usage = drain(core)["r"][-1].usage
    assert (usage.approximate_tokens, usage.recomputed_tokens) == (0, 0)


def test_what_is_evicted_while_it_waits_is_computed_in_its_place(model: Llama):
    core = make(model, 0.25)
    seen_before(core)
    ask(core, "r", parts_of(3, 1, 2))
    core.pool.forget()
    exact = make(model, None)
    ask(exact, "r", parts_of(3, 1, 2))
    told = drain(core)["r"]
    assert told[-1].finish == "length"
    assert core.pool.free_blocks == core.pool.capacity


@pytest.mark.parametrize("steps", range(6))
def test_whoever_leaves_leaves_nothing(model: Llama, steps: int):
    core = make(model, 0.25, max_tokens=64)
    seen_before(core)
    core.pool.forget()
    ask(core, "stays", parts_of(3, 1, 2))
    ask(core, "leaves", parts_of(1, 3, 2))
    for _ in range(steps):
        core.step()
    core.abort("leaves")
    told = drain(core)
    assert told["stays"][-1].finish == "length"
    assert not core._sequences
    assert core.pool.free_blocks == core.pool.capacity


def test_a_small_pool_preempts_and_goes_on(model: Llama):
    core = make(model, 0.25, blocks=34, max_tokens=64)
    rng = random.Random(0)
    for i in range(12):
        ask(core, f"{i}", parts_of(*rng.sample(range(4), 2), tail=(i + 3, 5)), 30)
    told = drain(core)
    assert all(outputs[-1].finish == "length" for outputs in told.values())
    assert len(told) == 12
    assert core.scheduler.preempted_total
    assert core.pool.free_blocks == core.pool.capacity


def test_where_all_is_there_in_this_order_nothing_is_approximate_and_all_is_found_again(model: Llama):
    core = make(model, 0.25)
    seen_before(core)
    tail = tuple(range(40, 90))
    core.add("prefix", parts_of(3, 1, 2), Sampling(max_tokens=1, ignore_eos=True), "public", 0, reuse="prefix")
    drain(core)
    cached = []
    for name in ("first", "again"):
        ask(core, name, parts_of(3, 1, 2, tail=tail), 1)
        assert core._sequences[name].reuse is not None
        usage = drain(core)[name][-1].usage
        assert usage.kv_mode == "exact"
        cached.append(usage.cached_tokens)
    documents = len(HEAD) + 96 + 64 + 71
    assert cached[0] == documents
    assert cached[1] >= documents + len(tail) - BLOCK_SIZE


def test_all_but_the_first_are_computed_behind_the_lead(model: Llama):
    core = make(model, 0.25)
    seen_before(core)
    ask(core, "r", parts_of(3, 1, 2))
    reuse = core._sequences["r"].reuse
    for span, number in zip(reuse.spans, (3, 1, 2), strict=True):
        compiled = span.compiled(BLOCK_SIZE)
        at = span.start - span.by
        assert tuple(compiled[at : at + span.end - span.start]) == DOCUMENTS[number].tokens
        if span is reuse.spans[0]:
            assert tuple(compiled[:at]) == HEAD
        else:  # whole blocks, and the lead's end is whole
            assert at == (len(HEAD) + len(LEAD)) // BLOCK_SIZE * BLOCK_SIZE
            assert tuple(compiled[:at]) == (*HEAD, *LEAD[len(HEAD) + len(LEAD) - at :])
        names: list[bytes] = []
        extend_names(names, core._sequences["r"].root, compiled, len(compiled), BLOCK_SIZE)
        assert span.names == names
    assert drain(core)["r"][-1].usage.kv_mode == "segments"


@pytest.mark.parametrize("eviction", ["gdsf", "lru"])
@pytest.mark.parametrize("blocks", range(26, 90, 4))
def test_no_pool_is_so_small_that_somebody_waits_for_ever(model: Llama, blocks: int, eviction: str):
    core = make(model, 0.25, blocks=blocks, eviction=eviction)
    for i, order in enumerate([(0, 1), (1, 2), (2, 3), (3, 0), (3, 1, 2), (2, 1, 0, 3), (0, 2)]):
        if core.pool.capacity * BLOCK_SIZE < 320:
            order = order[:2]
        ask(core, f"{i}", parts_of(*order), 2)
    for _ in range(400):
        core.step()
    assert not core.has_work
    assert core.pool.free_blocks == core.pool.capacity


def test_who_is_urgent_does_not_wait_for_what_nobody_is(model: Llama):
    core = make(model, 0.25)
    seen_before(core)
    core.pool.forget()
    for name, priority in (("later", 1), ("now", 0)):
        sampling = Sampling(max_tokens=1, ignore_eos=True)
        core.add(name, parts_of(3, 1, 2), sampling, "public", 0, priority=priority)
        assert {core._sequences[each].priority for each in core._sequences[name].reuse.awaits} == {priority}
    drain(core)


def test_what_stands_in_the_prefix_is_not_computed_as_a_segment(model: Llama):
    core = make(model, 0.25)
    seen_before(core)
    sampling = Sampling(max_tokens=1, ignore_eos=True)
    core.add("prefix", parts_of(3, 1, 2), sampling, "public", 0, reuse="prefix")
    drain(core)
    ask(core, "r", parts_of(3, 1, 0))
    waits = core._sequences["r"].reuse
    assert waits is not None
    assert len(waits.awaits) <= 2  # the last one, and one that ends within a block
    drain(core)


def test_who_has_all_documents_goes_before_who_has_them_computed(model: Llama):
    core = make(model, 0.1, max_tokens=64)
    seen_before(core)
    core.expect(Parts(HEAD, (document(50, 150), document(51, 150), document(52, 150)), ()), "public")
    ask(core, "known", parts_of(3, 1, 2), 1)
    drain(core)
    ask(core, "new", Parts(HEAD, (document(50, 150), document(51, 150), document(52, 150)), (7, 8)), 1)
    assert len(core._sequences["new"].reuse.awaits) == 3
    ask(core, "ready", parts_of(3, 1, 2, tail=(11, 12)), 1)
    told: list[str] = []
    while core.has_work:
        told += [output.request_id for output in core.step()]
        if "ready" in told:
            break
    assert told == ["ready"]
    assert len(core._sequences["new"].reuse.awaits) >= 2  # most of it is still to be computed
    drain(core)


def test_a_burst_is_served_one_after_the_other(model: Llama):
    """Not all documents of all first: whoever comes first gets what they await, and their answer, before the last."""
    core = make(model, 0.1, max_tokens=64)
    prompts = [Parts(HEAD, tuple(document(60 + 3 * i + j, 150) for j in range(3)), (7, i)) for i in range(3)]
    for parts in prompts:
        core.expect(parts, "public")
    for i, parts in enumerate(prompts):
        ask(core, f"{i}", parts, 1)
        assert len(core._sequences[f"{i}"].reuse.awaits) == 3
    told: list[str] = []
    while not told:
        told += [output.request_id for output in core.step()]
    assert told == ["0"]
    assert len(core._sequences["2"].reuse.awaits) == 3
    told += [output.request_id for outputs in drain(core).values() for output in outputs]
    assert told == ["0", "1", "2"]
