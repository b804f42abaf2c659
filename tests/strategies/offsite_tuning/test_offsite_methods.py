"""Whole offsite-tuning runs by method: the union's step, what is exported, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedsplit.config import RunConfig
from fedsplit.emulators.build import tune_in_full, tune_inside
from fedsplit.emulators.files import load_emulator
from fedsplit.emulators.lm import logits_of
from fedsplit.emulators.settings import method_settings
from fedsplit.errors import ConfigError
from fedsplit.models.adapters.files import attach_saved
from fedsplit.owners.offsite.owner import AdapterOwner
from simulations.runtime.local_run import run_in_process
from strategies.base_model import load_base
from strategies.offsite_tuning.export import ADAPTERS
from tests.strategies.offsite_union import train_on_the_union

SETTINGS = {
    "offsite__rank": 2,
    "offsite__lora_alpha": 2.0,
    "offsite__width": 4,
    "offsite__prefix": 3,
    "train__lr": 0.5,
    "train__rounds": 2,
    "output__evaluate_every": 0,
}


@pytest.fixture
def offsite(offsite: Any) -> Any:
    """Return a function from overrides to the settings of a run with small modules inside A."""
    return lambda **overrides: offsite(**SETTINGS | overrides)


def run(config: RunConfig, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Path]:
    _, server = run_in_process(config, folder)
    return load_file(folder / "server" / ADAPTERS), server, folder / "server"


@pytest.mark.parametrize("method", ["lora", "bottleneck", "bitfit", "prefix"])
def test_a_round_is_a_step_on_the_union_and_what_is_written_loads(
    offsite: Any, tmp_path: Path, method: str
) -> None:
    config = offsite(offsite__method=method)
    federated, server, folder = run(config, tmp_path / "run")

    # The same steps in one process, on the union of the owners' batches.
    emulator = load_emulator(folder / "emulator")
    tuning = tune_inside(emulator, method_settings(config.offsite, config.seed))
    start = tuning.state()
    train_on_the_union(config, emulator.model, tuning.parameters())
    central = tuning.state()
    assert central.keys() == federated.keys()
    assert max(float((central[n] - start[n]).abs().max()) for n in central) > 1e-4
    for name, value in central.items():
        assert float((value - federated[name]).abs().max()) < 1e-5, name

    # The full model with these adapters, PEFT's or our folder on the base, and the plain folder.
    base, full = load_base(config), load_base(config)
    plugged = tune_in_full(full.model, emulator.plan, tuning.settings)
    plugged.load(federated)
    ids = torch.arange(24).view(2, 12) % 60
    with torch.inference_mode():
        expected = logits_of(full.model, ids)
        if method in ("bottleneck", "prefix"):
            attach_saved(base.model, folder / "adapter")
            found = logits_of(base.model, ids)
        else:
            found = logits_of(PeftModel.from_pretrained(base.model, folder / "adapter"), ids)
            model = load_base(
                replace(config, model=replace(config.model, name=str(folder / "model")))
            )
            plain = logits_of(model.model, ids)
            torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    about = server["emulator"]
    assert about["method"] == method
    assert about["trained_parameters"] == sum(t.numel() for t in federated.values())
    assert about["trained_share"] < about["adapter_parameters"] / about["full_parameters"]
    assert server["exported"]["model"] is (method not in ("bottleneck", "prefix"))
    assert ("model_not_written" in server["exported"]) is (method in ("bottleneck", "prefix"))
    assert all(row["lineage"]["verdict"] == "in_lineage" for row in server["rounds"])


def test_odd_adapters_cost_their_owner_alone(
    offsite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AdapterOwner.weights

    def weights(self: AdapterOwner) -> dict[str, torch.Tensor]:
        found = honest(self)
        name = sorted(found)[0]
        if self.name == "owner-1":
            del found[name]
        elif self.name == "owner-2":
            found["model.layers.1.x"] = torch.zeros(2)
        elif self.name == "owner-3":
            found[name] = found[name][:1]
        elif self.name == "owner-4":
            found[name].view(-1)[0] = float("nan")
        return found

    monkeypatch.setattr(AdapterOwner, "weights", weights)
    config = offsite(offsite__method="lora", data__owners=5, train__rounds=1, output__save=False)
    adapters, server, _ = run(config, tmp_path / "run")
    assert all(bool(t.isfinite().all()) for t in adapters.values())
    (row,) = server["rounds"]
    assert row["train"]["finished"] == ["owner-0"]
    told = {
        "owner-1": "missing or foreign",
        "owner-2": "missing or foreign",
        "owner-3": "must be float32",
        "owner-4": "finite",
    }
    assert row["train"]["lost"].keys() == told.keys()
    assert all(why in row["train"]["lost"][owner] for owner, why in told.items())


def test_a_foreign_lora_update_is_not_in_lineage(
    offsite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AdapterOwner.weights

    def weights(self: AdapterOwner) -> dict[str, torch.Tensor]:
        found = honest(self)
        if self.name == "owner-1":
            generator = torch.Generator().manual_seed(5)
            found = {n: 4 * torch.randn(t.shape, generator=generator) for n, t in found.items()}
        return found

    monkeypatch.setattr(AdapterOwner, "weights", weights)
    config = offsite(
        offsite__method="lora",
        offsite__rank=16,
        data__owners=3,
        lineage__gate="reject",
        output__save=False,
    )
    _, server, _ = run(config, tmp_path / "run")
    assert list(server["rounds"][-1]["lineage"]["quarantined"]) == ["owner-1"]


def test_epsilons_are_in_the_results(offsite: Any, tmp_path: Path) -> None:
    config = offsite(
        offsite__method="lora",
        dp__noise_multiplier=1.0,
        offsite__central_dp_clip=1.0,
        offsite__central_dp_noise=2.0,
        output__save=False,
    )
    _, server, _ = run(config, tmp_path / "run")
    own = [row["train"]["metrics"]["owners"]["owner-0"]["dp-epsilon"] for row in server["rounds"]]
    central = [row["central_dp"]["epsilon"] for row in server["rounds"]]
    assert 0 < own[0] < own[1]
    assert 0 < central[0] < central[1]
    assert server["rounds"][0]["central_dp"]["unit"] == "owner"
    worst = max(
        row["dp-epsilon"] for row in server["rounds"][1]["train"]["metrics"]["owners"].values()
    )
    assert server["rounds"][1]["owners_dp"]["epsilon"] == worst


def test_what_cannot_be_kept_is_refused_with_its_reason(offsite: Any) -> None:
    with pytest.raises(ConfigError, match="central-dp-noise"):
        offsite(offsite__central_dp_noise=1.0)
    with pytest.raises(ConfigError, match="plain mean"):
        offsite(
            offsite__central_dp_noise=1.0,
            offsite__central_dp_clip=1.0,
            offsite__averaging="krum",
        )
    assert json.dumps(offsite(dp__noise_multiplier=1.0).dp.noise_multiplier) == "1.0"
