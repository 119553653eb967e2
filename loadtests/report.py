"""What a load run measured, as numbers, as JSON and as a Markdown table."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PERCENTILES = (50, 90, 95, 99)
PACKAGES = ("refdesk", "locust", "torch", "litestar", "uvicorn", "faiss-cpu")
_ROOT = Path(__file__).parent.parent


def summarise(times_ms: Sequence[float]) -> dict[str, float]:
    """Count, percentiles and maximum in milliseconds; percentiles are the nearest measured value above."""
    ordered = sorted(times_ms)
    ranks = {p: ordered[min(len(ordered) - 1, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES}
    return {
        "count": len(ordered),
        "mean_ms": round(statistics.fmean(ordered), 1),
        **{f"p{p}_ms": round(value, 1) for p, value in ranks.items()},
        "max_ms": round(ordered[-1], 1),
    }


def environment() -> dict[str, Any]:
    """Where this was measured: versions, commit, machine.  No names of people, hosts or folders."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "commit": commit(), "machine": machine()}


def write(folder: Path, name: str, lines: Sequence[str], record: Mapping[str, Any]) -> None:
    """`name`.md of these lines, and `name`.json of the record with where it was measured."""
    (folder / f"{name}.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    text = json.dumps({**record, "environment": environment()}, indent=1)
    text = re.sub(r"\[[-+.\deE,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # a row of them is a line
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def commit() -> str:
    """The short hash of what is checked out, `+changes` where files differ from it; "unknown" outside a clone."""
    try:
        head, changes = (
            subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changes else "")


def machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_model(), "cores": cores, "ram_gib": _ram_gib(), "system": platform.system()}


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _ram_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def write_load(out: Path, record: Mapping[str, Any]) -> None:
    """`load.json` and `load.md` in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "load.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (out / "load.md").write_text(markdown(record), encoding="utf-8")


def markdown(record: Mapping[str, Any]) -> str:
    where, shape, tokens = record["environment"], record["shape"], record["tokens"]
    computer = where["machine"]
    columns = ("count", "mean_ms", *(f"p{p}_ms" for p in PERCENTILES), "max_ms")
    titles = ("count", "mean", *(f"p{p}" for p in PERCENTILES), "max")
    lines = [
        "# Load",
        "",
        f"`{record['command']}`: {shape['seconds']:g} s, {shape['users']} users, and {shape['burst_users']} more for "
        f"{shape['burst_seconds']:g} s in every {shape['every_seconds']:g} s. Backend: {record['backend']}.",
        "",
        "Milliseconds from sending the question.",
        "",
        "| milestone | " + " | ".join(titles) + " |",
        "|---|" + "---:|" * len(titles),
        *(
            f"| {name} | " + " | ".join(f"{row[column]:g}" for column in columns) + " |"
            for name, row in record["milestones"].items()
        ),
        "",
        f"Failures: {record['failed']}. Prompt tokens: {tokens.get('prompt_tokens', 0)}, of them cached: "
        f"{tokens.get('cached_tokens', 0)}. Tokens generated: {tokens.get('completion_tokens', 0)}.",
        "",
        *(f"- {count} × {what}" for what, count in record["failures"].items()),
        *([""] if record["failures"] else []),
        f"Measured on {computer['cores']} cores ({computer['cpu']}), {computer['ram_gib']} GiB, {computer['system']}; "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        + f"; commit {where['commit']}.",
        "",
    ]
    return "\n".join(lines)
