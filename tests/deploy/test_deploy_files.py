"""The files of deploy/ and the runbook say one thing, and what they say is valid."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsplit.config import RunConfig
from fedsplit.deploy import node
from fedsplit.deploy.node import NodeFile
from fedsplit.owners.policy import description
from fedsplit.owners.policy.rules import Asked, Policy
from tests.deploy.runbook import DEPLOY, ROOT, RUNBOOK, steps

ACTORS = {"model-owner", "hospital", "bank", "insurer"}
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
HARDENED = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "CapabilityBoundingSet": "",
    "RestrictSUIDSGID": "yes",
    "UMask": "0077",
}

RUNBOOK_POLICY = (DEPLOY / "owner.toml").read_text()


class Unit(RawConfigParser):
    """A systemd unit; keys keep their case."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, interpolation=None, delimiters=("=",))
        self.read(path)

    def optionxform(self, optionstr: str) -> str:
        return optionstr


TEMPLATE = description.TEMPLATE.read_text()
NODE = node.TEMPLATE.read_text()


def staying(actor: str) -> list[str]:
    """Return the words of the command that stays at ``actor``, from the runbook."""
    (step,) = [s for s in steps() if s.stays and actor in s.actors]
    (line,) = re.findall(r"^exec (.*)$", step.commands, re.MULTILINE)
    return shlex.split(line)


def settings(name: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tomllib.loads((DEPLOY / name).read_text()).items():
        inner = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else None
        flat |= inner if inner is not None else {key: value}
    return flat


def test_every_block_of_the_runbook_is_run_by_somebody() -> None:
    found = steps()
    assert len(found) >= 12
    assert RUNBOOK.read_text().count("```sh") == len(found)
    for step in found:
        assert step.actors, f"no marker:\n{step.commands}"
        assert set(step.actors) <= ACTORS
        done = subprocess.run(["bash", "-n", "-c", step.commands], check=False)
        assert done.returncode == 0, step.commands


def test_a_block_without_a_marker_is_seen() -> None:
    (step,) = steps("text\n```sh\nls\n```\n")
    assert step.actors == ()
    (step,) = steps("<!-- step: a, b stays -->\n```sh\nls\n```\n")
    assert step.actors == ("a", "b")
    assert step.stays


def test_files_that_the_runbook_names_are_there() -> None:
    for name in re.findall(r"deploy/[\w./-]*\w", RUNBOOK.read_text()):
        assert (ROOT / name).exists() or (ROOT / name.removeprefix("app/")).exists(), name


def test_the_templates_are_what_the_commands_write() -> None:
    assert RUNBOOK_POLICY == TEMPLATE
    assert (DEPLOY / "node.toml").read_text() == NODE


def test_the_node_template_loads() -> None:
    node = NodeFile.load(DEPLOY / "node.toml")
    config = node.node_config(Path("/etc/fedsplit/owner.toml"))
    assert node.superlink == "fed.example.org:9092"
    assert config["policy"] == "/etc/fedsplit/owner.toml"
    assert config["session-ca"] == str(DEPLOY / "keys" / "ca.pem")
    assert config["state-dir"] == "/var/lib/fedsplit"
    commented = re.sub(r"(?m)^# (?=[a-z-]+ = )", "", NODE)
    assert set(tomllib.loads(commented)) == {
        *("superlink", "ca", "key", "home", "session", "port"),
        *("client-certificate", "client-key", "node"),
    }


@pytest.mark.parametrize("name", ["split.toml", "offsite.toml"])
def test_an_owner_who_follows_the_runbook_accepts_the_runs(name: str, tmp_path: Path) -> None:
    config = RunConfig.from_flat(settings(name))
    assert config.session.port == 9093
    # What the runbook's sed commands make of the template.
    text = re.sub(
        r"(?m)^strategies = .*", 'strategies = ["split-tuning", "offsite-tuning"]', RUNBOOK_POLICY
    )
    asked = Asked(config.to_flat(), own_ca=True)
    assert Policy.parse(text.encode()).settings_breaches(asked) == []
    refused = Policy.parse(RUNBOOK_POLICY.encode()).settings_breaches(asked)
    assert [b.rule for b in refused][:1] == (["app.strategies"] if name == "offsite.toml" else [])


def test_a_policy_that_does_not_name_offsite_tuning_refuses_it() -> None:
    """Rules about representations fall away only by the owner's own leave."""
    flat = RunConfig.from_flat(settings("offsite.toml")).to_flat()
    text = TEMPLATE.replace("strategies =", "# strategies =")
    rules = {b.rule for b in Policy.parse(text.encode()).settings_breaches(Asked(flat))}
    assert {"noise.mechanisms", "noise.min_ratio", "labels.protection"} <= rules


def test_the_environment_file_names_what_the_server_reads() -> None:
    lines = (DEPLOY / "superlink.env").read_text().splitlines()
    env = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert {"FEDSPLIT_TLS_CERT", "FEDSPLIT_TLS_KEY", "FEDSPLIT_TLS_CA"} <= env.keys()
    port = settings("split.toml")["session.port"]
    assert env["FEDSPLIT_SESSION_ADDRESS"] == f"fed.example.org:{port}"
    connection = tomllib.loads((DEPLOY / "flower.toml").read_text())["superlink"]
    assert connection[connection["default"]]["root-certificates"] == env["FEDSPLIT_TLS_CA"]


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.stem)
def test_units_start_the_runbooks_commands_and_are_hardened(path: Path) -> None:
    unit = Unit(path)
    actor = "model-owner" if "superlink" in path.name else "hospital"
    program, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert [Path(program).name, *arguments] == staying(actor)
    for key, value in HARDENED.items():
        assert unit["Service"][key] == value, key
    assert unit["Service"]["Restart"] == "always"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.stem)
def test_systemd_understands_the_units(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    # The programs of the runbook's machines are not on this one.
    text = re.sub(r"/opt/fedsplit/\.venv/bin/[a-z-]+(?= )", "/bin/true", text)
    copy = tmp_path / path.name
    copy.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    told = [line for line in done.stderr.splitlines() if path.name in line]
    assert not told, told


def test_compose_starts_the_same_commands() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert shlex.split(services["superlink"]["command"]) == staying("model-owner")
    assert shlex.split(services["supernode"]["command"]) == staying("hospital")
    for service in services.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["user"] != "root"
    # An owner's machine publishes no port, and its settings and data cannot be written.
    owner = services["supernode"]
    assert "ports" not in owner
    volumes = [volume.split(":") for volume in owner["volumes"]]
    assert [v[0] for v in volumes if v[-1] != "ro"] == ["/var/lib/fedsplit"]


def test_proxies_pass_both_ports_through_unopened() -> None:
    nginx = (DEPLOY / "proxy" / "nginx.conf").read_text()
    envoy = yaml.safe_load((DEPLOY / "proxy" / "envoy.yaml").read_text())["static_resources"]
    assert "ssl_preread on" in nginx
    assert "ssl_certificate" not in nginx
    ports = {
        endpoint["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["port_value"]
        for cluster in envoy["clusters"]
        for endpoint in cluster["load_assignment"]["endpoints"]
    }
    assert ports == {9092, 9093} == {int(x) for x in re.findall(r"127\.0\.0\.1:(\d+);", nginx)}
    assert "transport_socket" not in str(envoy)
