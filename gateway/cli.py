"""The command line `refdesk`.  Errors are one line on stderr and exit code 2."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.naming import DEFAULT_COLLECTION, collection_name, is_text

if TYPE_CHECKING:
    from gateway.config import Config


class Text(click.ParamType):
    """An argument that goes into JSON or the library, where the shell's odd bytes have no place."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not is_text(value):
            self.fail("it is not valid UTF-8", param, ctx)
        return value


class Collection(Text):
    """The name of a collection."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return collection_name(super().convert(value, param, ctx))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; always ends by SystemExit."""
    try:
        code = refdesk.main(args=arguments, prog_name="refdesk", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as help_wanted:
        click.echo(help_wanted.ctx.get_help() if help_wanted.ctx else "")
        code = 0
    except click.ClickException as error:
        _complain(error.format_message())
        code = 2
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except OSError as error:
        if error.filename is None:
            raise
        _complain(f"{error.filename}: {(error.strerror or str(error)).lower()}")
        code = 2
    except Exception as error:
        # Every error of ours has a code and a message for the reader; the rest are bugs and show where they are.
        if not isinstance(getattr(error, "code", None), str):
            raise
        _complain(str(error))
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> None:
    click.echo(f"refdesk: {' '.join(message.split())}", err=True)


def _data_option(function: Any) -> Any:
    return click.option(
        "--data",
        metavar="DIR",
        help="Directory that holds everything a server keeps (default: $REFDESK_DATA, else the platform's place).",
    )(function)


def _config_option(function: Any) -> Any:
    return click.option(
        "--config",
        "config_path",
        metavar="FILE",
        envvar="REFDESK_CONFIG",
        type=click.Path(path_type=Path),
        help="TOML file with settings (default: refdesk.toml in the data directory).",
    )(function)


def _url_option(function: Any) -> Any:
    return click.option(
        "--url",
        metavar="URL",
        type=Text(),
        envvar="REFDESK_URL",
        help="Ask a running server, such as http://127.0.0.1:8080, instead of opening the data directory.",
    )(function)


def _load(config_path: Path | None, data: str | None, **overrides: Any) -> Config:
    from gateway.config import load_config

    given = {"data": data} | {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(config_path, overrides=given)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("-v", "--verbose", is_flag=True, help="Log every request and what the server does to stderr.")
@click.version_option(package_name="refdesk")
def refdesk(verbose: bool) -> None:
    """Ask your documents: streamed answers with citations.

    \b
    Try it:                   refdesk demo
    With your own documents:  refdesk ingest ~/notes
                              refdesk serve
                              refdesk ask "How do I renew a certificate?"

    Every setting is a key in a TOML file and an environment variable: server.port is
    REFDESK_SERVER__PORT.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    for talkative in ("httpx", "faiss.loader", "sentence_transformers"):
        logging.getLogger(talkative).setLevel(logging.WARNING)


@refdesk.command()
@click.option("--host", help="Address to listen on (default 127.0.0.1).")
@click.option("--port", type=int, help="Port to listen on (default 8080; 0 takes any free one).")
@click.option("--model", type=Text(), help='Folder, .gguf file or name of a model (backend.model; default "smollm2").')
@click.option(
    "--quantization",
    type=click.Choice(["none", "w8a8", "w8a16", "w4a16", "fp8", "mxfp4"]),
    help="Round the model's weights: faster, for a loss (backend.quantization; default none).",
)
@_data_option
@_config_option
def serve(
    host: str | None,
    port: int | None,
    model: str | None,
    quantization: str | None,
    data: str | None,
    config_path: Path | None,
) -> None:
    """Serve the search page and the API.

    The page is at /, the API's description at /schema.  SIGTERM and Ctrl-C let open answers
    finish for server.drain_seconds.
    """
    config = _load(
        config_path,
        data,
        server__host=host,
        server__port=port,
        backend__model=model,
        backend__quantization=quantization,
    )
    from gateway.serving import address_of, bind, leave
    from gateway.serving import serve as run

    sock = bind(config.server.host, config.server.port)
    address = address_of(sock)
    click.echo(f"refdesk: loading {config.data_dir}")
    run(config, sock, on_ready=lambda: click.echo(f"refdesk: ready at {address}"))
    leave(0)


@refdesk.command()
@click.option("--host", help="Address to listen on (default 127.0.0.1).")
@click.option("--port", type=int, help="Port to listen on (default 8080; 0 takes any free one).")
@_data_option
@_config_option
def demo(host: str | None, port: int | None, data: str | None, config_path: Path | None) -> None:
    """Serve a sample corpus, the Python manual, to see what this is.

    It has a data directory of its own unless one is given.  An empty one is filled first; one that holds documents
    is served as it is.
    """
    config = _load(config_path, data, server__host=host, server__port=port)
    import msgspec

    from gateway.desk import in_daemon_thread
    from gateway.serving import address_of, bind, leave
    from gateway.serving import serve as run

    if not config.data:
        config = msgspec.structs.replace(config, data=f"{config.data_dir}-demo")
    sock = bind(config.server.host, config.server.port)
    address = address_of(sock)
    # In a thread that ends: the OpenMP threads of the main one would stay, and the engine wants all cores.
    total = asyncio.run(in_daemon_thread(lambda: _fill_with_sample(config)))
    click.echo(f"refdesk: {total} documents in {config.data_dir}; loading the model")

    def announce() -> None:
        click.echo(
            f"refdesk: ready. Open {address} or ask from a terminal:\n\n"
            f"  curl -N {address}/v1/answers -H 'Content-Type: application/json' \\\n"
            """    -d '{"question": "What does the with statement do?", "stream": true}'\n"""
        )

    run(config, sock, on_ready=announce)
    leave(0)


def _fill_with_sample(config: Config) -> int:
    """Put the sample corpus into an empty library; the number of documents in it then."""
    from gateway.desk import open_library
    from gateway.reporting import Progress
    from retrieval import SAMPLE_COLLECTION, sample_documents

    with open_library(config) as library:
        if not library.whole.documents(limit=1)[1]:
            click.echo("refdesk: putting the Python manual's topics into the library")
            with Progress() as progress:
                library.ingest_documents(sample_documents(), collection=SAMPLE_COLLECTION, progress=progress)
        return library.whole.documents(limit=1)[1]


@refdesk.command()
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
    default=("public",),
    show_default=True,
    help="Who may read them: public, tenant:NAME, group:NAME or user:NAME; may be given several times.",
)
@click.option("--tag", "tags", multiple=True, type=Text(), help="A tag for filters; may be given several times.")
@_data_option
@_config_option
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
    config = _load(config_path, data)
    from gateway.desk import open_library
    from gateway.reporting import Progress, summary
    from retrieval.access import checked

    missing = [path for path in paths if not path.exists()]
    if missing:
        raise click.ClickException(f"{missing[0]} does not exist")
    try:
        for reader in readers:
            checked(reader)
    except ValueError as error:
        raise click.UsageError(f"--reader: {error}") from error
    with open_library(config) as library, Progress() as progress:
        report = library.ingest_paths(paths, collection=collection, readers=readers, tags=tags, progress=progress)
    for name, reason in report.failed:
        click.echo(f"refdesk: not read: {name}: {reason}", err=True)
    for name, reason in report.unread:
        click.echo(f"refdesk: not read, a part of {name}: {reason}", err=True)
    click.echo(summary(report))
    return 1 if report.failed else 0


@refdesk.command()
@click.argument("question", type=Text())
@click.option("--collection", type=Collection(), help="Ask only this collection.")
@click.option("--top-k", type=click.IntRange(1, 20), help="Passages to answer from.")
@click.option("--max-tokens", type=click.IntRange(1, 8192), help="Longest answer, in tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as one JSON object.")
@_url_option
@_data_option
@_config_option
def ask(
    question: str,
    collection: str | None,
    top_k: int | None,
    max_tokens: int | None,
    as_json: bool,
    url: str | None,
    data: str | None,
    config_path: Path | None,
) -> None:
    """Ask a question; the answer streams to the terminal.

    With --url a running server answers; otherwise the model is loaded here, over the data directory.
    """
    given = {"question": question, "collection": collection, "top_k": top_k, "max_tokens": max_tokens}
    request = {key: value for key, value in given.items() if value is not None}
    from gateway.reporting import AnswerPrinter

    printer = AnswerPrinter(as_json=as_json)
    if url:
        from gateway.client import Client

        with Client(url) as client:
            for name, content in client.answer(request):
                printer(name, content)
    else:
        config = _load(config_path, data)
        from gateway.inprocess import answer_here

        answer_here(config, request, printer)
    printer.finish()


@refdesk.group()
def documents() -> None:
    """List or remove documents."""


@documents.command("list")
@click.option("--collection", type=Collection(), help="Only this collection.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per document.")
@_url_option
@_data_option
@_config_option
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
@_url_option
@_data_option
@_config_option
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
    config = _load(config_path, data)
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
    config = _load(config_path, data)
    from gateway.desk import open_library

    with open_library(config) as library:
        while page := library.whole.documents(collection=collection, offset=offset, limit=limit)[0]:
            yield from map(msgspec.to_builtins, page)
            offset += len(page)


if __name__ == "__main__":
    main()
