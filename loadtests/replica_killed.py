"""A replica is killed under load: what becomes of the requests that it had.

    python -m loadtests.replica_killed --kills 10

Two of our engines behind one gateway, and users who ask again as soon as they are answered.  Every few seconds one of
the two is killed with SIGKILL, then started again on the same port.  Each request is in one of three states when its
replica dies: its first token hasn't come (another replica must answer it, and nobody notices), it is being answered
(its stream ends with an error: what was said can't be taken back), or it is over.  Writes replica_killed.md and .json;
exit code 1 when a request was lost before its first token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

from loadtests import rag, report
from loadtests.replicas import gateway, workload
from loadtests.run import RESULTS, RunError, Started, free_port, started

USERS = 12
SETTINGS = {
    "REFDESK_BACKEND__KIND": "engine",
    "REFDESK_BACKEND__THREADS": "1",
    "REFDESK_BACKEND__KV_CACHE_MB": "512",
    "REFDESK_RETRIEVAL__THREADS": "1",
}


class Engine:
    """A server that is started again after each death."""

    def __init__(self) -> None:
        self.port = free_port()
        self._folder = tempfile.TemporaryDirectory()
        self._running = contextlib.ExitStack()
        self.server: Started | None = None

    def start(self) -> str:
        self.server = self._running.enter_context(started(Path(self._folder.name), self.port, "serve", SETTINGS))
        return self.server.url

    def kill(self) -> None:
        assert self.server is not None
        self.server.process.kill()
        self.server.process.wait()
        self._running.close()

    def close(self) -> None:
        self._running.close()
        self._folder.cleanup()


async def load(url: str, kills: int, engines: list[Engine], seed: int) -> tuple[list[rag.Seen], list[dict]]:
    """(every request, of each kill how many it met without and with a first token)."""
    requests = iter(workload("topics", 5000, 1, seed))
    seen: list[rag.Seen] = []
    open_now: set[int] = set()
    over = asyncio.Event()
    rng = random.Random(seed)

    async def user(client: httpx.AsyncClient) -> None:
        while not over.is_set():
            mine = rag.Seen()
            seen.append(mine)
            open_now.add(id(mine))
            await rag.ask(client, url, "smollm2", next(requests), mine)
            open_now.discard(id(mine))

    told = []
    async with httpx.AsyncClient(timeout=httpx.Timeout(300, connect=10)) as client:
        users = [asyncio.create_task(user(client)) for _ in range(USERS)]
        for number in range(kills):
            await asyncio.sleep(rng.uniform(3.0, 6.0))
            engine = engines[number % 2]
            before = await _numbers(client, url)
            unread = sum(id(s) in open_now and s.first is None for s in seen)
            streaming = sum(id(s) in open_now and s.first is not None for s in seen)
            at = time.perf_counter()
            await asyncio.to_thread(engine.kill)
            await asyncio.to_thread(engine.start)
            away = time.perf_counter() - at
            while not await _serves(client, url, engine.port):  # noqa: ASYNC110  it is another process
                await asyncio.sleep(0.1)
            after = await _numbers(client, url)
            told.append(
                {
                    "unread": unread,
                    "streaming": streaming,
                    "away_s": round(away, 1),
                    "back_s": round(time.perf_counter() - at - away, 1),
                    "elsewhere": after["retries"] - before["retries"],
                }
            )
            print(told[-1], flush=True)
        over.set()
        await asyncio.gather(*users)
    return seen, told


async def _numbers(client: httpx.AsyncClient, url: str) -> dict[str, float]:
    lines = (await client.get(f"{url}/metrics")).text.splitlines()
    return {
        name: float(line.split()[-1])
        for line in lines
        for name in ("retries", "refused")
        if line.startswith(f"refdesk_backend_fleet_{name}_total")
    }


async def _serves(client: httpx.AsyncClient, url: str, port: int) -> bool:
    """Whether the gateway sends requests to the replica at `port` again."""
    lines = (await client.get(f"{url}/metrics")).text.splitlines()
    mine = [line for line in lines if f":{port}" in line]
    circuit = next(float(line.split()[-1]) for line in mine if line.startswith("refdesk_backend_replica_open"))
    running = next(float(line.split()[-1]) for line in mine if line.startswith("refdesk_backend_replica_running"))
    return not circuit and running > 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.replica_killed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    try:
        with contextlib.ExitStack() as running:
            engines = [Engine(), Engine()]
            for engine in engines:
                running.callback(engine.close)
            urls = [engine.start() for engine in engines]
            url = running.enter_context(gateway(urls, "generic", "smollm2", "affinity", "relevance"))
            seen, kills = asyncio.run(load(url, options.kills, engines, options.seed))
    except RunError as error:
        print(f"replica killed: {error}", file=sys.stderr)
        return 2
    lost = [s for s in seen if s.error and s.first is None]
    broken = [s for s in seen if s.error and s.first is not None]
    command = shlex.join(["python", "-m", "loadtests.replica_killed", "--kills", str(options.kills)])
    lines = [
        "# A replica killed under load",
        "",
        f"`{command}`: two of our engines behind one gateway, {USERS} users, {len(kills)} times SIGKILL to one.",
        "",
        "| what | count |",
        "|---|---:|",
        f"| requests | {len(seen)} |",
        f"| open at a kill, at either replica, before their first token | {sum(k['unread'] for k in kills)} |",
        f"| · and after it | {sum(k['streaming'] for k in kills)} |",
        f"| asked of the other replica, their own having died | {sum(k['elsewhere'] for k in kills):g} |",
        f"| **lost before their first token** (wanted: 0) | {len(lost)} |",
        f"| ended with an error after it | {len(broken)} |",
        "",
        f"A replica that was back got requests again after {statistics.median(k['back_s'] for k in kills):.1f} s "
        f"(at most {max(k['back_s'] for k in kills):.1f}).",
        *(f"- lost: {s.error}" for s in lost[:10]),
    ]
    record = {"command": command, "kills": kills, "requests": len(seen), "lost": len(lost), "broken": len(broken)}
    report.write(options.out, "replica_killed", lines, record)
    print("\n".join(lines))
    return 1 if lost or not sum(k["elsewhere"] for k in kills) else 0


if __name__ == "__main__":
    sys.exit(main())
