"""The order of documents: what it saves is true, never less than the order of relevance saves, and always the same."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import Sampling
from inference.engine.blocks import BlockPool, extend_names, root_name
from inference.engine.ordering import Document, DocumentTree, Parts, Weights
from tests.inference.integer_model import chain, drain, expected, make_core, next_token, tokens_of

ROOT = root_name("model", "public")
HEAD = (1, 2, 3)


def document(number: int, length: int) -> Document:
    return Document(number.to_bytes(2, "little"), tuple(random.Random(number).choices(range(1, 90), k=length)))


def parts_of(*documents: Document, tail: tuple[int, ...] = (7, 8)) -> Parts:
    return Parts(HEAD, documents, tail)


A, B, C, D = (document(number, length) for number, length in ((1, 40), (2, 33), (3, 52), (4, 20)))


def ask(core, name: str, parts: Parts, scope: str = "public") -> None:
    core._model.scope_of[name] = scope
    core.add(name, parts, Sampling(max_tokens=3), scope, 0)


def served(core, name: str, parts: Parts, scope: str = "public") -> tuple[int, ...]:
    """Asks, and looks at the order that was taken and the answer to it."""
    ask(core, name, parts, scope)
    sequence = core._sequences[name]
    outputs = drain(core)
    assert tokens_of(outputs[name]) == expected(parts.tokens(sequence.order), 3, scope)
    return sequence.order


def test_the_order_whose_beginning_is_there():
    core = make_core(order="planned")
    assert served(core, "first", parts_of(A, B, C)) == (0, 1, 2)
    assert served(core, "second", parts_of(D, B, A)) == (2, 1, 0), "A, B as before, then D"
    assert core.counters.cached_tokens == 3 + 40 + 33, "to the token"
    assert served(core, "third", parts_of(C, D)) == (0, 1), "neither ever came first"


@pytest.mark.parametrize(
    ("order", "wanted"),
    [("relevance", (0, 1, 2)), ("canonical", (2, 1, 0)), ("planned", (1, 0, 2)), ("best_first", (0, 1, 2))],
)
def test_each_order(order: str, wanted: tuple[int, ...]):
    core = make_core(order=order)
    served(core, "first", parts_of(B, D))
    assert served(core, "second", parts_of(C, B, A)) == wanted


def test_the_best_document_stays_ahead_of_those_that_are_planned():
    core = make_core(order="best_first")
    served(core, "first", parts_of(A, C, B))
    assert served(core, "second", parts_of(A, B, D, C)) == (0, 3, 1, 2), "A, C, B as before, then D"
    assert served(core, "third", parts_of(C, A, B)) == (0, 1, 2), "what begins with another one is no use to it"


def test_a_scope_learns_nothing_of_another_and_a_revoked_one_begins_anew():
    core = make_core(order="planned")
    served(core, "first", parts_of(A, B), "ours")
    assert served(core, "second", parts_of(B, A), "theirs") == (0, 1)
    core.revoke("ours")
    assert served(core, "third", parts_of(B, A), "ours") == (0, 1)


def test_what_is_being_computed_counts_and_what_was_aborted_does_not():
    core = make_core(order="planned")
    ask(core, "first", parts_of(A, B))
    ask(core, "second", parts_of(B, A))
    assert core._sequences["second"].order == (1, 0)
    core.abort("first")
    core.step()  # planned again when it is admitted
    assert core._sequences["second"].order == (0, 1)
    drain(core)
    assert not any(node.held for node in nodes(core.documents.tree))


def test_the_hint_tells_of_another_order_and_of_no_other():
    core = make_core(order="planned")
    hinted = [parts_of(A, B)._replace(hint=lambda order: [50 + rank for rank in order])]
    hinted.append(hinted[0]._replace(documents=(B, A)))
    assert served(core, "first", hinted[0]) == (0, 1)
    assert served(core, "second", hinted[1]) == (1, 0)
    assert hinted[1].tokens((1, 0))[-4:] == [51, 50, 7, 8]
    assert hinted[1].tokens((0, 1))[-2:] == [7, 8]


def test_a_hint_that_no_longer_fits_leaves_the_order():
    whole = len(parts_of(B, A).tokens((0, 1)))
    core = make_core(order="planned", max_context_tokens=whole + 3)
    served(core, "first", parts_of(A, B))
    assert served(core, "second", parts_of(B, A)._replace(hint=lambda order: [9])) == (0, 1)


def nodes(tree: DocumentTree) -> list:
    found, stack = [], list(tree._roots.values())
    while stack:
        node = stack.pop()
        found.append(node)
        stack += node.children.values()
    return found


requests = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=5, unique=True), min_size=2, max_size=14)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(requests=requests, blocks=st.integers(12, 60), margin=st.sampled_from([0, 16]))
def test_a_plan_is_true_and_never_worse(requests: list[list[int]], blocks: int, margin: int):
    documents = [document(10 + i, 9 + 13 * i) for i in range(8)]
    pool = BlockPool(blocks)
    tree = DocumentTree(pool, weights=Weights(margin=margin))
    for wanted in requests:
        parts = parts_of(*(documents[i] for i in wanted))
        plan = tree.plan(ROOT, parts)
        assert plan == tree.plan(ROOT, parts)
        assert sorted(plan.order) == list(range(len(wanted)))
        assert plan.expected >= plan.plain
        held, free = hits(pool, parts, plan.order), hits(pool, parts, tuple(range(len(wanted))))
        assert plan.expected <= 16 * len(held) < plan.expected + 32, "the block of a seam may be there too"
        assert plan.plain <= 16 * len(free) < plan.plain + 32
        path = tree.hold(ROOT, parts, plan.order)
        names = names_of(parts, plan.order)
        pool.take(held)
        fresh = pool.allocate(len(names) - len(held))
        if fresh is not None:
            for block, name in zip(fresh, names[len(held) :], strict=True):
                pool.publish(block, name)
        pool.release(held + (fresh or []))
        tree.leave(path)


def names_of(parts: Parts, order: tuple[int, ...]) -> list[bytes]:
    names: list[bytes] = []
    tokens = parts.tokens(order)
    extend_names(names, ROOT, tokens, len(tokens), 16)
    return names


def hits(pool: BlockPool, parts: Parts, order: tuple[int, ...]) -> list[int]:
    return pool.match(names_of(parts, order))


def test_what_the_pool_took_back_is_swept():
    core = make_core(blocks=12, order="planned")
    core.documents.tree._sweep_at = 40
    for i in range(60):
        served(core, f"r{i}", parts_of(document(100 + i, 40), document(200 + i, 30)))
        assert len(core.documents.tree) == len(nodes(core.documents.tree))
        core.documents.tree._sweep_at = 40
    assert len(core.documents.tree) <= 41


def test_the_integer_model_notices_another_order():
    """What `served` relies on."""
    there, swapped = (chain("public", parts_of(A, B).tokens(order)) for order in ((0, 1), (1, 0)))
    assert next_token(there) != next_token(swapped)


def test_documents_that_end_within_a_block_are_shared_to_the_token():
    core = make_core()
    served(core, "first", parts_of(A, B, tail=(5, 6, 7)))
    computed = core.counters.computed_tokens
    ask(core, "second", parts_of(A, B, tail=(8, 9)))
    outputs = drain(core)["second"]
    assert tokens_of(outputs) == expected(parts_of(A, B, tail=(8, 9)).tokens((0, 1)), 3)
    assert outputs[-1].usage.cached_tokens == 3 + 40 + 33
    assert core.counters.computed_tokens - computed == 2 + 2  # its tail, and two of its own three tokens
    ask(core, "third", parts_of(A, C))
    assert drain(core)["third"][-1].usage.cached_tokens == 3 + 40
    ask(core, "fourth", parts_of(A, B), scope="other")
    assert drain(core)["fourth"][-1].usage.cached_tokens == 0
    core.pool.check()


def test_a_crowd_computes_its_documents_once_wherever_they_end():
    core = make_core(blocks=600)
    crowd = [parts_of(A, B, C, tail=(10 + i, 5)) for i in range(32)]
    for i, parts in enumerate(crowd):
        ask(core, f"{i}", parts)
    told = drain(core)
    for i, parts in enumerate(crowd):
        assert tokens_of(told[f"{i}"]) == expected(parts.tokens((0, 1, 2)), 3)
    documents = 40 + 33 + 52
    assert core.counters.computed_tokens == 3 + documents + 32 * (2 + 2)


def test_the_beginning_of_a_block_goes_with_the_block():
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool.publish_beginning(block, b"begins")
    pool.publish_beginning(block, b"begins later")
    pool.publish_beginning(block, b"begins")
    pool.release([block])
    assert pool.beginning(b"begins") == pool.beginning(b"begins later") == block
    pool.check()
    pool.allocate(3)
    assert pool.beginning(b"begins") is pool.beginning(b"begins later") is None
    pool.check()


def test_nothing_is_copied_after_a_step_that_failed():
    core = make_core()
    core._model.before_step = lambda: 1 / 0
    ask(core, "first", parts_of(A, B))
    assert core.step()[0].error is not None
    core._model.before_step = lambda: None
    assert served(core, "second", parts_of(A, B)) == (0, 1)
    assert core.counters.cached_tokens == 0
