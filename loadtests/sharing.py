"""What each order of documents saves: the real scheduler, block pool and tree over long traces, and no model.

    python -m loadtests.sharing                    every trace and arm, three seeds; writes loadtests/results
    python -m loadtests.sharing --requests 300     a quick look; nothing is written

Every arm has the same blocks and gets the same requests one after the other, five documents each.  Counted are tokens:
how much of the documents was not computed again, how often and how far the ranking was changed, and how long planning
took.  What it does to times and answers is measured elsewhere: this ranks policies.  The traces:

    topics     80 topics of 12 documents, drawn by Zipf's law; each request ranks its topic's documents anew
    shift      the same, but in the middle of the run other topics become popular
    novel      any five of 200 documents in any order; the cache could hold 240, but a document is there twice where it
               is asked for as the first one and behind others
    alien      documents drawn evenly from 20,000: next to no overlap
    retrieved  what retrieval finds for CLAPnq's 300 questions, each asked once: real overlap (needs the data folder)

Work is that of a prompt's floating point operations, in the shape of SmolLM2-135M: attention grows with what a token
stands behind.  One arm has all blocks that it could ever want, "without end": what planned prefixes could save at most.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import retrieval
from inference import Sampling
from inference.config import Eviction
from inference.engine.ordering import Document, Parts
from inference.engine.segments import Reusing
from inference.models import open_checkpoint
from inference.models.tokenizer import load_tokenizer
from inference.placement import cores
from inference.prompt import DocumentOrder
from kernels import BLOCK_SIZE
from loadtests import report
from loadtests.free import Free, core_over
from loadtests.question_sets import CLAPNQ, clapnq_documents, clapnq_questions

TOPICS, PER_TOPIC, PER_REQUEST = 80, 12, 5
LENGTHS = (80, 320)  # tokens of a document, evenly
ALIEN = 0.1  # of a request's documents come from elsewhere
HEAD, QUESTION = 60, 30  # tokens
BUDGETS = (48_000, 12_000)  # tokens of cache


class Library:
    """Documents by number, made when they are first asked for."""

    def __init__(self, seed: int, lengths: dict[int, int]):
        self._seed = seed
        self._lengths = lengths
        self._documents: dict[int, Document] = {}

    def __getitem__(self, number: int) -> Document:
        if number not in self._documents:
            rng = random.Random(f"{self._seed}/{number}")
            length = self._lengths.get(number) or rng.randint(*LENGTHS)
            tokens = tuple(rng.randrange(10, 50_000) for _ in range(length))
            self._documents[number] = Document(number.to_bytes(4, "little"), tokens)
        return self._documents[number]


def topics(rng: random.Random, count: int, shift: bool = False) -> Iterator[list[int]]:
    """Ranked documents: a topic's by their closeness to the question, which is noise around their rank in it."""
    order = rng.sample(range(TOPICS), TOPICS)
    weights = [1 / (place + 1) for place in range(TOPICS)]
    for i in range(count):
        if shift and i == count // 2:
            rng.shuffle(order)
        topic = rng.choices(order, weights)[0]
        close = {topic * PER_TOPIC + d: -d / 4 + rng.gauss(0, 1) for d in range(PER_TOPIC)}
        ranked = sorted(close, key=close.__getitem__, reverse=True)[:PER_REQUEST]
        yield [10**6 + rng.randrange(20_000) if rng.random() < ALIEN else document for document in ranked]


def novel(rng: random.Random, count: int) -> Iterator[list[int]]:
    for _ in range(count):
        yield rng.sample(range(200), PER_REQUEST)


def alien(rng: random.Random, count: int) -> Iterator[list[int]]:
    for _ in range(count):
        yield rng.sample(range(20_000), PER_REQUEST)


@cache
def found() -> tuple[list[list[int]], dict[int, int]]:
    """(passages that retrieval finds for each of CLAPnq's questions, best first; the tokens of each passage)."""
    tokenizer = load_tokenizer(open_checkpoint("smollm2").path)
    numbers: dict[str, int] = {}
    lengths: dict[int, int] = {}
    ranked = []
    with tempfile.TemporaryDirectory() as folder, retrieval.Library.open(Path(folder)) as library:
        library.ingest_documents(clapnq_documents())
        for question in clapnq_questions():
            passages = library.whole.search(question.text, top_k=PER_REQUEST).passages
            ranked.append([numbers.setdefault(passage.passage_id, len(numbers)) for passage in passages])
            for number, passage in zip(ranked[-1], passages, strict=True):
                lengths[number] = len(tokenizer.encode(passage.text, add_special_tokens=False))
    return ranked, lengths


def retrieved(rng: random.Random, count: int) -> Iterator[list[int]]:
    ranked, _ = found()
    yield from rng.sample(ranked, min(count, len(ranked)))


