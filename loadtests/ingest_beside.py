"""Do answers come later while documents are read?  And how fast are those read, next to what the embedder alone does?

    python -m loadtests.ingest_beside                            25 minutes; writes ingest_beside.md and .json
    python -m loadtests.ingest_beside --seconds 20 --repeats 1 --out /tmp/look

One server over the sample corpus, all of whose questions have been asked once.  Then, in turn, a question every few
seconds with nothing else to do ("idle"), and the same questions while its queue of jobs never runs dry ("busy"); they
ask the sample corpus alone, so that both find the same.  Then the queue by itself ("jobs"), and in a process of its own
the embedder with the same passages, the same batches and as many cores as beside the engine ("embedder").
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

import httpx

from loadtests import report
from loadtests.questions import QUESTIONS, ZipfChoice
from loadtests.run import RESULTS, served
from loadtests.streams import watch_answer
from retrieval import SAMPLE_COLLECTION, sample_documents

SLOWER, AS_FAST = 1.5, 0.8  # what is wanted: at most, at least
WAITING = 8  # jobs that are queued at any time
MEASURED = 40  # documents for the rate of reading
COLLECTION = "beside"
ONE_CORE = {"REFDESK_RETRIEVAL__THREADS": "1"}  # for the embedder, as beside our engine in any case


def documents() -> Iterator[tuple[str, bytes]]:
    """(name, content) without end: the sample's documents with their paragraphs in other orders."""
    sample = [(title, text.split("\n\n")) for _, title, text, _ in sample_documents()]
    for turn in count(1):
        for number, (title, paragraphs) in enumerate(sample):
            at = turn * 7 % len(paragraphs)
            text = "\n\n".join([f"# {title}, variation {turn}", *paragraphs[at:], *paragraphs[:at]])
            yield f"{number}-{turn}.md", text.encode()


