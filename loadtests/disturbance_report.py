"""What `loadtests.disturbance` has measured, as a table and a picture."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loadtests import curve, report

TOLD = 16  # tokens of an answer


class Measured(NamedTuple):
    kl: float
    same: float
    nll_rise: float | None
    recomputed: float  # of the tokens of all documents but the first


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, lower, upper) of a 95 % interval by bootstrap over cases."""
    rng = np.random.default_rng(0)
    means = rng.choice(np.array(values), (4000, len(values))).mean(1)
    return float(np.mean(values)), *(float(x) for x in np.quantile(means, (0.025, 0.975)))


def summary(of: str, name: str, found: list[Measured]) -> dict:
    rises = [each.nll_rise for each in found if each.nll_rise is not None]
    return {
        "set": of,
        "arm": name,
        "prompts": len(found),
        "recomputed": statistics.fmean(each.recomputed for each in found),
        "kl": interval([each.kl for each in found]),
        "same": statistics.fmean(each.same for each in found),
        "nll_rise": interval(rises) if rises else None,
    }


def line(row: dict) -> str:
    rise = "" if row["nll_rise"] is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*row["nll_rise"])
    return (
        "| {set} | {arm} | {prompts} | {recomputed:.0%} | {kl[0]:.4f} ({kl[1]:.4f} to {kl[2]:.4f}) ".format(**row)
        + f"| {row['same']:.2f} | {rise} |"
    )


def write(rows: list[dict], out: Path, beside_others: bool) -> None:
    """`beside_others`: rows of other arms that an earlier run measured over the same prompts stay."""
    where = report.environment()
    command = shlex.join(["python", "-m", "loadtests.disturbance", *sys.argv[1:]])
    commands = [f"`{command}` at commit {where['commit']}"]
    if beside_others:
        before = json.loads((out / "disturbance.json").read_text(encoding="utf-8"))
        new = {(row["set"], row["arm"]) for row in rows}
        old = [row for row in before["rows"] if (row["set"], row["arm"]) not in new]
        rows = [row for of in dict.fromkeys(row["set"] for row in rows) for row in [*old, *rows] if row["set"] == of]
        commands = [*before["commands"], *commands]
    lines = [
        "# What sharing disturbs",
        "",
        f"{', '.join(commands)}: SmolLM2 in float32 against a full prefill in the order of relevance, over {TOLD} "
        "tokens of its answer; in brackets 95 % intervals.  Recomputed: of the documents but the first.",
        "",
        "![KL against tokens computed again](disturbance.svg)",
        "",
        "| prompts | arm | of them | recomputed | KL, nats | same best token | rise of the gold answer's NLL |",
        "|" + "---|" * 7,
        *(line(row) for row in rows),
        "",
    ]
    record = {"commands": commands, "rows": rows, "environment": where}
    (out / "disturbance.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "disturbance.md").write_text("\n".join(lines), encoding="utf-8")
    (out / "disturbance.svg").write_text(curve.picture(rows), encoding="utf-8")
