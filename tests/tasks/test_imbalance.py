"""Rare classes: weights by an owner's own counts, and batches that draw classes alike."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from fedsplit.data import balanced_batches
from fedsplit.errors import ConfigError
from fedsplit.owners.samples import Samples, text_identity
from fedsplit.owners.split.protected_labels import own_class_weights
from fedsplit.owners.split.schedule import passes_of
from fedsplit.settings import read_settings
from fedsplit.tasks import TaggedWords, balanced_weights, task_of
from simulations.core.owner_samples import owner_samples
from simulations.split.centralised import CentralisedTwin
from strategies.base_model import load_base
from tests.strategies.conftest import make_config, run_locally, texts, tiny_bert

__all__ = ["make_config", "run_locally", "texts", "tiny_bert"]  # fixtures

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60)


@given(labels=LABELS)
@settings(max_examples=60, deadline=None)
def test_weights_are_scikit_learns(labels: list[int]) -> None:
    there = sorted(set(labels))
    expected = compute_class_weight("balanced", classes=np.array(there), y=np.array(labels))
    found = balanced_weights(torch.tensor(labels), 6)
    assert [found[c] for c in there] == pytest.approx(expected.tolist())
    assert all(found[c] == 1.0 for c in range(6) if c not in there)


def test_tags_are_weighed_by_an_owners_own_words() -> None:
    tags = [[0, 0, 1], [0, 2, 0, 0], [0]]
    texts = tuple(torch.tensor([[n, t] for n, t in enumerate(own)]) for own in tags)
    samples = Samples(
        tuple(torch.arange(len(own)) for own in tags),
        None,
        tuple(text_identity(str(own)) for own in tags),
        words=TaggedWords(("O", "B-a", "I-a"), texts),
    )
    flat = np.array([tag for own in tags for tag in own])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=flat)
    assert own_class_weights(samples, 3) == pytest.approx(expected.tolist())


def test_weights_are_cut_to_what_a_server_accepts() -> None:
    labels = torch.tensor([0] * 999 + [1])
    assert balanced_weights(labels, 2) == [pytest.approx(1000 / 1998), 100.0]


@given(labels=LABELS, size=st.integers(1, 12), seed=st.integers(0, 9), epoch=st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_batches_are_those_of_an_epoch_and_no_slot_is_twice_in_one(
    labels: list[int], size: int, seed: int, epoch: int
) -> None:
    n = len(labels)
    batches = balanced_batches(labels, size, seed, epoch)
    assert [len(b) for b in batches] == [min(size, n - at) for at in range(0, n, size)]
    assert all(len(set(b.tolist())) == len(b) and 0 <= b.min() <= b.max() < n for b in batches)
    drawn = Counter(int(slot) for batch in batches for slot in batch)
    for c in set(labels):
        own = [drawn[slot] for slot in range(n) if labels[slot] == c]
        assert max(own) - min(own) <= 1
    again = balanced_batches(labels, size, seed, epoch)
    assert [b.tolist() for b in batches] == [b.tolist() for b in again]


def test_every_class_is_expected_as_often_as_any_other() -> None:
    labels = np.array([0] * 70 + [1] * 24 + [2] * 6)
    batches = [b for epoch in range(150) for b in balanced_batches(labels, 10, 3, epoch)]
    counts = np.array([np.bincount(labels[b], minlength=3) for b in batches])
    assert counts.min() >= 3  # 10/3 to a slot less or more
    assert counts.max() <= 4
    assert np.allclose(counts.mean(0), 10 / 3, atol=0.05)
    # A class of fewer slots than its share is whole in every batch; the others share the rest.
    few = [np.bincount(labels[b], minlength=3) for b in balanced_batches(labels, 30, 3, 0)[:3]]
    assert [row.tolist() for row in few] == [[12, 12, 6]] * 3


def test_epochs_and_seeds_have_draws_of_their_own() -> None:
    labels = [0] * 30 + [1] * 10
    plans = [
        np.concatenate(balanced_batches(labels, 8, s, e)).tolist()
        for s, e in ((0, 0), (0, 1), (1, 0))
    ]
    assert plans[0] != plans[1]
    assert plans[0] != plans[2]


@given(labels=LABELS, size=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_passes_are_those_of_the_text_that_is_drawn_most(labels: list[int], size: int) -> None:
    batches = balanced_batches(labels, size, 0, 0) + balanced_batches(labels, size, 0, 1)
    passes = passes_of(batches, len(labels))
    for end in range(1, len(batches) + 1):
        drawn = Counter(int(slot) for batch in batches[:end] for slot in batch)
        assert sum(passes[:end]) >= max(drawn.values()) - 1e-9
    assert sum(passes) == pytest.approx(max(2.0, *drawn.values()))
    assert min(passes) >= -1e-9


WEIGHTED = {"model.labels": 3, "train.class-weights": "balanced"}
SAMPLED = {"model.labels": 3, "train.sampler": "balanced"}


@pytest.mark.parametrize(
    ("flat", "name"),
    [
        (WEIGHTED | {"model.task": "causal-lm"}, "train.class-weights"),
        (WEIGHTED | {"model.task": "regression", "model.label-range": "0,1"}, "class-weights"),
        (WEIGHTED | {"model.task": "multi-label"}, "train.class-weights"),
        (
            WEIGHTED | {"labels.protection": "client-head", "dp.noise-multiplier": 1.0},
            "class-weights='balanced': must be numbers with dp.noise-multiplier",
        ),
        (
            WEIGHTED | {"labels.protection": "randomised-response", "labels.debias": True},
            "train.class-weights",
        ),
        (SAMPLED | {"model.task": "multi-label"}, "train.sampler"),
        (SAMPLED | {"model.task": "causal-lm"}, "train.sampler"),
        (SAMPLED | {"train.sampler": "rare"}, "train.sampler"),
        (SAMPLED | {"split.bottom": "joint"}, "train.sampler"),
        (
            SAMPLED | {"labels.protection": "client-head+none", "dp.noise-multiplier": 1.0},
            "train.sampler='balanced': must be uniform with dp.noise-multiplier",
        ),
        *(
            (SAMPLED | {"labels.protection": p, "train.method": m}, "train.sampler='balanced'")
            for p, m in (
                ("client-head", "all"),
                ("client-tail", "head"),
                ("row-noise", "all"),
                ("client-head+row-noise", "all"),
            )
        ),
    ],
)
def test_settings_that_contradict_are_refused_by_name(flat: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        read_settings(flat)


@pytest.mark.parametrize("protection", ["none", "client-head+none", "randomised-response"])
def test_draws_by_class_go_where_labels_are_told_or_drawn(protection: str) -> None:
    flat = SAMPLED | WEIGHTED | {"labels.protection": protection}
    assert read_settings(flat).train.sampler == "balanced"


def test_a_row_of_unknown_weight_is_explained_at_its_scale_and_no_other() -> None:
    server = task_of(read_settings(WEIGHTED))
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(64, 3, generator=generator).requires_grad_()
    targets = torch.randint(0, 3, (64,), generator=generator)
    weights = torch.tensor([0.4, 1.0, 100.0])
    loss = (functional.cross_entropy(scores, targets, reduction="none") * weights[targets]).mean()
    (rows,) = torch.autograd.grad(loss, [scores])
    rows, seen = rows * 64, scores.detach()
    assert float(server.unexplained(rows, seen).max()) < 1e-4
    assert float(rows.norm(dim=1).max()) <= server.row_bound
    for crafted in (-rows, rows.roll(1, 1), torch.randn(64, 3, generator=generator) * 50):
        assert float(server.unexplained(crafted, seen).mean()) > server.tolerance
    with pytest.raises(ConfigError, match="class-weights"):
        server.loss(scores, targets)


@pytest.fixture
def rare(tmp_path: Path, texts: Path) -> Path:
    """Texts of which one in ten is of class 2."""
    path = tmp_path / "rare.jsonl"
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    kept = [r for n, r in enumerate(rows) if r["label"] < 2 or n % 4 == 0]
    path.write_text("".join(json.dumps(r) + "\n" for r in kept))
    return path


@pytest.mark.parametrize("setting", ["train__class_weights", "train__sampler"])
def test_the_twin_of_a_run_with_rare_classes(
    make_config: Any, run_locally: Any, rare: Path, setting: str
) -> None:
    options = {"train__optimizer": "sgd", "train__lr": 0.1, "train__max_steps": 4}
    options |= {"data__path": str(rare), "robust__clip": 2.0, setting: "balanced"}
    config = make_config(**options)

    run = run_locally(config)
    twin = CentralisedTwin(config, owner_samples(config, load_base(config).tokenizer))
    twin.run([row["train"]["waves"] for row in run.server["rounds"]])

    central = {n: p.detach() for n, p in twin.top.named_parameters() if n in run.state}
    for name, value in central.items():
        assert float((value - run.state[name]).abs().max()) < 1e-5, name
    assert not any(row["train"].get("charged") for row in run.server["rounds"])


def test_a_policys_counts_hold_for_the_text_that_is_drawn_most(
    make_config: Any,
    run_locally: Any,
    rare: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = tmp_path / "owner.toml"
    monkeypatch.setenv("FEDSPLIT_POLICY", str(policy))

    def run(name: str, sampler: str, rule: str) -> Any:
        policy.write_text(f"[budget]\n{rule}\n")
        policy.chmod(0o600)
        monkeypatch.setenv("FEDSPLIT_HOME", str(tmp_path / name))
        options = {"train__rounds": 1, "train__max_steps": 6, "output__evaluate_every": 0}
        options |= {"data__path": str(rare), "train__sampler": sampler}
        made = run_locally(make_config(output__dir=str(tmp_path / f"run {name}"), **options))
        return made.server["rounds"][0]["train"]["lost"]

    once = "epochs_per_run = 1.0"
    assert run("uniform", "uniform", once) == {}
    with pytest.raises(Exception, match=r"budget\.epochs_per_run"):  # every owner is lost
        run("balanced", "balanced", once)
    assert run("views", "balanced", "views_total = 1") == {}  # the rows are at the server already
