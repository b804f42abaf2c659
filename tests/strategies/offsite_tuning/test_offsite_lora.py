"""Runs with each form of LoRA, where the model runs, and settings that offsite tuning lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedsplit.commands.evaluation.subjects import read_adapters
from fedsplit.config import RunConfig
from fedsplit.config.groups import LORA_FORMS
from fedsplit.config.offsite import INSTEAD
from fedsplit.emulators.lm import logits_of
from fedsplit.emulators.settings import method_settings
from fedsplit.errors import ConfigError
from fedsplit.settings import read_settings
from simulations.runtime.local_run import run_in_process
from strategies.base_model import load_base
from strategies.offsite_tuning import parts
from strategies.offsite_tuning.export import ADAPTERS
from strategies.offsite_tuning.parts import build_parts

SETTINGS = {
    "offsite__method": "lora",
    "offsite__rank": 2,
    "offsite__lora_alpha": 2.0,
    "train__lr": 0.5,
    "train__rounds": 1,
}
OFFSITE = {"strategy": "offsite-tuning", "model.task": "causal-lm"}
IDS = torch.arange(24).view(2, 12) % 60
DEVICES = ("cpu", "cuda")


@pytest.fixture
def lora(offsite: Any) -> Any:
    """Return a function from overrides to the settings of a short run with LoRA."""
    return lambda **overrides: offsite(**SETTINGS | overrides)


@pytest.mark.parametrize("form", LORA_FORMS)
def test_a_run_leaves_what_peft_loads(lora: Any, tmp_path: Path, form: str) -> None:
    config = lora(
        offsite__lora_form=form,
        offsite__lora_dropout=0.1,
        offsite__lora_targets="q_proj,up_proj",
        lineage__gate="reject",
    )
    _, server = run_in_process(config, tmp_path / "run")
    folder = tmp_path / "run" / "server"
    assert all(
        row["lineage"]["verdict"] == "in_lineage" for row in server["rounds"] if "train" in row
    )
    state, settings = read_adapters(folder)
    assert {n.partition(".lora_")[0].rpartition(".")[2] for n in state} == {"q_proj", "up_proj"}
    assert any("magnitude" in n for n in state) is (form == "dora")
    wanted = method_settings(config.offsite, 0)
    assert settings == wanted
    base = load_base(config)
    with torch.inference_mode():
        start = logits_of(base.model, IDS)
        plain = load_base(read_settings({**config.to_flat(), "model.name": str(folder / "model")}))
        loaded = PeftModel.from_pretrained(base.model, str(folder / "adapter"))
        found, merged = logits_of(loaded, IDS), logits_of(plain.model, IDS)
    assert not torch.allclose(found, start, atol=1e-4)
    torch.testing.assert_close(merged, found, atol=1e-5, rtol=1e-5)


def test_adapters_of_earlier_versions_are_read(lora: Any, tmp_path: Path) -> None:
    run_in_process(lora(output__save=False), tmp_path / "run")
    file = tmp_path / "run" / "server" / ADAPTERS
    with safe_open(file, framework="pt") as handle:
        about = handle.metadata()
    method = json.loads(about["method"])
    assert {"lora_dropout", "lora_targets", "lora_form"} < method.keys()
    older = {k: v for k, v in method.items() if k[:5] != "lora_" or k == "lora_alpha"}
    save_file(load_file(file), tmp_path / "old", {**about, "method": json.dumps(older)})
    assert read_adapters(tmp_path / "old")[1] == read_adapters(file)[1]


def test_a_misspelt_target_costs_no_emulator(
    lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "shipped_emulator", None)
    with pytest.raises(ConfigError, match=r"offsite\.lora-targets='query': must be among"):
        build_parts(lora(offsite__lora_targets="query"), 1, None, tmp_path)  # type: ignore[arg-type]


def test_a_device_that_is_not_there_is_said_before_the_model_is_loaded(
    lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "load_base", None)
    with pytest.raises(ConfigError, match=r"model\.device='cuda:99': must be one of"):
        build_parts(lora(model__device="cuda:99"), 1, None, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["auto", "balanced", "sequential"])
def test_the_full_model_is_on_one_device(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.device='{device}': must be one device"):
        read_settings({**OFFSITE, "model.device": device})
    assert read_settings({"model.device": device}).model.device == device


OTHER = {
    "train.method": "lora",
    "train.lora-rank": 4,
    "train.lora-alpha": 2.0,
    "train.lora-dropout": 0.1,
    "train.lora-targets": "q_proj",
    "train.lora-form": "dora",
    "model.autocast": "bfloat16",
    "server.workers": 2,
    "server.devices": "cpu",
    "split.averaging": "krum",
    "privacy.mechanism": "dchi",
    "labels.protection": "client-head+none",
}


@pytest.mark.parametrize("name", INSTEAD)
def test_what_offsite_tuning_does_not_read_is_refused(name: str) -> None:
    value, more = OTHER[name], {"privacy.eta": 8.0} if name == "privacy.mechanism" else {}
    with pytest.raises(ConfigError) as caught:
        read_settings({**OFFSITE, **more, name: value})
    told = str(caught.value)
    assert told.startswith(f"{name}={value!r}: must be ")
    assert told.endswith(f"with offsite-tuning, which does not read it: use {INSTEAD[name]}")
    known = RunConfig().to_flat().keys()
    assert all(part in known for part in INSTEAD[name].split(" or "))


@pytest.mark.parametrize("strategy", ["split-tuning", "serving"])
def test_central_noise_is_refused_where_nothing_adds_it(strategy: str) -> None:
    with pytest.raises(ConfigError, match=r"^offsite\.central-dp-clip=1\.0: must be 0 with"):
        read_settings({"strategy": strategy, "offsite.central-dp-clip": 1.0})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compressor", ["scaleot", "gradot", "crash", "withholding"])
def test_a_run_on_a_gpu_is_the_run_on_the_cpu(lora: Any, tmp_path: Path, compressor: str) -> None:
    """The full model, importance, settling and the emulator there; owners stay on the CPU."""
    more = {"offsite__importance_steps": 2, "offsite__settle_steps": 2, "offsite__adapters": 1}
    if compressor != "withholding":
        more |= {"offsite__positions": "importance"}
    servers, adapters, models = [], [], []
    for number, device in enumerate(DEVICES):
        folder = tmp_path / str(number) / "server"
        config = lora(
            **more,
            model__device=device,
            offsite__compressor=compressor,
            offsite__lora_form="dora",
            lineage__gate="reject",
        )
        _, server = run_in_process(config, folder.parent)
        servers.append(server)
        adapters.append(load_file(folder / ADAPTERS))
        models.append(load_file(folder / "model" / "model.safetensors"))
    losses = [server["full_zero_shot_loss"] for server in servers]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert all(s["rounds"][0]["lineage"]["verdict"] == "in_lineage" for s in servers)
    assert adapters[0].keys() == adapters[1].keys()
    assert models[0].keys() == models[1].keys()
    if compressor == "gradot":  # nothing secret, nothing that rounding turns elsewhere
        for name, tensor in adapters[0].items():
            torch.testing.assert_close(adapters[1][name], tensor, atol=1e-3, rtol=1e-2)
