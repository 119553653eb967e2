"""What the cache gives up first."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engine.blocks import BlockPool
from inference.engine.eviction import DEBOUNCE_SECONDS, FreeBlocks, Popularity
from kernels import BLOCK_SIZE
from tests.inference.integer_model import add, drain, make_core
from tests.inference.test_engine_core import prompt_of


def serve(pool: BlockPool, names: list[bytes], now: float, answer: int = 0) -> int:
    """What the engine does with a prompt of `names` and an answer of so many blocks; how many were hits."""
    hits = pool.match(names)
    pool.take(hits)
    blocks = hits + pool.allocate(len(names) + answer - len(hits))
    pool.asked(names, now)
    for i, block in enumerate(blocks[len(hits) :], len(hits)):
        pool.publish(block, names[i] if i < len(names) else b"answer %d to " % i + names[-1])
    pool.release(blocks)
    pool.check()
    return len(hits)


def chain(which: int, length: int = 4) -> list[bytes]:
    return [b"%d/%d" % (which, i) for i in range(length)]


def test_what_is_asked_for_often_stays_when_much_else_passes():
    for eviction, stays in (("gdsf", True), ("lru", False)):
        pool = BlockPool(1 + 12, eviction=eviction)
        for i in range(6):
            serve(pool, chain(0), i)
        for i in range(10, 14):
            serve(pool, chain(i), i)
        assert (len(pool.match(chain(0))) == 4) == stays, eviction


def test_what_is_no_longer_asked_for_grows_old():
    pool = BlockPool(1 + 12)
    for i in range(6):
        serve(pool, chain(0), i)
    came = [serve(pool, chain(1 + i % 3), 10 + i) for i in range(40)]
    assert not pool.match(chain(0))
    assert came[-1] == 4


def test_a_document_that_comes_back_is_no_stranger():
    pool = BlockPool(1 + 8)
    for i in range(6):
        serve(pool, chain(0), i)
    taken = pool.allocate(8)
    assert not pool.match(chain(0))
    pool.release(taken)
    serve(pool, chain(0), 10)
    for i in range(11, 14):
        serve(pool, chain(i), i)
    assert len(pool.match(chain(0))) == 4


def test_partial_blocks_go_first_then_answers_then_what_was_asked_for():
    pool = BlockPool(1 + 8)
    serve(pool, chain(0), 0, answer=2)
    pool.release(pool.allocate(1))  # never published
    assert pool.published_blocks == 6
    pool.allocate(2)
    assert pool.published_blocks == 6
    pool.allocate(2)
    assert pool.match(chain(0)) == pool.match(chain(0))[:4]
    assert len(pool.match(chain(0))) == 4
    pool.allocate(1)
    assert len(pool.match(chain(0))) == 3


def test_a_burst_counts_once():
    popularity = Popularity(10)
    for i in range(32):
        popularity.note([b"crowd"], 1.0 + i * DEBOUNCE_SECONDS / 40)
    assert popularity.of(b"crowd") == pytest.approx(1, rel=0.01)
    popularity.note([b"crowd"], 1.0 + 2 * DEBOUNCE_SECONDS)
    assert popularity.of(b"crowd") == pytest.approx(2, rel=0.01)


def test_frequency_halves_and_the_table_is_bounded():
    popularity = Popularity(most=20, half_life=10)
    popularity.note([b"then"], 0.0)
    for i in range(1, 11):
        popularity.note([b"%d" % i], i)
    assert popularity.of(b"then") == pytest.approx(0.5)
    for i in range(11, 40):
        popularity.note([b"%d" % i], i)
    assert popularity.of(b"then") == 0
    assert len(popularity._seen) == 20


@pytest.mark.parametrize("per_pair", [0.0, 0.01])
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_chains_are_evicted_from_their_ends(per_pair: float, asked: list[tuple[int, int, int]]):
    """Documents in all orders, shared beginnings and ends of their own: no block goes before what stands on it."""
    pool = BlockPool(1 + 14, per_pair=per_pair)
    parent_of: dict[bytes, bytes] = {}
    for now, documents in enumerate(asked):
        names = [b"/".join(b"%d" % d for d in documents[: i + 1]) for i in range(3)]
        names = [part for name in names for part in (name + b"a", name + b"b")]
        parent_of |= dict(zip(names[1:], names, strict=False))
        serve(pool, names, now, answer=1)
        for name in pool._block_of:
            parent = parent_of.get(name)
            assert parent is None or parent in pool._block_of


@given(
    st.lists(st.tuples(st.sampled_from(["add", "remove", "pop"]), st.integers(0, 9), st.integers(0, 1)), max_size=60)
)
def test_the_free_list_against_a_slow_one(done: list[tuple[str, int, int]]):
    free, slow = FreeBlocks([]), OrderedDict[int, int]()
    for what, block, priority in done * 4:
        if what == "add" and block not in slow:
            free.add(block, priority)
            slow[block] = priority
        elif what == "remove" and block in slow:
            free.remove(block)
            del slow[block]
        elif what == "pop" and slow:
            first = min(slow, key=slow.__getitem__)
            assert free.pop() == (first, slow.pop(first))
        assert list(free) == list(slow)
        assert len(free) == len(slow)


def test_the_engine_keeps_what_many_ask_for():
    for eviction, cached in (("gdsf", True), ("lru", False)):
        core = make_core(blocks=1 + 24, eviction=eviction)
        hot = prompt_of(BLOCK_SIZE * 8)
        for i in range(5):
            add(core, f"hot {i}", [*hot, i], 1)
            drain(core)
        for i in range(4):
            add(core, f"cold {i}", prompt_of(BLOCK_SIZE * 8, 1 + i), 1)
            drain(core)
        add(core, "again", [*hot, 99], 1)
        outputs = drain(core)["again"]
        assert (outputs[-1].usage.cached_tokens == 8 * BLOCK_SIZE) == cached, eviction
