"""Re-implemented published attacks, beside the project's own on one transcript."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional

from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, load_experiment
from simulations.peers import gradient_matching, side_by_side
from simulations.peers.gradient_matching import Crossed, tag, teach
from tests.tiny_models import save_texts, save_tiny_llama

V, D, LENGTH = 40, 16, 7


def test_tag_reads_the_tokens_of_a_known_head() -> None:
    torch.manual_seed(0)
    head, ids = torch.randn(V, D), torch.randint(V, (LENGTH,))
    hidden = torch.randn(LENGTH, D).requires_grad_()
    loss = functional.cross_entropy((hidden @ head.T)[:-1], ids[1:])
    (gradient,) = torch.autograd.grad(loss, hidden)
    seen = Crossed(hidden.detach(), gradient, hidden.detach(), head, None, lambda soft: soft)
    found = tag(seen, torch.Generator().manual_seed(0))
    assert (found[1:] == ids[1:]).float().mean() > 0.8


def test_an_inverter_learns_what_states_are() -> None:
    torch.manual_seed(0)
    table = torch.randn(V, D)
    ids = [torch.randint(V, (LENGTH,)) for _ in range(64)]
    network = teach([table[x] for x in ids], ids, V, epochs=30, lr=1e-2)
    assert (network(table[ids[0]][None])[0].argmax(1) == ids[0]).float().mean() > 0.8


def test_every_attacker_reads_the_same_transcript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in (("TAG_STEPS", 30), ("LAMP_TRIALS", 3), ("FORWARD_STEPS", 5)):
        monkeypatch.setattr(gradient_matching, name, few)
    settings: dict[str, Any] = {
        "model.name": str(save_tiny_llama(tmp_path / "model")),
        "model.task": "causal-lm",
        "model.max-tokens": 10,
        "train.rounds": 1,
        "train.batch-size": 4,
        "train.max-steps": 1,
        "split.k": 1,
        "data.kind": "file",
        "data.path": str(save_texts(tmp_path / "texts.jsonl", 16)),
        "data.owners": 2,
        "data.partition": "iid",
        "lineage.gate": "off",
        "output.evaluate-every": 0,
    }
    options = {"samples": 2, "public-texts": 20, "inverter-epochs": 1}
    experiment = Experiment("lm-peers", "lm-peers", "a test", settings, options)
    with RunFolder(tmp_path / "out", name="lm-peers", kind="table") as folder:
        side_by_side.run(experiment, folder, Console(file=io.StringIO()))

    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    found = {row["attacker"]: row for row in rows}
    assert {"closed_form", "matching", "joint", "tag", "lamp", "bisr"} == found.keys()
    assert found["closed_form"]["token_recovery"] == 1.0
    for row in rows:
        assert row["tokens"] == found["tag"]["tokens"]
        assert row["it_alone"] == 0  # nobody reads more than the project's best
    assert len(list((tmp_path / "out").rglob("guesses/*.safetensors"))) == 6


def test_the_published_settings_are_valid() -> None:
    assert load_experiment("lm-peers").options["peers"] == ["tag", "lamp", "bisr"]
