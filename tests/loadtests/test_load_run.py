"""The whole load test, Locust included, against a server that behaves as told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loadtests.fake_desk import Behaviour, desk

pytest.importorskip("requests")
ROOT = Path(__file__).parents[2]

CASES: list[tuple[Behaviour, int, str]] = [
    ("good", 0, ""),
    ("truncated", 1, "truncated: the stream ended without done"),
    ("cut", 1, "truncated"),
    ("error", 1, "error event: bad_upstream"),
    ("broken", 1, "status 500 overloaded"),
    ("refused", 1, ""),
    ("shed", 1, ""),
]


def load(url: str, out: Path) -> subprocess.CompletedProcess[str]:
    knobs = ["--seconds", "2", "--users", "2", "--burst-users", "2", "--every-seconds", "2", "--burst-seconds", "1"]
    command = [sys.executable, "-m", "loadtests.run", "--url", url, "--out", str(out), *knobs]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(("behaviour", "code", "failure"), CASES)
def test_a_run_reports_what_users_saw(behaviour: Behaviour, code: int, failure: str, tmp_path: Path):
    pytest.importorskip("geventhttpclient", reason="the load extra is not installed")
    with desk(behaviour) as (url, asked):
        run = load(url, tmp_path)
    assert run.returncode == code, run.stdout + run.stderr
    record = json.loads((tmp_path / "load.json").read_text())
    assert asked
    assert all(body["stream"] is True and body["question"].endswith(("?", ".")) for body in asked)
    seen = record["milestones"]
    assert record["failed"] == (len(asked) if failure else 0)
    assert all(failure in what for what in record["failures"])
    match behaviour:
        case "good":
            assert {row["count"] for row in seen.values()} == {len(asked)}
            assert list(seen) == ["first source", "first token", "last token", "answer"]
            assert seen["first source"]["p50_ms"] <= seen["last token"]["p50_ms"] <= seen["answer"]["p50_ms"]
            assert record["tokens"]["cached_tokens"] == 3 * len(asked)
        case "refused" | "shed":
            assert [name.partition(" ")[0] for name in seen] == [behaviour]
    assert "| milestone |" in (tmp_path / "load.md").read_text()


@pytest.mark.slow
def test_a_server_that_is_not_there_fails_every_answer(tmp_path: Path):
    pytest.importorskip("geventhttpclient", reason="the load extra is not installed")
    with desk("good") as (url, _):
        pass
    run = load(url, tmp_path)
    assert run.returncode == 1
    assert "no connection" in run.stdout
