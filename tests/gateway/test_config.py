"""A wrong key, type or value stops the start with one line that names it and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import ConfigError, load_config
from inference import EngineConfig, ScriptedConfig


def load(tmp_path: Path, toml: str = "", environ: dict[str, str] | None = None, **overrides):
    file = tmp_path / "refdesk.toml"
    file.write_text(toml)
    return load_config(file, environ=environ or {}, overrides=overrides)


def test_the_file_the_environment_and_the_command_line_in_that_order(tmp_path):
    config = load(
        tmp_path,
        'data = "/srv/a"\n[server]\nport = 1\nhost = "::1"\n[answers]\ntop_k = 2\n',
        {"REFDESK_SERVER__PORT": "2", "REFDESK_ANSWERS__TOP_K": "3"},
        **{"server.port": 3, "server.host": None},
    )
    assert (config.data, config.server.host, config.server.port, config.answers.top_k) == ("/srv/a", "::1", 3, 3)
    assert isinstance(config.backend, EngineConfig)


def test_a_backend_wholly_from_the_environment(tmp_path):
    environ = {
        "REFDESK_BACKEND__KIND": "scripted",
        "REFDESK_BACKEND__LENGTH": "7",
        "REFDESK_BACKEND__FAIL_BEFORE_FIRST": "true",
        "PATH": "/bin",
    }
    assert load(tmp_path, "", environ).backend == ScriptedConfig(length=7, fail_before_first=True)


def test_the_file_in_the_data_directory_is_found(tmp_path):
    (tmp_path / "refdesk.toml").write_text("[server]\nport = 81\n")
    assert load_config(environ={"REFDESK_DATA": str(tmp_path)}).server.port == 81
    assert load_config(environ={}, overrides={"data": str(tmp_path)}).server.port == 81


@pytest.mark.parametrize(
    ("toml", "environ", "names"),
    [
        ("[server]\nprot = 1", {}, ["server.prot", "host, port"]),
        ("prot = 1", {}, ["prot", "data, server, access, backend"]),
        ("[server]\nport = 'x'", {}, ["server.port", "int"]),
        ("[server]\nport = 99999", {}, ["server.port", "65535"]),
        ("[backend]\nkind = 'x'", {}, ["backend.kind", "'x'", "engine, scripted, openai"]),
        ("[backend]\nkind = 'openai'\nmodel = 'm'", {}, ["backend.base_url is missing"]),
        ("[access]\nmode = 'x'", {}, ["access.mode: 'x'", "'open', 'headers'"]),
        (
            "[[backend.replicas]]\nbackend = {kind = 'openai', base_url = 'http://h', dialect = 'x'}",
            {},
            ["backend.replicas[0].backend.dialect: 'x'", "'generic', 'vllm', 'trtllm', 'sglang', 'llamacpp'"],
        ),
        ("[backend]\nmodell = 'm'", {}, ["backend.modell", "kind, model"]),
        ("[retrieval]\nfloor = 1", {}, ["retrieval.floor", "relevance_floor"]),
        ("[answers]\nprompt = 'odd'", {}, ["answers.prompt", "'odd'", "plain, begun, hinted, quoted, listed"]),
        ("server = 1", {}, ["server"]),
        ("[[watch]]\nfolder = '/a'", {}, ["watch[0].folder", "path, collection, readers"]),
        ("[[watch]]\ncollection = 'a'", {}, ["watch[0].path is missing"]),
        ("[[watch]]\npath = 1", {}, ["watch[0].path", "str"]),
        ("[[watch]]\npath = 'notes'", {}, ["watch.path", "full path", "'notes'"]),
        ("[[watch]]\npath = '~nosuchuser/x'", {}, ["watch.path", "~nosuchuser"]),
        ("[[watch]]\npath = '/a'\n[[watch]]\npath = '/a/b/..'", {}, ["watch.path", "/a", "more than once"]),
        ("[[watch]]\npath = '/a'\nreaders = ['hr']", {}, ["watch", "/a", "'hr' is no reader"]),
        ("[[watch]]\npath = '/a'\ncollection = ''", {}, ["watch", "/a", "1 to 200"]),
        ("[[watch]]\npath = '/a'\nsweep_minutes = 0", {}, ["watch[0].sweep_minutes", "> 0"]),
        ("", {"REFDESK_WATCH": "/a"}, ["REFDESK_WATCH", "array"]),
        ("=", {}, ["not valid TOML"]),
        ("", {"REFDESK_SERVER__PORT": "x"}, ["REFDESK_SERVER__PORT", "server.port", "int"]),
        ("", {"REFDESK_PORT": "1"}, ["REFDESK_PORT", "port is not a setting", "data, server"]),
        ("", {"REFDESK_BACKEND__SIZE": "1"}, ["REFDESK_BACKEND__SIZE", "backend.size"]),
        ("", {"REFDESK_ANSWERS__PROMPT": "odd"}, ["REFDESK_ANSWERS__PROMPT", "'odd'"]),
        ("", {"REFDESK_SERVER__PORT": "-1"}, ["REFDESK_SERVER__PORT", "server.port", ">= 0"]),
        ("", {"REFDESK_BACKEND__THREADS": "many"}, ["REFDESK_BACKEND__THREADS", "backend.threads", "int"]),
        ("", {"REFDESK_A__B__C": "1"}, ["REFDESK_A__B__C: a is not a setting"]),
        ("", {"REFDESK_SERVER__FOO__BAR": "1"}, ["REFDESK_SERVER__FOO__BAR: server.foo is not a setting"]),
        ("", {"REFDESK_SERVER__PORT__X": "1"}, ["REFDESK_SERVER__PORT__X: server.port"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, toml: str, environ: dict[str, str], names: list[str]):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, toml, environ)
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in names), message


def test_folders_to_watch(tmp_path):
    toml = "[[watch]]\npath = '/srv/a/'\nreaders = ['group:hr']\n[[watch]]\npath = '~/b'\nsweep_minutes = 1\n"
    a, b = load(tmp_path, toml).watches
    assert (str(a.path), a.into.readers, a.into.tags, a.into.collection) == ("/srv/a", ("group:hr",), None, "default")
    assert (b.path, b.sweep_seconds, b.into.readers) == (Path.home() / "b", 60, None)


def test_what_the_command_line_says_is_not_blamed_on_the_environment(tmp_path):
    with pytest.raises(ConfigError, match="server.port") as caught:
        load(tmp_path, "", {"REFDESK_SERVER__PORT": "81"}, **{"server.port": 99999})
    assert "REFDESK" not in str(caught.value)


def test_a_home_that_nobody_has(tmp_path):
    config = load(tmp_path, 'data = "~nosuchuser/x"')
    with pytest.raises(ConfigError, match="~nosuchuser"):
        str(config.data_dir)
    with pytest.raises(ConfigError, match="~nosuchuser"):
        load_config(environ={"REFDESK_DATA": "~nosuchuser/x"})


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        load_config(tmp_path / "nowhere.toml", environ={})
