"""The gate's other tests: norms and scales of everything that changed, and the public loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsplit.config import LineageConfig
from fedsplit.fingerprints.evidence import chain as evidence
from fedsplit.fingerprints.gate.lineage_gate import LineageGate
from fedsplit.fingerprints.gate.scale import ScaleGate, compare
from fedsplit.models.adapters.methods import BlockTuning, MethodSettings
from strategies.offsite_tuning.quality import QualityCheck
from strategies.rounds.lineage_setup import open_chain
from strategies.rounds.lineage_watch import LineageWatch
from tests.strategies.rounds.test_lineage_watch import honest, llama, one_round, updates_of

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return llama()


def watch_of(base: nn.Module, **options: Any) -> LineageWatch:
    watch = LineageWatch(LineageConfig(gate="reject"), None, owners=LineageGate(base), **options)
    watch.expect({n: p.detach() for n, p in base.named_parameters()})
    return watch


def whole(base: nn.Module, seed: int) -> State:
    return {n: p.detach().clone() for n, p in base.named_parameters()} | honest(base, seed)


def matrices_times(factor: float) -> Any:
    return lambda n, t: factor * t if "layers." in n and t.dim() > 1 else t


ATTACKS: dict[str, tuple[Any, str]] = {
    "every block matrix x 1,000": (matrices_times(1000.0), "growth since the base"),
    "every block matrix / 1,000": (matrices_times(1e-3), "growth since the base"),
    "the final norm x -5": (lambda n, t: -5 * t if n == "model.norm.weight" else t, "since the"),
    "the final norm turned around": (
        lambda n, t: -t if n == "model.norm.weight" else t,
        "change since the base",
    ),
    "the embeddings x 1e6": (lambda n, t: 1e6 * t if "embed" in n else t, "growth since the base"),
    "one bias-like vector x 50": (
        lambda n, t: 50 * t if n == "model.layers.1.input_layernorm.weight" else t,
        "model.layers.1.input_layernorm.weight",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_the_score_is_blind_to_is_refused_and_named(base: nn.Module, attack: str) -> None:
    change, told = ATTACKS[attack]
    updates = {name: whole(base, i) for i, name in enumerate("abcd")}
    updates["c"] = {n: change(n, t) for n, t in updates["c"].items()}
    watch = watch_of(base)
    row = one_round(watch, 1, updates)
    assert {o: r["action"] for o, r in row["owners"].items()} == {
        **dict.fromkeys("abd", "accept"),
        "c": "quarantine",
    }
    found = row["owners"]["c"]
    assert found["score"] > 0.9 or "embed" in attack
    assert "scale" in found["tests"] or found["tests"] == ["score"]
    if found["tests"] == ["scale"]:
        assert told in found["reason"]
    assert row["action"] == "accept"
    assert list(row["quarantined"]) == ["c"]


@pytest.mark.parametrize("attack", [n for n in ATTACKS if "1,000" in n or "norm" in n])
def test_an_average_and_the_servers_own_model_are_checked_too(base: nn.Module, attack: str) -> None:
    change, _ = ATTACKS[attack]
    watch = watch_of(base, check_owners=False)
    row = one_round(watch, 1, {"a": {n: change(n, t) for n, t in whole(base, 1).items()}})
    assert row["rejected"]
    assert "scale" in row["tests"]
    assert "average: scale" in row["reason"]

    model = llama()
    watch = LineageWatch(LineageConfig(gate="reject"), LineageGate(model))
    trained = {n: p.detach().clone() for n, p in model.named_parameters()}
    watch.expect({}, {f"model.{n}": t for n, t in trained.items()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(change(name, parameter))
    row = watch.open_round(1)
    watch.check_model(row, model, [f"model.{n}" for n in trained])
    watch.close_round(row)
    assert row["rejected"]
    assert row["tests"] == ["scale"]
    assert "the server's model: scale" in row["reason"]


def test_a_jump_since_the_last_round_is_seen_where_the_base_allows_it(base: nn.Module) -> None:
    watch = watch_of(base)
    one_round(watch, 1, {n: whole(base, i) for i, n in enumerate("abcd")})
    updates = {n: whole(base, i) for i, n in enumerate("abcd")}
    updates["b"] = {n: 1.8 * t if "layers.1" in n else t for n, t in updates["b"].items()}
    row = one_round(watch, 2, updates)
    assert row["owners"]["b"]["action"] == "quarantine"
    assert "since the last round" in row["owners"]["b"]["reason"]


def test_honest_rounds_pass(base: nn.Module) -> None:
    watch = watch_of(base)
    for number in range(1, 6):
        row = one_round(
            watch, number, {n: whole(base, 10 * number + i) for i, n in enumerate("ab")}
        )
        assert row["action"] == "accept"
        assert {r["action"] for r in row["owners"].values()} == {"accept"}
        assert row["owners"]["a"]["scale"]["change-since-base"]["value"] < 0.1


@pytest.mark.parametrize("method", ["bottleneck", "prefix", "lora", "bitfit"])
def test_tensors_that_the_base_has_not_are_checked(method: str) -> None:
    model = llama()
    watch = LineageWatch(LineageConfig(gate="reject"), None, owners=LineageGate(model))
    blocks = {"model.layers.1.": model.get_submodule("model.layers.1")}
    tuning = BlockTuning(model, blocks, MethodSettings(method=method, seed=0))
    start = tuning.state()
    watch.expect(start)
    generator = torch.Generator().manual_seed(0)

    def trained(size: float) -> State:
        state = {n: t + size * torch.randn(t.shape, generator=generator) for n, t in start.items()}
        return {**state, **tuning.dense(state)}

    row = one_round(watch, 1, {"a": trained(0.01), "b": trained(0.01), "c": trained(300.0)})
    assert row["owners"]["a"]["action"] == row["owners"]["b"]["action"] == "accept"
    assert row["owners"]["c"]["action"] == "quarantine"


def test_small_tensors_that_begin_at_zero_may_move() -> None:
    gate = ScaleGate({"w": torch.full((50, 50), 0.05), "b": torch.zeros(50)}, frozenset())
    assert not gate.check({"w": torch.full((50, 50), 0.051), "b": torch.full((50,), 0.005)}).failed
    assert gate.check({"w": torch.full((50, 50), 0.05), "b": torch.full((50,), 5.0)}).failed
    assert compare(torch.zeros(3), torch.zeros(3), 0.0) == (0.0, 0.0)


def test_nan_is_refused_by_name() -> None:
    watch = LineageWatch(LineageConfig(gate="reject"), None)
    watch.expect({"head.weight": torch.ones(4, 4)})
    row = watch.open_round(1)
    kept = watch.screen(row, {"a": {"head.weight": torch.full((4, 4), float("nan"))}})
    assert kept == []
    assert "NaN" in row["owners"]["a"]["reason"]


def test_heads_that_owners_train_are_checked_without_any_block() -> None:
    watch = LineageWatch(LineageConfig(gate="reject"), None)
    head = {"head.weight": 0.1 * torch.ones(4, 4), "head.bias": torch.zeros(4)}
    watch.expect(head)
    good = {n: t + 0.01 for n, t in head.items()}
    row = one_round(watch, 1, {"a": good, "b": good, "c": {n: 1e6 * t for n, t in good.items()}})
    assert [r["action"] for r in row["owners"].values()] == ["accept", "accept", "quarantine"]
    assert row["owners"]["c"]["tests"] == ["scale"]


# ---- evidence, and restarts ---------------------------------------------------------------------


def test_the_evidence_line_says_which_test_failed_and_quarantine_survives_a_restart(
    base: nn.Module, tmp_path: Path
) -> None:
    config = LineageConfig(gate="reject")
    updates = updates_of(base)
    updates["c"] = {n: matrices_times(1000.0)(n, t) for n, t in updates["c"].items()}
    one_round(watch_of(base, chain=open_chain(tmp_path, config)), 1, updates)
    (record,) = evidence.read(tmp_path / "lineage.jsonl")
    details = record.body["details"]
    assert details["owners"]["c"]["tests"] == ["scale"]
    assert "growth since the base is 6.9" in details["owners"]["c"]["reason"]

    again = watch_of(base, chain=open_chain(tmp_path, config))
    assert again.is_quarantined(99, "c")
    assert "scale" in again.quarantined["c"]
    assert not again.is_quarantined(99, "a")
    one_round(again, 2, updates_of(base))
    third = watch_of(base, chain=open_chain(tmp_path, config))
    assert third.is_quarantined(99, "c"), "later rounds repeat who is out"


# ---- the public loss ----------------------------------------------------------------------------


def quality(losses: dict[int, float], gate: str = "reject") -> tuple[LineageWatch, Any]:
    config = LineageConfig(gate=gate, quality=0.1)
    watch = LineageWatch(config, None)
    return watch, QualityCheck(config, 4.0, lambda record: losses[id(record)])


def test_a_round_that_costs_too_much_public_loss_is_refused() -> None:
    from flwr.app import ArrayRecord, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from fedsplit.wire.messages import WEIGHTS

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    mean, parts = ArrayRecord(), {name: ArrayRecord() for name in "abcd"}
    replies = {
        name: Message(RecordDict({WEIGHTS: part}), dst_node_id=1, message_type="train")
        for name, part in parts.items()
    }
    own = {"a": 3.9, "b": 4.3, "c": float("nan"), "d": 4.0}
    losses = {id(replies[n].content.array_records[WEIGHTS]): own[n] for n in own}
    for loss, passes in ((3.5, True), (4.39, True), (4.41, False), (float("nan"), False)):
        watch, check = quality(losses | {id(mean): loss})
        row: dict[str, Any] = {"round": 3, "verdict": "in_lineage"}
        check.check(watch, row, mean, 4.0, replies, {"c": 7})
        if passes:
            assert row["verdict"] == "in_lineage"
            continue
        assert row["verdict"] == "not_shown"
        assert row["tests"] == ["quality"]
        assert list(row["charged"]) == ["c"]
        assert watch.is_quarantined(7, None)
    warned, check = quality(losses | {id(mean): 9.0}, "warn")
    check.check(warned, {"round": 1, "verdict": "in_lineage"}, mean, 4.0, replies, {"c": 7})
    assert not warned.quarantined
