"""The first token's wait, over a model that costs nothing: who is asked, whose turn it is, what is told."""

from __future__ import annotations

from loadtests import first_token
from loadtests.first_token import ALONE, ARMS, BURST, BURSTS, PLAIN, Switched
from loadtests.waiting import COST


def test_all_arms_serve_the_same_requests(monkeypatch):
    monkeypatch.setattr(first_token, "FILL", 60)
    model = Switched(None)
    model.__dict__["_model"] = model._free  # "on" costs nothing either
    model._free.config = type("Config", (), {"vocab_size": 50_000})
    for load, asked in (("alone", ALONE), ("bursts", BURST * BURSTS)):
        seen = first_token.run("topics", 0, model, object(), COST, 30, load)
        assert {arm: len(some) for arm, some in seen.items()} == dict.fromkeys(ARMS, asked)
        assert all(0 <= each.waited <= each.first for some in seen.values() for each in some)


def test_the_table_compares_each_seed_with_documents_as_ranked():
    rows = [
        {"trace": "topics", "load": "alone", "seed": seed, "arm": arm, "first": first, "cold": first[:1]}
        for seed in (0, 1)
        for arm, first in ((PLAIN, [2.0, 4.0, 4.0]), ("planned", [1.0, 2.0 + seed, 3.0]))
    ]
    *_, planned, _ = first_token.table(rows)
    assert "0.62 (0.50 to 0.75)" in planned
    assert "33%" in planned
