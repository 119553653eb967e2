"""The command line `refdesk`.  Errors are one line on stderr and exit code 2."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gateway import keeping
from gateway.options import Collection, Text, config_option, data_option, load, url_option

if TYPE_CHECKING:
    from gateway.config import Config


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
    for talkative in ("httpx", "faiss.loader", "sentence_transformers", "watchfiles"):
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
@data_option
@config_option
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
    finish for server.drain_seconds; SIGHUP reads the configuration again, for a fleet whose
    replicas change.
    """

    def read() -> Config:
        return load(
            config_path,
            data,
            server__host=host,
            server__port=port,
            backend__model=model,
            backend__quantization=quantization,
        )

    config = read()
    from gateway.serving import address_of, bind, leave
    from gateway.serving import serve as run

    sock = bind(config.server.host, config.server.port)
    address = address_of(sock)
    click.echo(f"refdesk: loading {config.data_dir}")
    run(config, sock, on_ready=lambda: click.echo(f"refdesk: ready at {address}"), reread=read)
    leave(0)


@refdesk.command()
@click.option("--host", help="Address to listen on (default 127.0.0.1).")
@click.option("--port", type=int, help="Port to listen on (default 8080; 0 takes any free one).")
@data_option
@config_option
def demo(host: str | None, port: int | None, data: str | None, config_path: Path | None) -> None:
    """Serve a sample corpus, the Python manual, to see what this is.

    It has a data directory of its own unless one is given.  An empty one is filled first; one that holds documents
    is served as it is.
    """
    config = load(config_path, data, server__host=host, server__port=port)
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
@click.argument("question", type=Text())
@click.option("--collection", type=Collection(), help="Ask only this collection.")
@click.option("--top-k", type=click.IntRange(1, 20), help="Passages to answer from.")
@click.option("--max-tokens", type=click.IntRange(1, 8192), help="Longest answer, in tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as one JSON object.")
@url_option
@data_option
@config_option
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
        config = load(config_path, data)
        from gateway.inprocess import answer_here

        answer_here(config, request, printer)
    printer.finish()


for command in (keeping.ingest, keeping.documents, keeping.jobs, keeping.backup, keeping.restore, keeping.check):
    refdesk.add_command(command)


if __name__ == "__main__":
    main()
