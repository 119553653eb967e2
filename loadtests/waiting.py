"""Who waits for whom: the real scheduler, block pool and tree under bursts, on a clock of the steps' cost, no model.

    python -m loadtests.waiting          writes loadtests/results/waiting.md and .json

Requests are those of `loadtests.sharing`, each answered with 32 tokens.  Steps take what SmolLM2's take on two cores,
so seconds are of that machine, and arms differ by their decisions alone.  First come, first served is the same
scheduler that looks at one request at a time.  A request is cold where it found nothing of its documents in the cache.

    bursts    12 at once every 18 s
    crowd     32 at once over the same five documents, none of which anybody asked for before, ranked differently
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
from pathlib import Path

from inference.engine.cost import StepCost
from inference.engine.ordering import Parts
from kernels import BLOCK_SIZE
from loadtests import report
from loadtests.sharing import HEAD, LENGTHS, QUESTION, Library, topics
from loadtests.world import World, percentile

COST = StepCost(fixed=0.025, per_token=0.0012, per_pair=2e-7)
ANSWER = 32
BURST, PERIOD = 12, 18.0
CROWD = 32
CACHE = 48_000
PLAIN, FCFS, OURS = "as ranked, LRU, first come, first served", "planned, first come, first served", "planned, in bands"
ARMS = {PLAIN: {"order": "relevance", "eviction": "lru", "look_ahead": 1}, FCFS: {"look_ahead": 1}, OURS: {}}


def world(**policy) -> World:
    return World(1 + CACHE // BLOCK_SIZE, COST, **policy)


def bursts(seed: int, count: int) -> list[tuple[float, Parts]]:
    library, rng = Library(seed, {}), random.Random(f"waiting/{seed}")
    head, found = list(range(HEAD)), []
    for i, ranked in enumerate(topics(rng, count)):
        documents = tuple(library[number] for number in dict.fromkeys(ranked))
        question = [50_000 + (i * QUESTION + j) % 400_000 for j in range(QUESTION)]
        found.append((i // BURST * PERIOD, Parts(head, documents, question)))
    return found


def crowd(seed: int) -> list[tuple[float, Parts]]:
    library, rng = Library(seed, {}), random.Random(f"crowd/{seed}")
    found = []
    for i in range(CROWD):
        ranked = [library[number] for number in rng.sample(range(5), 5)]
        found.append(
            (0.0, Parts(list(range(HEAD)), tuple(ranked), [50_000 + i * QUESTION + j for j in range(QUESTION)]))
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.waiting", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rows, crowds = [], []
    for arm, policy in ARMS.items():
        for seed in range(options.seeds):
            seen = world(**policy).serve(bursts(seed, options.requests), ANSWER)[options.requests // 10 :]
            for kind, some in (
                ("all", seen),
                ("hit", [s for s in seen if s.cached]),
                ("cold", [s for s in seen if not s.cached]),
            ):
                rows.append(
                    {"arm": arm, "seed": seed, "kind": kind, "requests": len(some)}
                    | {f"waited p{p}": percentile([s.waited for s in some], p) for p in (50, 99)}
                    | {f"first p{p}": percentile([s.first for s in some], p) for p in (50, 95, 99)}
                )
    for seed in range(options.seeds):
        desk, arrivals = world(), crowd(seed)
        desk.serve(arrivals, ANSWER)
        once = sum(len(d.tokens) for d in arrivals[0][1].documents)
        own = HEAD + CROWD * (QUESTION + ANSWER - 1)
        crowds.append((desk.core.counters.computed_tokens - own) / once)
    where = report.environment()
    command = shlex.join(["python", "-m", "loadtests.waiting", *sys.argv[1:]])
    names = [name for name in rows[0] if " p" in name]
    lines = [
        "# Who waits for whom",
        "",
        f"`{command}`: {options.seeds} seeds of {options.requests} requests, {BURST} at once every {PERIOD:.0f} s, "
        f"five documents of {LENGTHS[0]} to {LENGTHS[1]} tokens, a cache of {CACHE} tokens; a clock "
        f"of the steps' cost, no model; commit {where['commit']}.  Seconds, the mean of the seeds.",
        "",
        "| | requests | share | " + " | ".join(names) + " |",
        "|" + "---|" * (3 + len(names)),
    ]
    for arm in ARMS:
        for kind in ("all", "hit", "cold"):
            some = [row for row in rows if (row["arm"], row["kind"]) == (arm, kind)]
            total = sum(row["requests"] for row in rows if (row["arm"], row["kind"]) == (arm, "all"))
            share = sum(row["requests"] for row in some) / total
            cells = [f"{statistics.fmean(row[name] for row in some):.2f}" for name in names]
            lines.append(f"| {arm} | {kind} | {share:.0%} | " + " | ".join(cells) + " |")
    cold, first = {}, {}  # of each arm, by seed
    for row in rows:
        if row["kind"] == "cold":
            cold.setdefault(row["arm"], []).append(row["waited p99"])
        elif row["kind"] == "all":
            first.setdefault(row["arm"], []).append(row["first p50"])
    fcfs, ours = statistics.fmean(cold[FCFS]), statistics.fmean(cold[OURS])
    ratios = [a / b for a, b in zip(first[OURS], first[PLAIN], strict=True)]
    lines += [
        "",
        f"A cold request's p99 wait is {ours / fcfs:.2f} times what first come, first served gives it.",
        "",
        f"The first token's p50 is {min(ratios):.2f} to {max(ratios):.2f} times that of documents as ranked over LRU.",
        "",
        f"A crowd of {CROWD} over the same five new documents computes {min(crowds):.2f} to {max(crowds):.2f} times "
        "the documents' tokens of one request, all included that it computes beside its questions and answers.",
        "",
    ]
    record = {"command": command, "rows": rows, "crowds": crowds, "environment": where}
    (options.out / "waiting.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.out / "waiting.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
