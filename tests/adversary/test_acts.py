"""A rule belongs to the act: whatever message asks, what it makes leave is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsplit.errors import PolicyError
from fedsplit.models.bundle.bottom import Bundle
from fedsplit.owners.ledger.chain import Ledger
from fedsplit.owners.ledger.check import ACTS, DisclosureCheck
from fedsplit.owners.ledger.disclosure import Averages, Training, Weights
from fedsplit.owners.ledger.session import SessionFacts
from fedsplit.owners.policy.rules import Policy
from fedsplit.privacy.dp.accounting import NoisySteps, composed_epsilon
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.wire.message_types import STEP_TYPE
from tests.adversary.lying import LyingServer, Owner, settings


def zeros(slots: list[int]) -> Tensor:
    return torch.zeros(len(slots), 2)


def nothing_left(owner: Owner) -> bool:
    return {line["kind"] for line in owner.ledger()} <= {"error"}


@pytest.mark.parametrize("strategy", ["serving", "offsite-tuning", "split-tuning"])
def test_a_message_is_of_the_strategy_that_the_policy_allows(
    server: LyingServer, owner: Callable[..., Owner], bundles: dict[str, Bundle], strategy: str
) -> None:
    victim = owner('[app]\nstrategies = ["serving"]\n')
    taken = server.split(victim, settings(strategy=strategy), bundles["bottom"], zeros)
    assert taken.refusal
    assert taken.up == []
    assert nothing_left(victim)


@pytest.mark.parametrize("mode", ["predict", "evaluate", "TRAIN", ""])
def test_a_training_message_asks_for_training(
    server: LyingServer, owner: Callable[..., Owner], bundles: dict[str, Bundle], mode: str
) -> None:
    victim = owner()
    taken = server.split(victim, settings(), bundles["bottom"], zeros, mode=mode)
    assert taken.refusal.startswith("SessionError")
    assert nothing_left(victim)


@pytest.mark.parametrize("transport", ["stream", "messages"])
@pytest.mark.parametrize("strategy", ["split-tuning", "offsite-tuning"])
def test_steps_travel_by_an_allowed_transport(
    server: LyingServer, owner: Callable[..., Owner], transport: str, strategy: str
) -> None:
    rules = '[transport]\nallowed = ["stream"]\n[app]\nstrategies = ["offsite-tuning"]\n'
    for policy in (rules, '[transport]\nallowed = ["stream"]\n'):
        victim = owner(policy, name=f"{len(policy)}")
        offered = {"transport": transport, "digest": "a" * 64}
        flat = settings(strategy=strategy)
        taken = server.session(victim, flat, lambda peer: None, kind=STEP_TYPE, **offered)
        assert taken.refusal
        assert nothing_left(victim)


def check(
    folder: Path, strategy: str, mode: str, policy: str = "", run: int = 1
) -> DisclosureCheck:
    folder.mkdir(exist_ok=True)
    facts = SessionFacts(run, "x", 1, mode, "a" * 64, strategy=strategy)
    return DisclosureCheck(
        Ledger(folder), facts, Policy.parse(policy.encode()), OwnerSecret(bytes(32))
    )


def test_what_a_strategy_does_not_show_never_leaves(tmp_path: Path) -> None:
    """Whatever code asks, by the type of what would leave."""
    averages = Averages(metrics={"loss": 1.0}, texts=9)
    weights = Weights(tensors={"w": torch.zeros(2)})
    for strategy, mode in [*ACTS, ("", ""), ("serving", "train"), ("other", "train")]:
        kinds = ACTS.get((strategy, mode), frozenset())
        for shown in (averages, weights):
            out = check(tmp_path / f"{strategy}{mode}{shown.kind}", strategy, mode)
            if shown.kind not in kinds:
                with pytest.raises(PolicyError, match="must not leave"):
                    out.release(shown)
    out = check(tmp_path / "x", "split-tuning", "train")
    with pytest.raises(PolicyError, match="training was not recorded"):
        out.release(weights)
    allowed = '[app]\nstrategies = ["serving"]'
    with pytest.raises(PolicyError, match=r"app\.strategies"):
        check(tmp_path / "y", "split-tuning", "train", allowed).release(averages)


def test_trained_weights_leave_after_their_training(tmp_path: Path) -> None:
    out = check(tmp_path, "offsite-tuning", "train")
    out.release(Training(steps=3, batch=4, samples=9, epochs=1.0))
    out.release(Weights(tensors={"w": torch.zeros(2)}))


def test_what_dp_sgd_costs_is_composed_over_runs(tmp_path: Path) -> None:
    policy = "[budget]\nmax_dp_epsilon = 20.0\n[offsite]\nmax_epsilon = 10.0\nmin_batch = 4\n"
    noise, spent, refused = NoisySteps(1.0, 0.25, 20), [], ()
    for run in range(1, 7):
        out = check(tmp_path, "offsite-tuning", "train", policy, run)
        with pytest.raises(PolicyError, match=r"offsite\.min_batch"):
            out.release(Training(steps=20, batch=1, samples=16))
        try:
            out.release(Training(steps=20, batch=4, samples=16, epochs=1.0, noise=noise))
        except PolicyError as error:
            refused = error.rules
            break
        spent.append(run)
    assert refused == ("budget.max_dp_epsilon",)
    costs = [composed_epsilon([noise] * n, 1e-5) for n in range(1, len(spent) + 2)]
    assert len(spent) >= 2
    assert costs[0] < 10.0
    assert costs[-2] <= 20.0 < costs[-1]
    with pytest.raises(PolicyError, match=r"offsite\.max_epsilon"):
        check(tmp_path, "offsite-tuning", "train", policy, 1).release(
            Training(steps=20, batch=4, samples=16, noise=noise)
        )
