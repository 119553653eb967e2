"""The figures that this project promises on two CPU cores, measured through its public door.

    python -m loadtests.bench            start, first token, decode, memory waste, logits
    python -m loadtests.bench --fresh    the same, and a fresh clone from nothing to its first answer

Starts a server of its own over the sample corpus, asks over HTTP, and writes bench.md and bench.json with the
spread of the repeats, versions and commit.  Exit code 1 when a bar does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from loadtests import report
from loadtests.questions import QUESTIONS
from loadtests.run import RESULTS, served

SYSTEM = "You answer questions from the passages that the user gives. Be brief."
REPEATS = 5
ROOT = Path(__file__).parent.parent

# what, unit, bar, whether the bar is the most or the least
BARS = {
    "fresh clone to first answer": ("s", 240.0, "at most"),
    "start with an existing index, until ready": ("s", 15.0, "at most"),
    "answer: first token, nothing cached": ("s", 1.5, "at most"),
    "answer: first token, documents resident": ("s", 0.4, "at most"),
    "chat: first token, 4 passages, nothing cached": ("s", 1.5, "at most"),
    "chat: first token, 4 passages resident": ("s", 0.4, "at most"),
    "decode, one stream": ("tokens/s", 25.0, "at least"),
    "decode, 8 streams together": ("tokens/s", 120.0, "at least"),
    "KV slots allocated but unused, prompts over 400 tokens": ("%", 4.0, "at most"),
    "logits against transformers, fp32, 512 tokens": ("max difference", 1e-3, "at most"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--fresh", action="store_true", help="also time a fresh clone to its first answer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for bench.md and bench.json")
    options = parser.parse_args()
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        with served(data, None):
            pass  # ingest the sample corpus once
        figures["start with an existing index, until ready"] = [_start_seconds(data) for _ in range(3)]
        with served(data, None) as url, httpx.Client(base_url=url, timeout=120) as client:
            figures |= measure(client)
    if options.fresh:
        figures["fresh clone to first answer"] = [fresh_clone_seconds()]
    figures["logits against transformers, fp32, 512 tokens"] = [_logits_difference()]
    return write(options.out, figures, shlex.join(["python", "-m", "loadtests.bench", *sys.argv[1:]]))


def measure(client: httpx.Client) -> dict[str, list[float]]:
    """Everything that a running server shows."""
    model = next(m["id"] for m in client.get("/v1/models").json()["data"] if m["id"] != "refdesk")
    passages = sample_passages(client)
    for _ in range(2):  # warm-up: threads, allocator, first touch of every weight
        next(stream_chat(client, model, [next(passages) for _ in range(4)], "What is this?", 16))
    figures: dict[str, list[float]] = {}

    cold, resident, one = [], [], []
    for i in range(REPEATS):
        four = [next(passages) for _ in range(4)]
        cold.append(first_token(stream_chat(client, model, four, f"What is said about item {i}?", 4)))
        resident.append(first_token(stream_chat(client, model, four, "Which of these is the most important?", 4)))
        one.append(rate(list(stream_chat(client, model, four, "Explain all of it.", 128))))
    figures["chat: first token, 4 passages, nothing cached"] = cold
    figures["chat: first token, 4 passages resident"] = resident
    figures["decode, one stream"] = one

    together, waste = [], []
    for _ in range(3):
        speed, wasted = eight_streams(client, model, [[next(passages) for _ in range(4)] for _ in range(8)])
        together.append(speed)
        waste += wasted
    figures["decode, 8 streams together"] = together
    figures["KV slots allocated but unused, prompts over 400 tokens"] = waste

    cold, resident = [], []
    for question in QUESTIONS[:: max(1, len(QUESTIONS) // (3 * REPEATS))]:
        first = stream_answer(client, question)
        if first["refused"] or first["cached_tokens"] > 100:  # its documents had been asked for before
            continue
        again = stream_answer(client, question.rstrip("?") + ", exactly?")
        cold.append(first["first_token"])
        if again["cached_tokens"] > first["prompt_tokens"] / 2:
            resident.append(again["first_token"])
    figures["answer: first token, nothing cached"] = cold
    figures["answer: first token, documents resident"] = resident
    return figures


def sample_passages(client: httpx.Client) -> Iterator[str]:
    """Passages of about 180 tokens of the sample corpus, each once, so that nothing is cached by chance."""
    listed = client.get("/v1/documents", params={"limit": 100}).json()["documents"]
    for document in listed:
        text = client.get(f"/v1/documents/{document['document_id']}").json()["text"]
        words = text.split()
        for start in range(0, len(words) - 110, 110):
            yield " ".join(words[start : start + 110])


def stream_chat(client: httpx.Client, model: str, passages: list[str], question: str, tokens: int) -> Iterator[float]:
    """Seconds from sending to each token that arrives."""
    user = "\n\n".join([*passages, question])
    body = {
        "model": model,
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    sent = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"bench: {response.status_code} {response.read().decode()[:300]}")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if any(choice["delta"].get("content") for choice in event["choices"]):
                    yield time.perf_counter() - sent


def stream_answer(client: httpx.Client, question: str) -> dict[str, Any]:
    """One question to /v1/answers: seconds to the first token, and what the reply says of itself."""
    seen: dict[str, Any] = {"refused": False, "cached_tokens": 0, "prompt_tokens": 0}
    sent = time.perf_counter()
    with client.stream("POST", "/v1/answers", json={"question": question, "stream": True, "max_tokens": 8}) as response:
        event = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                event = line[7:]
                if event == "delta":
                    seen.setdefault("first_token", time.perf_counter() - sent)
            elif line.startswith("data: ") and event in ("sources", "usage"):
                value = json.loads(line[6:])
                seen["refused"] |= bool(value.get("refused"))
                for name in ("prompt_tokens", "cached_tokens"):
                    seen[name] = (value.get("usage") or {}).get(name) or seen[name]
    return seen


def first_token(times: Iterator[float]) -> float:
    first, *_ = times
    return first


def rate(times: list[float]) -> float:
    return (len(times) - 1) / (times[-1] - times[0])


def eight_streams(client: httpx.Client, model: str, prompts: list[list[str]]) -> tuple[float, list[float]]:
    """Tokens per second of all streams while all of them decode, and the share of slots wasted meanwhile, in %."""
    tokens = 192
    arrived: list[list[float]] = [[] for _ in prompts]
    started = time.perf_counter()

    def run(i: int) -> None:
        offset = time.perf_counter() - started
        arrived[i] = [offset + t for t in stream_chat(client, model, prompts[i], "Explain all of it.", tokens)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    waste = []
    while any(thread.is_alive() for thread in threads):
        gauges = dict(re.findall(r"^(\S*kv_slots_\w+) ([\d.e+]+)$", client.get("/metrics").text, re.M))
        used = next(float(v) for k, v in gauges.items() if k.endswith("used"))
        allocated = next(float(v) for k, v in gauges.items() if k.endswith("allocated"))
        if allocated > 8 * 400:
            waste.append(100 * (1 - used / allocated))
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    begin, end = max(times[0] for times in arrived), min(times[-1] for times in arrived)
    return sum(begin < t <= end for times in arrived for t in times) / (end - begin), waste


def _start_seconds(data: Path) -> float:
    started = time.perf_counter()
    with served(data, None):
        return time.perf_counter() - started


def _logits_difference() -> float:
    printed = subprocess.run([sys.executable, "-m", "inference.parity"], capture_output=True, text=True, check=True)
    return float(printed.stdout.split()[-1])


def fresh_clone_seconds(port: int = 8080) -> float:
    """From `git clone` to the first answer of `make demo`, in an empty folder; pip's cache is used."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        started = time.perf_counter()
        subprocess.run(["git", "clone", "-q", str(ROOT), f"{folder}/refdesk"], check=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("REFDESK_", "VIRTUAL_ENV"))}
        environment |= {"REFDESK_DATA": f"{folder}/data", "XDG_CACHE_HOME": f"{folder}/cache"}
        kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pip"
        environment.setdefault("PIP_CACHE_DIR", str(kept))
        log = stack.enter_context(open(f"{folder}/log", "w+"))
        demo = subprocess.Popen(
            ["make", "demo"], cwd=f"{folder}/refdesk", env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while demo.poll() is None:
                try:
                    body = {"question": "How do I write a list comprehension?"}
                    reply = httpx.post(f"http://127.0.0.1:{port}/v1/answers", json=body, timeout=60)
                    if reply.status_code == 200 and reply.json()["answer"]:
                        return time.perf_counter() - started
                except httpx.TransportError:
                    pass
                time.sleep(0.5)
            log.seek(0)
            raise SystemExit(f"bench: make demo ended with {demo.returncode}:\n{log.read()[-2000:]}")
        finally:
            os.killpg(demo.pid, signal.SIGTERM)
            demo.wait(30)
            shutil.rmtree(f"{folder}/refdesk", ignore_errors=True)


def write(out: Path, figures: dict[str, list[float]], command: str) -> int:
    rows, failed = [], 0
    for what, (unit, bar, kind) in BARS.items():
        values = sorted(figures.get(what, []))
        if not values:
            continue
        middle = statistics.median(values)
        holds = middle <= bar if kind == "at most" else middle >= bar
        failed += not holds
        rows.append(
            {"what": what, "unit": unit, "bar": f"{kind} {bar:g}", "median": middle, "least": values[0],
             "most": values[-1], "repeats": len(values), "holds": holds}
        )  # fmt: skip
    record = {"command": command, "figures": rows, "environment": report.environment()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    table = markdown(record)
    (out / "bench.md").write_text(table, encoding="utf-8")
    print(table)
    return 1 if failed else 0


def markdown(record: dict[str, Any]) -> str:
    environment = record["environment"]
    machine = environment["machine"]
    lines = [
        "# What refdesk reaches on this machine",
        "",
        f"`{record['command']}`, commit {environment['commit']}, {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['ram_gib']} GiB; " + ", ".join(f"{k} {v}" for k, v in environment["versions"].items()),
        "",
        "| what | bar | median | least – most | repeats | |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["figures"]:
        value = "{:.2g}" if row["unit"] == "max difference" else "{:.2f}" if row["median"] < 10 else "{:.1f}"
        lines.append(
            f"| {row['what']} | {row['bar']} {row['unit']} | {value.format(row['median'])} | "
            f"{value.format(row['least'])} – {value.format(row['most'])} | {row['repeats']} | "
            f"{'holds' if row['holds'] else '**falls short**'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
