"""Attacks on files: a run's folder is enough, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fedsplit.attacks import ATTACKS
from fedsplit.attacks.files import attack_files, parse_budget, read_config
from fedsplit.attacks.transcripts import read_transcript, read_truth, write_truth
from fedsplit.cli import app_cli
from fedsplit.config import RunConfig
from fedsplit.errors import AttackError, ConfigError
from fedsplit.models import load, split
from fedsplit.owners.samples import Samples
from fedsplit.privacy import DChi, OwnerSecret
from simulations.core.owner_samples import OwnerSamples
from simulations.split.transcript_attacks import (
    attack_transcript,
    write_truth_file,
)
from tests.tiny_models import WORDS, save_tiny_bert, save_tiny_llama

SMALL = parse_budget(
    ["optimisation-steps=60", "optimisation-samples=4", "learned-steps=5", "public-samples=300"]
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return {
        "bert": save_tiny_bert(tmp_path_factory.mktemp("bert")),
        "llama": save_tiny_llama(tmp_path_factory.mktemp("llama")),
    }


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    g = torch.Generator().manual_seed(9)
    path = tmp_path_factory.mktemp("public") / "public.txt"
    rows = torch.randint(0, len(WORDS), (300, 8), generator=g).tolist()
    path.write_text("\n".join(" ".join(WORDS[i] for i in row) for row in rows))
    return path


def make_run(folder: Path, model: Path, k: int, eta: float = 0.0) -> Path:
    """Write what a run leaves: settings, transcript, truth."""
    task = "causal-lm" if model.name.startswith("llama") else "sequence-classification"
    loaded = load(model, task, num_labels=None if task == "causal-lm" else 3)
    bottom = split(loaded.model, k)[0].eval()
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 90, (n,), generator=g) for n in (5, 9, 3, 7)]
    secret = OwnerSecret.for_simulation(0, "owner-0")
    rows = []
    for i, x in enumerate(ids):
        with torch.no_grad():
            hidden = bottom(x[None], torch.ones_like(x[None]))[0]
        rows.append(DChi(eta).privatise(hidden, secret.stream(i)) if eta else hidden)
    (folder / "server").mkdir(parents=True)
    key = "owner-0/train"
    save_file(
        {
            f"{key}/rows": torch.cat(rows),
            f"{key}/lengths": torch.tensor([len(x) for x in ids]),
            f"{key}/slots": torch.arange(4),
        },
        folder / "server" / "transcript.safetensors",
    )
    write_truth(folder / "truth.safetensors", {("owner-0", "train"): dict(enumerate(ids))})
    lines = [
        f'[model]\nname = "{model}"\ntask = "{task}"\nlabels = 3\nmax-tokens = 16',
        f"[split]\nk = {k}",
        f'[privacy]\nmechanism = "dchi"\neta = {eta}' if eta else "",
    ]
    (folder / "config.toml").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("family", "k", "eta", "expected"),
    [
        ("bert", 0, 0.0, ["nearest"]),
        ("bert", 0, 6.0, ["nearest", "map", "contextual"]),
        ("bert", 1, 0.0, ["optimisation", "learned", "token_states", "text_search"]),
        ("llama", 2, 0.0, ["optimisation", "learned", "token_states", "exact_search", "joint"]),
    ],
)
def test_attacks_are_chosen_by_the_split(models, public, tmp_path, family, k, eta, expected):
    run = make_run(tmp_path / "run", models[family], k, eta)

    results = attack_files(run, public=str(public), budget=SMALL)

    assert [r.name for r in results] == expected
    best = max(r.success for r in results)
    assert best == 1.0 if eta == 0 else best > results[0].baseline
    assert all(r.interval[0] <= r.success <= r.interval[1] for r in results)


def test_a_simulation_attacks_any_split_and_writes_its_truth(models, public, tmp_path):
    run = make_run(tmp_path / "run", models["bert"], 1)
    ids = tuple(read_truth(run / "truth.safetensors")["owner-0", "train"].values())
    shares = [OwnerSamples("owner-0", Samples(ids, None, ()), Samples((), None, ()))]
    config = RunConfig.from_flat(read_config(run / "config.toml"))
    transcript = run / "server" / "transcript.safetensors"

    found = attack_transcript(config, transcript, shares, public=str(public), budget=SMALL)

    expected = {"optimisation_inversion", "learned_inversion", "token_states", "text_search"}
    assert found.keys() == expected
    assert max(row["success"] for row in found.values()) == 1.0
    written = read_truth(write_truth_file(tmp_path, shares))
    assert all(map(torch.equal, written["owner-0", "train"].values(), ids))


def test_the_command_prints_and_writes(models, public, tmp_path):
    run = make_run(tmp_path / "run", models["bert"], 0, 6.0)
    out = tmp_path / "attacks.json"
    arguments = ["attack", "inversion", str(run), "--public", str(public), "--attack", "map"]

    done = CliRunner().invoke(app_cli, [*arguments, "--json", str(out)])

    assert done.exit_code == 0, done.output
    (row,) = json.loads(out.read_text())
    assert row["name"] == "map"
    assert row["empirical_privacy"] == pytest.approx(1 - row["success"])
    listed = CliRunner().invoke(app_cli, ["attack", "list"])
    assert all(name[:8] in listed.output for name in ATTACKS)


def test_every_row_says_what_it_knows_and_may_spend():
    for name, attack in ATTACKS.items():
        made = attack()
        assert attack.name == name
        assert made.knowledge
        assert all(hasattr(made, field) for field in attack.budget)
        assert {field for field, _ in attack.keys.values()} <= set(attack.budget)


def test_truth_survives_the_file(tmp_path):
    truth = {("a", "train"): {3: torch.tensor([1, 2]), 0: torch.tensor([7])}, ("b", "test"): {}}

    write_truth(tmp_path / "t", truth)

    found = read_truth(tmp_path / "t")
    assert found.keys() == {("a", "train")}
    assert found["a", "train"][3].tolist() == [1, 2]


def test_misfits_are_named(models, tmp_path):
    run = make_run(tmp_path / "run", models["bert"], 0)
    with pytest.raises(AttackError, match="no transcript"):
        read_transcript(tmp_path / "nothing")
    (tmp_path / "bad").write_bytes(b"nothing of the kind")
    with pytest.raises(AttackError, match="must hold slots"):
        read_truth(tmp_path / "bad")
    with pytest.raises(ConfigError, match="budget x=1"):
        parse_budget(["x=1"])
    with pytest.raises(ConfigError, match="attack='x'"):
        attack_files(run, attacks=["x"])
    write_truth(run / "truth.safetensors", {("owner-0", "train"): {0: torch.tensor([1])}})
    with pytest.raises(AttackError, match="slot 0: 1 tokens"):
        attack_files(run)