TRACES: dict[str, Callable[[random.Random, int], Iterator[list[int]]]] = {
    "topics": topics,
    "shift": lambda rng, count: topics(rng, count, shift=True),
    "novel": novel,
    "alien": alien,
    "retrieved": retrieved,
}
PER_PAIR = 4 * 30 * 9 * 64 / (2 * 106e6)  # operations of a query with a key, over those of a token's products
SHARE = 0.12  # of a reused document's tokens computed again
LEAD = tuple(range(60_000, 60_490))
LOOKED = 16 / 30  # of a question's work, to see what it attends to


class Arm(NamedTuple):
    """What the client does, and what the engine does."""

    sorted_by: str = "relevance"
    order: DocumentOrder = "relevance"
    eviction: Eviction = "gdsf"
    segments: bool = False
    endless: bool = False


class Greedy:
    """A client's own tree of the orders that it sent, without an end: goes on with whatever document it knows there
    (CacheWeaver's rule, but the most relevant first where there are several)."""

    def __init__(self) -> None:
        self._root: dict = {}

    def __call__(self, ranked: list[int]) -> list[int]:
        order, left, node = [], list(ranked), self._root
        while (known := next((d for d in left if d in node), None)) is not None:
            order.append(known)
            left.remove(known)
            node = node[known]
        for document in left:
            node = node.setdefault(document, {})
        return order + left


ARMS = {
    "as ranked, LRU": Arm(eviction="lru"),
    "as ranked": Arm(),
    "by id": Arm(order="canonical"),
    "most popular first": Arm(sorted_by="popular"),
    "greedy, LRU": Arm(sorted_by="greedy", eviction="lru"),
    "planned, LRU": Arm(order="planned", eviction="lru"),
    "planned": Arm(order="planned"),
    "best first": Arm(order="best_first"),
    "planned over popular": Arm(sorted_by="popular", order="planned"),
    "segments, as ranked": Arm(segments=True),
    "segments, planned": Arm(order="planned", segments=True),
    "planned, without end": Arm(order="planned", endless=True),
}


class Counted(NamedTuple):
    """Shares of all document tokens, of all work, and of all requests; `approximate`: document tokens that were copied,
    and those that were computed for it at that moment are not `reused`; `prefilled`: tokens of a request, what was
    computed for others on its account included; `displaced`: places from its rank, the mean of a document; `lasting`:
    what was reused in the last tenth of the requests over the first tenth that is counted, so 1 where nothing wears
    off."""

    reused: float
    approximate: float
    work_saved: float
    prefilled: float
    changed: float
    displaced: float
    plan_us: float
    plan_us_p99: float
    evict_us: float
    lasting: float


