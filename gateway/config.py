"""Every setting of a server: one TOML file, and the same keys as environment variables.

    refdesk.toml                 environment
    data = "/srv/refdesk"        REFDESK_DATA=/srv/refdesk
    [server]
    port = 8080                  REFDESK_SERVER__PORT=8080
    [backend]
    kind = "scripted"            REFDESK_BACKEND__KIND=scripted
    [[watch]]
    path = "/srv/handbook"       only in the file, as are [[backend.replicas]]

The environment wins over the file, the command line over both.  A key, type or value that
isn't known raises `ConfigError` with one line that names the key and what it may be.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from gateway.naming import DEFAULT_COLLECTION, collection_name
from inference import BackendConfig, EngineConfig
from retrieval import RetrievalSettings, Watch
from retrieval.ingest import Into

PREFIX = "REFDESK_"
FILE_NAME = "refdesk.toml"
# Read by the command line itself, not settings of a server.
NOT_SETTINGS = {"REFDESK_CONFIG", "REFDESK_URL"}

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]


class ConfigError(Exception):
    """A setting is wrong; the message is one line that names it."""

    code = "invalid_configuration"


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class ServerConfig(Section):
    """Where to listen, and what the server puts up with.  `drain_seconds`: how long open answers may go on
    after SIGTERM; `slow_reader_seconds`: how long a client may leave a stream unread before it is ended."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    max_upload_mb: Count = 50
    max_body_kb: Count = 1024
    max_question_characters: Count = 4000
    heartbeat_seconds: Seconds = 10.0
    slow_reader_seconds: Seconds = 30.0
    drain_seconds: Annotated[float, Meta(ge=0, le=300)] = 5.0


class AccessConfig(Section):
    """Who asks.  `mode` "open": nobody signs in, all read what is public and may change it.  "headers": a proxy in
    front of refdesk, and nothing but it, may reach it, and says in these headers who was signed in; groups are parted
    by commas.  `stewards`: readers, as group:NAME or group:TENANT/NAME, who may change all that they may read."""

    mode: Literal["open", "headers"] = "open"
    user_header: str = "X-Forwarded-User"
    groups_header: str = "X-Forwarded-Groups"
    tenant_header: str = "X-Forwarded-Tenant"
    stewards: list[str] = []


class AnswersConfig(Section):
    """How an answer is made.  `top_k` passages are the sources; the model reads the best `reads` of them, in a prompt
    of the shape `prompt` (see `gateway.composing`).  The defaults are measured for the default model, which is so
    small that more than one passage confuses it: raise `reads` with a larger model.
    `neighbours`: passages before and behind each of these in its document that the model reads with it.
    `follow_ups`: a question that refers to the one before it is looked for together with that one ("joined"), or as
    the model says it so that it stands by itself ("rewritten", for larger models).
    `quotes` closest sentences lead the reply; `max_tokens` and `temperature` hold where a request has none.
    `warm_seconds`: how long, after a start and until somebody asks, the passages that are read most are computed into
    the cache, for backends that share documents; with 0 they are not, and nothing is remembered of what is read."""

    top_k: Annotated[int, Meta(ge=1, le=20)] = 4
    reads: Annotated[int, Meta(ge=1, le=20)] = 1
    neighbours: Annotated[int, Meta(ge=0, le=5)] = 0
    follow_ups: Literal["joined", "rewritten"] = "joined"
    max_tokens: Annotated[int, Meta(ge=1, le=8192)] = 128
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.0
    quotes: Annotated[int, Meta(ge=0, le=10)] = 2
    prompt: str = "listed"
    warm_seconds: Annotated[float, Meta(ge=0)] = 30.0


class WatchConfig(Section):
    """A folder whose documents follow its files while a server runs: added, changed, moved and removed with them.
    `path` in full; `collection`, `readers` and `tags` as of `refdesk ingest`.  Every `sweep_minutes` all of it is
    looked through, for what the system didn't tell of."""

    path: str
    collection: str = DEFAULT_COLLECTION
    readers: list[str] | None = None
    tags: list[str] | None = None
    sweep_minutes: Seconds = 15.0


class Config(Section):
    """All settings.  `data` is the directory that holds everything the server keeps."""

    data: str = ""
    server: ServerConfig = ServerConfig()
    access: AccessConfig = AccessConfig()
    backend: BackendConfig = EngineConfig()
    retrieval: RetrievalSettings = RetrievalSettings()
    answers: AnswersConfig = AnswersConfig()
    watch: list[WatchConfig] = []

    @property
    def watches(self) -> list[Watch]:
        """The folders to watch.  Raises ConfigError."""
        found: dict[Path, Watch] = {}
        for each in self.watch:
            path = Path(os.path.normpath(_directory(each.path, "watch.path")))
            if not path.is_absolute():
                raise ConfigError(f"watch.path: give the full path, not {each.path!r}")
            if path in found:
                raise ConfigError(f"watch.path: {path} is named more than once")
            readers, tags = (None if given is None else tuple(given) for given in (each.readers, each.tags))
            try:
                into = Into(collection_name(each.collection), readers, "", tags)
                into.check()
            except ValueError as error:
                raise ConfigError(f"watch, of {path}: {error}") from None
            found[path] = Watch(path, into, 60 * each.sweep_minutes)
        return list(found.values())

    @property
    def data_dir(self) -> Path:
        """Raises ConfigError where it hangs on a home directory that can't be found."""
        return _directory(self.data)


