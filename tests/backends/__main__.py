"""Installs and starts each server, and runs both suites against it.  Exit code 1 if anything failed, anywhere."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from types import ModuleType
from typing import Any

from loadtests.run import RunError
from tests.backends import home, llamacpp, triton, vllm

SERVERS: dict[str, ModuleType] = {"vllm": vllm, "triton": triton, "llamacpp": llamacpp}
SUITES = "tests/inference/test_real_servers.py"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.backends", description=__doc__.partition("\n")[0])
    parser.add_argument("servers", nargs="*", metavar="server", help=f"some of {', '.join(SERVERS)}; else all")
    chosen = parser.parse_args().servers or list(SERVERS)
    if unknown := set(chosen) - SERVERS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SERVERS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the server that runs is stopped, too
    home.HOME.mkdir(exist_ok=True)
    results = [_try(name, SERVERS[name]) for name in chosen]
    print()
    for line, _ in results:
        print(line)
    return 0 if all(passed for _, passed in results) else 1


def _try(name: str, server: ModuleType) -> tuple[str, bool]:
    """What came of it, and whether it's good."""
    try:
        server.install()
        print(f"{name}: starting {server.version()}, its output is in {server.venv.log}", flush=True)
        with server.served() as settings:
            return _suites(name, server.version(), settings)
    except (home.NotInstalled, RunError) as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return f"{name}: NOT RUN: {str(error).splitlines()[0]}", False


def _suites(name: str, version: str, settings: list[dict[str, Any]]) -> tuple[str, bool]:
    print(f"{name}: running {SUITES}", flush=True)
    report = home.HOME / f"{name}.xml"
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", SUITES, "-rs", f"--junitxml={report}"],
        env=os.environ | {"REFDESK_TEST_BACKENDS": json.dumps(settings)},
        cwd=home.HOME.parent,
    )
    if not report.exists():
        return f"{name}: NOT RUN: pytest ended with {done.returncode}", False
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = Counter(skip.get("message", "") for case in cases for skip in case.iter("skipped"))
    failed = sum(1 for case in cases if case.find("failure") is not None or case.find("error") is not None)
    passed = len(cases) - failed - skipped.total()
    line = f"{name}: {version}: {passed} passed, {failed} failed, {skipped.total()} skipped"
    for reason, times in skipped.items():
        line += f"\n    {times} skipped: {reason}"
    return line, done.returncode == 0 and passed > 0


if __name__ == "__main__":
    sys.exit(main())
