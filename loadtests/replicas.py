"""Two real replicas behind one gateway: what affinity finds in their caches, over sending to each in turn.

    python -m loadtests.replicas                                     two of our engines, started for each run
    python -m loadtests.replicas --dialect vllm --urls http://127.0.0.1:8001 http://127.0.0.1:8002

A request is of a topic drawn by Zipf's law; it ranks its topic's twelve passages anew, takes the best five (one in ten
comes from elsewhere), and asks something.  The passages are the Python manual's, about 180 tokens each.  All of them,
in one order each, are 72,000 tokens; a replica's cache holds `--cache-tokens` (22,000), so two hold more together than
one, if they hold different ones.  Users are eight.  Every arm has the same requests and the same order of documents;
only what the gateway routes by differs.  Arms alternate; where the servers are given, each run has prompts of its own.
Writes replicas.md and .json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loadtests import rag, report
from loadtests.run import RESULTS, RunError, served

PER_TOPIC, PER_REQUEST, ALIEN = 12, 5, 0.1
ARMS = ("affinity", "round_robin", "least_loaded")
BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * 2  # of SmolLM2-135M's keys and values in bf16
WANTED, AIM = 1.5, 1.9


def workload(count: int, salt: int, seed: int) -> list[rag.Request]:
    texts, rng = rag.corpus(), random.Random(f"replicas/{seed}")
    topics = len(texts) // PER_TOPIC
    of_rank = rng.sample(range(topics), topics)
    weights = [1 / (place + 1) for place in range(topics)]
    requests = []
    for number in range(count):
        topic = rng.choices(of_rank, weights)[0]
        close = {topic * PER_TOPIC + d: -d / 4 + rng.gauss(0, 1) for d in range(PER_TOPIC)}
        ranked = sorted(close, key=close.__getitem__, reverse=True)[:PER_REQUEST]
        ranked = [rng.randrange(len(texts)) if rng.random() < ALIEN else passage for passage in ranked]
        passages = tuple(dict.fromkeys(ranked))
        question = f"Question {number}: what do these passages have in common?"
        marked = tuple(rag.marked(passage, texts[passage]) for passage in passages)
        requests.append(rag.Request(passages, rag.SYSTEM.format(salt), marked, question))
    return requests


@contextlib.contextmanager
def gateway(urls: list[str], dialect: str, model: str, by: str, order: str) -> Iterator[str]:
    """A server before these, as an operator would set it up."""
    replicas = "".join(
        f'[[backend.replicas]]\nbackend = {{ kind = "openai", dialect = "{dialect}", base_url = "{url}", '
        f'model = "{model}" }}\n'
        for url in urls
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "refdesk.toml")
        file.write_text(f'[backend]\nroute_by = "{by}"\ndocument_order = "{order}"\n{replicas}')
        with served(Path(folder, "data"), None, "serve", {"REFDESK_CONFIG": str(file)}) as url:
            yield url


@contextlib.contextmanager
def engines(count: int, cache_tokens: int) -> Iterator[list[str]]:
    """So many servers with our engine, a thread and a cold cache each."""
    settings = {
        "REFDESK_BACKEND__KIND": "engine",
        "REFDESK_BACKEND__THREADS": "1",
        "REFDESK_BACKEND__KV_CACHE_MB": str(round(cache_tokens * BYTES_PER_TOKEN / 2**20)),
        "REFDESK_RETRIEVAL__THREADS": "1",
    }
    with contextlib.ExitStack() as running:
        folders = [Path(running.enter_context(tempfile.TemporaryDirectory())) for _ in range(count)]
        yield [running.enter_context(served(folder, None, "serve", settings)) for folder in folders]


def run(options: argparse.Namespace, by: str, repeat: int) -> dict[str, float]:
    salt = repeat * len(ARMS) + ARMS.index(by) + 1
    requests = workload(options.requests, salt, repeat)
    with contextlib.ExitStack() as running:
        urls = options.urls or running.enter_context(engines(2, options.cache_tokens))
        url = running.enter_context(gateway(urls, options.dialect, options.model, by, options.order))
        seen = asyncio.run(rag.drive(url, options.model, requests, False, options.order))
    for error in sorted({s.error for s in seen if s.error}):
        print("failed:", error, file=sys.stderr)
    found = rag.summarise(seen)
    return found | {"cached_tokens": sum(s.cached_tokens or 0 for s in seen)}


def over_round_robin(runs: dict[str, list[dict[str, float]]], by: str) -> list[float]:
    """Of cached tokens, in each repeat."""
    pairs = zip(runs[by], runs["round_robin"], strict=True)
    return [mine["cached_tokens"] / max(1, turns["cached_tokens"]) for mine, turns in pairs]


def table(runs: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = [
        "| routed by | cached tokens | of the prompts | over round robin | requests/s | first token p50, s | p95, s "
        "| failed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for by, found in runs.items():
        ratios = [
            a["cached_tokens"] / max(1, b["cached_tokens"]) for a, b in zip(found, runs["round_robin"], strict=True)
        ]
        row = {key: statistics.median(each[key] for each in found) for key in found[0]}
        lines.append(
            f"| {by.replace('_', ' ')} | {row['cached_tokens']:,.0f} | {row['cached_share']:.1%} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {row['requests_per_s']:.2f} "
            f"| {row['ttft_p50']:.2f} | {row['ttft_p95']:.2f} | {sum(each['failed'] for each in found):g} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.replicas", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--urls", nargs=2, help="two servers that run; without them our engines are started")
    parser.add_argument("--dialect", default="generic")
    parser.add_argument("--model", default="smollm2", help="as the servers call it")
    parser.add_argument("--order", choices=("relevance", "planned", "canonical"), default="planned")
    parser.add_argument("--cache-tokens", type=int, default=22_000, help="of each engine")
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="replicas", help="of the files that are written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {by: [] for by in ARMS}
    try:
        for repeat in range(options.repeats):
            for by in ARMS if repeat % 2 == 0 else ARMS[::-1]:
                runs[by].append(run(options, by, repeat))
                print(by, runs[by][-1], flush=True)
    except RunError as error:
        print(f"replicas: {error}", file=sys.stderr)
        return 2
    told = [argument for argument in sys.argv[1:] if not argument.startswith("http")]
    command = shlex.join(["python", "-m", "loadtests.replicas", *told])
    lines = [
        "# Two replicas: where requests go, and what their caches hold",
        "",
        f"`{command}`: {options.requests} requests by {rag.USERS} users, {options.repeats} repeats; "
        f"documents in the {options.order} order; "
        + (
            f"servers of the dialect {options.dialect}."
            if options.urls
            else f"our engines, {options.cache_tokens:,} "
            "tokens of cache and one thread each, on the cores that the gateway and its clients use too."
        )
        + " Medians; in brackets the least and the largest.",
        "",
        *table(runs),
        "",
        f"Wanted: cached tokens {WANTED} times those of round robin; aimed at: {AIM}.",
    ]
    report.write(options.out, options.name, lines, {"command": command, "runs": runs})
    print("\n".join(lines))
    return 0 if statistics.median(over_round_robin(runs, "affinity")) >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
