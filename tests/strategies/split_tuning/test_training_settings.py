"""Accumulated gradients, early stopping and LoRA's forms in whole runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, MetricRecord
from safetensors.torch import load_file

from fedsplit.errors import ConfigError
from fedsplit.models.trained.whole import whole_of_run
from fedsplit.settings import read_settings
from fedsplit.tasks import task_of
from fedsplit.wire.messages import REPORT
from strategies.early_stopping import EarlyStopping
from strategies.rounds.replies import average
from strategies.split_tuning.strategy import SplitTuning
from tests.strategies.rounds.test_failures_replies import replies_of
from tests.strategies.split_tuning.test_centralised_equivalence import (
    PLAIN_SGD,
    Centralised,
    moved,
    whole_name,
    worst,
)


class Accumulated(Centralised):
    """The reference takes one step on the union of every two cohort steps' batches."""

    def run(self, skip: Any = None) -> int:
        taken, plans = 0, [self.plan(owner, 1) for owner in range(len(self.shares))]
        longest = max(len(plan) for plan in plans)
        for step in range(0, longest, 2):
            pair = [s for s in (step, step + 1) if s < longest]
            self.step([x for s in pair for plan in plans if s < len(plan) for x in plan[s]])
            taken += 1
        return taken


def test_accumulated_steps_are_steps_on_the_union(
    make_config: Any, run_locally: Any, tiny_bert: Path
) -> None:
    options = PLAIN_SGD | {"train__accumulate": 2, "train__batch_size": 6}
    config = make_config(split__k=1, train__max_steps=0, train__rounds=1, **options)
    run = run_locally(config)
    reference = Accumulated(config)
    cohort_steps = run.server["rounds"][0]["train"]["steps"]
    assert reference.run() == -(-cohort_steps // 2) >= 3
    assert worst([(whole_name(n, 1), p) for n, p in run.state.items()], reference.model) < 2e-6
    assert moved(reference.model, str(tiny_bert), False) > 1e-3


def test_a_run_ends_with_what_was_best_of_it(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, states = iter([0.9, 0.5, 0.7, float("nan"), 0.1]), {}
    close = SplitTuning.close_evaluation

    def told(self: SplitTuning, context: Any, replies: Any) -> MetricRecord:
        close(self, context, replies)
        states[context.number] = self.parts.model.trainable.state()
        return MetricRecord({"loss": next(losses)})

    monkeypatch.setattr(SplitTuning, "close_evaluation", told)
    run = run_locally(make_config(train__rounds=6, train__patience=2, train__max_steps=1))
    assert sorted(states) == [1, 2, 3, 4]
    stopping = run.server["early_stopping"]
    assert stopping == {"best_round": 2, "best_loss": 0.5, "waited": 2, "stopped": True}
    assert run.server["status"] == "completed"
    kept = load_file(run.folder / "top.safetensors")
    assert all(torch.equal(kept[n], t) for n, t in states[2].items())
    assert any(not torch.equal(kept[n], t) for n, t in states[4].items())


def test_what_was_best_outlives_a_restart() -> None:
    first, second = EarlyStopping(2), EarlyStopping(2)
    assert first.improves(1, 0.5)
    first.keep({"a": torch.ones(1)}, {"numbers": {}})
    assert not first.improves(2, 0.5)
    second.restore(first.state(), first.tensors)
    assert not second.stopped
    assert not second.improves(3, 0.6)
    assert second.stopped
    assert second.report()["best_round"] == 1
    assert second.tensors.keys() == {"a"}
    assert not EarlyStopping(0).stopped


def test_one_owner_decides_neither_what_is_best_nor_when_to_end() -> None:
    honest = {f"owner-{i}": (1.0, 10.0) for i in range(4)}
    watched = EarlyStopping(2)
    assert watched.improves(1, -1e9, honest | {"liar": (-1e9, 20.0)})
    fallen = {name: (0.9, weight) for name, (_, weight) in honest.items()}
    assert watched.improves(2, 1e9, fallen | {"liar": (1e9, 20.0)})

    second = EarlyStopping(2)
    second.keep({}, {})
    second.restore(watched.state(), {})
    risen = {name: (0.95, weight) for name, (_, weight) in honest.items()}
    for stopping in (watched, second):
        assert not stopping.improves(3, -1e9, risen | {"liar": (-1e9, 20.0)})
        assert not stopping.improves(4, -1e9, risen | {"liar": (-2e9, 20.0)})
        assert stopping.stopped
        assert stopping.report()["best_round"] == 2


def test_a_lie_about_a_loss_ends_no_run(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(losses: Iterator[float]) -> Callable[[Message], None]:
        def change(reply: Message) -> None:
            reply.content[REPORT]["loss"] = next(losses)

        return change

    for owner in range(4):
        replies_of(monkeypatch, owner, says(iter([0.9, 0.8, 0.7])), "evaluate")
    replies_of(monkeypatch, 4, says(iter([-1e9, 1e9, 2e9])), "evaluate")
    settings = {"data__owners": 5, "train__rounds": 3, "train__patience": 1}
    found = run_locally(make_config(train__max_steps=1, **settings)).server["early_stopping"]
    assert found["best_round"] == 3
    assert not found["stopped"]


def test_a_higher_score_is_better_and_one_owner_does_not_decide() -> None:
    watched = EarlyStopping(2, "metric", higher=True)
    assert watched.improves(1, 0.5)
    assert not watched.improves(2, 0.4)
    assert not watched.improves(3, float("nan"))
    assert watched.stopped
    assert watched.report() == {"best_round": 1, "best_metric": 0.5, "waited": 2, "stopped": True}
    again = EarlyStopping(2, "metric", higher=True)
    again.restore(watched.state(), {})
    assert again.improves(4, 0.6)
    fresh = EarlyStopping(2, "metric", higher=True)
    fresh.restore(EarlyStopping(2, "metric", higher=True).state(), {})
    assert fresh.improves(1, -1.0)

    honest = {f"owner-{i}": (0.5, 10.0) for i in range(4)}
    watched = EarlyStopping(2, "metric", higher=True)
    assert watched.improves(1, 0.5, honest | {"liar": (1.0, 20.0)})
    risen = {name: (0.6, weight) for name, (_, weight) in honest.items()}
    assert watched.improves(2, 0.4, risen | {"liar": (0.0, 20.0)})
    fallen = {name: (0.55, weight) for name, (_, weight) in honest.items()}
    assert not watched.improves(3, 0.9, fallen | {"liar": (1.0, 20.0)})


@pytest.mark.parametrize("owners", [3, 5])
def test_a_run_watches_the_score_and_not_the_loss(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, owners: int
) -> None:
    def says(losses: Iterator[float], scores: Iterator[float]) -> Callable[[Message], None]:
        def change(reply: Message) -> None:
            reply.content[REPORT]["loss"] = next(losses)
            reply.content[REPORT]["accuracy"] = next(scores)

        return change

    for owner in range(min(owners, 4)):  # the loss falls, the score is best after round 2
        told = says(iter([0.9, 0.8, 0.7]), iter([0.5, 0.75, 0.25]))
        replies_of(monkeypatch, owner, told, "evaluate")
    if owners == 5:  # the last one lies
        replies_of(monkeypatch, 4, says(iter([0.9] * 3), iter([1.0, 0.0, 1.0])), "evaluate")
    settings = {"data__owners": owners, "train__rounds": 3, "train__patience": 3}
    config = make_config(train__max_steps=1, train__watch="metric", **settings)
    found = run_locally(config).server["early_stopping"]
    assert found["best_round"] == 2
    assert found["waited"] == 1
    assert "best_metric" in found


def test_an_owners_score_is_of_its_own_counts() -> None:
    flat = {
        "model.task": "token-classification",
        "model.labels": 3,
        "model.label-names": "O,B-a,I-a",
    }
    task = task_of(read_settings(flat))
    (family, *_) = task.families()
    assert task.headline_of({"loss": 1.0, "targets": 4.0}) is None
    rows = {
        "a": {"loss": 1.0, "targets": 4.0, "num-examples": 2.0, f"{family.name}-0-0": 3.0},
        "b": {"loss": 1.0, "targets": 4.0, "num-examples": 2.0},
    }
    own = task.headline_of(rows["a"])
    owners = average(rows, 0.0, task.scores, task.headline_of)["owners"]
    assert own is not None
    assert {name: row.get("headline") for name, row in owners.items()} == {"a": own, "b": None}
    assert "headline" not in average(rows, 0.0, task.scores)["owners"]["a"]


def test_perplexity_is_better_lower() -> None:
    flat = {"model.task": "causal-lm", "train.patience": 1, "train.watch": "metric"}
    task = task_of(read_settings(flat))
    assert task.lower_is_better
    assert task.headline_of({"loss": 0.0}) == 1.0


@pytest.mark.parametrize("form", ["rslora", "dora"])
def test_a_run_of_another_lora(make_config: Any, run_locally: Any, form: str) -> None:
    settings = {"train__lora_form": form, "train__lora_rank": 2, "train__lora_targets": "query"}
    run = run_locally(make_config(train__method="lora", train__rounds=1, **settings))
    names = {n for n in run.state if ".lora_" in n}
    assert all(".query.lora_" in n for n in names)
    assert any("magnitude" in n for n in names) == (form == "dora")
    assert all(t.shape[0] == 2 for n, t in run.state.items() if ".lora_A." in n)


def test_a_run_on_a_stored_top_is_nearly_the_run_on_a_plain_one(
    make_config: Any, run_locally: Any
) -> None:
    losses, names = {}, {}
    for form, again in (("as-loaded", False), ("int8", True)):
        settings: dict[str, Any] = {"server__frozen_weights": form, "server__checkpointing": again}
        settings |= {"session__deadline_s": 120.0, "session__wave_wait_s": 120.0}
        run = run_locally(make_config(train__method="lora", train__rounds=1, **settings))
        losses[form] = run.server["rounds"][0]["evaluate"]["metrics"]["loss"]
        names[form] = set(run.state)
        whole = whole_of_run(run.folder).loaded.model  # LoRA on the base as it is
        assert all(torch.isfinite(p).all() for p in whole.parameters())
    assert names["int8"] == names["as-loaded"]
    assert losses["int8"] == pytest.approx(losses["as-loaded"], rel=0.02)
    assert losses["int8"] != losses["as-loaded"]


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"train.accumulate": 2, "split.bottom": "joint"}, "1 where owners train a part"),
        ({"train.accumulate": 2, "labels.protection": "client-head"}, "1 where owners train"),
        (
            {"train.accumulate": 2, "strategy": "offsite-tuning", "model.task": "causal-lm"},
            "1 with offsite-tuning",
        ),
        ({"train.patience": 1, "output.evaluate-every": 0}, "evaluate-every=0: must be >= 1"),
        ({"train.watch": "metric"}, "train.watch='metric': must be 'loss' with train.patience=0"),
        ({"train.lora-form": "qlora"}, "train.lora-form='qlora'"),
        ({"train.lora-dropout": 1.0}, r"must be in \[0, 1\)"),
        ({"train.schedule": "steps"}, "train.schedule='steps'"),
    ],
)
def test_settings_that_do_not_go_together(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(flat)
