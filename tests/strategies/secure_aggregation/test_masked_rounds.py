"""Whole offsite runs under secure aggregation: equal to plain averaging, whoever drops out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, RunError
from fedsplit.wire.message_types import SECURE_TYPE
from fedsplit.wire.secure_sum import KEYS, MASKED, REVEAL, SECURE, SHARES
from strategies.offsite_tuning.strategy import OffsiteTuning
from tests.strategies.local_grid import LocalGrid

FREE = {"robust__clip": 0.0, "robust__weight_cap": 0.0, "robust__screen": False}
MASKS = {**FREE, "secure__aggregation": True, "secure__bound": 1.0}


class Dropping(LocalGrid):
    """A grid whose owners fail at a phase of the masked sum: index -> phase, or ``train``."""

    def __init__(self, config: RunConfig, lost: dict[int, str]) -> None:
        super().__init__(config, config.data.owners)
        self.lost = lost
        self.before: Callable[[Message], None] = lambda message: None

    def _work(self, message: Message, replies: list[Message]) -> None:
        index = self.nodes[message.metadata.dst_node_id]
        record = message.content.config_records.get(SECURE)
        at = "train" if message.metadata.message_type == "train" else None
        if message.metadata.message_type == SECURE_TYPE and record is not None:
            at = str(record["phase"])
        if at is not None and self.lost.get(index) == at:
            made = Message(Error(code=8, reason="gone"), reply_to=message)
            made.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
            replies.append(made)
            return
        super()._work(message, replies)


def run(config: RunConfig, lost: dict[int, str] | None = None) -> tuple[Any, Any, dict[str, Any]]:
    grid = Dropping(config, lost or {})
    with OffsiteTuning.open(config, run_id=grid.run_id) as strategy:
        result = strategy.start(grid)
    server = json.loads((Path(config.output.dir) / "server.json").read_text())
    return grid, result, server


def final(result: Any) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in result.arrays.items()}


def differ(one: Any, other: Any) -> float:
    a, b = final(one), final(other)
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


@pytest.mark.parametrize(
    ("averaging", "method", "neighbours"), [("fedavg", "full", 0), ("fedadam", "lora", 4)]
)
def test_a_masked_run_is_the_plain_run_within_the_stated_error(
    quick: Any, tmp_path: Path, averaging: str, method: str, neighbours: int
) -> None:
    same = {"data__owners": 6, "offsite__averaging": averaging, "offsite__method": method}
    same["train__rounds"] = 2
    plain = run(quick(**same, **FREE, output__dir=str(tmp_path / "plain")))
    grid, result, server = run(quick(**same, **MASKS, secure__neighbours=neighbours))
    facts = [row["secure_aggregation"] for row in server["rounds"]]
    assert [f["in_sum"] for f in facts] == [f["roster"] for f in facts] == [6, 6]
    assert [f["neighbours"] for f in facts] == [neighbours or 5] * 2
    errors = [f["error"] for f in facts]
    assert max(errors) < 1e-4
    # FedAdam divides by what was measured, so errors of the mean are not errors of its step.
    allowed = sum(errors) + 1e-6 if averaging == "fedavg" else 1e-3
    assert differ(plain[1], result) <= allowed
    for p, m in zip(plain[2]["rounds"], server["rounds"], strict=True):
        told, asked = m["train"]["metrics"], p["train"]["metrics"]
        assert told["loss"] == pytest.approx(asked["loss"], abs=1e-3)
        assert told["num-examples"] == asked["num-examples"]
    # Nothing of one owner is read beside its name.
    trained = [r for r in grid.replies if r.metadata.message_type == "train"]
    assert len(trained) == 12
    for reply in trained:
        assert list(reply.content.array_records) == [MASKED]
        (report,) = reply.content.metric_records.values()
        assert list(report) == ["train-seconds"]
    assert "owners" not in server["rounds"][0]["lineage"]
    assert "secure aggregation" in server["rounds"][0]["lineage"]["note"]


@pytest.mark.parametrize("lost", [{3: "train", 5: "train"}, {1: KEYS, 2: SHARES, 4: REVEAL}])
def test_owners_that_drop_out_cost_their_own_part_alone(
    quick: Any, tmp_path: Path, lost: dict[int, str]
) -> None:
    same = {"data__owners": 8, "train__rounds": 1}
    out = {i for i, phase in lost.items() if phase in (KEYS, SHARES, "train")}
    plain = run(
        quick(**same, **FREE, output__dir=str(tmp_path / "plain")), dict.fromkeys(out, "train")
    )
    masked = run(quick(**same, **MASKS), lost)
    row = masked[2]["rounds"][0]
    assert row["secure_aggregation"]["in_sum"] == 8 - len(out)
    assert set(row["train"]["lost"]) >= {f"owner-{i}" for i in out if lost[i] != KEYS}
    assert differ(plain[1], masked[1]) <= row["secure_aggregation"]["error"] + 1e-6


@pytest.mark.parametrize("phase", ["train", REVEAL])
def test_more_dropouts_than_the_threshold_leaves_change_nothing_and_say_so(
    quick: Any, phase: str
) -> None:
    config = quick(**MASKS, data__owners=7, train__rounds=1)
    grid = Dropping(config, dict.fromkeys(range(3), phase))
    with OffsiteTuning.open(config, run_id=grid.run_id) as strategy:
        before = {n: a.numpy().copy() for n, a in strategy.initial_arrays.items()}
        strategy.start(grid)
        after = {n: a.numpy() for n, a in strategy.initial_arrays.items()}
    row = json.loads((Path(config.output.dir) / "server.json").read_text())["rounds"][0]
    assert "must be >= 4 (secure.threshold); nothing can be said" in row["lineage"]["note"]
    assert "plug_in_loss" not in row
    assert all(np.array_equal(before[n], after[n]) for n in before)


def test_too_few_owners_are_not_added_up(quick: Any) -> None:
    config = quick(**MASKS, data__owners=4, train__rounds=1, secure__min_owners=4)
    with pytest.raises(RunError, match="owners with keys=3: must be >= 4"):
        run(config, {0: KEYS})


def test_the_gate_still_refuses_a_sum_that_is_not_in_lineage(
    quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsplit.owners.offsite.owner import AdapterOwner

    honest = AdapterOwner.weights

    def foreign(self: AdapterOwner) -> dict[str, Any]:
        return {name: t.roll(1, 0) * -3.0 for name, t in honest(self).items()}

    monkeypatch.setattr(AdapterOwner, "weights", foreign)
    config = quick(
        **{**MASKS, "secure__bound": 100.0}, data__owners=3, train__rounds=1, lineage__gate="reject"
    )
    _, _, server = run(config)
    lineage = server["rounds"][0]["lineage"]
    assert lineage["rejected"]
    assert not lineage.get("quarantined")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("robust__screen", True),
        ("robust__clip", 2.0),
        ("robust__weight_cap", 2.0),
        ("offsite__averaging", "krum"),
        ("offsite__averaging", "fedmedian"),
        ("offsite__averaging", "fedtrimmedavg"),
        ("offsite__central_dp_clip", 1.0),
    ],
)
def test_what_needs_single_updates_is_refused_by_name(
    offsite: Any, setting: str, value: Any
) -> None:
    name = setting.replace("__", ".").replace("_", "-")
    with pytest.raises(ConfigError, match=rf"{name}=.*with secure\.aggregation"):
        offsite(**{**MASKS, setting: value})


def test_settings_that_could_wrap_around_or_average_nothing_are_refused(
    offsite: Any, make_config: Any
) -> None:
    with pytest.raises(ConfigError, match="would wrap around"):
        offsite(**MASKS, secure__most_targets=2**30)
    with pytest.raises(ConfigError, match="no weights of owners are averaged"):
        make_config(secure__aggregation=True)
