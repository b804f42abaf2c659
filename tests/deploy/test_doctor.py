"""``fedsplit doctor``: every line says what to do, and one that fails hides no other."""

from __future__ import annotations

import json
import shutil
import socket
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.deploy import doctor
from fedsplit.deploy.checks import FAIL, OK, SKIPPED, WARN, Check
from fedsplit.deploy.doctor import Patient, examine
from fedsplit.deploy.keys import make_keys
from tests.tiny_models import save_texts, save_tiny_bert


def looked_at(patient: Patient | None = None) -> dict[str, Check]:
    return {check.name: check for check in examine(patient or Patient())}


def test_every_line_says_what_to_do() -> None:
    found = looked_at()
    assert {"Python", "packages", "ports", "clock", "disk", "GPU"} <= found.keys()
    assert {found[name].state for name in ("certificates", "data", "model")} == {SKIPPED}
    for check in found.values():
        assert check.text
        assert (check.advice == "nothing") == (check.state == OK)


def test_packages_are_compared_with_what_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("safetensors", "opacus", "ray"):
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "peft" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = looked_at()
    assert found["packages"].state == FAIL
    assert "safetensors is not installed" in found["packages"].text
    assert "peft 0.1: must be " in found["packages"].text
    assert found["packages"].advice.startswith("pip install ")
    assert "'safetensors>=" in found["packages"].advice
    assert found["extras"].state == WARN
    assert found["extras"].text == "not installed: dp, simulation"  # flwr[simulation] brings ray


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(doctor, "SERVER_PORTS", (port,))
        taken = looked_at()["ports"]
    assert taken.state == WARN
    assert f"taken: {port}" in taken.text
    assert looked_at()["ports"].state == OK


def test_a_wrong_clock_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_kernel_clock", lambda: doctor.UNSYNCHRONISED)
    assert looked_at()["clock"].state == WARN
    monkeypatch.setattr(doctor, "_kernel_clock", lambda: 0)
    assert looked_at()["clock"].state == OK
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert looked_at()["clock"].state == FAIL


def test_a_full_disk_and_a_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        name, total_memory = "H200", 139 << 30

    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1 << 20))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Card)
    found = looked_at()
    assert (found["disk"].state, found["temporary files"].state) == (WARN, WARN)
    assert found["GPU"].text.startswith("H200 (139 GiB)")


def test_data_and_a_model_are_read(tmp_path: Path) -> None:
    data = save_texts(tmp_path / "texts.jsonl", 30)
    model = save_tiny_bert(tmp_path / "bert")
    found = looked_at(Patient(data=data, model=str(model)))
    assert "30 texts" in found["data"].text
    assert found["labels"].text.startswith("3 classes in 'label': ")
    assert (found["data"].state, found["model"].state) == (OK, OK)

    (model / "config.json").write_text("{")
    found = looked_at(Patient(data=tmp_path / "none.csv", model=str(model)))
    assert (found["data"].state, found["model"].state) == (FAIL, FAIL)
    assert "none.csv" in found["data"].text
    assert found["GPU"].state == OK


@pytest.mark.parametrize(
    ("name", "content", "state", "told"),
    [
        (
            "a.csv",
            "text,label\nx,1.5\ny,2.25\n",
            WARN,
            "from 1.5 to 2.25, for a regression",
        ),
        ("a.jsonl", '{"text": "x", "label": ["a", "b"]}\n', WARN, "sets of 2 classes: a 1, b 1"),
        ("a.conll", "Ann\tB-who\nran\tO\n", WARN, "2 tags of words in 'label'"),
        ("a.csv", "text;label\nx;a\ny;b\n", WARN, "2 classes in 'label': a 1, b 1"),
        ("a.csv", "text,other\nx,a\n", OK, "no column 'label': texts alone"),
        ("a.csv", "text,label\nx,\ny,b\n", FAIL, "label=None: must be a label; the cell is empty"),
    ],
)
def test_labels_of_every_task_are_told(
    tmp_path: Path, name: str, content: str, state: str, told: str
) -> None:
    (tmp_path / name).write_text(content)
    found = {x.name: x for x in doctor._data(Patient(data=tmp_path / name))}
    assert found["data"].state == OK
    assert found["labels"].state == state
    assert told in found["labels"].text


def test_an_owners_files_are_looked_at_too(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", ["localhost"], ["bank"])
    (tmp_path / "node.toml").write_text(
        'superlink = "localhost:1"\nca = "keys/owners/bank/ca.pem"\n'
        'key = "keys/owners/bank/node.key"\nhome = "home"\n'
        '[node]\nowner = "bank"\ndata-path = "missing.jsonl"\n'
    )
    told = tmp_path / "told.json"
    files = ["--node", str(tmp_path / "node.toml"), "--policy", str(tmp_path / "owner.toml")]
    result = CliRunner().invoke(app_cli, ["doctor", *files, "--json", str(told)])
    assert result.exit_code == 1, result.output
    rows: dict[str, Any] = {row["name"]: row for row in json.loads(told.read_text())}
    assert rows["ca"]["state"] == rows["node key"]["state"] == OK
    assert rows["superlink"]["state"] == WARN
    assert (rows["policy"]["state"], rows["data"]["state"]) == (FAIL, FAIL)
    assert "fedsplit policy init" in rows["policy"]["todo"]
    assert all(row["todo"] for row in rows.values())


def test_what_goes_wrong_in_one_line_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("CUDA driver error")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    found = looked_at()
    assert found["GPU"].state == FAIL
    assert "CUDA driver error" in found["GPU"].text
    assert found["disk"].state in (OK, WARN)
