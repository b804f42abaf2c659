"""A mechanism and a label protection are added by one file and one row, and nothing else.

The files are in ``tests/contracts/toys``; each test adds the row and looks where it must show.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedsplit.attacks import Public, Truth, View, make_attack, suited
from fedsplit.cli import app_cli
from fedsplit.config import LabelsConfig, PrivacyConfig
from fedsplit.errors import ConfigError
from fedsplit.models import load, split
from fedsplit.owners.ledger.exposure import Draw
from fedsplit.owners.policy.description import openings, restrictions
from fedsplit.owners.policy.rules import Asked, Policy
from fedsplit.privacy import MECHANISMS, OwnerSecret, SamplePerturber, build_mechanism
from fedsplit.privacy.labels.table import (
    LABEL_PROTECTIONS,
    GradientShield,
    build_protection,
    head_at_owner,
)
from fedsplit.settings import read_settings
from strategies.telemetry.status import spent_on
from tests.contracts import test_label_protections as label_contract
from tests.contracts import test_mechanisms as mechanism_contract
from tests.contracts.toys.toy_label_protection import Blur
from tests.contracts.toys.toy_mechanism import Toy
from tests.tiny_models import save_tiny_bert

G = torch.Generator().manual_seed(0)
IDS = [torch.randint(4, 94, (12,), generator=G) for _ in range(8)]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Toy]:
    monkeypatch.setitem(MECHANISMS, "toy", Toy)
    return Toy


@pytest.fixture
def blur(monkeypatch: pytest.MonkeyPatch) -> type[Blur]:
    monkeypatch.setitem(LABEL_PROTECTIONS, "blur", Blur)
    return Blur


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def bottom(model: Path) -> Any:
    made, _ = split(load(str(model), "sequence-classification", num_labels=3).model, 0)
    return made.eval()


def told(*command: str, policy: str = "") -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "owner.toml"
        path.write_text(policy)
        path.chmod(0o600)
        given = [str(path) if word == "POLICY" else word for word in command]
        return CliRunner().invoke(app_cli, given, env={**os.environ, "COLUMNS": "200"}).stdout


# ---- a mechanism ---------------------------------------------------------------------------------


def test_settings_know_a_new_mechanism(toy: type[Toy]) -> None:
    asked = {"privacy.mechanism": "toy", "privacy.epsilon": 2.0}
    config = read_settings(asked)
    assert spent_on(config) == {"mechanism": "toy", "epsilon": 2.0}
    assert toy.label(vars(config.privacy)) == "toy noise, epsilon 2"
    with pytest.raises(ConfigError, match=r"privacy\.epsilon=2\.0: must be .*and 0 otherwise"):
        read_settings(asked | {"privacy.noise-ratio": 1.0})
    with pytest.raises(ConfigError, match=r"one of none, dchi, .*, toy"):
        read_settings({"privacy.mechanism": "other"})


def test_a_new_mechanism_keeps_every_contract(toy: type[Toy]) -> None:
    mechanism_contract.PARAMS["toy"] = {"epsilon": 2.0}
    try:
        for check in (
            mechanism_contract.test_shape_dtype_and_input_are_kept,
            mechanism_contract.test_reproducible_from_the_secret,
            mechanism_contract.test_guarantee_is_in_words_and_grows_with_views,
            mechanism_contract.test_description_names_the_mechanism_and_survives_json,
            mechanism_contract.test_a_sample_never_shows_two_draws,
            mechanism_contract.test_other_parameters_draw_other_noise,
        ):
            check(toy(epsilon=2.0))
    finally:
        del mechanism_contract.PARAMS["toy"]
    mechanism_contract.test_settings_know_every_row_and_no_other()


def test_a_policy_bounds_a_new_mechanism(toy: type[Toy]) -> None:
    policy = Policy({"noise": {"max_toy": 1.5, "min_ratio": 2}})
    asked = read_settings({"privacy.mechanism": "toy", "privacy.epsilon": 2.0}).to_flat()
    assert [b.rule for b in policy.settings_breaches(Asked(asked))] == ["noise.max_toy"]
    built = toy(epsilon=2.0)
    found = policy.mechanism_breaches("toy", built.describe(), 1.0)
    assert [b.rule for b in found] == ["noise.max_toy", "noise.min_ratio"]
    assert policy.mechanism_breaches("toy", toy(epsilon=1.0).describe(), 3.0) == []
    # A bound on another mechanism's level lets no unbounded toy noise through.
    assert Policy({"noise": {"max_eta": 1}}).mechanism_breaches("toy", built.describe(), 3.0)
    assert ("noise.max_toy", "Toy noise has epsilon <= 1.5.") in [
        row[:2] for row in restrictions(policy)
    ]
    assert ("noise.max_toy", "Toy noise may be of any size.") in openings(Policy({}))


def test_the_ledger_adds_up_a_new_mechanisms_draws(toy: type[Toy]) -> None:
    assert Draw("bottom:0", "bottom", toy(epsilon=2.0).describe()).cost == ("toys", 2.0)


def test_commands_list_a_new_mechanism(toy: type[Toy], model: Path) -> None:
    assert "Toy noise has epsilon <= 3." in told(
        "policy", "check", "POLICY", policy="[noise]\nmax_toy = 3"
    )
    assert "toy epsilon" in told("inspect", str(model), "--labels", "3")


def test_attacks_read_through_a_new_mechanism(toy: type[Toy], bottom: Any) -> None:
    config = PrivacyConfig(mechanism="toy", noise_ratio=0.05)
    mechanism = build_mechanism(config, bottom, bottom.vocab)
    assert mechanism.noise_ratio(bottom, bottom.vocab) == pytest.approx(0.05, rel=1e-3)
    perturber = SamplePerturber(mechanism, OwnerSecret.for_simulation(0, "toy"), "bottom:0")
    with torch.no_grad():
        clean = [bottom(ids[None], torch.ones(1, len(ids), dtype=torch.int64))[0] for ids in IDS]
    rows = [perturber.perturb(h, ids) for h, ids in zip(clean, IDS, strict=True)]
    public = Public(bottom, mechanism, [ids.tolist() for ids in IDS])
    view = View(public, rows)
    assert {"nearest", "map", "contextual"} <= {attack.name for attack in suited(view)}
    found = make_attack("map").run(view, Truth(ids=IDS))
    assert found.success > 0.9


# ---- a label protection --------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
@pytest.mark.parametrize("protection", ["blur", "client-head+blur"])
def test_settings_know_a_new_label_protection(blur: type[Blur], task: str, protection: str) -> None:
    config = read_settings({"labels.protection": protection, "model.task": task})
    assert isinstance(build_protection(config.labels), blur)
    assert head_at_owner(protection) == protection.startswith("client-head")
    assert blur.label(config.labels) == "noise-power=4"
    assert spent_on(config)["labels"] == protection


def test_a_new_label_protection_keeps_every_contract(blur: type[Blur]) -> None:
    made = build_protection(LabelsConfig(protection="blur"))
    label_contract.test_named_and_described(made)
    label_contract.test_its_level_is_a_setting(made)
    label_contract.test_gradients_change_where_it_says_so(made)
    label_contract.test_labels_change_where_it_says_so(made)
    label_contract.test_the_place_of_the_head_goes_with_what_changes_something(made)


def test_a_policy_bounds_a_new_label_protection(blur: type[Blur]) -> None:
    policy = Policy({"labels": {"min_blur": 5, "protection": ["blur"]}})
    asked = {"labels.protection": "client-head+blur", "labels.noise-power": 4.0}
    for power, broken in ((4.0, ["labels.min_blur"]), (5.0, [])):
        flat = read_settings(asked | {"labels.noise-power": power}).to_flat()
        assert [b.rule for b in policy.settings_breaches(Asked(flat))] == broken
    said = told("policy", "check", "POLICY", policy="[labels]\nmin_blur = 5")
    assert "Blur is at least 5." in said
    assert ("labels.min_blur", "Blur may be nothing.") in openings(Policy({}))


def test_attacks_read_through_a_new_label_protection(blur: type[Blur]) -> None:
    labels = torch.arange(40) % 2
    clean = torch.where(labels[:, None] == 1, 1.0, -1.0) * torch.tensor([1.0, -1.0])
    share = 0.5
    for power, hidden in ((1e-6, False), (1e4, True)):
        shield = GradientShield(blur(power), OwnerSecret.for_simulation(0, "blur"), share)
        rows = shield(clean, labels, range(40))
        found = make_attack("label_leakage").run(View(gradients=list(rows)), Truth(labels=labels))
        assert (found.success < 0.9) == hidden
