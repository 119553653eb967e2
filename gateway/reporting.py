"""What the command line prints: progress, reports, answers."""

from __future__ import annotations

import sys
from typing import Any

import click
import msgspec
from tqdm import tqdm

from retrieval import IngestReport, ProgressEvent


class Progress:
    """A bar on a terminal, a line per settled document elsewhere.  Both on stderr."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._on_terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, event: ProgressEvent) -> None:
        if not self._on_terminal:
            if event.state not in ("parsing", "embedding"):
                click.echo(f"{event.done}/{event.total} {event.state} {event.source}", err=True)
            return
        if self._bar is None:
            self._bar = tqdm(total=event.total, unit="doc", dynamic_ncols=True, leave=False)
        self._bar.total = event.total
        part = f" {event.state} {event.part}/{event.parts}" if event.parts else ""
        self._bar.set_postfix_str(event.source.rsplit("/", 1)[-1][:40] + part, refresh=False)
        self._bar.update(event.done - self._bar.n)


def summary(report: IngestReport) -> str:
    """One line about a run."""
    counts = {
        "added": len(report.added),
        "updated": len(report.updated),
        "moved": len(report.moved),
        "unchanged": len(report.unchanged),
        "failed": len(report.failed),
        "skipped (no format that is read)": report.skipped,
    }
    parts = [f"{count} {name}" for name, count in counts.items() if count]
    return f"{', '.join(parts) or 'no documents found'}; {report.passages} passages written"


def document_line(document: dict[str, Any]) -> str:
    return "  ".join(
        (
            document["document_id"],
            f"{document['collection']:<12}",
            f"{document['passages']:>5} passages",
            printable(document["title"]),
            printable(document["source"]),
        )
    )


def job_line(job: dict[str, Any]) -> str:
    state = job["state"]
    match state:
        case "parsing" if job["parts"]:
            state = f"parsing {job['parts_read']}/{job['parts']}"
        case "embedding" if job["passages"]:
            state = f"embedding {job['passages_embedded']}/{job['passages']}"
    again = f" (attempt {job['attempts']})" if job["attempts"] > 1 else ""
    why = f": {job['reason']}" if job["reason"] else ""
    unread = f", not read: {'; '.join(job['unread'])}" if job["unread"] else ""
    return printable(f"{job['job_id']}  {state + again:<18}  {job['source']}{why}{unread}")


class AnswerPrinter:
    """Prints the events of an answer as they come, or one JSON object at the end."""

    def __init__(self, *, as_json: bool):
        self._as_json = as_json
        self._events: dict[str, dict[str, Any]] = {}
        self._text: list[str] = []

    def __call__(self, name: str, content: dict[str, Any]) -> None:
        if name == "delta":
            self._text.append(content["text"])
            if not self._as_json:
                click.echo(printable(content["text"], keep="\n"), nl=False)
            return
        self._events[name] = content
        if name == "sources" and not self._as_json:
            self._print_quotes(content)

    def finish(self) -> None:
        if self._as_json:
            whole: dict[str, Any] = {"answer": "".join(self._text)}
            for content in self._events.values():
                whole |= content
            click.echo(msgspec.json.encode(whole).decode())
            return
        click.echo()
        if self._events.get("done", {}).get("finish_reason") == "length":
            click.echo("(cut here: the answer reached its length limit; --max-tokens raises it)")
        sources = self._events.get("sources", {})
        refused = sources.get("refused")
        if sources.get("sources"):
            click.echo("\nNearest passages, which may be unrelated:" if refused else "\nSources:")
        cited = {citation["marker"] for citation in self._events.get("citations", {}).get("citations", [])}
        for marker, source in enumerate(sources.get("sources", []), 1):
            sign = "*" if marker in cited else " "
            where = f", page {source['page']}" if source["page"] else ""
            click.echo(f"{sign}[{marker}] {printable(source['title'])}{where}  ({printable(source['source'])})")
        if cited:
            click.echo("* supports a sentence of the answer")

    def _print_quotes(self, sources: dict[str, Any]) -> None:
        markers = {source["passage_id"]: index for index, source in enumerate(sources["sources"], 1)}
        for quote in sources["quotes"]:
            click.echo(f"  “{printable(' '.join(quote['text'].split()))}” [{markers[quote['passage_id']]}]")
        if sources["quotes"]:
            click.echo()


def printable(text: str, keep: str = "") -> str:
    """Text of documents and models without the characters that would command the terminal."""
    return "".join(char if char.isprintable() or char in keep else " " for char in text)
