"""What the commands of the command line share: kinds of arguments, and the options for data, settings and a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.naming import collection_name, is_text

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


def data_option(function: Any) -> Any:
    return click.option(
        "--data",
        metavar="DIR",
        help="Directory that holds everything a server keeps (default: $REFDESK_DATA, else the platform's place).",
    )(function)


def config_option(function: Any) -> Any:
    return click.option(
        "--config",
        "config_path",
        metavar="FILE",
        envvar="REFDESK_CONFIG",
        type=click.Path(path_type=Path),
        help="TOML file with settings (default: refdesk.toml in the data directory).",
    )(function)


def url_option(function: Any) -> Any:
    return click.option(
        "--url",
        metavar="URL",
        type=Text(),
        envvar="REFDESK_URL",
        help="Ask a running server, such as http://127.0.0.1:8080, instead of opening the data directory.",
    )(function)


def load(config_path: Path | None, data: str | None, **overrides: Any) -> Config:
    from gateway.config import load_config

    given = {"data": data} | {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(config_path, overrides=given)
