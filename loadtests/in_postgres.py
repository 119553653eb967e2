"""Searching among 100,000 passages in PostgreSQL, and what they take there.

    python -m loadtests.in_postgres                         writes in_postgres.md and .json
    python -m loadtests.in_postgres --passages 10000 --out /tmp

The documents, vectors and questions are those of `loadtests.many_passages`; the server is one of this machine's own,
with the defaults of PostgreSQL.  Searches are timed without embedding the question.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psycopg

from loadtests import report
from loadtests.many_passages import FEW, SEARCHES, Drawn, Mixture, documents, spread
from loadtests.postgres_server import serving
from loadtests.run import RESULTS
from retrieval import OPERATOR, Library, Principal, RetrievalSettings
from retrieval.formats import reading
from retrieval.search import Question, StageTimer

STAGES = ("all", "vectors", "text", "fuse")
RELATIONS = {
    "text": "documents, passages",
    "vectors of sentences and passages": "embeddings",
    "their index (HNSW)": "embeddings_2",
    "words for ranking": "postings",
    "words for phrases (GIN)": "passages_found",
}


def measured(url: str, passages: int) -> dict:
    embedder, rng = Drawn(), np.random.default_rng(2)
    settings = RetrievalSettings(passage_tokens=220, max_passage_tokens=400, relevance_floor=-1, database=url)
    people = {"all": OPERATOR, "one in a hundred": Principal.of(groups=["few"])}
    rows: dict = {"searches": {}, "recall": {}, "bytes": {}}
    with (
        tempfile.TemporaryDirectory() as folder,
        Library.open(Path(folder), embedder=embedder, settings=settings, reader=reading) as library,
    ):
        began = time.perf_counter()
        made = list(documents(passages, rng))
        library.ingest_documents(made[::FEW], readers=["group:few"])
        library.ingest_documents([each for n, each in enumerate(made) if n % FEW], readers=["group:many"])
        rows["seconds to fill"] = time.perf_counter() - began
        rows["passages"] = library._store.counts()[1]
        with psycopg.connect(url, autocommit=True) as db:
            db.execute("ANALYZE")  # as the server does by itself within a minute
            for name, relations in RELATIONS.items():
                rows["bytes"][name] = sum(
                    db.execute("SELECT pg_total_relation_size(%s)", [relation]).fetchone()[0]
                    for relation in relations.split(", ")
                )
        for name, who in people.items():
            seen = library.seen_by(who)
            took: dict[str, list[float]] = {stage: [] for stage in STAGES}
            for words in rng.choice(2000, (SEARCHES, 6)):
                found = seen.search("what about " + " ".join(f"w{word}" for word in words), top_k=5)
                for stage in STAGES[1:]:
                    took[stage].append(found.timings[stage])
                took["all"].append(sum(found.timings.values()) - found.timings["embed"])
            rows["searches"][name] = took
            rows["recall"][name] = [recall(library, who, query) for query in Mixture(3).draw(50)]
    return rows


def recall(library: Library, who: Principal, query: np.ndarray) -> float:
    """Of the ten nearest by meaning that `who` may see, the share that is found."""
    timer = StageTimer(time.perf_counter, ("vectors", "text"))
    found = library._indexes.find(who, Question(query, []), library._settings.candidates, timer)
    where, values = ("true", []) if who.readers is None else ("r.reader = ANY(%s)", [sorted(who.readers)])
    exact = library._store._rows(
        "SELECT DISTINCT e.passage, e.vector <#> %s AS far FROM embeddings e JOIN documents d ON d.id = e.document "
        f"LEFT JOIN access_readers r ON r.access = d.access WHERE {where} ORDER BY far LIMIT 10",
        [query, *values],
    )
    return len({number for number, _ in exact} & set(found)) / 10


def lines(rows: dict, command: str) -> list[str]:
    mib = {name: size / 2**20 for name, size in rows["bytes"].items()}
    # What PostgreSQL counts to a table are its indexes, too.
    mib["text"] -= mib["words for phrases (GIN)"]
    mib["vectors of sentences and passages"] -= mib["their index (HNSW)"]
    return [
        "# In PostgreSQL",
        "",
        f"`{command}`: {rows['passages']:,} passages, filled in {rows['seconds to fill']:.0f} s. In ms, p50 and p95.",
        "",
        "| who may see | search | vectors | words | rows and ranking | recall@10 of vectors |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {' | '.join(spread(took[stage]) for stage in STAGES)} | {np.mean(rows['recall'][name]):.3f} |"
            for name, took in rows["searches"].items()
        ),
        "",
        "| on the disk | MiB |",
        "|---|---|",
        *(f"| {name} | {size:.0f} |" for name, size in mib.items()),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.in_postgres", description=__doc__.partition("\n")[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for in_postgres.md and .json")
    options = parser.parse_args()
    with serving(settings="") as server:
        rows = measured(server.new_place(), options.passages)
    told = [] if options.passages == 100_000 else ["--passages", str(options.passages)]
    command = shlex.join(["python", "-m", "loadtests.in_postgres", *told])
    table = lines(rows, command)
    report.write(options.out, "in_postgres", table, {"command": command, **rows})
    print("\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