class Server:
    """What this asks of one."""

    def __init__(self, url: str):
        self._http = httpx.Client(base_url=url, timeout=300)
        self._documents = documents()

    def ask(self, question: str) -> tuple[float, float]:
        """Seconds to the first token, and to the end."""
        body = {"question": question, "stream": True, "collection": SAMPLE_COLLECTION}
        sent = time.perf_counter()
        with self._http.stream("POST", "/v1/answers", json=body) as response:
            response.raise_for_status()
            seen = watch_answer(response.iter_bytes(), time.perf_counter)
        assert seen.first_token is not None and seen.done is not None, f"not answered: {question}"  # noqa: PT018
        return seen.first_token - sent, seen.done - sent

    def ask_all(self, questions: list[str], every: float) -> dict[str, list[float]]:
        """At these moments, whatever the others take."""
        began = time.perf_counter()
        with ThreadPoolExecutor(16) as pool:
            asked = []
            for number, question in enumerate(questions):
                time.sleep(max(0.0, began + number * every - time.perf_counter()))
                asked.append(pool.submit(self.ask, question))
            first, whole = zip(*(each.result() for each in asked), strict=True)
        return {"first_token_s": list(first), "whole_s": list(whole)}

    def jobs(self, *states: str) -> dict[str, Any]:
        response = self._http.get("/v1/jobs", params={"state": states, "limit": 500})
        response.raise_for_status()
        return response.json()

    def send(self, how_many: int) -> list[str]:
        """The ids of the jobs."""
        found = []
        for name, content in islice(self._documents, how_many):
            response = self._http.post(
                "/v1/documents?wait=false", files={"file": (name, content)}, data={"collection": COLLECTION}
            )
            response.raise_for_status()
            found.append(response.json()["job_id"])
        return found

    def read(self, job_ids: set[str]) -> int:
        """Wait until these are done: how many passages."""
        while self.jobs("queued", "parsing", "embedding")["total"]:
            time.sleep(0.1)
        return sum(job["passages"] for job in self.jobs("done")["jobs"] if job["job_id"] in job_ids)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Documents are read all the time; in the end what is queued is dropped."""
        stop = threading.Event()

        def feed() -> None:
            while not stop.is_set():
                self.send(max(0, WAITING - self.jobs("queued")["total"]))
                stop.wait(1.0)

        with ThreadPoolExecutor(1) as pool:
            feeding = pool.submit(feed)
            try:
                while not self.jobs("embedding")["total"]:
                    time.sleep(0.05)
                yield
            finally:
                stop.set()
                feeding.result()
                while running := self.jobs("queued", "parsing", "embedding")["jobs"]:
                    for job in running:
                        self._http.post(f"/v1/jobs/{job['job_id']}/cancel")
                    time.sleep(0.1)


def embed_alone(how_many: int) -> None:
    """Print how many passages those documents have, and how many seconds embedding them takes."""
    from retrieval.embedding import SentenceTransformerEmbedder, SharedEmbedder
    from retrieval.formats.reading import read_source
    from retrieval.pooling import passage_text
    from retrieval.settings import RetrievalSettings
    from retrieval.splitting import split

    settings = RetrievalSettings()
    embedder = SharedEmbedder(SentenceTransformerEmbedder(settings.embedder, threads=1))
    texts = []
    for name, content in islice(documents(), how_many):
        parsed = read_source(name, content.decode(), "text/markdown")
        passages = split(parsed, embedder.count_tokens, settings.passage_tokens, settings.max_passage_tokens)
        texts.append([passage_text(parsed.title, passage.heading, passage.text) for passage in passages])
    with embedder.serving():  # its turns are as short as in a server from now on
        pass
    embedder.encode_passages(texts[0])
    began = time.perf_counter()
    for some in texts:
        embedder.encode_passages(some)
    print(json.dumps({"passages": sum(map(len, texts)), "seconds": time.perf_counter() - began}))


def rates(server: Server) -> dict[str, float]:
    """Passages a second, by jobs and by the embedder alone."""
    began = time.perf_counter()
    passages = server.read(set(server.send(MEASURED)))
    by_jobs = passages / (time.perf_counter() - began)
    command = [sys.executable, "-m", "loadtests.ingest_beside", "--embed-alone", str(MEASURED)]
    alone = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
    return {"jobs_per_s": by_jobs, "embedder_per_s": alone["passages"] / alone["seconds"], "passages": passages}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.ingest_beside",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="of each arm (default 240)")
    parser.add_argument("--every", type=float, default=4.0, help="seconds from question to question (default 4)")
    parser.add_argument("--repeats", type=int, default=2, help="of each arm (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for ingest_beside.md and .json")
    parser.add_argument("--embed-alone", type=int, metavar="N", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.embed_alone:
        embed_alone(options.embed_alone)
        return 0
    choose = ZipfChoice(11)
    questions = [choose() for _ in range(max(1, round(options.seconds / options.every)))]
    rows: list[dict[str, Any]] = []
    read: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, served(Path(folder) / "data", None, settings=ONE_CORE) as url:
        server = Server(url)
        for question in QUESTIONS:
            server.ask(question)
        for repeat in range(options.repeats):
            rows.append({"arm": "idle", "repeat": repeat} | server.ask_all(questions, options.every))
            with server.busy():
                rows.append({"arm": "busy", "repeat": repeat} | server.ask_all(questions, options.every))
            read.append(rates(server))
    record = {
        "command": shlex.join(["python", "-m", "loadtests.ingest_beside", *sys.argv[1:]]),
        "every_s": options.every,
        "rows": rows,
        "rates": read,
        "environment": report.environment(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ingest_beside.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.out / "ingest_beside.md").write_text(markdown(record), encoding="utf-8")
    print(markdown(record))
    return 0


def markdown(record: dict[str, Any]) -> str:
    where, rows = record["environment"], record["rows"]
    asked = len(rows[0]["whole_s"])
    lines = [
        "# Answers while documents are read",
        "",
        f"`{record['command']}`: {asked} questions, one every {record['every_s']:g} s, with nothing else to do and "
        f"with a queue of documents that never runs dry, in turn.  Seconds, medians of {len(rows) // 2} runs, "
        f"least – most.  Commit {where['commit']}, {where['machine']['cores']} cores of {where['machine']['cpu']}; "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        + ".",
        "",
        f"| what | idle | while documents are read | times as long (p95: at most {SLOWER}) |",
        "|---|---|---|---|",
    ]
    for name, key in (("first token", "first_token_s"), ("whole answer", "whole_s")):
        for rank in (50, 95):
            idle, busy = (
                [
                    report.summarise([1000 * each for each in row[key]])[f"p{rank}_ms"] / 1000
                    for row in rows
                    if row["arm"] == arm
                ]
                for arm in ("idle", "busy")
            )
            ratios = [b / i for i, b in zip(idle, busy, strict=True)]
            cells = [_spread(idle), _spread(busy), _spread(ratios)]
            lines.append(f"| {name}, p{rank} | {' | '.join(cells)} |")
    rates = record["rates"]
    lines += [
        "",
        f"| passages a second, {rates[0]['passages']} passages | median | least – most |",
        "|---|---|---|",
    ]
    by_jobs, alone = ([each[key] for each in rates] for key in ("jobs_per_s", "embedder_per_s"))
    for name, values in (
        ("read as jobs, nobody asking", by_jobs),
        ("the embedder alone, on one core", alone),
        (f"the first over the second (at least {AS_FAST})", [j / a for j, a in zip(by_jobs, alone, strict=True)]),
    ):
        lines.append(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} – {max(values):.2f} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} – {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
