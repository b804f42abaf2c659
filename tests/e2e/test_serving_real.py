"""Private inference between real processes: SuperLink, SuperNodes, TLS, an owner's command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fedsplit.config import RunConfig
from simulations.runtime.federated import deploy, owner_environment
from tests.tiny_models import save_texts, save_tiny_bert

pytestmark = pytest.mark.e2e


@pytest.mark.timeout(600)
def test_a_served_model_answers_the_owners_command(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "strategy": "serving",
        "model.name": str(save_tiny_bert(tmp_path / "bert")),
        "model.labels": 3,
        "model.max-tokens": 16,
        "data.kind": "file",
        "data.path": str(save_texts(tmp_path / "texts.jsonl", 40)),
        "data.owners": 2,
        "data.partition": "iid",
        "privacy.mechanism": "dchi",
        "privacy.eta": 40.0,
        "serving.minutes": 1.0,
        "output.threads": 1,
    }
    folder = tmp_path / "run"
    served: dict[str, Any] = {}

    def serve() -> None:
        served["server"] = deploy(RunConfig.from_flat(settings), folder)[1]

    thread = threading.Thread(target=serve)
    thread.start()
    home = folder / "homes" / "owner-0"
    until = time.monotonic() + 120
    while not (home / "serving.json").exists():
        assert time.monotonic() < until, "no offer came"
        assert thread.is_alive(), "the serving run ended"
        time.sleep(0.5)
    texts = ["w1 w2 w3", "w50 w7 w9", "w11 w12"]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    out = tmp_path / "answers.jsonl"
    command = [sys.executable, "-c", "from fedsplit.cli import app; app()", "predict"]
    asked = subprocess.run(
        [*command, "--file", str(tmp_path / "ask.jsonl"), "--home", str(home), "--out", str(out)],
        env={**os.environ, **owner_environment(folder / "homes")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    thread.join()

    assert asked.returncode == 0, asked.stdout + asked.stderr
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [a["text"] for a in answers] == texts
    assert all(sum(a["probabilities"]) == pytest.approx(1.0) for a in answers)
    report = served["server"]["serving"]
    assert report["owners"] == ["owner-0", "owner-1"]
    assert report["texts"] == 3
    assert not report["failed"]
