"""Our engine beside its peers: the same requests, the same weights, this machine, one after the other.

    python -m loadtests.peers --models FOLDER --openvino PYTHON --vllm VLLM --repeats 3

FOLDER is made by `python -m loadtests.peer_models FOLDER`.  PYTHON is one that has `openvino-genai`, VLLM the `vllm`
command of an installation for the CPU; a peer that is not given is left out.  In each repeat every contender is
started, runs the closed and the spiky workload (loadtests.rag) from a cold cache, and is stopped, so that what slows
the machine for a while slows all of them.  Writes peers.md and peers.json: medians, the spread, and ratios to ours.
With --documents ours is given documents instead of a prompt, and its orders and reuse are contenders:
peers_documents.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from loadtests import rag, report
from loadtests.peer_servers import vllm_served
from loadtests.run import RESULTS, RunError, served

SCENARIOS = {"closed": False, "spiky": True}
FIGURES = {  # name in the summary: title, unit, is more better
    "requests_per_s": ("requests/s", True),
    "ttft_p50": ("first token p50, s", False),
    "ttft_p95": ("first token p95, s", False),
    "tpot_p50": ("time per token p50, s", False),
    "itl_p99": ("gap between tokens p99, s", False),
    "cached_share": ("prompt from cache", True),
}
LEAD = 3  # passages

Runner = Callable[[str, int], dict[str, dict[str, float]]]


def ours(documents: str | None = None, reuse: str = "prefix") -> Runner:
    """A whole server over HTTP: the gateway, retrieval's embedder, and the engine.  It is given the `documents`, to be
    put in this order, or else the prompt; for "segments" also a lead, some passages as they stand in prompts."""

    def run(order: str, salt: int) -> dict[str, dict[str, float]]:
        settings = {"REFDESK_BACKEND__KIND": "engine", "REFDESK_BACKEND__DOCUMENT_REUSE": reuse}
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as server:
            if reuse == "segments":
                lead = Path(folder, "lead.txt")
                lead.write_text("".join(f"{rag.marked(n, text)}\n\n" for n, text in enumerate(rag.corpus()[:LEAD])))
                settings["REFDESK_BACKEND__DOCUMENT_LEAD"] = str(lead)
            url = server.enter_context(served(Path(folder, "data"), None, "serve", settings))
            return _over_http(url, "smollm2", order, salt, documents)

    return run


def openvino(python: str, model: Path) -> Runner:
    def run(order: str, salt: int) -> dict[str, dict[str, float]]:
        found = {}
        for name, spiky in SCENARIOS.items():
            command = [python, "-m", "loadtests.peer_openvino", str(model), "--order", order, "--salt", str(salt)]
            done = subprocess.run([*command, *(["--spiky"] if spiky else [])], capture_output=True, text=True)
            if done.returncode:
                raise RunError(f"OpenVINO GenAI failed:\n{done.stderr[-2000:]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run


def vllm(command: str, model: Path, preload: list[Path]) -> Runner:
    def run(order: str, salt: int) -> dict[str, dict[str, float]]:
        with vllm_served(command, model, preload) as url:
            return _over_http(url, str(model), order, salt)

    return run


def _over_http(
    url: str, model: str, order: str, salt: int, documents: str | None = None
) -> dict[str, dict[str, float]]:
    found = {}
    for n, (name, spiky) in enumerate(SCENARIOS.items()):
        warm, requests = rag.plan(spiky, order, salt + n)
        asyncio.run(rag.drive(url, model, warm, False, documents))
        found[name] = rag.summarise(asyncio.run(rag.drive(url, model, requests, spiky, documents)))
    return found


def main() -> int:
    options = _options()
    contenders: dict[str, Runner] = {"refdesk": ours()}
    if options.documents:
        contenders = {
            "refdesk": ours("planned"),
            "refdesk, segments": ours("relevance", "segments"),
            "refdesk, planned, segments": ours("planned", "segments"),
        }
    versions: dict[str, str] = {}
    if options.openvino:
        asked = "import importlib.metadata as m; print(m.version('openvino-genai'))"
        versions["OpenVINO GenAI"] = _version([options.openvino, "-c", asked])
        contenders["OpenVINO GenAI"] = openvino(options.openvino, options.models / "f16.gguf")
    if options.vllm:
        versions["vLLM"] = _version([options.vllm, "--version"])
        contenders["vLLM"] = vllm(options.vllm, options.models / "hf", options.preload)
    runs: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in contenders}
    environment = report.environment()
    for repeat in range(options.repeats):
        for name, run in contenders.items():
            try:
                runs[name].append(run(options.order, 100 * (repeat + 1)))
            except RunError as error:
                print(f"peers: {error}", file=sys.stderr)
                return 2
            print(name, json.dumps(runs[name][-1]), flush=True)
        record = {  # after each repeat: what was measured is not lost to what comes
            "command": shlex.join(["python", "-m", "loadtests.peers", *_told(options)]),
            "order": options.order,
            "peers": versions,
            "runs": runs,
            "environment": environment,
        }
        options.out.mkdir(parents=True, exist_ok=True)
        name = "peers_documents" if options.documents else "peers"
        (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (options.out / f"{name}.md").write_text(markdown(record), encoding="utf-8")
    print(markdown(record))
    return 0


def _version(command: list[str]) -> str:
    """The last line that the command prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="folder with hf/ and f16.gguf")
    parser.add_argument("--openvino", help="a Python that has openvino-genai")
    parser.add_argument("--vllm", help="the vllm command")
    parser.add_argument(
        "--preload", type=Path, action="append", default=[], help="a library for vLLM: tcmalloc, libiomp5"
    )
    parser.add_argument("--order", choices=rag.ORDERS, default="ranked")
    parser.add_argument(
        "--documents", action="store_true", help="ours composes and orders: planned, by segments, and both"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _told(options: argparse.Namespace) -> list[str]:
    peers = [word for name in ("openvino", "vllm") if getattr(options, name) for word in (f"--{name}", "…")]
    peers += [word for path in options.preload for word in ("--preload", path.name)]
    peers += ["--documents"] * options.documents
    return ["--models", "…", *peers, "--order", options.order, "--repeats", str(options.repeats)]


def markdown(record: dict) -> str:
    runs, where = record["runs"], record["environment"]
    computer = where["machine"]
    lines = [
        "# The engine and its peers on one RAG workload",
        "",
        f"`{record['command']}`: SmolLM2-135M-Instruct, order of passages {record['order']}, medians of "
        f"{min(len(found) for found in runs.values())} repeats (least – most) and "
        "how many times a peer's figure ours is. OpenVINO GenAI runs in its client's process, the others answer "
        "over HTTP.",
        "",
    ]
    for scenario in SCENARIOS:
        lines += [f"## {scenario}", "", "| | " + " | ".join(t for t, _ in FIGURES.values()) + " | failed |"]
        lines += ["|---|" + "---|" * (len(FIGURES) + 1)]
        for name, found in runs.items():
            cells = [_spread([run[scenario][figure] for run in found]) for figure in FIGURES]
            if name != "refdesk":
                cells = [
                    f"{cell}; ours {_ratio(runs['refdesk'], found, scenario, f)}"
                    for cell, f in zip(cells, FIGURES, strict=True)
                ]
            failed = sum(run[scenario]["failed"] for run in found)
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {failed} |")
        lines.append("")
    lines += [
        f"Measured on {computer['cores']} cores ({computer['cpu']}), {computer['ram_gib']} GiB; "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        + "; peers: "
        + ", ".join(f"{name} {version}" for name, version in record["peers"].items())
        + f"; commit {where['commit']}.",
        "",
    ]
    return "\n".join(lines)


def _ratio(ours: list[dict], theirs: list[dict], scenario: str, figure: str) -> str:
    """Median of the ratios within each repeat."""
    pairs = [(a[scenario][figure], b[scenario][figure]) for a, b in zip(ours, theirs, strict=False)]
    ratios = [a / b for a, b in pairs if b]
    return f"{statistics.median(ratios):.2f}×" if ratios else "–"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} – {max(values):.3g})"


if __name__ == "__main__":
    sys.exit(main())
