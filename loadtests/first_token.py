"""How long the first token takes, with the model itself: traces of `loadtests.sharing`, one process, one model load.

    python -m loadtests.first_token               a quarter of an hour; writes first_token.md and .json
    python -m loadtests.first_token --seeds 1     a look, written nowhere

Every arm has the same blocks.  They are filled by 2,000 requests of bookkeeping alone, which leaves the cache as it
would be but for its numbers, and then SmolLM2 serves the next ones on a clock that its steps move; arms take turns, in
an order that turns as well.  Requests are of five documents, 1,000 tokens of prompt, and come

    alone     16 one after the other, answered with one token
    bursts    twice 12 at once, answered with 32 tokens, as often as 0.85 of what a machine that caches nothing
              can bear

over Zipf's topics, and over documents that next to nobody else asks for ("alien").  A request is cold where nothing of
its documents was in the cache when it came.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
from pathlib import Path

import torch

from inference.engine.calibrate import measure_step_cost
from inference.engine.cost import StepCost
from inference.engine.ordering import Parts
from inference.engine.segments import Reusing, looked_at
from inference.models import Llama, open_checkpoint
from inference.placement import choose_dtype, cores
from kernels import BLOCK_SIZE
from loadtests import report
from loadtests.free import Free
from loadtests.sharing import HEAD, LEAD, QUESTION, SHARE, TRACES, Library
from loadtests.world import Seen, World, percentile

CACHE = 48_000  # tokens
FILL = 2000  # requests
BURST, BURSTS, ANSWER, BUSY = 12, 2, 32, 0.85
ALONE = 16
PLAIN = "as ranked, LRU, first come, first served"
ARMS = {
    PLAIN: {"order": "relevance", "eviction": "lru", "look_ahead": 1},
    "planned": {"order": "planned"},
    "best first": {"order": "best_first"},
    "segments, as ranked": {"order": "relevance"},
}
LOADS = ("alone", "bursts")


class Switched:
    """A model that costs nothing until it is switched on."""

    def __init__(self, model: Llama):
        self._model = model
        self._free = Free()
        self.on = False

    def forward(self, tokens, plan, cache, wanted):
        if not self.on:
            return self._free.forward(tokens, plan, cache, wanted)
        return self._model.forward(tokens % self._model.config.vocab_size, plan, cache, wanted)

    def look(self, tokens, plan, cache, layers):
        if not self.on:
            return self._free.look(tokens, plan, cache, layers)
        return self._model.look(tokens % self._model.config.vocab_size, plan, cache, layers)

    def copy(self, *args) -> None:
        if self.on:
            self._model.copy(*args)

    def splice(self, *args) -> None:
        if self.on:
            self._model.splice(*args)


def prompts(trace: str, seed: int, count: int) -> list[Parts]:
    library, rng = Library(seed, {}), random.Random(f"{trace}/{seed}")
    found = []
    for i, ranked in enumerate(TRACES[trace](rng, count)):
        question = [50_000 + (i * QUESTION + j) % 400_000 for j in range(QUESTION)]
        found.append(Parts(list(range(HEAD)), tuple(library[n] for n in dict.fromkeys(ranked)), question))
    return found


def run(trace: str, seed: int, model: Switched, cache, cost: StepCost, layers: int, load: str) -> dict[str, list[Seen]]:
    """What those who ask each arm see."""
    all_at_once, rounds = (BURST, BURSTS) if load == "bursts" else (1, ALONE)
    asked = prompts(trace, seed, FILL + all_at_once * rounds)
    worlds = {}
    model.on = False
    for arm, how in ARMS.items():
        reuse = Reusing(SHARE, looked_at(layers), LEAD) if arm.startswith("segments") else None
        worlds[arm] = World(1 + CACHE // BLOCK_SIZE, cost, model, cache, reuse=reuse, **how)
        for parts in asked[:FILL]:
            worlds[arm].serve([(1.0, parts)], 1)
    model.on = True
    mean = statistics.fmean(len(parts.tokens(parts.ranks)) for parts in asked)
    work = BURST * cost.chunk(0, round(mean)) + ANSWER * (cost.fixed + BURST * cost.per_token)
    together = 1 if load == "alone" else BURSTS  # bursts may meet; single requests don't
    seen: dict[str, list[Seen]] = {arm: [] for arm in ARMS}
    arms = list(ARMS)
    for i in range(0, rounds, together):
        for arm in arms[(seed + i) % len(arms) :] + arms[: (seed + i) % len(arms)]:
            start = FILL + i * all_at_once
            arrivals = [
                (j // all_at_once * work / BUSY, parts)
                for j, parts in enumerate(asked[start : start + together * all_at_once])
            ]
            worlds[arm].measured = True
            seen[arm] += worlds[arm].serve(arrivals, ANSWER if load == "bursts" else 1)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.first_token",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, help="of each trace (3)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(cores())
    whole = Llama(open_checkpoint("smollm2"), choose_dtype("auto"))
    blocks = 1 + CACHE // BLOCK_SIZE
    cache = whole.new_cache(blocks)
    for layer in cache:
        layer.keys.zero_()
        layer.values.zero_()
    cost = measure_step_cost(whole, cache, blocks, BLOCK_SIZE, whole.config.max_context_tokens)
    model = Switched(whole)
    rows = []
    for trace in ("topics", "alien"):
        for load in LOADS:
            for seed in range(options.seeds or 3):
                seen = run(trace, seed, model, cache, cost, len(whole.layers), load)
                for arm, all_seen in seen.items():
                    row = {"trace": trace, "load": load, "seed": seed, "arm": arm, "first": [s.first for s in all_seen]}
                    rows.append(row | {"cold": [s.first for s in all_seen if not s.cached]})
                    print(trace, load, seed, arm, f"{percentile(row['first'], 50):.2f} s", file=sys.stderr, flush=True)
    lines = table(rows)
    print("\n".join(lines))
    if options.seeds is None:
        where = report.environment()
        command = shlex.join(["python", "-m", "loadtests.first_token", *sys.argv[1:]])
        lines[2:2] = [f"`{command}`: 3 seeds, a cache of {CACHE} tokens; commit {where['commit']}.  Seconds.", ""]
        record = {"command": command, "rows": rows, "environment": where}
        (options.out / "first_token.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (options.out / "first_token.md").write_text("\n".join(lines), encoding="utf-8")


def table(rows: list[dict]) -> list[str]:
    lines = [
        "# The first token's wait, with the model",
        "",
        "| trace | load | arm | p50 of all seeds | over as ranked with LRU, by seed | p95 | the longest | cold "
        "| p50 of cold | of hits |",
        "|" + "---|" * 10,
    ]
    for trace, load, arm in dict.fromkeys((row["trace"], row["load"], row["arm"]) for row in rows):
        mine = [row for row in rows if (row["trace"], row["load"], row["arm"]) == (trace, load, arm)]
        plain = [row for row in rows if (row["trace"], row["load"], row["arm"]) == (trace, load, PLAIN)]
        first = [value for row in mine for value in row["first"]]
        cold = [value for row in mine for value in row["cold"]]
        hits = list(first)
        for value in cold:
            hits.remove(value)
        over = [percentile(a["first"], 50) / percentile(b["first"], 50) for a, b in zip(mine, plain, strict=True)]
        cells = [
            f"{trace} | {load} | {arm} | {percentile(first, 50):.2f}",
            f"{statistics.median(over):.2f} ({min(over):.2f} to {max(over):.2f})",
            f"{percentile(first, 95):.2f} | {max(first):.2f}",
            f"{len(cold) / len(first):.0%} | {percentile(cold, 50):.2f} | {percentile(hits, 50):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
