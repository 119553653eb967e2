"""Which replica is asked: the router over simulated fleets, on the traces of Azure's services of 2023.

    python -m loadtests.routing                 every case and arm; writes loadtests/results/routing.md and .json
    python -m loadtests.routing --quick         a tenth of each trace, one seed; nothing is written
    python -m loadtests.routing --measure       what steps take here, and nothing else

Arrivals and the tokens of prompts and answers are the trace's, an hour of it.  What is asked is not in the trace: each
request is about one of 80 topics, drawn by Zipf's law, and holds documents of its topic, ranked anew (as
`simulated_fleet` says).  Each replica is the real engine, with its scheduler and cache, over a model that costs
nothing, on a clock of measured step costs.  Caches are empty in the beginning.  The arms of a case differ in who is
asked, in nothing else:

    round robin     each in turn
    least loaded    where the fewest requests run
    hashed          where rendezvous hashing puts the first document, whatever the load
    affinity        the router's own rule (inference/routing/router.py)

Other fleets than of 16 replicas get the trace thinned or laid over itself, so that each has as much to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from inference.engine import calibrate
from inference.engine.blocks import extend_names
from inference.engine.cost import StepCost
from inference.models import Llama, open_checkpoint
from inference.placement import choose_dtype, cores
from inference.prompt import DocumentOrder
from inference.routing.path import Chain, Name
from inference.routing.record import Record
from inference.routing.router import Replica, Router
from kernels import BLOCK_SIZE
from loadtests import report
from loadtests.simulated_fleet import (
    CPU,
    TRACES,
    Fleet,
    Hashed,
    Request,
    arrivals,
    gpu,
    pieces,
    prompt,
    read_trace,
)
from loadtests.world import percentile

RESULTS = Path(__file__).parent / "results"
USUAL = 16  # replicas that a trace is for
GPU_SPEED = 32  # times as fast a trace is played to GPUs, which would be idle


class Case(NamedTuple):
    """`part`: of the trace; `cache`: times as much as usual; `changes`: a replica dies after a third of the time, and
    another joins after two; `blind`: the routers don't know how much a cache holds."""

    name: str
    trace: str = "code"
    order: DocumentOrder = "planned"
    replicas: int = USUAL
    gateways: int = 1
    seeds: int = 3
    part: float = 1.0
    cache: int = 1
    on_gpu: bool = False
    changes: bool = False
    blind: bool = False
    arms: tuple[str, ...] = ("round robin", "affinity")


ALL = ("round robin", "least loaded", "hashed", "affinity")
BAR = Case("code, 16 replicas, planned", arms=ALL)
CASES = (
    BAR,
    Case("code, 16 replicas, as ranked", order="relevance", arms=("round robin", "hashed", "affinity")),
    Case("conv, 16 replicas, planned, a quarter of the hour", trace="conv", part=1 / 4, arms=ALL),
    Case("4 gateways that share nothing, a third of the hour", gateways=4, part=1 / 3),
    Case("the size of caches unknown, a third of the hour", blind=True, part=1 / 3),
    Case("caches four times as large, a third of the hour", cache=4, part=1 / 3),
    Case("a replica dies, another joins", changes=True),
    Case("4 replicas", replicas=4),
    Case("64 replicas, a quarter of the hour", replicas=64, part=1 / 4, seeds=1),
    Case("256 replicas, a sixteenth of the hour", replicas=256, part=1 / 16, seeds=1),
    Case("8B on GPUs, the hour in two minutes", on_gpu=True),
)