def default_data_dir() -> Path:
    """The data directory by the platform's convention."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "refdesk"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "refdesk"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "refdesk"


def load_config(
    path: Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Settings from `path` (or `refdesk.toml` in the data directory, if there), then the environment,
    then `overrides`: dotted keys such as `server.port`, None meaning not given."""
    environ = os.environ if environ is None else environ
    overrides = {key: value for key, value in (overrides or {}).items() if value is not None}
    if path is None:
        data = overrides.get("data") or environ.get(PREFIX + "DATA")
        beside = _directory(data) / FILE_NAME
        path = beside if beside.is_file() else None
    settings = _read(path) if path else {}
    origin = str(path) if path else "settings"
    variables: dict[str, str] = {}
    for name, value in sorted(environ.items()):
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            keys = name.removeprefix(PREFIX).lower().split("__")
            variables[".".join(keys)] = name
            _put(settings, keys, value)
    for key, value in overrides.items():
        _put(settings, key.split("."), value)
        variables.pop(key, None)
    if isinstance(settings.get("backend"), dict):
        usual = "fleet" if "replicas" in settings["backend"] else "engine"
        settings["backend"] = {"kind": usual} | settings["backend"]
    try:
        # Lax, since the environment knows only strings.
        config = msgspec.convert(settings, Config, strict=False)
    except msgspec.ValidationError as error:
        key, explanation = _explain(str(error), settings)
        # REFDESK_A__B is what makes `a` a key, where `a` alone is what is wrong.
        variable = next((name for dotted, name in variables.items() if f"{dotted}.".startswith(f"{key}.")), origin)
        raise ConfigError(f"{variable}: {explanation}") from None
    from gateway.composing import SHAPES

    if config.answers.prompt not in SHAPES:
        raise ConfigError(
            f"{variables.get('answers.prompt', origin)}: answers.prompt: {config.answers.prompt!r} is not a prompt "
            f"shape; allowed: {', '.join(SHAPES)}"
        )
    try:
        config.watches  # noqa: B018  raises
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    return config


def _directory(data: str | None, key: str = "data") -> Path:
    try:
        return Path(data).expanduser() if data else default_data_dir()
    except RuntimeError:
        raise ConfigError(f"{key}: no home directory for {data or '~'!r}; give the full path") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _put(settings: dict[str, Any], keys: list[str], value: Any) -> None:
    *parents, last = keys
    for key in parents:
        child = settings.get(key)
        settings[key] = settings = dict(child) if isinstance(child, dict) else {}
    settings[last] = value


def _explain(message: str, settings: Mapping[str, Any]) -> tuple[str, str]:
    """The dotted key that msgspec's message is about, and a sentence that says what is allowed there."""
    what, _, where = message.partition(" - at `$")
    section = where.rstrip("`").lstrip(".")
    owners, kind = _place(section, settings)
    unknown = re.search(r"unknown field `(.*)`", what)
    missing = re.search(r"missing required field `(.*)`", what)
    key = ".".join(part for part in (section, (unknown or missing or [None, ""])[1]) if part)
    if unknown:
        return key, f"{key} is not a setting; allowed here: {', '.join(_names(owners, kind))}"
    if missing:
        return key, f"{key} is missing"
    if key.endswith("backend.kind"):
        return key, f"{key}: {kind!r} is not a backend; allowed: {', '.join(owners)}"
    if what.startswith("Invalid enum value"):
        parent, _, name = section.rpartition(".")
        choices = _choices(get_type_hints(_owner(*_place(parent, settings)))[name])
        return key, f"{key}: {what.removeprefix('Invalid enum value ')} isn't known; allowed: {', '.join(choices)}"
    return key, f"{key}: {what[:1].lower()}{what[1:]}"


def _place(where: str, settings: Mapping[str, Any]) -> tuple[dict[str | None, type[msgspec.Struct]], Any]:
    """(the structs that may stand there by their `kind`, the `kind` of what does)."""
    found: Any = settings
    owners = _owners(Config)
    kind = None
    for name, index in re.findall(r"(\w+)(?:\[(\d+)\])?", where):
        if name == "kind":
            break
        owners = _owners(get_type_hints(_owner(owners, kind), include_extras=True)[name])
        found = found[name][int(index)] if index else found[name]
        kind = found.get("kind") if isinstance(found, dict) else None
    return owners, kind


def _owners(annotation: Any) -> dict[str | None, type[msgspec.Struct]]:
    """The structs in a type, by their tag."""
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return {annotation.__struct_config__.tag: annotation}
    owners: dict[str | None, type[msgspec.Struct]] = {}
    for part in get_args(annotation):
        owners |= _owners(part)
    return owners


def _owner(owners: Mapping[str | None, type[msgspec.Struct]], kind: str | None) -> type[msgspec.Struct]:
    return owners.get(kind) or next(iter(owners.values()))


def _choices(annotation: Any) -> list[str]:
    """What a Literal allows, None left out."""
    if isinstance(annotation, str):
        return [repr(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _names(owners: Mapping[str | None, type[msgspec.Struct]], kind: str | None) -> list[str]:
    names = [field.encode_name for field in msgspec.structs.fields(_owner(owners, kind))]
    return ["kind", *names] if kind in owners and kind is not None else names
