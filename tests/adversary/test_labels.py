"""A server that lies to read labels: each way once read all, and reads no more than allowed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsplit.models.bundle.bottom import Bundle
from fedsplit.owners.data_source import held_out
from fedsplit.owners.policy.refusals import TOLD
from fedsplit.owners.split.schedule import slot_order
from fedsplit.privacy.secret import OwnerSecret
from tests.adversary.lying import LyingServer, Owner, Taken, nearest_class, settings

SECRET = OwnerSecret(bytes(range(32)))
RECOVERY = "[labels]\nmax_recovery = 0.75\n"


def truth(owner: Owner, split: str = "train") -> list[int]:
    """Return the true label of each slot of a split."""
    sides = held_out(owner.texts, 0.2, SECRET)
    own = sides[split == "test"]
    return [owner.labels[own[i]] for i in slot_order(SECRET, split, len(own))]


def zeros(slots: list[int]) -> Tensor:
    return torch.zeros(len(slots), 2)


def read(taken: Taken, says: Callable[[list[int]], Tensor]) -> dict[int, int]:
    """Return slot -> label as the gradients tell it."""
    found: dict[int, int] = {}
    for step, sent in taken.gradients.items():
        slots = taken.slots[step]
        found |= dict(zip(slots, nearest_class(sent, says(slots)), strict=True))
    return found


def right(taken: Taken, owner: Owner, says: Callable[[list[int]], Tensor] = zeros) -> int:
    """Return how many labels were read rightly."""
    labels = truth(owner)
    return sum(labels[slot] == label for slot, label in read(taken, says).items())


@pytest.mark.parametrize(
    "protection",
    [
        {"labels__protection": "none"},
        {"labels__protection": "max-norm"},
        {"labels__protection": "marvell", "labels__noise_power": 1e-9},
    ],
)
def test_protections_that_a_server_makes_void_are_found_out(
    server: LyingServer,
    owner: Callable[..., Owner],
    bundles: dict[str, Bundle],
    protection: dict[str, Any],
) -> None:
    open_, strict = owner(name="open"), owner(RECOVERY, name="strict")
    asked = settings(**protection)
    before = server.split(open_, asked, bundles["bottom"], zeros)
    assert right(before, open_) == len(truth(open_)) > 30
    after = server.split(strict, asked, bundles["bottom"], zeros)
    assert "labels.max_recovery" in after.refusal
    assert right(after, strict) <= 12
    again = server.split(strict, asked, bundles["bottom"], zeros)  # what was read stays read
    assert right(again, strict) <= 12


def test_weak_noise_is_refused_by_name(
    server: LyingServer, owner: Callable[..., Owner], bundles: dict[str, Bundle]
) -> None:
    strict = owner("[labels]\nmin_noise_power = 2.0\nrequire = ['marvell']\n")
    weak = settings(labels__protection="marvell", labels__noise_power=1e-9)
    assert "labels.min_noise_power" in server.split(strict, weak, bundles["bottom"], zeros).refusal
    other = settings(labels__protection="max-norm")
    assert "labels.require" in server.split(strict, other, bundles["bottom"], zeros).refusal


def test_strong_noise_passes(
    server: LyingServer, owner: Callable[..., Owner], bundles: dict[str, Bundle]
) -> None:
    strict = owner(RECOVERY)
    honest = settings(labels__protection="marvell", labels__noise_power=40.0)
    taken = server.split(strict, honest, bundles["bottom"], zeros)
    assert taken.refusal == ""
    assert right(taken, strict) < 0.8 * len(truth(strict))


def test_a_head_that_the_server_knows_is_inverted_by_its_owner_first(
    server: LyingServer, owner: Callable[..., Owner], bundles: dict[str, Bundle]
) -> None:
    def hidden(slots: list[int]) -> Tensor:
        return torch.ones(len(slots), 32)

    for protection in ("client-head", "client-head+max-norm"):
        strict = owner(RECOVERY, name=protection)
        asked = settings(labels__protection=protection)
        taken = server.split(strict, asked, bundles["head"], hidden)
        assert "labels.max_recovery" in taken.refusal
        assert sum(map(len, taken.gradients.values())) <= 24  # three of five steps


def test_labels_are_drawn_once_whatever_is_asked(
    server: LyingServer, owner: Callable[..., Owner], bundles: dict[str, Bundle]
) -> None:
    """Ninety draws at slightly different epsilon read every label; there is one."""
    victim = owner()
    first = read(server.split(victim, _drawn(), bundles["bottom"], zeros), zeros)
    for changes in ({"model__max_tokens": 5}, {"seed": 9}, {"data__test_share": 0.5}):
        taken = server.split(victim, _drawn(**changes), bundles["bottom"], zeros)
        assert read(taken, zeros) == first
    for changes in ({"labels__epsilon": 1.001}, {"labels__epsilon": 0.9}):
        taken = server.split(victim, _drawn(**changes), bundles["bottom"], zeros)
        assert "labels.epsilon" in taken.refusal
        assert taken.gradients == {}
    taken = server.split(victim, _drawn(model__labels=3), bundles["bottom"], zeros)
    assert "labels.classes" in taken.refusal
    labels = truth(victim)
    share = sum(labels[s] == y for s, y in first.items()) / len(labels)
    assert share < 0.731 + 3 * math.sqrt(0.731 * 0.269 / len(labels))


def test_the_policy_fixes_epsilon(
    server: LyingServer, owner: Callable[..., Owner], bundles: dict[str, Bundle]
) -> None:
    victim = owner("[labels]\nepsilon = 0.5\n")
    taken = server.split(victim, _drawn(labels__epsilon=1.0), bundles["bottom"], zeros)
    assert "labels.epsilon" in taken.refusal
    assert [line["kind"] for line in victim.ledger()] == ["error"]


def _drawn(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"labels__protection": "randomised-response", "labels__epsilon": 1.0}
    return settings(**base | changes)


# ---- reports ------------------------------------------------------------------------------------

STEP = 2e-3


def packed(slots: list[int]) -> Tensor:
    """Return logits whose average loss has one binary digit per slot."""
    half = torch.tensor([STEP * 2.0 ** -(i % 12) / 2 for i in slots])
    return torch.stack([half, -half], dim=1)


def unpacked(loss: float, labels: int, count: int) -> list[int]:
    """Return the labels that an average loss of :func:`packed` carries, by trying all."""
    best, found = math.inf, 0
    for bits in range(1 << labels):
        chosen = torch.tensor([(bits >> i) & 1 for i in range(labels)])
        rows = torch.nn.functional.cross_entropy(packed(list(range(labels))), chosen)
        if abs(float(rows) - loss) < best:
            best, found = abs(float(rows) - loss), bits
    return [(found >> i) & 1 for i in range(labels)]


def test_an_average_carries_no_labels(
    server: LyingServer, owner: Callable[..., Owner], bundles: dict[str, Bundle]
) -> None:
    exact = owner(name="exact", count=30)
    labels = truth(exact, "test")
    assert 4 <= len(labels) <= 11
    before = server.split(exact, settings(), bundles["bottom"], packed, "evaluate")
    assert unpacked(before.metrics["loss"], len(labels), len(labels)) == labels
    few = owner("[reports]\nmin_texts = 100\n", name="few", count=30)
    refused = server.split(few, settings(), bundles["bottom"], packed, "evaluate")
    assert "reports.min_texts" in refused.refusal
    none = owner("[reports]\nallow = false\n", name="none", count=30)
    silent = server.split(none, settings(), bundles["bottom"], packed, "evaluate")
    assert not {"loss", "accuracy"} & silent.metrics.keys()
    # Little noise: that of the template moves most averages below zero, and all of these are
    # reported alike.
    rules = "[reports]\nepsilon = 60.0\nmax_per_day = 6\nmax_epsilon = 600.0\n"
    noisy = owner(rules, name="noisy", count=30)
    told = [
        server.split(noisy, settings(), bundles["bottom"], packed, "evaluate") for _ in range(7)
    ]
    losses = [one.metrics["loss"] for one in told[:6]]
    assert any(unpacked(loss, len(labels), len(labels)) != labels for loss in losses)
    assert max(abs(loss - before.metrics["loss"]) for loss in losses) > STEP
    assert len(set(losses)) > 1  # noise of its own
    assert "reports.max_per_day" in told[6].refusal


def test_outputs_out_of_bounds_are_clipped_or_refused_without_a_value(
    server: LyingServer, owner: Callable[..., Owner], bundles: dict[str, Bundle]
) -> None:
    victim = owner()

    def huge(slots: list[int]) -> Tensor:
        return torch.tensor([[9e5, -9e5]]).repeat(len(slots), 1)

    taken = server.split(victim, settings(), bundles["bottom"], huge, "evaluate")
    assert taken.metrics["loss"] <= 60.0
    sentences = set(TOLD.values())
    for bad in (
        lambda slots: torch.zeros(len(slots), 5),
        lambda slots: torch.zeros(len(slots) + 1, 2),
        lambda slots: torch.zeros(len(slots), 3),
    ):
        taken = server.split(victim, settings(), bundles["bottom"], bad)
        assert taken.told
        assert all(text.partition(": ")[2] in sentences for text in taken.told)


# ---- the owner's own split ----------------------------------------------------------------------


def test_no_setting_moves_a_text_between_training_and_evaluation(
    server: LyingServer, owner: Callable[..., Owner], bundles: dict[str, Bundle]
) -> None:
    victim, seen = owner(), set()
    for changes in ({}, {"data__test_share": 0.9}, {"seed": 5}, {"data__limit": 3}):
        flat = settings(**changes)
        taken = server.split(victim, flat, bundles["bottom"], zeros, "evaluate")
        names = [n for line in victim.ledger() for n in line.get("samples", [])]
        seen.add(json.dumps([taken.metrics["num-examples"], sorted(set(names))]))
    assert len(seen) == 1
