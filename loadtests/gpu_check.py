"""Everything that only a GPU can say, in one command: do the kernels compute the same there, how far are they from what
bandwidth and arithmetic allow, and how fast is the engine with an 8B and a 1B model of random weights.

    make gpu-check                          meant to take under eight minutes; writes loadtests/results/gpu
    python -m loadtests.gpu_check --rehearse    tiny shapes on the CPU in Triton's interpreter: does the command work?

Needs torch with CUDA, triton, transformers, numpy, msgspec, and pytest for the first part; no network, no web packages.
A part that fails is named, the others go on; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TESTS = ("tests/kernels/gpu", "tests/inference/test_on_gpu.py")
NEEDED = ("torch", "triton", "transformers", "numpy", "msgspec")
KINDS = {  # name: (quantization, FP8 cache)
    "bf16": ("none", False),
    "FP8 cache": ("none", True),
    "FP8": ("fp8", True),  # weights and cache
    "int4": ("w4a16", False),
    "MXFP4": ("mxfp4", False),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; nothing is written")
    parser.add_argument("--out", type=Path, default=ROOT / "loadtests/results/gpu")
    parser.add_argument("--skip-tests", action="store_true", help="only measure")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of the engine")
    options = parser.parse_args()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"gpu-check: {', '.join(missing)} not installed for {sys.executable}: pip install {' '.join(missing)}")
        return 2
    if options.rehearse:
        os.environ["KERNELS_TRITON"] = "interpret"  # before anything imports the kernels
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no GPU here; --rehearse tries the command without one")
        return 2
    found: dict[str, Any] = {"failed": []}
    parts: list[tuple[str, Callable[[], Any]]] = []
    if not options.rehearse and not options.skip_tests:
        parts.append(("tests", run_tests))
    parts.append(("kernels", lambda: run_kernels(options.rehearse)))
    sizes = ["tiny"] if options.rehearse else ["8B", "1B"]
    for size in sizes:
        for kind in options.kinds if size != "1B" else {"bf16", "FP8"} & set(options.kinds):
            parts.append((f"{size} {kind}", lambda size=size, kind=kind: run_engine(size, kind, options.rehearse)))
    for name, part in parts:
        started = time.perf_counter()
        try:
            found[name] = part()
        except Exception:  # the other parts are worth having all the same
            traceback.print_exc()
            found["failed"].append({"part": name, "error": traceback.format_exc()[-2000:]})
        print(f"[{time.perf_counter() - started:6.1f} s] {name}", flush=True)
        if not options.rehearse:
            write(found, options.out)
    print("\n".join(tables(found)))
    return 1 if found["failed"] else 0


def run_tests() -> dict[str, Any]:
    several = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []  # compilers' time
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *several, *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-3000:])
    if done.returncode:
        raise AssertionError(done.stdout[-3000:] + done.stderr[-1000:])
    return {"said": next(line for line in reversed(done.stdout.splitlines()) if " passed" in line)}


def run_kernels(rehearse: bool) -> list[dict[str, Any]]:
    from loadtests import gpu_kernels

    sizes = gpu_kernels.TINY if rehearse else gpu_kernels.Sizes()
    rows = []
    for row in gpu_kernels.measure(sizes, "cpu" if rehearse else "cuda"):
        rows.append(row._asdict())
    return rows


def run_engine(size: str, kind: str, rehearse: bool) -> dict[str, Any]:
    import torch

    from loadtests import gpu_engine

    quantization, small_cache = KINDS[kind]
    setup = gpu_engine.TINY if rehearse else gpu_engine.Setup()
    kv_dtype = torch.float8_e4m3fn if small_cache else None
    try:
        traces = rehearse or (size, kind) == ("8B", "bf16")
        return gpu_engine.measure(size, kind, quantization, kv_dtype, setup, "cpu" if rehearse else "cuda", traces)
    finally:
        gpu_engine.drop()


def write(found: dict[str, Any], out: Path) -> None:
    import torch
    import triton

    from loadtests import report

    device = {"name": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    record = {**found, "device": device, "environment": report.environment()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    head = [
        "# The engine and its kernels on a GPU",
        "",
        f"`python -m loadtests.gpu_check`: {device['name']}, torch {device['torch']}, triton {device['triton']}, "
        f"commit {record['environment']['commit']}.",
        "",
    ]
    (out / "gpu.md").write_text("\n".join(head + tables(found)) + "\n", encoding="utf-8")


def tables(found: dict[str, Any]) -> list[str]:
    lines = [f"**Failed: {each['part']}**" for each in found["failed"]]
    if "tests" in found:
        lines += [f"Tests on the device: {found['tests']['said']}", ""]
    if "kernels" in found:
        lines += ["## Kernels", "", "| what | µs | floor µs | share of the floor | beside |", "|---|---|---|---|---|"]
        for row in found["kernels"]:
            floor = row["floor"]
            least = f"{1e3 * floor:.1f} | {floor / row['milliseconds']:.0%}" if floor and row["milliseconds"] else "|"
            beside = ", ".join(f"{name} {1e3 * ms:.1f}" for name, ms in (row["beside"] or {}).items())
            lines.append(f"| {row['what']} | {1e3 * row['milliseconds']:.1f} | {least} | {beside} |")
        lines.append("")
    engines = [value for value in found.values() if isinstance(value, dict) and "decode" in value]
    if engines:
        batches = list(engines[0]["decode"])
        lines += ["## Between tokens, ms (host's work in it; and in turn with the GPU's), by streams", ""]
        lines += ["| model | " + " | ".join(batches) + " | prefill tokens/s |", "|---" * (len(batches) + 2) + "|"]
        for each in engines:
            cells = [
                "{itl ms:.2f} ({host ms:.2f}; {itl in turn ms:.2f})".format_map(each["decode"][b]) for b in batches
            ]
            name = f"{each['model']} {each['kind']}"
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {each['prefill tokens/s']:.0f} |")
        lines += ["", "## A spiky trace", ""]
        spiky = [
            (f"{each['model']} {each['kind']}, {name}", each[name])
            for each in engines
            for name in ("spiky", "spiky, shared documents")
            if name in each
        ]
        if spiky:
            keys = list(spiky[0][1])
            lines += ["| run | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
            lines += [f"| {name} | " + " | ".join(f"{run[key]:.3g}" for key in keys) + " |" for name, run in spiky]
    return lines


if __name__ == "__main__":
    sys.exit(main())
