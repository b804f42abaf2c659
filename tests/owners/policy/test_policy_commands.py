"""An owner's rules about the app that runs, and the commands that show and check them."""

from __future__ import annotations

import math
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.errors import ConfigError
from fedsplit.owners.app_digest import digest_of_app, running_app
from fedsplit.owners.policy import description
from fedsplit.owners.policy.description import openings, restrictions
from fedsplit.owners.policy.rule_table import policy_rules
from fedsplit.owners.policy.rules import Policy

DIGEST = "ab" * 32

TEMPLATE = description.TEMPLATE.read_text()


def policy(text: str) -> Policy:
    return Policy.parse(text.encode())


def test_a_bundle_and_its_installed_folder_have_one_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "flwr" / "apps" / "fedsplit.fedsplit.0.1.0.12345678"
    files = {"pyproject.toml": b"[project]", "strategies/server_app.py": b"app = 1"}
    bundle = tmp_path / "app.fab"
    with zipfile.ZipFile(bundle, "w") as archive:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            archive.writestr(name, content)
        archive.writestr(".info/CONTENT", "hashes")
    (folder / "strategies" / "__pycache__").mkdir()
    (folder / "strategies" / "__pycache__" / "server_app.pyc").write_bytes(b"x")
    before = digest_of_app(bundle)
    assert digest_of_app(folder) == before

    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert running_app() is None
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    assert running_app() == folder.resolve()
    (folder / "strategies" / "server_app.py").write_bytes(b"app = 2")
    assert digest_of_app(folder) != before
    with pytest.raises(ConfigError, match=r"must be a \.fab file"):
        digest_of_app(folder / "pyproject.toml")


# ---- in words -----------------------------------------------------------------------------------


def test_every_rule_has_words_and_the_template_is_a_policy() -> None:
    template = policy(TEMPLATE)
    # A rule that is commented out stands at the start of its line.
    active = re.sub(r"(?m)^# (?=[a-z_]+ = )", "", TEMPLATE).replace('"..."', f'"{DIGEST}"')
    full = policy(active)  # what is commented out is valid too
    missing = {"model.names", "noise.max_epsilon", "noise.max_nats"}  # of what it does not allow
    assert set(policy_rules()) - set(full.rules) == missing
    for rules in (template, full, Policy({})):
        said = {rule for rule, _, _ in restrictions(rules)}
        assert said == set(rules.rules)
        assert not said & {rule for rule, _ in openings(rules)}
    assert (
        len(openings(Policy({}))) == len(policy_rules()) - 1
    )  # no date to begin with means nothing


def test_init_and_check(tmp_path: Path) -> None:
    run = CliRunner()
    path = str(tmp_path / "owner.toml")
    assert run.invoke(app_cli, ["policy", "init", path]).exit_code == 0
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert isinstance(run.invoke(app_cli, ["policy", "init", path]).exception, ConfigError)
    told = run.invoke(app_cli, ["policy", "check", path])
    assert told.exit_code == 0
    assert "not restricted" in told.stdout
    settings = '[privacy]\nmechanism = "dchi"\nnoise-ratio = 6.0\nrow-clip = "auto"\n'
    (tmp_path / "run.toml").write_text(settings)
    asked = ["policy", "check", path, "--against", str(tmp_path / "run.toml")]
    refused = run.invoke(app_cli, asked)
    assert refused.exit_code == 1
    assert "labels.protection: asked 'none'" in refused.stdout
    accepted = run.invoke(app_cli, [*asked, "--against", "labels.protection=randomised-response"])
    assert accepted.exit_code == 0
    assert "accepted" in accepted.stdout
    assert math.isclose(policy(TEMPLATE)["noise.min_ratio"], 6.0)
