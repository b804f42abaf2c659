"""An owner's adapter steps: micro-batches, precision, checkpoints, DP-SGD, bounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedsplit.config import RunConfig
from fedsplit.emulators.build import build_emulator
from fedsplit.emulators.planning.plan import EmulatorPlan
from fedsplit.errors import ConfigError, ModelError
from fedsplit.owners.ledger.spending import TrainingTotals
from fedsplit.owners.offsite.owner import AdapterOwner, Blocks
from fedsplit.owners.offsite.steps import bounded
from fedsplit.privacy.dp.accounting import NoisySteps, spent_epsilon
from fedsplit.privacy.secret import OwnerSecret

BLOCKS = (torch.arange(12 * 9).view(12, 9) * 11) % 57 + 3
PLAN = EmulatorPlan(("adapter", "drop", "adapter"))
SECRET = OwnerSecret.for_simulation(0, "ann")


def owner(secret: OwnerSecret | None = SECRET, **settings: Any) -> AdapterOwner:
    flat = {
        "strategy": "offsite-tuning",
        "model.task": "causal-lm",
        "train.batch-size": 6,
        "train.optimizer": "sgd",
        "train.lr": 0.5,
        "train.clip": 0.0,
        "train.warmup": 0.0,
        "train.schedule": "constant",
        "train.weight-decay": 0.0,
    }
    flat |= {k.replace("__", ".").replace("_", "-"): v for k, v in settings.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                "llama",
                vocab_size=61,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                initializer_range=0.2,
            )
        )
    emulator = build_emulator(model.eval(), PLAN)
    config = RunConfig.from_flat(flat)
    return AdapterOwner(
        emulator, Blocks(BLOCKS, BLOCKS[:2], BLOCKS, BLOCKS[:2]), config, "ann", secret
    )


def after(round_: int = 1, **settings: Any) -> dict[str, torch.Tensor]:
    one = owner(**settings)
    one.train(round_)
    return one.weights()


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[n] - b[n]).pow(2).sum()) for n in a) ** 0.5


@pytest.mark.parametrize("method", ["full", "lora", "bottleneck", "bitfit", "prefix"])
def test_micro_batches_and_checkpoints_are_the_big_batch(method: str) -> None:
    start = owner(offsite__method=method).weights()
    whole = after(offsite__method=method)
    assert distance(whole, start) > 1e-4
    for settings in ({"offsite__micro_batch": 4}, {"offsite__checkpointing": True}):
        other = after(offsite__method=method, **settings)
        assert distance(other, whole) < 1e-5 * max(1.0, distance(whole, start))


@pytest.mark.parametrize("form", ["lora", "dora"])
def test_dropout_acts_while_training_and_not_in_evaluation(form: str) -> None:
    def drawn(seed: int, dropout: float) -> dict[str, torch.Tensor]:
        lora: dict[str, Any] = {"offsite__method": "lora", "offsite__lora_form": form}
        one = owner(**lora, offsite__lora_dropout=dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            one.train(1)
            assert one.evaluate()["loss"] == one.evaluate()["loss"]
        return one.weights()

    assert distance(drawn(1, 0.0), drawn(2, 0.0)) == 0.0
    assert distance(drawn(1, 0.5), drawn(1, 0.5)) == 0.0
    assert distance(drawn(1, 0.5), drawn(2, 0.5)) > 1e-4


def test_bfloat16_goes_where_float32_goes() -> None:
    start, plain = owner().weights(), after()
    half = after(offsite__bf16=True)
    assert all(t.dtype == torch.float32 for t in half.values())
    assert 0 < distance(half, plain) < 0.1 * distance(plain, start)


def test_nearly_no_noise_and_a_wide_bound_are_plain_steps() -> None:
    start, plain = owner().weights(), after()
    private = after(dp__noise_multiplier=1e-9, dp__clip=1e3)
    assert distance(private, plain) < 1e-3 * distance(plain, start)


def test_a_step_is_no_longer_than_the_bound() -> None:
    settings = {"dp__noise_multiplier": 1e-6, "dp__clip": 0.01, "train__max_steps": 1}
    start = owner().weights()
    moved = distance(after(**settings), start)
    assert 0 < moved <= 0.5 * 0.01 * 1.001  # learning rate times the bound on a mean of six


def test_noise_is_the_secrets_and_has_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distance(after(dp__noise_multiplier=0.5), after(dp__noise_multiplier=0.5)) > 0.0
    monkeypatch.setenv("FEDSPLIT_SIMULATION", "1")  # elsewhere each session has noise of its own
    settings = {"dp__noise_multiplier": 50.0, "dp__clip": 0.01, "train__max_steps": 1}
    start, one, again = owner().weights(), after(**settings), after(**settings)
    other = owner(secret=OwnerSecret.for_simulation(1, "ann"), **settings)
    other.train(1)
    assert distance(one, again) == 0.0
    count = sum(t.numel() for t in one.values())
    expected = 0.5 * 50.0 * 0.01 / 6 * count**0.5  # rate * z * C / batch, over all weights
    assert distance(one, start) == pytest.approx(expected, rel=0.1)
    assert distance(one, other.weights()) == pytest.approx(expected * 2**0.5, rel=0.1)


def test_what_noise_has_cost_is_reported() -> None:
    one = owner(dp__noise_multiplier=1.1, offsite__method="lora")
    first, third = one.train(1), one.train(3)
    assert first["dp-steps"] == 2  # twelve blocks, six a step
    assert first["dp-epsilon"] == spent_epsilon(1.1, 0.5, 2, 1e-5)
    assert third["dp-epsilon"] == spent_epsilon(1.1, 0.5, 6, 1e-5) > first["dp-epsilon"]
    assert not {"dp-epsilon", "dp-steps"} & owner().train(1).keys()


@pytest.mark.parametrize(
    ("settings", "draws"),
    [
        ({}, 1),
        ({"train__epochs": 3}, 3),
        ({"train__max_steps": 1, "train__batch_size": 1}, 1),  # one block of twelve
        ({"train__max_steps": 1, "train__batch_size": 12}, 1),
    ],
)
def test_the_rules_count_each_step_that_a_block_is_in(settings: dict[str, Any], draws: int) -> None:
    planned = owner(dp__noise_multiplier=1.1, **settings).plan(1).noise
    assert planned == NoisySteps(1.1, 1.0, draws)


def test_a_round_asked_for_again_costs_as_much_again() -> None:
    one = owner(dp__noise_multiplier=1.0, train__max_steps=1, train__batch_size=1)
    assert [b.tolist() for b in one._steps(1)[0]] == [b.tolist() for b in one._steps(1)[0]]
    spent = TrainingTotals()
    for _ in range(20):
        noise = one.plan(1).noise
        assert noise is not None
        spent.apply({"noise": noise.to_json()}, "2026-01-01")
    # twenty noisy gradients of one known block: their mean is one with a twentieth of the variance
    alone = spent_epsilon(20**-0.5, 1.0, 1, 1e-5)
    assert spent.epsilon(1e-5) == pytest.approx(alone)


def test_noise_needs_a_secret() -> None:
    with pytest.raises(ConfigError, match="secret"):
        owner(secret=None, dp__noise_multiplier=1.0)


def test_the_proximal_term_pulls_in_both_ways_of_stepping() -> None:
    for settings in ({}, {"dp__noise_multiplier": 1e-9, "dp__clip": 1e3}):
        start = owner(**settings).weights()
        free = after(train__epochs=4, train__lr=0.1, **settings)
        held = after(train__epochs=4, train__lr=0.1, offsite__proximal=8.0, **settings)
        assert distance(held, start) < 0.7 * distance(free, start)


def test_a_change_is_bounded_before_it_leaves() -> None:
    start, free = owner().weights(), after()
    bound = 0.25 * distance(free, start)
    held = after(offsite__central_dp_clip=bound)
    assert distance(held, start) == pytest.approx(bound, rel=1e-4)
    part = {n: start[n] + (free[n] - start[n]) * 0.25 for n in free}
    assert distance(held, part) < 1e-5
    assert distance(after(offsite__central_dp_clip=10 * bound), free) == 0.0
    assert bounded(start, start, 1e-9) is start


def test_a_loss_that_is_not_finite_takes_no_step() -> None:
    one = owner()
    with torch.no_grad():
        next(iter(one.tuning.named_parameters().values())).fill_(float("nan"))
    with pytest.raises(ModelError, match="finite"):
        one.train(1)


def test_only_what_is_trained_travels() -> None:
    sizes = {
        m: sum(t.numel() for t in owner(offsite__method=m).weights().values())
        for m in ("full", "lora", "bottleneck", "bitfit", "prefix")
    }
    assert sizes["bitfit"] < sizes["prefix"] < sizes["full"]
    one = owner(offsite__method="lora", offsite__rank=2)
    assert all(".lora_" in name for name in one.weights())
    assert {n.split(".")[2] for n in one.weights()} == {"0", "2"}  # the base's positions
    config = replace(one.config.offsite, rank=4)
    assert config.rank == 4
