"""Killed at any moment: what was said to be safe is there, what was not is there whole or not at all.  `make soak`
kills 300 times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.retrieval.kills import kill

pytestmark = pytest.mark.slow


def test_what_was_acknowledged_survives_kills(tmp_path: Path):
    kills = kill(tmp_path / "data", cycles=20, seed=6)
    assert kills.acknowledged > 100
    assert kills.lost == []


def test_what_is_said_to_be_safe_too_early_is_found_to_be_lost(tmp_path: Path):
    assert kill(tmp_path / "data", cycles=5, seed=6, hasty=True).lost
