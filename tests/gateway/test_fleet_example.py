"""The worked example of a fleet: its parts fit together, and what it configures is what the gateway takes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from gateway.config import load_config
from inference import FleetConfig

FOLDER = Path(__file__).parents[2] / "inference" / "routing"


@pytest.fixture
def parts() -> dict[tuple[str, str], dict]:
    documents = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


def container(part: dict) -> dict:
    return part["spec"]["template"]["spec"]["containers"][0]


def test_the_gateways_take_their_configuration(parts, tmp_path):
    (name, text), *others = parts["ConfigMap", "refdesk"]["data"].items()
    assert not others
    (tmp_path / name).write_text(text)
    backend = load_config(tmp_path / name, environ={}).backend
    assert isinstance(backend, FleetConfig)
    (replica,) = backend.replicas
    service = parts["Service", "vllm"]
    port = service["spec"]["ports"][0]["port"]
    assert replica.resolve
    assert replica.backend.base_url == f"http://{service['metadata']['name']}:{port}"
    variables = {each["name"]: each.get("value") for each in container(parts["Deployment", "refdesk"])["env"]}
    assert variables["REFDESK_CONFIG"].endswith(name)


def test_services_lead_to_what_is_deployed(parts):
    assert parts["Service", "vllm"]["spec"]["clusterIP"] == "None"
    for name in ("vllm", "refdesk"):
        service, deployment = parts["Service", name]["spec"], parts["Deployment", name]["spec"]
        labels = deployment["template"]["metadata"]["labels"]
        assert service["selector"] == labels == deployment["selector"]["matchLabels"]
        ports = {port["containerPort"] for port in container(parts["Deployment", name])["ports"]}
        assert {port.get("targetPort", port["port"]) for port in service["ports"]} <= ports
        mounted = {mount["name"] for mount in container(parts["Deployment", name])["volumeMounts"]}
        assert mounted == {volume["name"] for volume in deployment["template"]["spec"]["volumes"]}
    pod = parts["Deployment", "refdesk"]["spec"]["template"]["spec"]
    config = tomllib.loads(parts["ConfigMap", "refdesk"]["data"]["refdesk.toml"])
    assert pod["terminationGracePeriodSeconds"] > config["server"]["drain_seconds"] + 10


@pytest.mark.parametrize("page", ["ROUTING.md", "FLEET.md"])
def test_every_configuration_on_the_pages_is_taken(page, tmp_path):
    examples = re.findall(r"```toml\n(.*?)```", (FOLDER / page).read_text(), re.DOTALL)
    assert examples
    for number, text in enumerate(examples):
        (tmp_path / f"{number}.toml").write_text(text)
        load_config(tmp_path / f"{number}.toml", environ={})
