"""Where requests are sent: the router's parts, without a server."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import pytest

from inference import ChatPrompt, Message, Overloaded, Segment, TextPrompt, Unavailable
from inference.routing.path import Asked, Chain, Piece, asked_of, reordered
from inference.routing.planning import plan
from inference.routing.record import MOST, Record
from inference.routing.rendezvous import claim
from inference.routing.router import Replica, Router
from inference.routing.standing import Circuit, Limit

HEAD = Piece(b"head", 60)


def document(number: int, tokens: float = 200) -> Piece:
    return Piece(b"document %d" % number, tokens)


def chain(*documents: int, question: bytes = b"?") -> Chain:
    return Chain(Asked((HEAD,), tuple(document(number) for number in documents), (Piece(question, 30),)))


def sent(record: Record, asked: Chain, order: tuple[int, ...] | None = None) -> None:
    along = asked.along(order or asked.asked.ranks)
    record.note(along)
    record.settle(along)


def prompt(*documents: str, question: str = "When?", system: str = "Be brief.") -> ChatPrompt:
    blocks = tuple(Segment(text, "document", text) for text in documents)
    return ChatPrompt(
        (
            Message("system", (Segment(system, "system"),)),
            Message("user", (*blocks, Segment("We spoke of gates.", "history"), Segment(question))),
        )
    )


# ---- prompts ------------------------------------------------------------------------------------


def test_equal_beginnings_have_equal_names_and_nothing_else_has():
    ranks = (0, 1, 2)
    one = Chain(asked_of(prompt("a", "b", "c"), "public")).along(ranks)
    other = Chain(asked_of(prompt("a", "b", "d"), "public")).along(ranks)
    shared = [name for name, _ in one if name in dict(other)]
    assert shared == [name for name, _ in one[:4]]  # scope, system, a, b
    assert Chain(asked_of(prompt("a", "b", "c", question="Where?"), "public")).along(ranks)[:-1] == one[:-1]
    for different in (
        asked_of(prompt("a", "b", "c"), "team"),
        asked_of(prompt("a", "b", "c", system="Be long."), "public"),
        asked_of(ChatPrompt((Message("user", (Segment("Be brief.", "system"),)),)), "public"),
    ):
        assert not dict(one[1:]).keys() & dict(Chain(different).along(different.ranks)).keys()


def test_a_conversation_goes_on_where_it_was():
    turns = [Message("system", (Segment("s", "system"),)), Message("user", (Segment("hello"),))]
    before = Chain(asked_of(ChatPrompt(tuple(turns)), "public"))
    turns += [Message("assistant", (Segment("hi", "history"),)), Message("user", (Segment("bye"),))]
    after = Chain(asked_of(ChatPrompt(tuple(turns)), "public"))
    assert after.along(())[:3] == before.along(())
    assert after.key == before.key  # the whole conversation has one home


def test_raw_text_shares_what_it_begins_with():
    text = "".join(f"line {n}\n" for n in range(1000))
    one, other = (Chain(asked_of(TextPrompt(text + end), "public")).along(()) for end in ("a", "b"))
    assert one[:-1] == other[:-1]
    assert one[-1] != other[-1]


def test_documents_change_places_and_nothing_else_does():
    moved = reordered(prompt("a", "b", "c"), (2, 0, 1))
    assert [segment.text for segment in moved.messages[1].segments] == ["c", "a", "b", "We spoke of gates.", "When?"]
    assert moved.messages[0] == prompt("a").messages[0]
    assert asked_of(moved, "public").pieces((0, 1, 2)) == asked_of(prompt("a", "b", "c"), "public").pieces((2, 0, 1))
    without = ChatPrompt((Message("user", (Segment("hello"),)),))
    assert reordered(without, ()) == without


# ---- what a replica was sent -----------------------------------------------------------------------


def test_a_record_knows_the_longest_beginning():
    record = Record()
    sent(record, chain(1, 2, 3))
    assert record.overlap(chain(1, 2, 3).along((0, 1, 2))) == 60 + 600 + 30
    assert record.overlap(chain(1, 2, 4).along((0, 1, 2))) == 60 + 400
    assert record.overlap(chain(2, 1).along((0, 1))) == 60


def test_a_record_forgets_what_was_not_asked_for_and_beginnings_last():
    record = Record(900)
    sent(record, chain(1, 2, 3))
    sent(record, chain(1, 4))
    assert record.overlap(chain(1).along((0,))) >= 260
    assert record.overlap(chain(1, 2, 3).along((0, 1, 2))) < 690
    for number in range(100):
        sent(record, chain(number))
    assert sum(record.overlap(chain(n).along((0,))) > 60 for n in range(100)) <= 5
    record = Record()
    for number in range(MOST):
        sent(record, chain(number, question=b"%d" % number))
    assert len(record) == MOST


def test_a_record_learns_how_much_a_server_holds():
    """It is told nothing but what the server found, whose own cache is a record of its true size."""
    chooser, record, learned = random.Random(1), Record(), []
    for tokens in (4_000, 8_000, 2_000):
        server = Record(tokens)
        for _ in range(4_000):
            asked = chain(int(chooser.paretovariate(0.5)) % 500, question=b"%d" % chooser.randrange(10**6))
            along = asked.along((0,))
            promised, found = record.promised(along) / 290, server.overlap(along) / 290
            sent(record, asked)
            record.correct(along, promised, found)
            sent(server, asked)
        learned.append(record.tokens)
    assert learned == pytest.approx([4_000, 8_000, 2_000], rel=0.3)


def test_what_was_just_computed_is_held_whatever_was_there_before():
    record, asked = Record(), chain(1, 2, 3)
    sent(record, asked)
    record.correct(asked.along((0, 1, 2)), promised=1.0, found=0.0)
    assert record.overlap(asked.along((0, 1, 2))) == 690


def test_what_is_being_computed_is_expected_but_not_missed():
    """Two at once: the second finds nothing yet, which says nothing about what the server holds."""
    replica = Replica("a")
    router, earlier = Router([replica]), chain(*range(10, 30))
    sent(replica.record, earlier)
    before = len(replica.record)
    for ticket in [router.route(chain(1, 2, question=q), 0.0) for q in (b"1", b"2")]:
        ticket.first_token()
        ticket.usage(490, 60)
        ticket.ended()
    assert len(replica.record) == before + 4  # two documents, two questions
    third = router.route(chain(1, 2, question=b"3"), 0.0)
    third.first_token()
    third.usage(490, 60)  # by now it should have been there
    assert len(replica.record) < before + 5
    assert replica.record.overlap(chain(1, 2).along((0, 1))[:3]) == 460


def test_what_was_never_computed_is_not_expected():
    for end, told in (("left", ()), ("failed", (0.0,)), ("refused", (0.0, None))):
        replica = Replica("a")
        getattr(Router([replica]).route(chain(1), 0.0), end)(*told)
        assert len(replica.record) == 0
        assert (replica.running, replica.unread) == (0, 0)


# ---- orders -------------------------------------------------------------------------------------------


def test_documents_are_put_behind_what_is_held():
    record = Record()
    sent(record, chain(7, 5, 9))
    asked = chain(1, 5, 7)
    assert plan(asked, record, "relevance") == (0, 1, 2)
    assert plan(asked, record, "planned") == (2, 1, 0)
    assert plan(asked, record, "best_first") == (0, 1, 2)
    assert plan(chain(7, 1, 5), record, "best_first") == (0, 2, 1)
    assert plan(asked, Record(), "planned") == (0, 1, 2)
    assert {plan(chain(*ids), record, "canonical") for ids in ((1, 2), (2, 1))} == {(0, 1), (1, 0)}


def test_an_order_must_save_more_than_it_disturbs():
    record = Record()
    tiny = Asked((HEAD,), (document(1, 8),), ())
    sent(record, Chain(tiny))
    assert plan(Chain(Asked((HEAD,), (document(2), document(1, 8)), ())), record, "planned") == (0, 1)


def test_an_order_holds_every_document_once_also_where_one_is_there_twice():
    chooser = random.Random(3)
    for _ in range(300):
        record = Record(chooser.choice((None, 3000)))
        for _ in range(8):
            sent(record, chain(*chooser.choices(range(6), k=5)))
        asked = chain(*chooser.choices(range(6), k=5))
        orders = {how: plan(asked, record, how) for how in ("relevance", "planned", "best_first", "canonical")}
        assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders.values())
        assert orders["best_first"][0] == 0


# ---- hashing ---------------------------------------------------------------------------------------


def homes(weights: dict[str, float], keys: int = 4000) -> list[str]:
    return [max(weights, key=lambda name: claim(b"%d" % key, name, weights[name])) for key in range(keys)]


def test_keys_are_shared_by_weight_and_move_only_to_who_comes():
    before = homes({"a": 1, "b": 1, "c": 2})
    shares = Counter(before)
    assert shares["c"] == pytest.approx(2000, rel=0.1)
    assert shares["a"] == pytest.approx(1000, rel=0.1)
    after = homes({"a": 1, "b": 1, "c": 2, "d": 1})
    assert {now for was, now in zip(before, after, strict=True) if was != now} == {"d"}


@pytest.mark.parametrize("digest", [b"\0" * 8, b"\xff" * 8])
def test_any_hash_is_a_claim(monkeypatch, digest):
    monkeypatch.setattr("inference.routing.rendezvous.blake2b", lambda *_, **__: SimpleNamespace(digest=lambda: digest))
    assert 0 < claim(b"key", "a") < float("inf")


# ---- circuits and limits -----------------------------------------------------------------------------


def test_a_circuit_opens_is_tried_by_one_and_closes():
    circuit = Circuit(opens_after=2, open_seconds=1.0)
    circuit.failed(0.0)
    assert circuit.admits
    circuit.failed(0.0)
    assert not circuit.admits
    circuit.answered()  # something that was sent before
    circuit.succeeded()
    assert circuit.state == "open"
    circuit.looked(False, 1.0)
    assert circuit.until == 3.0  # for twice as long
    circuit.looked(True, 3.0)
    assert circuit.admits
    assert circuit.sent()
    assert not circuit.admits
    circuit.tried()
    assert circuit.admits
    circuit.failed(3.0)
    assert (circuit.state, circuit.until) == ("open", 7.0)
    circuit.looked(True, 7.0)
    circuit.answered()
    assert circuit.admits
    circuit.failed(8.0)  # one is enough, until an answer came to its end
    assert circuit.state == "open"
    circuit.looked(True, 20.0)
    circuit.answered()
    circuit.succeeded()
    circuit.failed(21.0)
    assert circuit.state == "closed"


def test_old_streams_keep_nobody_from_trying():
    replica, other = Replica("a"), Replica("b", tier=1)
    router = Router([replica, other])
    old = router.route(chain(1), 0.0)
    old.first_token()
    for _ in range(3):
        router.route(chain(2), 0.0).failed(0.0)
    replica.circuit.looked(True, 1.0)
    trial = router.route(chain(3), 1.0)
    assert trial.replica is replica
    assert router.route(chain(3), 1.0).replica is other
    old.ended()
    assert router.route(chain(3), 1.0).replica is other
    trial.left()
    router.route(chain(3), 1.0).first_token()
    assert replica.circuit.state == "closed"


def test_one_that_is_tried_is_asked_by_all_where_there_is_nobody_else():
    replica, other = Replica("a"), Replica("b")
    router = Router([replica, other])
    for _ in range(3):
        replica.circuit.failed(0.0)
    replica.circuit.looked(True, 1.0)
    router.route(chain(1), 1.0, without=[other])
    assert router.route(chain(1), 1.0).replica is other
    assert router.route(chain(1), 1.0, without=[other]).replica is replica  # the other one has just died
    other.draining = True
    assert router.route(chain(1), 1.0).replica is replica


def test_a_limit_halves_once_for_what_came_together_and_grows_where_it_is_reached():
    limit = Limit(64)
    for at in (0.0, 0.1, 0.2):
        limit.refused(running=31, now=at)
    assert limit.value == 16
    limit.ended_well(running=3)
    assert limit.value == 16
    for _ in range(17):
        limit.ended_well(running=16)
    assert limit.value == 17
    for at in range(1, 20):
        limit.refused(running=0, now=float(at))
    assert limit.value == 1
    for _ in range(5000):
        limit.ended_well(running=64)
    assert limit.value == 64


# ---- choosing ----------------------------------------------------------------------------------------


def fleet(count: int = 4, **settings) -> Router:
    return Router([Replica(f"r{n}", **settings) for n in range(count)])


def serve(router: Router, asked: Chain, now: float = 0.0) -> Replica:
    ticket = router.route(asked, now)
    ticket.first_token()
    ticket.ended()
    return ticket.replica


def test_requests_go_where_their_documents_are():
    router = fleet()
    homes = {number: serve(router, chain(number)) for number in range(40)}
    assert len(set(homes.values())) == 4
    for number, home in homes.items():
        assert serve(router, chain(number, 99, question=b"other")) is home


def test_gateways_that_know_nothing_of_each_other_agree():
    one, other = fleet(), fleet()
    assert [serve(one, chain(n)).name for n in range(40)] == [serve(other, chain(n)).name for n in range(40)]


def test_who_waits_too_long_at_home_goes_elsewhere():
    router = fleet()
    home = serve(router, chain(1))
    tickets = [router.route(chain(1, question=b"%d" % n), 0.0) for n in range(100)]
    assert tickets[0].replica is home
    loads = Counter(ticket.replica.name for ticket in tickets)
    assert len(loads) == 4
    assert max(loads.values()) < 2 * min(loads.values())


def test_the_longer_the_queues_the_longer_documents_are_waited_for():
    router = fleet()
    home = serve(router, chain(1, 2, 3))
    for unread, stays in ((0.0, False), (20_000.0, True)):
        for replica in router.replicas:
            replica.unread = unread + 5000.0 * (replica is home)
        ticket = router.route(chain(1, 2, 3, question=b"another"), 0.0)
        ticket.left()
        assert (ticket.replica is home) == stays


def test_a_weight_is_what_a_replica_bears():
    router = Router([Replica("small"), Replica("large", weight=3.0)])
    tickets = [router.route(chain(n), 0.0) for n in range(200)]
    assert Counter(ticket.replica.name for ticket in tickets)["large"] == pytest.approx(150, abs=15)


@pytest.mark.parametrize("by", ["affinity", "least_loaded", "round_robin"])
def test_every_way_keeps_to_tiers_shares_drains_and_limits(by):
    first = [Replica("a"), Replica("b"), Replica("leaving", draining=True)]
    spare, canary = Replica("spare", tier=1), Replica("canary", share=0.2)
    router = Router([*first, spare, canary], by)
    counts = Counter(serve(router, chain(n)).name for n in range(1000))
    assert counts["canary"] == pytest.approx(200, abs=40)
    assert counts["leaving"] == counts["spare"] == 0
    assert {serve(router, chain(5)).name == "canary" for _ in range(10)} in ({True}, {False})
    canary.draining = True
    held = []
    for replica in first[:2]:
        replica.limit = Limit(3)
    held = [router.route(chain(n), 0.0) for n in range(6)]
    assert Counter(ticket.replica.name for ticket in held) == {"a": 3, "b": 3}
    assert serve(router, chain(1)) is spare
    spare.draining = True
    with pytest.raises(Overloaded):
        router.route(chain(1), 0.0)
    held[0].left()
    assert serve(router, chain(1)) is held[0].replica


def test_a_canary_stands_in_for_others_only_where_nobody_else_can_be_asked():
    usual, canary, spare = Replica("usual"), Replica("canary", share=0.2), Replica("spare", tier=1)
    router = Router([usual, canary, spare])
    usual.draining = True
    counts = Counter(serve(router, chain(n)).name for n in range(1000))
    assert counts == {"canary": pytest.approx(200, abs=40), "spare": pytest.approx(800, abs=40)}
    spare.draining = True
    assert {serve(router, chain(n)).name for n in range(100)} == {"canary"}


def test_least_loaded_and_round_robin():
    router = Router([Replica("a"), Replica("b", weight=2.0)], "least_loaded")
    assert Counter(router.route(chain(1), 0.0).replica.name for _ in range(30)) == {"a": 10, "b": 20}
    router = Router([Replica("a"), Replica("b")], "round_robin")
    assert Counter(router.route(chain(1), 0.0).replica.name for _ in range(30)) == {"a": 15, "b": 15}


def test_who_said_when_to_come_again_is_left_alone_until_then():
    router = fleet(2)
    ticket = router.route(chain(1), 0.0)
    ticket.refused(0.0, retry_after=5.0)
    other = router.route(chain(1), 1.0, without=[ticket.replica])
    other.refused(1.0, retry_after=9.0)
    with pytest.raises(Overloaded) as raised:
        router.route(chain(1), 2.0)
    assert raised.value.retry_after_seconds == pytest.approx(3.0)
    assert router.route(chain(1), 5.0).replica is ticket.replica


def test_with_all_circuits_open_nobody_is_asked():
    router = fleet(2)
    for _ in range(6):
        router.route(chain(1), 0.0).failed(0.0)
    with pytest.raises(Unavailable, match="none of 2 replicas"):
        router.route(chain(1), 0.0)
