"""A load test in one command: start a server, let users ask for a minute, write down what they saw.

    python -m loadtests.run --seconds 60                      against a server that it starts and stops
    python -m loadtests.run --url http://127.0.0.1:8080       against one that runs

Settings of the server come from the environment, as for `refdesk serve` (`REFDESK_BACKEND__KIND=scripted` leaves
the model out).  Writes load.md and load.json; exit code 1 when any answer failed or none arrived, 2 when the
server did not start.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from loadtests import report
from loadtests.shapes import Spikes

RESULTS = Path(__file__).parent / "results"
LOCUSTFILE = Path(__file__).with_name("locustfile.py")
START_SECONDS = 240
STOP_SECONDS = 30
FINISH_SECONDS = 90  # for answers that run when the time is over
ANSWER = "answer"


class RunError(Exception):
    """The run could not be made; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    spikes = Spikes(
        seconds=options.seconds,
        users=options.users,
        burst_users=options.burst_users,
        every_seconds=options.every_seconds,
        burst_seconds=options.burst_seconds,
    )
    try:
        with contextlib.ExitStack() as stack:
            url = (options.url or stack.enter_context(served(options.data, options.port))).rstrip("/")
            seen = ask_for_a_while(url, spikes)
    except RunError as error:
        print(f"load: {error}", file=sys.stderr)
        return 2
    record = {
        "command": shlex.join(["python", "-m", "loadtests.run", *_told(options)]),
        "backend": "as the server at --url has it"
        if options.url
        else os.environ.get("REFDESK_BACKEND__KIND", "engine"),
        "shape": asdict(spikes),
        "milestones": {name: report.summarise(seen["times_ms"][name]) for name in _in_order(seen["times_ms"])},
        "failed": sum(seen["failures"].values()),
        "failures": seen["failures"],
        "tokens": seen["tokens"],
        "environment": report.environment(),
    }
    report.write_load(options.out, record)
    print(report.markdown(record))
    if record["failed"]:
        print(f"load: {record['failed']} answers failed", file=sys.stderr)
        return 1
    if ANSWER not in record["milestones"]:
        print("load: not one answer arrived", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def served(
    data: Path | None, port: int | None, how: str = "demo", settings: Mapping[str, str] = MappingProxyType({})
) -> Iterator[str]:
    """The address of `started`.  Raises RunError, too, if the server stopped by itself."""
    with started(data, port, how, settings) as server:
        yield server.url
        server.must_run()


class Started(NamedTuple):
    """A server that was started: where it is, and its process."""

    url: str
    process: subprocess.Popen[bytes]
    output: Any

    def must_run(self) -> None:
        if self.process.poll() is not None:
            code = self.process.returncode
            raise RunError(f"the server stopped during the run (exit code {code}):\n{_tail(self.output)}")


@contextlib.contextmanager
def started(
    data: Path | None, port: int | None, how: str = "demo", settings: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Started]:
    """A server of our own while the block runs, `demo` (the sample corpus goes in if the store is empty) or `serve`,
    with these `settings` by name of their variable.

    Raises RunError, with the end of the server's output, if it does not become ready."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "gateway.cli", how, "--host", "127.0.0.1", "--port", str(port)]
    if data is not None:
        command += ["--data", str(data)]
    with tempfile.TemporaryFile() as output:
        print(f"load: starting {shlex.join(['refdesk', *command[3:]])}", flush=True)
        server = subprocess.Popen(
            command, env=os.environ | settings, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            _wait_until_ready(url, server, output)
            yield Started(url, server, output)
        finally:
            stop(server)


def ask_for_a_while(url: str, spikes: Spikes) -> dict:
    """Run Locust in a process of its own (it patches the standard library) and read what it recorded."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seen.json"
        given = {f"LOAD_{name.upper()}": str(value) for name, value in asdict(spikes).items()}
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url]
        command += ["--headless", "--only-summary", "--skip-log", "--stop-timeout", str(FINISH_SECONDS)]
        try:
            subprocess.run(
                command,
                env={**os.environ, **given, "LOAD_OUT": str(out)},
                cwd=LOCUSTFILE.parent.parent,
                stdout=subprocess.DEVNULL,
                timeout=spikes.seconds + FINISH_SECONDS + 60,
                check=False,  # its exit code says that some failed: so do the failures
            )
        except subprocess.TimeoutExpired:
            raise RunError("Locust did not come to an end") from None
        if not out.exists():
            raise RunError("Locust did not run: is it installed? pip install 'refdesk[load]'")
        return json.loads(out.read_text(encoding="utf-8"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.run", description=__doc__.partition("\n")[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="a running server; without it one is started")
    where.add_argument("--serve", action="store_true", help="start a server and stop it at the end (the default)")
    parser.add_argument("--data", type=Path, help="data directory of the server that is started")
    parser.add_argument("--port", type=int, help="port of the server that is started; a free one by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for load.md and load.json")
    shape = Spikes()
    parser.add_argument("--seconds", type=float, default=shape.seconds)
    parser.add_argument("--users", type=int, default=shape.users, help="users all the time")
    parser.add_argument("--burst-users", type=int, default=shape.burst_users, help="users more in a burst")
    parser.add_argument("--every-seconds", type=float, default=shape.every_seconds, help="from burst to burst")
    parser.add_argument("--burst-seconds", type=float, default=shape.burst_seconds, help="length of a burst")
    return parser


def _told(options: argparse.Namespace) -> list[str]:
    """The options that differ from the defaults, without those that name places on this machine."""
    defaults = vars(_parser().parse_args([]))
    told = []
    for name, value in vars(options).items():
        if name not in ("data", "port", "out", "url", "serve") and value != defaults[name]:
            told += [f"--{name.replace('_', '-')}", f"{value:g}"]
    return told


def _in_order(times_ms: dict[str, list[float]]) -> list[str]:
    order = ("first source", "first token", "last token", ANSWER)
    return sorted(times_ms, key=lambda name: (order.index(name) if name in order else len(order), name))


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], output) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RunError(f"the server did not start (exit code {server.returncode}):\n{_tail(output)}")
        try:
            with urllib.request.urlopen(url + "/health/ready", timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise RunError(f"the server was not ready within {START_SECONDS} s:\n{_tail(output)}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL for one that does not go."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _tail(output, lines: int = 20) -> str:
    output.seek(0)
    return "\n".join(output.read().decode("utf-8", "replace").splitlines()[-lines:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
