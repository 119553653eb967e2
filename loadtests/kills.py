"""Is what was acknowledged there after kills and after losses of power?

    python -m loadtests.kills --cycles 300

Kills the writer of a growing library that many times, and replays a writer's run up to each of its writes as it may be
on the disk when power is lost there (`tests/retrieval/kills.py`, `power_loss.py`, which `make test` runs with fewer).
Writes kills.md and kills.json; exit code 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shlex
import sqlite3
import sys
import tempfile
from pathlib import Path

import faiss

from loadtests import report
from loadtests.run import RESULTS
from tests.retrieval.kills import kill
from tests.retrieval.power_loss import COMPILER, record
from tests.retrieval.worlds import examine


def lose_power(folder: Path, seed: int) -> tuple[int, list[str]]:
    """(folders that may be left, what is lost in any of them), at each moment of a run, with three chances each."""
    watched = folder / "watched"
    watched.mkdir()
    log = record([sys.executable, "-m", "tests.retrieval.keeper", str(watched), str(seed), "none"], watched, folder)
    states, lost = 0, []
    for found in examine(log, watched, folder / "left", random.Random(seed)):
        states += 1
        lost += found
        if states % 200 == 0:
            print(f"{states} folders after a loss of power, {len(lost)} lost", flush=True)
    return states, lost


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if COMPILER is None:
        parser.error("power is lost in a folder that a small C library watches: install a compiler named cc")
    faiss.omp_set_num_threads(1)
    logging.getLogger("retrieval").setLevel(logging.ERROR)  # indexes that are built again are the rule here
    where = report.environment()
    where["versions"]["sqlite"] = sqlite3.sqlite_version
    with tempfile.TemporaryDirectory() as folder:
        kills = kill(
            Path(folder) / "data",
            options.cycles,
            options.seed,
            tell=lambda kills: print(
                f"{kills.cycles} kills, {kills.acknowledged} acknowledged, {len(kills.lost)} lost"
            ),
        )
        states, lost = lose_power(Path(folder), options.seed)
    command = shlex.join(["python", "-m", "loadtests.kills", *sys.argv[1:]])
    machine = where["machine"]
    lines = [
        "# What is left after kills and losses of power",
        "",
        f"`{command}`",
        "",
        f"Killed while it writes: {kills.cycles} cycles, {kills.acknowledged} documents acknowledged, "
        f"{len(kills.lost)} lost.",
        "",
        f"Power lost at any write: {states} folders as a disk may hold them, {len(lost)} with a loss.",
        "",
        *(f"- {what}" for what in [*kills.lost, *lost][:20]),
        *([""] if kills.lost or lost else []),
        f"On {machine['cores']} cores ({machine['cpu']}), {machine['system']}; "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        + f"; commit {where['commit']}.",
        "",
    ]
    found = {
        "command": command,
        "kills": {"cycles": kills.cycles, "acknowledged": kills.acknowledged, "lost": kills.lost},
        "power": {"folders": states, "lost": lost},
        "environment": where,
    }
    (options.out / "kills.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "kills.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    return 1 if kills.lost or lost else 0


if __name__ == "__main__":
    sys.exit(main())
