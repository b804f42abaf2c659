"""What owners sent, read from their ledgers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsplit.owners.policy.rules import Policy
from simulations.runtime.ledgers import sent_by_owners


def test_what_owners_sent_is_what_the_server_got(
    make_config: Any, run_locally: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_locally(make_config(privacy__mechanism="dchi", privacy__eta=10.0, train__rounds=3))
    (tmp_path / "owner.toml").write_text("[budget]\nviews_total = 5\n")
    (tmp_path / "owner.toml").chmod(0o600)
    monkeypatch.setenv("FEDSPLIT_POLICY", str(tmp_path / "owner.toml"))
    assert Policy.load(tmp_path / "owner.toml").rules

    rows = sent_by_owners(tmp_path / "homes")

    server = json.loads((tmp_path / "server" / "server.json").read_bytes())
    parts = [row[mode] for row in server["rounds"] for mode in ("train", "evaluate")]
    assert [row["owner"] for row in rows] == ["owner-0", "owner-1", "owner-2"]
    assert sum(row["tokens"] for row in rows) == sum(part["row_tokens"] for part in parts)
    got = sum(part["bytes_up"] for part in parts)
    assert 0.9 * got < sum(row["bytes"] for row in rows) <= 1.1 * got
    for row in rows:
        assert row["sessions"] == 6  # training and held-out texts of three rounds
        assert row["views"] == {"max": 1, "median": 1}
        assert row["cost"]["eta"] == {"max": 10.0, "median": 10.0}
        assert row["budget"] == {"budget.views_total": 5}


def test_an_unreadable_ledger_is_told_of_its_owner_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ledger.jsonl").write_text("" if name == "a" else "{}\n")
    whole, broken = sent_by_owners(tmp_path)
    assert (whole["owner"], whole["bytes"]) == ("a", 0)
    assert broken["owner"] == "b"
    assert broken["error"]
    assert sent_by_owners(tmp_path / "nowhere") == []