def requests(case: Case) -> list[Request]:
    """The trace as `case` wants it."""
    trace = read_trace(case.trace)
    if case.replicas < USUAL:
        trace = trace[:: USUAL // case.replicas]
    hour = trace[-1].at
    copies = max(1, case.replicas // USUAL)  # each begins at another time of the hour, and goes on at its beginning
    trace = [r._replace(at=(r.at + hour * copy / copies) % hour) for copy in range(copies) for r in trace]
    speed = GPU_SPEED if case.on_gpu else 1
    return [r._replace(at=r.at / speed) for r in sorted(trace) if r.at <= hour * case.part]


def router_by(by: str, order: DocumentOrder) -> Router:
    if by == "hashed":
        return Hashed(order=order)
    return Router(by=by.replace(" ", "_"), order=order)  # type: ignore[arg-type]


def run(case: Case, by: str, seed: int) -> dict[str, Any]:
    """What one arm of a case sees."""
    asked = arrivals(requests(case), seed)
    machine = gpu() if case.on_gpu else CPU
    assert machine is not None
    machine = machine._replace(cache_tokens=case.cache * machine.cache_tokens)
    fleet = Fleet([router_by(by, case.order) for _ in range(case.gateways)], machine, seed, not case.blind)
    for number in range(case.replicas):
        fleet.join(f"replica {number}")
    thirds = [asked[-1].at * third / 3 for third in (1, 2)]
    if case.changes:
        fleet.at(thirds[0], lambda: fleet.die("replica 0"))
        fleet.at(thirds[1], lambda: fleet.join(f"replica {case.replicas}"))
    served = fleet.run(asked)
    servers = fleet.servers.values()
    busy = [server.busy_seconds / fleet.now for server in servers]
    whole = [each for each in served if not each.cut]
    first = [each.first for each in served if not math.isnan(each.first)]
    periods = [[each for each in whole if sum(each.at >= third for third in thirds) == i] for i in range(3)]
    return {
        "requests": len(served),
        "cut": len(served) - len(whole),
        "tried again": sum(each.tries > 1 for each in served),
        "prompt tokens": sum(each.prompt_tokens for each in whole),
        "cached tokens": sum(each.cached_tokens for each in whole),
        "cached by thirds": [
            sum(each.cached_tokens for each in period) / max(1, sum(each.prompt_tokens for each in period))
            for period in periods
        ],
        "computed tokens": sum(server.core.counters.computed_tokens for server in servers),
        "replica seconds": sum(server.busy_seconds for server in servers),
        "first p50": percentile(first, 50),
        "first p95": percentile(first, 95),
        "first p99": percentile(first, 99),
        "utilisation": sum(busy) / case.replicas,
        "busiest": max(busy),
        "idlest": min(busy),
        "route us p50": 1e6 * percentile(fleet.routing_seconds, 50),
        "route us p99": 1e6 * percentile(fleet.routing_seconds, 99),
    }


def bound(case: Case, seed: int) -> dict[str, float]:
    """The share of prompt tokens that would be hits in one cache shared by all, each prompt computed at once: in one
    `without end`, and in one `as large` as all of the replicas' together."""
    asked = arrivals(requests(case), seed)
    replica = Replica("all", record=Everything())
    router, held, cached, total = Router([replica], order=case.order), set(), 0, 0
    for number, arrival in enumerate(asked):
        ticket = router.route(Chain(pieces(number, arrival)), arrival.at)
        ticket.first_token()
        ticket.ended()
        tokens = prompt(number, arrival, ticket.order)
        names: list[bytes] = []
        extend_names(names, b"", tokens, len(tokens), BLOCK_SIZE)
        known = next((at for at, name in enumerate(names) if name not in held), len(names))
        cached += min(known, (len(tokens) - 1) // BLOCK_SIZE) * BLOCK_SIZE
        total += len(tokens)
        held.update(names)
    at_once = CPU._replace(cost=StepCost(fixed=1e-6), cache_tokens=case.replicas * CPU.cache_tokens)
    fleet = Fleet([Router(order=case.order)], at_once)
    fleet.join("all")
    return {"without end": cached / total, "as large": sum(each.cached_tokens for each in fleet.run(asked)) / total}


class Everything(Record):
    """Forgets nothing."""

    def note(self, along: Sequence[tuple[Name, float]]) -> None:
        self._held.update(along)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.routing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.measure:
        print(measured())
        return 0
    if not TRACES.is_dir():
        print(
            f"nothing is measured without the traces: put azure_llm_2023_code.csv and _conv.csv into {TRACES}",
            file=sys.stderr,
        )
        return 0
    cases = [case for case in CASES if gpu() is not None or not case.on_gpu]
    if options.quick:
        cases = [case._replace(part=case.part / 10, seeds=1) for case in cases]
    with ProcessPoolExecutor(cores()) as pool:
        rows, bounds = simulated(cases, pool.map)
    command = shlex.join(["python", "-m", "loadtests.routing", *sys.argv[1:]])
    lines = markdown(command, cases, rows, bounds)
    print("\n".join(lines))
    if not options.quick:
        machines = [machine for machine in (CPU, gpu()) if machine is not None]
        settings = [machine._replace(cost=dataclasses.asdict(machine.cost))._asdict() for machine in machines]
        report.write(
            options.out,
            "routing",
            lines,
            {
                "command": command,
                "cases": [case._asdict() for case in cases],
                "machines": settings,
                "rows": rows,
                "bounds": bounds,
            },
        )
    return 0


def simulated(cases: Sequence[Case], apply: Callable = map) -> tuple[list[dict], list[dict]]:
    """(what each arm of each case sees with each seed; the bounds of the first two cases)."""
    jobs = [(case, arm, seed) for case in cases for arm in case.arms for seed in range(case.seeds)]
    bounded = [(case, seed) for case in cases[:2] for seed in range(case.seeds)]
    bounds = apply(bound, *zip(*bounded, strict=True))
    runs, rows = apply(run, *zip(*jobs, strict=True)), []
    for (case, arm, seed), seen in zip(jobs, runs, strict=True):
        rows.append({"case": case.name, "arm": arm, "seed": seed} | seen)
        print(case.name, arm, seed, f"{seen['first p95']:.1f} s", file=sys.stderr, flush=True)
    return rows, [{"case": c.name, "seed": seed} | of for (c, seed), of in zip(bounded, bounds, strict=True)]


def measured() -> StepCost:
    """What steps of the default model take on this machine, whatever else runs there."""
    torch.set_num_threads(cores())
    calibrate.REPEATS = 50
    model = Llama(open_checkpoint("smollm2"), choose_dtype("auto"))
    blocks, longest = 1 + CPU.cache_tokens // BLOCK_SIZE, model.config.max_context_tokens
    return calibrate.measure_step_cost(model, model.new_cache(blocks), blocks, BLOCK_SIZE, longest)


def markdown(command: str, cases: Sequence[Case], rows: list[dict], bounds: list[dict]) -> list[str]:
    where = report.environment()
    lines = [
        "# Routing over simulated fleets",
        "",
        f"`{command}`: medians of the seeds, in brackets the least and the largest; simulated time, {CPU.name} per "
        f"replica where not said otherwise: a step takes {CPU.cost.fixed * 1e3:.1f} ms, {CPU.cost.per_token * 1e3:.2f} "
        f"ms for each token and {CPU.cost.per_pair * 1e9:.0f} ns for each pair, and a cache holds {CPU.cache_tokens:,} "
        f"tokens; commit {where['commit']}.",
        "",
        "Hit tokens are prompt tokens that a replica read from its cache.  Ratios are over round robin with the same "
        "seed.  Work: what a request keeps a replica busy.  Load: how busy the replicas are, from the first arrival to "
        "the last answer.  The hits are bounded by what "
        "one cache that all share would have, each prompt computed at once: as large as all caches together, and "
        "without end.",
        "",
        "| case | asked is | hit tokens | over round robin | first token p50, s | p95, s | p95 over round robin "
        "| work, s | over round robin | computed tokens | load | busiest and idlest replica | routing p50 (p99), µs |",
        "|" + "---|" * 13,
    ]
    for case in cases:
        plain = [row for row in rows if (row["case"], row["arm"]) == (case.name, "round robin")]
        for arm in case.arms:
            some = [row for row in rows if (row["case"], row["arm"]) == (case.name, arm)]
            cells = [
                case.name,
                arm,
                spread([hits(row) for row in some], ".1%"),
                spread([hits(row) / hits(base) for row, base in zip(some, plain, strict=True)], ".2f"),
                spread([row["first p50"] for row in some], ".1f"),
                spread([row["first p95"] for row in some], ".1f"),
                spread([row["first p95"] / base["first p95"] for row, base in zip(some, plain, strict=True)], ".2f"),
                spread([work(row) for row in some], ".3g"),
                spread([work(row) / work(base) for row, base in zip(some, plain, strict=True)], ".2f"),
                spread([row["computed tokens"] / row["requests"] for row in some], ".0f"),
                spread([row["utilisation"] for row in some], ".0%"),
                f"{max(row['busiest'] for row in some):.0%}, {min(row['idlest'] for row in some):.0%}",
                f"{statistics.median(row['route us p50'] for row in some):.0f} "
                f"({statistics.median(row['route us p99'] for row in some):.0f})",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        for kind in ("as large", "without end"):
            if shares := [each[kind] for each in bounds if each["case"] == case.name]:
                lines.append(f"| {case.name} | (one cache {kind}) | {spread(shares, '.1%')} |" + " |" * 10)
    return [*lines, "", *changes(cases, rows)]


def changes(cases: Sequence[Case], rows: list[dict]) -> list[str]:
    """What a replica's death and another's joining do."""
    lines = ["| hit tokens | first third | second | last | asked again | answers cut off |", "|" + "---|" * 6]
    for case in [case for case in cases if case.changes]:
        for name in (BAR.name, case.name):
            for arm in case.arms:
                some = [row for row in rows if (row["case"], row["arm"]) == (name, arm)]
                thirds = [spread([row["cached by thirds"][i] for row in some], ".1%") for i in range(3)]
                counts = [spread([row[what] for row in some], ".0f") for what in ("tried again", "cut")]
                lines.append(f"| {name}: {arm} | {' | '.join([*thirds, *counts])} |")
    return lines


def hits(row: dict) -> float:
    return row["cached tokens"] / row["prompt tokens"]


def work(row: dict) -> float:
    return row["replica seconds"] / row["requests"]


def spread(values: Sequence[float], how: str) -> str:
    middle = f"{statistics.median(values):{how}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{how}} – {max(values):{how}})"


if __name__ == "__main__":
    sys.exit(main())
