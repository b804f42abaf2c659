"""Laws of split tuning, with real sessions and messages within one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedsplit.data import names_digest
from fedsplit.errors import SessionError
from fedsplit.owners.data_source import simulated_shares
from fedsplit.wire.authentication import Hello


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def test_a_run_trains_the_top_and_reports_every_round(make_config: Any, run_locally: Any) -> None:
    config = make_config()
    run = run_locally(config)
    rounds = run.server["rounds"]
    assert [r["round"] for r in rounds] == [1, 2]
    for row in rounds:
        assert row["train"]["finished"] == ["owner-0", "owner-1", "owner-2"]
        assert row["train"]["lost"] == {}
        assert row["train"]["steps"] == 3
        assert 0 <= row["evaluate"]["metrics"]["accuracy"] <= 1
        assert row["lineage"]["verdict"] in ("in_lineage", "not_shown", "independent")


def test_same_seed_same_model(make_config: Any, run_locally: Any) -> None:
    first = run_locally(make_config()).state
    again = run_locally(make_config()).state
    other = run_locally(make_config(seed=1)).state
    assert distance(first, again) == 0.0
    assert distance(first, other) > 0.0


@pytest.mark.parametrize("bottom", ["frozen", "joint"])
@pytest.mark.parametrize("k", [0, 2])
def test_stream_and_messages_give_the_same_model(
    make_config: Any, run_locally: Any, k: int, bottom: str
) -> None:
    common = {"split__k": k, "split__bottom": bottom, "privacy__mechanism": "dchi"}
    common["privacy__eta"] = 40.0
    stream = run_locally(make_config(**common))
    messages = run_locally(make_config(session__transport="messages", **common))
    assert distance(stream.state, messages.state) == 0.0
    if bottom == "joint":
        theirs = {n: torch.tensor(a.numpy()) for n, a in messages.result.arrays.items()}
        ours = {n: torch.tensor(a.numpy()) for n, a in stream.result.arrays.items()}
        assert distance(ours, theirs) == 0.0


def test_sequential_and_parallel_both_learn_and_differ(make_config: Any, run_locally: Any) -> None:
    parallel = run_locally(make_config())
    sequential = run_locally(make_config(session__schedule="sequential"))
    assert distance(parallel.state, sequential.state) > 0.0
    # One after another makes as many steps as owners times the owners' steps.
    assert sequential.server["rounds"][0]["train"]["steps"] == 9
    assert parallel.server["rounds"][0]["train"]["steps"] == 3


def test_frozen_representations_cross_once(make_config: Any, run_locally: Any) -> None:
    config = make_config(
        train__max_steps=0, train__rounds=3, privacy__mechanism="dchi", privacy__eta=30.0
    )
    rounds = run_locally(config).server["rounds"]
    assert rounds[0]["train"]["row_bytes"] > 0
    assert rounds[0]["evaluate"]["row_bytes"] > 0
    for row in rounds[1:]:
        assert row["train"]["row_bytes"] == 0
        assert row["evaluate"]["row_bytes"] == 0


def test_a_restarted_owner_shows_the_server_nothing_new(
    make_config: Any, run_locally: Any, tmp_path: Path
) -> None:
    common = {"privacy__mechanism": "dchi", "privacy__eta": 30.0}
    first = run_locally(make_config(output__dir=str(tmp_path / "a"), **common), run_id=7)
    second = run_locally(make_config(output__dir=str(tmp_path / "b"), **common), run_id=8)
    ours = load_file(first.folder / "transcript.safetensors")
    theirs = load_file(second.folder / "transcript.safetensors")
    assert distance(ours, theirs) == 0.0


def test_joint_bottoms_are_averaged_and_move(make_config: Any, run_locally: Any) -> None:
    config = make_config(split__bottom="joint", split__k=1, train__bottom_lr=1e-2)
    run = run_locally(config)
    final = {n: torch.tensor(a.numpy()) for n, a in run.result.arrays.items()}
    from fedsplit.models.splitting.halves import split
    from strategies.base_model import load_base

    bottom, _ = split(load_base(config).model, 1)
    start = {n: p.detach() for n, p in bottom.named_parameters()}
    assert distance(start, final) > 1e-3
    # The averaged bottom is what every owner continued from, in round 2 and in evaluation.
    assert run.server["rounds"][1]["train"]["finished"] == ["owner-0", "owner-1", "owner-2"]


def test_language_modelling(make_config: Any, run_locally: Any, tiny_llama: Path) -> None:
    config = make_config(
        model__name=str(tiny_llama), model__task="causal-lm", split__k=1, train__rounds=4
    )
    rounds = run_locally(config).server["rounds"]
    losses = [r["evaluate"]["metrics"]["loss"] for r in rounds]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["head", "lora", "bitfit", "ia3", "adapter"])
def test_every_trainable_part(make_config: Any, run_locally: Any, method: str) -> None:
    run = run_locally(make_config(train__method=method, train__rounds=1))
    assert run.server["trainable_share"] < 0.5
    assert run.server["rounds"][0]["lineage"]["verdict"] == "in_lineage"


def test_waves_when_owners_outnumber_slots(make_config: Any, run_locally: Any) -> None:
    config = make_config(data__owners=5, session__wave=2, train__max_steps=2)
    run = run_locally(config, slots=2)
    for row in run.server["rounds"]:
        assert [len(w) for w in row["train"]["waves"]] == [2, 2, 1]
        assert sorted(row["train"]["finished"]) == [f"owner-{i}" for i in range(5)]
        assert row["train"]["steps"] == 6


def test_sampling_by_name_is_reproducible(make_config: Any, run_locally: Any) -> None:
    config = make_config(data__owners=5, train__fraction=0.4, train__max_steps=1)
    first = run_locally(config, first=1000).server["rounds"]
    again = run_locally(config, first=5000).server["rounds"]  # other node ids, same owners
    for a, b in zip(first, again, strict=True):
        assert len(a["train"]["finished"]) == 2
        assert a["train"]["finished"] == b["train"]["finished"]


def test_one_list_of_classes_for_all_owners(make_config: Any, run_locally: Any) -> None:
    def hello(owner: str, *names: str) -> Hello:
        return Hello(7, 1, 1, "train", owner, "", names_digest(names) if names else "")

    strategy = run_locally(make_config(train__rounds=1, train__max_steps=1)).strategy
    strategy._classes = None
    for owner in (hello("a", "no", "yes"), hello("b", "no", "yes"), hello("c")):
        strategy._check_classes(owner)
    for other in (("yes", "no"), ("no", "yes", "?"), ("0", "1")):
        with pytest.raises(SessionError, match="classes of owner 'd': must be those of a"):
            strategy._check_classes(hello("d", *other))


@pytest.mark.parametrize("transport", ["stream", "messages"])
def test_counts_of_classes_are_all_owners_held_out_texts(
    make_config: Any, run_locally: Any, transport: str
) -> None:
    config = make_config(train__rounds=1, train__max_steps=2, session__transport=transport)
    found = run_locally(config).server["rounds"][-1]["evaluate"]["metrics"]
    counts = torch.tensor(found["confusion"])
    labels = [
        y for _, test in simulated_shares(config.data, config.seed, True) for y in test.labels
    ]
    assert counts.sum(1).tolist() == torch.tensor(labels).bincount(minlength=3).tolist()
    assert float(counts.trace() / counts.sum()) == pytest.approx(found["accuracy"])
    assert {"macro-f1", "micro-f1", "mcc", "balanced-accuracy"} <= found.keys()
    assert found["micro-f1"] == pytest.approx(found["accuracy"])
    assert not any("confusion" in key for row in found["owners"].values() for key in row)


@pytest.mark.parametrize(
    ("rules", "leave"),
    [
        ("[reports]\nmin_texts = 1\n", False),
        ("[reports]\ncounts = true\n", True),
        ("[reports]\ncounts = false\n", False),
        ("[reports]\ncounts = true\nepsilon = 1.0\n", False),
        ("[reports]\ncounts = true\nallow = false\n", False),
    ],
)
def test_counts_leave_only_as_the_owner_says(
    make_config: Any,
    run_locally: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rules: str,
    leave: bool,
) -> None:
    policy = tmp_path / "owner.toml"
    policy.write_text(rules)
    policy.chmod(0o600)
    monkeypatch.setenv("FEDSPLIT_POLICY", str(policy))
    run = run_locally(make_config(train__rounds=1, train__max_steps=1))
    row = run.server["rounds"][-1]["evaluate"]
    assert row["lost"] == {}
    assert ("confusion" in row["metrics"]) is leave
