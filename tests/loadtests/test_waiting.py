"""The clock of steps, and who is told to have waited."""

from __future__ import annotations

from loadtests import waiting


def test_a_crowd_is_served_once_and_all_are_told():
    world, arrivals = waiting.world(), waiting.crowd(0)[:8]
    seen = world.serve(arrivals, waiting.ANSWER)
    assert len(seen) == 8
    assert all(0 <= each.waited < each.first <= world.now for each in seen)
    assert sum(each.cached == 0 for each in seen) == 1
    again = waiting.world()
    assert again.serve(arrivals, waiting.ANSWER) == seen
    assert again.now == world.now


def test_bursts_come_when_they_should():
    at = [at for at, _ in waiting.bursts(0, 2 * waiting.BURST)]
    assert at == [0.0] * waiting.BURST + [waiting.PERIOD] * waiting.BURST
