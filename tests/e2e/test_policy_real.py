"""An owner's policy in a real federation: SuperLink, SuperNodes, TLS, one process per message."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedsplit.config import RunConfig
from fedsplit.deploy.flower_commands import find_command
from fedsplit.errors import RunError
from fedsplit.owners.app_digest import digest_of_app
from fedsplit.owners.ledger.chain import read_ledger
from simulations.runtime import federated
from simulations.runtime.federated import deploy
from tests.tiny_models import save_texts, save_tiny_bert

pytestmark = pytest.mark.e2e
OWNERS = ("owner-0", "owner-1")
HONEST = """
[noise]
mechanisms = ["dchi"]
max_eta = 40.0
[model]
bottom = ["frozen"]
[budget]
rounds = 1
views_total = 1
[transport]
allowed = ["stream"]
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("material")
    return {
        "model.name": str(save_tiny_bert(folder / "bert")),
        "model.labels": 3,
        "model.max-tokens": 16,
        "train.rounds": 1,
        "train.batch-size": 4,
        "train.max-steps": 3,
        "train.lr": 1e-2,
        "data.kind": "file",
        "data.path": str(save_texts(folder / "texts.jsonl", 60)),
        "data.owners": 2,
        "data.partition": "iid",
        "privacy.mechanism": "dchi",
        "privacy.eta": 40.0,
        "session.codec": "fp32",
        "output.evaluate-every": 0,
        "output.threads": 1,
    }


@pytest.mark.timeout(600)
def test_a_server_that_breaks_the_policy_is_refused_and_an_honest_one_is_not(
    material: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = tmp_path / "app"  # what the server's bundle is made of, as an owner would review it
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(federated.ROOT / "strategies", app / "strategies", ignore=ignored)
    shutil.copy(federated.ROOT / "pyproject.toml", app)
    home = {**os.environ, "FLWR_HOME": str(tmp_path / "flwr")}
    build = [find_command("flwr"), "build", "--app", str(app)]
    subprocess.run(build, cwd=tmp_path, env=home, check=True, capture_output=True, timeout=120)
    digest = digest_of_app(next(tmp_path.glob("*.fab")))  # fedsplit owner digest app.fab
    monkeypatch.setattr(federated, "ROOT", app)
    policy = tmp_path / "owner.toml"
    policy.write_text(HONEST + f'[app]\ndigest = "{"0" * 64}"\n')
    policy.chmod(0o600)
    monkeypatch.setenv("FEDSPLIT_POLICY", str(policy))  # the machine's environment, not the run's

    broken = {**material, "privacy.eta": 400.0, "session.wave-wait-s": 5.0}
    with pytest.raises(RunError, match="no owner took a step") as caught:
        deploy(RunConfig.from_flat(broken), tmp_path / "broken")
    told = str(caught.value) + (tmp_path / "broken" / "server" / "server.json").read_text()
    assert "noise.max_eta" in told  # with values: these owners are simulated
    assert "app.digest" in told
    for owner in OWNERS:
        kinds = {line["kind"] for line in read_ledger(tmp_path / "broken" / "homes" / owner)}
        assert kinds == {"error"}  # not even HELLO has left

    policy.write_text(HONEST + f'[app]\ndigest = "{digest}"\n')
    _, server = deploy(RunConfig.from_flat(material), tmp_path / "honest")
    (row,) = server["rounds"]
    assert row["train"]["lost"] == {}
    assert row["train"]["finished"] == list(OWNERS)
