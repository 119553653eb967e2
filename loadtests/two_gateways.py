"""Two servers over one PostgreSQL database: is what one writes seen by the other at once, and what do requests take?

    python -m loadtests.two_gateways --seconds 60

Starts a PostgreSQL server with pgvector and two servers of refdesk (with the real embedding model, and answers by a
script, since the model that writes them is not what is measured).  At each, some search, some ask, and writers upload a
document to one of them, look for it at the other as soon as it is acknowledged, replace it at the other, look at the
first, remove it at one, and look at both.  Writes two_gateways.md and .json; exit code 1 when a request failed or
anything seen was older than what had been acknowledged.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shlex
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from loadtests import report
from loadtests.postgres_server import NoServer, serving
from loadtests.run import RESULTS, RunError, served

SEARCHERS, ASKERS, WRITERS = 2, 1, 2  # at each server
QUESTIONS = (
    "How many days of leave do I get?",
    "When is the library open?",
    "Who may use the meeting rooms?",
    "What does the canteen serve?",
    "How do I book a train?",
)
_names = itertools.count()


class Seen:
    """What the clients saw: milliseconds by kind of request, failures, and what was older than it should be."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self.failures: Counter[str] = Counter()
        self.looks: Counter[str] = Counter()
        self.stale: Counter[str] = Counter()
        self._lock = threading.Lock()

    def asked(self, kind: str, expected: int, send: Callable[[], httpx.Response]) -> Any:
        """The reply's JSON; None where it failed."""
        began = time.perf_counter()
        try:
            response = send()
        except httpx.HTTPError as error:
            with self._lock:
                self.failures[f"{kind}: {type(error).__name__}"] += 1
            return None
        with self._lock:
            self.times[kind].append((time.perf_counter() - began) * 1000)
            if response.status_code != expected:
                self.failures[f"{kind}: status {response.status_code}"] += 1
                return None
        return response.json() if response.content else {}

    def looked(self, what: str, as_it_should: bool) -> None:
        with self._lock:
            self.looks[what] += 1
            self.stale[what] += not as_it_should


def search(seen: Seen, http: httpx.Client, query: str) -> list[str]:
    """The documents of the passages that are found."""
    found = seen.asked("search", 200, lambda: http.post("/v1/search", json={"query": query, "top_k": 5}))
    return [passage["document_id"] for passage in found["passages"]] if found else []


def searcher(seen: Seen, https: list[httpx.Client], rng: random.Random) -> None:
    search(seen, https[0], rng.choice(QUESTIONS))


def asker(seen: Seen, https: list[httpx.Client], rng: random.Random) -> None:
    body = {"question": rng.choice(QUESTIONS), "max_tokens": 16}
    seen.asked("answer", 200, lambda: https[0].post("/v1/answers", json=body))


def writer(seen: Seen, https: list[httpx.Client], rng: random.Random) -> None:
    """A document's life, at its own server and the other one."""
    here, there = https
    name = f"zq{next(_names):05}x"
    query = f"when does the {name} gate close"

    def upload(http: httpx.Client, hour: int) -> Any:
        file = {"file": (f"{name}.md", f"# Gates\n\nThe {name} gate closes at {hour} each day.".encode())}
        return seen.asked("upload", 201, lambda: http.post("/v1/documents", files=file))

    if (document := upload(here, 7)) is None:
        return
    document_id = document["document_id"]
    seen.looked("added", document_id in search(seen, there, query))
    if upload(there, 8) is not None:
        text = seen.asked("document", 200, lambda: here.get(f"/v1/documents/{document_id}"))
        seen.looked("replaced", text is not None and "at 8 each" in text["text"])
    removing = rng.choice(https)
    if seen.asked("remove", 204, lambda: removing.delete(f"/v1/documents/{document_id}")) is not None:
        for http in https:
            gone = seen.asked("document", 404, lambda http=http: http.get(f"/v1/documents/{document_id}"))
            seen.looked("removed", gone is not None and document_id not in search(seen, http, query))


def traffic(urls: list[str], seconds: float) -> Seen:
    seen, threads = Seen(), []
    until = time.monotonic() + seconds

    def repeat(client: Callable[..., None], order: list[str], seed: int) -> None:
        rng = random.Random(seed)
        with ExitStack() as opened:
            https = [opened.enter_context(httpx.Client(base_url=url, timeout=30)) for url in order]
            while time.monotonic() < until:
                client(seen, https, rng)

    for order in (urls, urls[::-1]):
        for client, count in ((searcher, SEARCHERS), (asker, ASKERS), (writer, WRITERS)):
            for _ in range(count):
                threads.append(threading.Thread(target=repeat, args=(client, order, len(threads))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.two_gateways", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for two_gateways.md and .json")
    options = parser.parse_args()
    try:
        with ExitStack() as running:
            database = running.enter_context(serving(settings="")).new_place()
            settings = {
                "REFDESK_RETRIEVAL__DATABASE": database,
                "REFDESK_RETRIEVAL__THREADS": "1",
                "REFDESK_BACKEND__KIND": "scripted",
                "REFDESK_BACKEND__LENGTH": "16",
            }
            urls = []
            for how in ("demo", "serve"):  # the first one puts the samples in
                folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
                urls.append(running.enter_context(served(folder, None, how, settings)))
            seen = traffic(urls, options.seconds)
    except (RunError, NoServer) as error:
        print(f"two gateways: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "loadtests.two_gateways", "--seconds", f"{options.seconds:g}"])
    milestones = {kind: report.summarise(times) for kind, times in sorted(seen.times.items())}
    clients = f"{2 * SEARCHERS} search, {2 * ASKERS} ask, {2 * WRITERS} write"
    lines = [
        "# Two servers over one PostgreSQL database",
        "",
        f"`{command}`: {clients}, all at once and without a pause. Milliseconds.",
        "",
        "| request | count | p50 | p95 | max |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {kind} | {row['count']} | {row['p50_ms']:g} | {row['p95_ms']:g} | {row['max_ms']:g} |"
            for kind, row in milestones.items()
        ),
        "",
        "| written at one, looked at at once at the other | looks | older than acknowledged |",
        "|---|---:|---:|",
        *(f"| {what} | {count} | {seen.stale[what]} |" for what, count in sorted(seen.looks.items())),
        "",
        f"Failures: {seen.failures.total()}.",
        *(f"- {count} × {what}" for what, count in seen.failures.items()),
    ]
    record = {
        "command": command,
        "requests": milestones,
        "looks": dict(seen.looks),
        "stale": dict(seen.stale),
        "failures": dict(seen.failures),
    }
    report.write(options.out, "two_gateways", lines, record)
    print("\n".join(lines))
    return 1 if seen.failures or seen.stale.total() or not seen.looks else 0


if __name__ == "__main__":
    sys.exit(main())
