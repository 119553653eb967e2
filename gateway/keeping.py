"""The commands that keep a library: put documents in, list and remove them, see what is being read, back all of it up
and bring it back, look for damage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.naming import DEFAULT_COLLECTION
from gateway.options import Collection, Text, config_option, data_option, load, url_option

if TYPE_CHECKING:
    from gateway.config import Config


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option(
    "--collection",
    type=Collection(),
    default=DEFAULT_COLLECTION,
    show_default=True,
    help="Collection to put them in.",
)
@click.option(
    "--reader",
    "readers",
    multiple=True,
    type=Text(),
    help="Who may read them: public (the default for new ones), tenant:NAME, group:NAME or user:NAME (of a tenant "
    "group:TENANT/NAME, user:TENANT/NAME); may be given several times.",
)
@click.option("--tag", "tags", multiple=True, type=Text(), help="A tag for filters; may be given several times.")
@data_option
@config_option
def ingest(
    paths: tuple[Path, ...],
    collection: str,
    readers: tuple[str, ...],
    tags: tuple[str, ...],
    data: str | None,
    config_path: Path | None,
) -> int:
    """Put files and folders into the library.

    Reads Markdown, text, HTML, PDF, Office files (DOCX, PPTX, XLSX, XLS, ODS), CSV, EPUB, mails
    (EML, MSG), JSON, notebooks, feeds, XML, and ZIP archives of these; folders all the way down.
    What has not changed since the last time is skipped.  Files that cannot be read are listed with
    the reason, the rest go in; the exit code is then 1.
    """
    config = load(config_path, data)
    from gateway.desk import open_library
    from gateway.reporting import Progress, summary
    from retrieval.ingest import Into

    missing = [path for path in paths if not path.exists()]
    if missing:
        raise click.ClickException(f"{missing[0]} does not exist")
    try:
        Into(collection, readers or None, "", tags or None).check()
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with open_library(config) as library, Progress() as progress:
        report = library.ingest_paths(
            paths, collection=collection, readers=readers or None, tags=tags or None, progress=progress
        )
    for name, reason in report.failed:
        click.echo(f"refdesk: not read: {name}: {reason}", err=True)
    for name, reason in report.unread:
        click.echo(f"refdesk: not read, a part of {name}: {reason}", err=True)
    click.echo(summary(report))
    return 1 if report.failed else 0


@click.group()
def documents() -> None:
    """List or remove documents."""


@documents.command("list")
@click.option("--collection", type=Collection(), help="Only this collection.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per document.")
@url_option
@data_option
@config_option
def list_documents(
    collection: str | None, as_json: bool, url: str | None, data: str | None, config_path: Path | None
) -> None:
    """List the documents."""
    import msgspec

    from gateway.reporting import document_line

    for document in _all_documents(collection, url, data, config_path):
        click.echo(msgspec.json.encode(document).decode() if as_json else document_line(document))


@documents.command("remove")
@click.argument("document_ids", nargs=-1, required=True, type=Text(), metavar="DOCUMENT_ID...")
@url_option
@data_option
@config_option
def remove_documents(
    document_ids: tuple[str, ...], url: str | None, data: str | None, config_path: Path | None
) -> None:
    """Remove documents, by the ids that `refdesk documents list` shows."""
    if url:
        from gateway.client import Client

        with Client(url) as client:
            for document_id in document_ids:
                client.remove(document_id)
                click.echo(f"removed {document_id}")
        return
    config = load(config_path, data)
    from gateway.desk import open_library

    with open_library(config) as library:
        for document_id in document_ids:
            library.whole.remove(document_id)
            click.echo(f"removed {document_id}")


def _all_documents(collection: str | None, url: str | None, data: str | None, config_path: Path | None) -> Any:
    """Every document as a dict, a page at a time."""
    import msgspec

    limit, offset = 200, 0
    if url:
        from gateway.client import Client

        with Client(url) as client:
            while page := client.documents(collection=collection, offset=offset, limit=limit):
                yield from page
                offset += len(page)
        return
    config = load(config_path, data)
    from gateway.desk import open_library

    with open_library(config) as library:
        while page := library.whole.documents(collection=collection, offset=offset, limit=limit)[0]:
            yield from map(msgspec.to_builtins, page)
            offset += len(page)


@click.group()
def jobs() -> None:
    """See what a server reads; cancel it, or try again what failed.

    What is sent to a server and what lies in the folders that it watches is read job by job.
    """


@jobs.command("list")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(["queued", "parsing", "embedding", "done", "failed", "cancelled"]),
    help="Only those in this state; may be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per job.")
@url_option
@data_option
@config_option
def list_jobs(
    states: tuple[str, ...], as_json: bool, url: str | None, data: str | None, config_path: Path | None
) -> None:
    """List the jobs, the newest first."""
    import msgspec

    from gateway.reporting import job_line

    for job in _all_jobs(states, url, data, config_path):
        click.echo(msgspec.json.encode(job).decode() if as_json else job_line(job))


@jobs.command("cancel")
@click.argument("job_ids", nargs=-1, required=True, type=Text(), metavar="JOB_ID...")
@url_option
@data_option
@config_option
def cancel_jobs(job_ids: tuple[str, ...], url: str | None, data: str | None, config_path: Path | None) -> None:
    """Cancel jobs, by the ids that `refdesk jobs list` shows; nothing of them is stored."""
    _change_jobs("cancel", job_ids, url, data, config_path)


@jobs.command("retry")
@click.argument("job_ids", nargs=-1, required=True, type=Text(), metavar="JOB_ID...")
@url_option
@data_option
@config_option
def retry_jobs(job_ids: tuple[str, ...], url: str | None, data: str | None, config_path: Path | None) -> None:
    """Queue jobs again that failed or were cancelled."""
    _change_jobs("retry", job_ids, url, data, config_path)


def _all_jobs(states: tuple[str, ...], url: str | None, data: str | None, config_path: Path | None) -> Iterator[Any]:
    """Every job as a dict, a page at a time."""
    import msgspec

    limit, offset = 200, 0
    if url:
        from gateway.client import Client

        with Client(url) as client:
            while page := client.jobs(states=states, offset=offset, limit=limit):
                yield from page
                offset += len(page)
        return
    config = load(config_path, data)
    from gateway.desk import open_library
    from retrieval import OPERATOR

    with open_library(config) as library:
        while page := library.jobs.jobs(OPERATOR, states, offset=offset, limit=limit)[0]:
            yield from map(msgspec.to_builtins, page)
            offset += len(page)


def _change_jobs(
    change: str, job_ids: tuple[str, ...], url: str | None, data: str | None, config_path: Path | None
) -> None:
    import msgspec

    from gateway.reporting import job_line

    if url:
        from gateway.client import Client

        with Client(url) as client:
            for job_id in job_ids:
                click.echo(job_line(client.change_job(job_id, change)))
        return
    config = load(config_path, data)
    from gateway.desk import open_library
    from retrieval import OPERATOR

    with open_library(config) as library:
        for job_id in job_ids:
            click.echo(job_line(msgspec.to_builtins(getattr(library.jobs, change)(OPERATOR, job_id))))


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@data_option
@config_option
def backup(file: Path, data: str | None, config_path: Path | None) -> None:
    """Copy the library to FILE, also while a server is using it.

    FILE holds everything: documents, passages, embeddings, who may read what.  Bring it back by
    `refdesk restore FILE`.
    """
    data_dir = _folder(load(config_path, data))
    from retrieval.sqlite.backup import back_up

    count = back_up(data_dir, file)
    click.echo(f"{count} documents, {file.stat().st_size / 2**20:.1f} MiB in {file}")


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--replace", is_flag=True, help="Also where there is a library already; that one is kept beside it.")
@data_option
@config_option
def restore(file: Path, replace: bool, data: str | None, config_path: Path | None) -> None:
    """Make the library what FILE holds, a backup.  No server may be using it."""
    data_dir = _folder(load(config_path, data))
    from retrieval.sqlite.backup import restore as bring_back

    count = bring_back(file, data_dir, replace)
    click.echo(f"{count} documents in {data_dir}")


@click.command()
@click.option("--repair", is_flag=True, help="Make again what can be made from the rest, and say what can't.")
@data_option
@config_option
def check(repair: bool, data: str | None, config_path: Path | None) -> int:
    """Look for damage in the whole library.

    Looks at the database's pages, the text of every document and its passages, full text, words and
    embeddings, and who may read what.  With --repair all that can be made from the rest is made
    again.  Documents that have to be added again are named.  No server may be using the library.
    The exit code is 1 where something is wrong, with --repair where something still is.
    """
    data_dir = _folder(load(config_path, data))
    from gateway.reporting import Progress, printable
    from retrieval.sqlite.checking import check as look

    with Progress() as progress:
        checked = look(data_dir, repair, progress)
    for what in dict.fromkeys(checked.found + checked.left):
        click.echo(printable(what if what in checked.left else f"repaired: {what}"))
    if not checked.found:
        click.echo(f"{checked.documents} documents, nothing is wrong")
    elif not repair:
        click.echo("`refdesk check --repair` makes again what can be made from the rest")
    return 1 if checked.left else 0


def _folder(config: Config) -> Path:
    """Where the library lies.  Raises ClickException where it lies in a database server."""
    if config.retrieval.database:
        raise click.ClickException(
            "documents are kept in PostgreSQL (retrieval.database): copy, bring back and check them by its own "
            "pg_dump, pg_restore and pg_amcheck"
        )
    return config.data_dir
