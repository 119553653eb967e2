"""What the first to ask after a restart gain from pre-warming, measured through the server's door.

    python -m loadtests.warming                 a quarter of an hour; writes loadtests/results/warming.md and .json
    python -m loadtests.warming --repeats 1     a quick look, written as well

A server over the sample corpus is asked 60 questions, drawn by Zipf's law with replacement, so that it knows which
passages are popular.  Then it is started anew for each row and repeat, in turn, with the same popularity:

    cold      REFDESK_ANSWERS__WARM_SECONDS=0, asked as soon as it is ready
    warmed    asked once warming is done, as after a restart at a quiet hour

and 30 questions are asked one after the other: the first 30 "again", whose passages are all known to be popular, or the
next 30 draws, "anew", among them questions that nobody asked before.  A question that is drawn twice finds its
passage in either case.  Times are seconds from sending the question to the first token, retrieval included.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from gateway.warming import FILE_NAME
from loadtests import report
from loadtests.bench import stream_answer
from loadtests.questions import ZipfChoice
from loadtests.run import RESULTS, served

SEED, DRAWN, ASKED = 7, 60, 30
COLD, WARMED = "cold", "warmed"
OFF = {"REFDESK_ANSWERS__WARM_SECONDS": "0"}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.warming", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="starts of each row (default 3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for warming.md and warming.json")
    options = parser.parse_args()
    choose = ZipfChoice(SEED)
    draws = [choose() for _ in range(DRAWN + ASKED)]
    questions = {"again": draws[:ASKED], "anew": draws[DRAWN:]}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        with served(data, None) as url:
            ask_all(url, draws[:DRAWN])
        popularity = (data / FILE_NAME).read_bytes()
        about = {
            "command": shlex.join(["python", "-m", "loadtests.warming", *sys.argv[1:]]),
            "passages": len(json.loads(popularity)["passages"]),
            "strangers": len(set(questions["anew"]) - set(draws[:DRAWN])),
            "environment": report.environment(),
        }
        for repeat in range(options.repeats):
            for which, some in questions.items():
                for arm in (COLD, WARMED) if repeat % 2 == 0 else (WARMED, COLD):
                    (data / FILE_NAME).write_bytes(popularity)
                    with served(data, None, settings=OFF if arm == COLD else {}) as url:
                        warming = wait_until_warm(url)
                        rows.append({"arm": arm, "questions": which, "repeat": repeat} | warming | ask_all(url, some))
            write(options.out, about | {"rows": rows})  # each time, so that a run that is broken off leaves something
    print(markdown(about | {"rows": rows}))
    return 0


def write(out: Path, record: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "warming.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "warming.md").write_text(markdown(record), encoding="utf-8")


def wait_until_warm(url: str) -> dict[str, float]:
    """How long warming took once the server was ready, and what it computed.  Raises SystemExit if it does not end."""
    began = time.perf_counter()
    while time.perf_counter() - began < 120:
        text = httpx.get(f"{url}/metrics").text
        shown = dict(re.findall(r"^refdesk_(warming|warmed_tokens_total) (\S+)$", text, re.MULTILINE))
        if float(shown["warming"]) == 0:
            return {"warm_s": time.perf_counter() - began, "warmed_tokens": float(shown["warmed_tokens_total"])}
        time.sleep(0.1)
    raise SystemExit("warming: it does not come to an end")


def ask_all(url: str, questions: list[str]) -> dict[str, Any]:
    """Ask one after the other: seconds to each first token, refusals left out, and the share of cached tokens."""
    with httpx.Client(base_url=url, timeout=120) as client:
        seen = [one for one in (stream_answer(client, question) for question in questions) if not one["refused"]]
    return {
        "first_token_s": [one["first_token"] for one in seen],
        "cached_share": sum(one["cached_tokens"] for one in seen) / sum(one["prompt_tokens"] for one in seen),
    }


def markdown(record: dict[str, Any]) -> str:
    where, rows = record["environment"], record["rows"]
    lines = [
        "# Pre-warming after a restart",
        "",
        f"`{record['command']}`: the sample corpus, {DRAWN} questions asked before, {record['passages']} passages "
        f"known to be popular; then {ASKED} questions one after the other, of those drawn anew {record['strangers']} "
        f"never asked before.  First tokens in seconds, medians of {1 + max(row['repeat'] for row in rows)} starts, "
        f"least – most.  Commit {where['commit']}, {where['machine']['cores']} cores of {where['machine']['cpu']}; "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        + ".",
        "",
        "| questions | start | first token, p50 | p95 | the very first | tokens cached | warming, s | its tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for which in dict.fromkeys(row["questions"] for row in rows):
        for arm in (COLD, WARMED):
            some = [row for row in rows if (row["questions"], row["arm"]) == (which, arm)]
            times = [report.summarise([1000 * seconds for seconds in row["first_token_s"]]) for row in some]
            cells = [
                spread([each["p50_ms"] / 1000 for each in times], ".2f"),
                spread([each["p95_ms"] / 1000 for each in times], ".2f"),
                spread([row["first_token_s"][0] for row in some], ".2f"),
                spread([row["cached_share"] for row in some], ".0%"),
                spread([row["warm_s"] for row in some], ".1f") if arm == WARMED else "",
                spread([row["warmed_tokens"] for row in some], ".0f") if arm == WARMED else "",
            ]
            lines.append(f"| {which} | {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], how: str) -> str:
    return f"{statistics.median(values):{how}} ({min(values):{how}} – {max(values):{how}})"


if __name__ == "__main__":
    sys.exit(main())
