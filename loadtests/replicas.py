"""Two real replicas behind one gateway: what affinity finds in their caches, over sending to each in turn.

    python -m loadtests.replicas                                     two of our engines, started for each run
    python -m loadtests.replicas --dialect vllm --urls http://127.0.0.1:8001 http://127.0.0.1:8002

The texts are the Python manual's.  Two replicas hold more together than one where they hold different documents, and
that counts where the documents in use fit into two caches and not into one:

    even     a question about one of 32 documents of 900 tokens, each as often as any other
    zipf     about one of 80, drawn by Zipf's law: a few fit into any cache, and these are asked for most
    topics   about five passages of 180 tokens, of a topic drawn by Zipf's law, ranked anew in each request, one in ten
             from elsewhere; the planned order stands for what prefixes can share of them

Users are eight.  Both arms have the same requests, order of documents and empty caches; only what the gateway routes by
differs.  Arms alternate; where the servers are given, each run has prompts of its own.  Writes replicas.md and .json;
exit code 1 where "even" falls short of what is wanted.
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

ARMS = ("affinity", "round_robin")
CACHE_TOKENS = {"even": 16_000, "zipf": 8_000, "topics": 22_000}  # of each engine
PER_TOPIC, PER_REQUEST, ALIEN = 12, 5, 0.1
PASSAGES_EACH = 5  # of a long document
BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * 2  # of SmolLM2-135M's keys and values in bf16
WANTED, AIM = 1.5, 1.9


def workload(traffic: str, count: int, salt: int, seed: int) -> list[rag.Request]:
    rng = random.Random(f"replicas/{traffic}/{seed}")
    draw = {"even": long_documents(rng, 32, 0.0), "zipf": long_documents(rng, 80, 1.0), "topics": topics(rng)}[traffic]
    requests = []
    for number in range(count):
        names, texts = next(draw)
        question = f"Question {number}: what is the most important thing said here?"
        requests.append(rag.Request(names, rag.SYSTEM.format(salt), texts, question))
    return requests


Drawn = Iterator[tuple[tuple[int, ...], tuple[str, ...]]]


def long_documents(rng: random.Random, count: int, zipf: float) -> Drawn:
    texts = rag.corpus()
    weights = [(place + 1) ** -zipf for place in range(count)]
    names = rng.sample(range(count), count)
    while True:
        (name,) = rng.choices(names, weights)
        yield (name,), (" ".join(texts[PASSAGES_EACH * name : PASSAGES_EACH * (name + 1)]),)


def topics(rng: random.Random) -> Drawn:
    texts = rag.corpus()
    of_rank = rng.sample(range(len(texts) // PER_TOPIC), len(texts) // PER_TOPIC)
    weights = [1 / (place + 1) for place in range(len(of_rank))]
    while True:
        (topic,) = rng.choices(of_rank, weights)
        close = {topic * PER_TOPIC + d: -d / 4 + rng.gauss(0, 1) for d in range(PER_TOPIC)}
        ranked = sorted(close, key=close.__getitem__, reverse=True)[:PER_REQUEST]
        ranked = [rng.randrange(len(texts)) if rng.random() < ALIEN else passage for passage in ranked]
        passages = tuple(dict.fromkeys(ranked))
        yield passages, tuple(rag.marked(passage, texts[passage]) for passage in passages)


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


def run(options: argparse.Namespace, traffic: str, by: str, repeat: int) -> dict[str, float]:
    salt = 1 + repeat + options.repeats * ARMS.index(by)
    requests = workload(traffic, options.requests, salt, repeat)
    with contextlib.ExitStack() as running:
        urls = options.urls or running.enter_context(engines(2, CACHE_TOKENS[traffic]))
        url = running.enter_context(gateway(urls, options.dialect, options.model, by, "planned"))
        seen = asyncio.run(rag.drive(url, options.model, requests, False, "planned"))
    for error in sorted({s.error for s in seen if s.error}):
        print("failed:", error, file=sys.stderr)
    return rag.summarise(seen) | {"cached_tokens": sum(s.cached_tokens or 0 for s in seen)}


Runs = dict[str, list[dict[str, float]]]


def ratios(runs: Runs, figure: str) -> list[float]:
    """Of affinity over round robin, in each repeat."""
    pairs = zip(runs["affinity"], runs["round_robin"], strict=True)
    return [mine[figure] / max(1e-9, turns[figure]) for mine, turns in pairs]


def line(traffic: str, runs: Runs, own_cache: bool) -> str:
    cells = [traffic, f"{CACHE_TOKENS[traffic]:,}" if own_cache else "as given"]
    cells += [f"{statistics.median(each['cached_share'] for each in runs[by]):.1%}" for by in reversed(ARMS)]
    for figure in ("cached_tokens", "requests_per_s", "ttft_p50", "ttft_p95"):
        found = ratios(runs, figure)
        cells.append(f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
    cells.append(f"{sum(each['failed'] for by in ARMS for each in runs[by]):g}")
    return "| " + " | ".join(cells) + " |"


def told(options: argparse.Namespace, all_runs: dict[str, Runs]) -> tuple[str, list[str]]:
    """(the command, the page)."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("http")]
    command = shlex.join(["python", "-m", "loadtests.replicas", *arguments])
    servers = (
        f"Servers of the dialect {options.dialect}."
        if options.urls
        else "Our engines, one thread each, on the cores that the gateway and its clients use, too."
    )
    lines = [
        "# Two replicas: where requests go, and what their caches hold",
        "",
        f"`{command}`: {options.requests} requests by {rag.USERS} users, {options.repeats} repeats. {servers} The "
        "traffics are explained in the module. Ratios are those of affinity over round robin; medians, in brackets the "
        "least and the largest.",
        "",
        "| traffic | cache of each, tokens | of the prompts, round robin | · affinity | cached tokens, ratio | "
        "requests/s, ratio | first token p50, ratio | p95, ratio | failed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(line(traffic, runs, not options.urls) for traffic, runs in all_runs.items()),
        "",
        f"Wanted of cached tokens, even traffic: {WANTED}; aimed at: {AIM}. Two caches hold twice as much as one: by "
        "Zipf's law what the second one adds is asked for less often than what the first one held.",
    ]
    return command, lines


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.replicas", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--urls", nargs=2, help="two servers that run; without them our engines are started")
    parser.add_argument("--dialect", default="generic")
    parser.add_argument("--model", default="smollm2", help="as the servers call it")
    parser.add_argument("--traffic", nargs="+", choices=CACHE_TOKENS, default=list(CACHE_TOKENS))
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="replicas", help="of the files that are written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    all_runs: dict[str, Runs] = {traffic: {by: [] for by in ARMS} for traffic in options.traffic}
    try:
        for traffic, runs in all_runs.items():
            for repeat in range(options.repeats):
                for by in ARMS if repeat % 2 == 0 else ARMS[::-1]:
                    runs[by].append(run(options, traffic, by, repeat))
                    print(traffic, by, runs[by][-1], flush=True)
    except RunError as error:
        print(f"replicas: {error}", file=sys.stderr)
        return 2
    command, lines = told(options, all_runs)
    report.write(options.out, options.name, lines, {"command": command, "runs": all_runs})
    print("\n".join(lines))
    first = next(iter(all_runs.values()))
    return 0 if statistics.median(ratios(first, "cached_tokens")) >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
