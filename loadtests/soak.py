"""Mixed traffic for a long time, with clients that leave at any moment: does memory grow, do all blocks come back?

    python -m loadtests.soak --minutes 30

Eight clients ask for chats and raw completions over shared documents, some long, some with a format or guesses that
fail, and leave two in five streams before their end.  Memory and cache blocks are read from /metrics.  Writes soak.md
and soak.json; exit code 1 when a request failed, a block is missing at the end, or memory grew by more than 1 MB a
minute from the second quarter to the last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from loadtests import rag, report
from loadtests.run import RESULTS, served

CLIENTS = 8
EVERY_SECONDS = 10.0
MOST_GROWTH_MB = 1.0  # a minute
MODEL = "smollm2"


async def client(http: httpx.AsyncClient, number: int, until: float, seen: dict[str, int]) -> None:
    """Ask, read, sometimes leave."""
    rng, texts = random.Random(number), rag.corpus()
    while time.monotonic() < until:
        requests = rag.workload(texts, 1, "ranked", salt=rng.randrange(4), seed=rng.randrange(10_000))
        body: dict[str, Any] = {"model": MODEL, "max_tokens": rng.choice((4, 32, 32, 150)), "stream": True}
        body |= {"temperature": rng.choice((0, 0.7)), "messages": requests[0].messages}
        path = "/v1/chat/completions"
        match rng.randrange(5):
            case 0:
                body["structured_outputs"] = {"regex": "[a-z ]{1,40}"}
            case 1:
                body["n"] = 2
            case 2:
                path, body["prompt"] = "/v1/completions", body.pop("messages")[1]["content"][: rng.randrange(10, 3000)]
        leave_after = rng.randrange(12) if rng.random() < 0.4 else None
        try:
            async with http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    seen[f"status {response.status_code}"] = seen.get(f"status {response.status_code}", 0) + 1
                    continue
                events = 0
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    events += data != line
                    if data.startswith("{") and "error" in (event := json.loads(data)):
                        kind = f"error events ({event['error'].get('code')})"
                        seen[kind] = seen.get(kind, 0) + 1
                    if leave_after is not None and events > leave_after:
                        break
            seen["left" if leave_after is not None and events > leave_after else "whole"] += 1
        except httpx.HTTPError as error:
            name = type(error).__name__
            seen[name] = seen.get(name, 0) + 1


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    text = (await http.get("/metrics")).text
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs if "{" not in name}


async def soak(url: str, minutes: float) -> dict[str, Any]:
    seen = {"whole": 0, "left": 0}
    samples: list[tuple[float, float]] = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        started = time.monotonic()
        until = started + 60 * minutes
        clients = [asyncio.create_task(client(http, n, until, seen)) for n in range(CLIENTS)]
        while time.monotonic() < until:
            await asyncio.sleep(min(EVERY_SECONDS, max(0.0, until - time.monotonic())))
            now = await metrics(http)
            samples.append(((time.monotonic() - started) / 60, now["process_resident_memory_bytes"] / 2**20))
            print(f"{samples[-1][0]:6.1f} min  {samples[-1][1]:8.1f} MB  {seen}", flush=True)
        await asyncio.gather(*clients)
        for _ in range(100):
            end = await metrics(http)
            if not end["refdesk_backend_requests_running"] and not end["refdesk_backend_requests_waiting"]:
                break
            await asyncio.sleep(0.1)
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    apart = statistics.fmean(t for t, _ in late) - statistics.fmean(t for t, _ in early)
    growth = statistics.median(mb for _, mb in late) - statistics.median(mb for _, mb in early)
    return {
        "requests": seen,
        "growth_mb_per_minute": growth / apart if apart else 0.0,
        "blocks_missing": end["refdesk_backend_kv_blocks"] - end["refdesk_backend_kv_free_blocks"],
        "still_running": end["refdesk_backend_requests_running"] + end["refdesk_backend_requests_waiting"],
        "preemptions": end["refdesk_backend_preemptions_total"],
        "samples": samples,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    where = report.environment()
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), None, "serve") as url:
        found = asyncio.run(soak(url, options.minutes))
    command = shlex.join(["python", "-m", "loadtests.soak", *sys.argv[1:]])
    failed = sum(count for name, count in found["requests"].items() if name not in ("whole", "left"))
    good = not failed and not found["blocks_missing"] and not found["still_running"]
    good = good and found["growth_mb_per_minute"] <= MOST_GROWTH_MB
    asked = ", ".join(f"{count} {name}" for name, count in found["requests"].items())
    lines = [
        "# A long time of mixed traffic",
        "",
        f"`{command}`, commit {where['commit']}: {'holds' if good else 'does not hold'}.",
        "",
        f"Streams: {asked}. Preemptions: {found['preemptions']:.0f}.",
        "",
        f"Memory from the second quarter to the last: {found['growth_mb_per_minute']:+.2f} MB a minute (at most "
        f"{MOST_GROWTH_MB:g}); at the end {found['samples'][-1][1]:.0f} MB. Blocks missing at the end: "
        f"{found['blocks_missing']:.0f}, requests still running: {found['still_running']:.0f}.",
        "",
    ]
    record = {"command": command, **found, "environment": where}
    (options.out / "soak.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.out / "soak.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