def run(trace: str, arm: str, blocks: int, requests: int, seed: int) -> Counted:
    how = ARMS[arm]
    now = 0
    reuse = Reusing(SHARE, range(1), LEAD) if how.segments else None
    blocks = 80 * requests if how.endless else blocks
    core = core_over(Free(), blocks + 1, how.order, how.eviction, reuse, lambda: float(now), max_tokens=8192)
    library, rng = Library(seed, found()[1] if trace == "retrieved" else {}), random.Random(f"{trace}/{seed}")
    head = list(range(HEAD))
    planning, segmenting, evicting, work = [], [], [], [0.0]
    core.documents.tree.plan = timed(core.documents.tree.plan, planning)
    if how.segments:
        core.documents.segments.plan = timed(core.documents.segments.plan, segmenting)
    core.pool.allocate = timed(core.pool.allocate, evicting)
    schedule = core.scheduler.schedule

    def weighed(at: float):
        plan = schedule(at)
        work[0] += sum(s.tokens * (1 + PER_PAIR * (s.start + s.end) / 2) for s in plan)
        return plan

    core.scheduler.schedule = weighed
    greedy, seen = Greedy(), Counter()
    prefilled = changed = displaced = approximate = counted = 0
    done = full = 0.0
    reused, total = [0.0] * 10, [0] * 10  # by tenths
    for i, ranked in enumerate(TRACES[trace](rng, requests)):
        now = i  # a request comes every second
        ranked = list(dict.fromkeys(ranked))
        sent = ranked
        if how.sorted_by == "popular":
            sent = sorted(ranked, key=lambda d: -seen[d])
        elif how.sorted_by == "greedy":
            sent = greedy(ranked)
        seen.update(ranked)
        documents = tuple(library[number] for number in sent)
        question = [50_000 + (i * QUESTION + j) % 400_000 for j in range(QUESTION)]
        work[0] = 0.0
        core.add(f"{i}", Parts(head, documents, question), Sampling(max_tokens=1, ignore_eos=True), "", 0)
        sequence = core._sequences[f"{i}"]
        before = core.counters.computed_tokens
        served = [sent[rank] for rank in sequence.order]
        while core.has_work:
            for output in core.step():
                assert output.error is None, output.error
        tokens = sum(len(document.tokens) for document in documents)
        if i >= requests // 10:  # the first tenth fills the cache
            counted += 1
            tenth = min(9, 10 * i // requests)
            total[tenth] += tokens
            computed = core.counters.computed_tokens - before
            prompt = tokens + QUESTION + HEAD
            if sequence.reuse is not None:
                computed += LOOKED * QUESTION
                work[0] += LOOKED * QUESTION * (1 + PER_PAIR * prompt)
                approximate += sequence.reuse.approximate
            prefilled += computed
            reused[tenth] += tokens + QUESTION + HEAD - min(HEAD, sequence.cached_tokens) - computed
            done += work[0]
            full += prompt * (1 + PER_PAIR * prompt / 2)
            changed += served != ranked
            displaced += sum(abs(at - ranked.index(d)) for at, d in enumerate(served)) / len(served)
    core.pool.check()
    at_first = reused[1] / total[1]
    return Counted(
        reused=sum(reused) / sum(total),
        approximate=approximate / sum(total),
        work_saved=1 - done / full,
        prefilled=prefilled / counted,
        changed=changed / counted,
        displaced=displaced / counted,
        plan_us=statistics.median(planning) + (statistics.median(segmenting) if segmenting else 0.0),
        plan_us_p99=sum(sorted(some)[int(0.99 * len(some))] for some in (planning, segmenting) if some),
        evict_us=sum(evicting) / core.pool.evicted_total if core.pool.evicted_total else 0.0,
        lasting=reused[9] / total[9] / at_first if at_first > 0.005 else 0.0,  # of nothing there is no ratio
    )


def timed(function: Callable, took: list[float]) -> Callable:
    """`function`, which notes in `took` how many microseconds each call takes."""

    def call(*args):
        began = time.perf_counter()
        result = function(*args)
        took.append(1e6 * (time.perf_counter() - began))
        return result

    return call


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.sharing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, help="of each run (2000)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    requests = options.requests or 2000
    rows, jobs = [], []
    for trace in TRACES:
        if trace == "retrieved" and not CLAPNQ.is_dir():
            print(f"no {CLAPNQ}: its questions are left out", file=sys.stderr)
            continue
        count = min(requests, 300) if trace == "retrieved" else requests
        for budget in BUDGETS if trace == "topics" else BUDGETS[:1]:
            rows += [{"trace": trace, "budget": budget, "arm": arm} for arm in ARMS]
            jobs += [(trace, arm, budget // BLOCK_SIZE, count, seed) for arm in ARMS for seed in range(options.seeds)]
    with ProcessPoolExecutor(cores()) as pool:
        results = pool.map(run, *zip(*jobs, strict=True))
        for row in rows:
            row["runs"] = [next(results)._asdict() for _ in range(options.seeds)]
            print(line(row, rows), flush=True)
    if options.requests is not None:
        return
    where = report.environment()
    command = shlex.join(["python", "-m", "loadtests.sharing", *sys.argv[1:]])
    lines = [
        "# What the order of documents saves",
        "",
        f"`{command}`: {options.seeds} seeds of {requests} requests, the first tenth not counted; the real scheduler, "
        f"block pool and tree, no model; commit {where['commit']}.  In brackets the seeds' least and largest.",
        "",
        "| trace | cache, tokens | order | document tokens reused | over as ranked | of all, copied | work saved "
        "| tokens prefilled | last tenth over the first | prompts changed | places moved | planning, µs (p99) "
        "| a block evicted, µs |",
        "|" + "---|" * 13,
        *(line(row, rows) for row in rows),
        "",
    ]
    record = {"command": command, "rows": rows, "environment": where}
    (options.out / "sharing.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.out / "sharing.md").write_text("\n".join(lines), encoding="utf-8")


def line(row: dict, rows: list[dict]) -> str:
    def mean(name: str, of: dict = row) -> float:
        return statistics.fmean(each[name] for each in of["runs"])

    plain = next(r for r in rows if (r["trace"], r["budget"]) == (row["trace"], row["budget"]))
    over = f"{mean('reused') / mean('reused', plain):.2f}" if mean("reused", plain) > 0.005 else ""  # noise by noise
    shares = [each["reused"] for each in row["runs"]]
    lasting = [each["lasting"] for each in row["runs"]]
    lasts = f"{statistics.fmean(lasting):.2f} ({min(lasting):.2f} to {max(lasting):.2f})" if min(lasting) else ""
    cells = [
        f"{row['trace']} | {row['budget']} | {row['arm']}",
        f"{mean('reused'):.1%} ({min(shares):.1%} to {max(shares):.1%}) | {over} | {mean('approximate'):.1%}",
        f"{mean('work_saved'):.1%} | {mean('prefilled'):.0f} | {lasts}",
        f"{mean('changed'):.0%} | {mean('displaced'):.2f}",
        f"{mean('plan_us'):.0f} ({mean('plan_us_p99'):.0f}) | {mean('evict_us'):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
