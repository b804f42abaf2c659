"""``fedsplit export``, ``evaluate`` and ``compare`` on the folder of a split run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.errors import ConfigError, ModelError
from fedsplit.fingerprints.sources import open_source
from fedsplit.models.trained.whole import whole_of_run


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app_cli, [str(a) for a in arguments])


@pytest.fixture
def causal(make_config: Any, tiny_llama: Path) -> dict[str, Any]:
    return {
        "model__name": str(tiny_llama),
        "model__task": "causal-lm",
        "split__k": 1,
        "train__rounds": 1,
        "train__lr": 0.05,
        "output__evaluate_every": 0,
        "output__transcript": False,
        "lineage__gate": "off",
    }


def test_a_lora_run_is_exported_measured_and_compared(
    make_config: Any, run_locally: Any, causal: dict[str, Any], tmp_path: Path
) -> None:
    run = run_locally(make_config(train__method="lora", **causal))
    base = causal["model__name"]
    ids = torch.arange(24).view(2, 12) % 60
    whole = whole_of_run(run.folder)
    with torch.inference_mode():
        expected = whole.top(whole.bottom(ids))
    said = call("export", run.folder, "--out", tmp_path / "out")
    assert said.exit_code == 0, said.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", use_safetensors=True)
    start = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
        assert float((start(ids).logits - expected).abs().max()) > 1e-3
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["adapter"] == {"format": "peft", "on": base}
    assert about["holders"] == {
        "bottom": "the base's, as everybody received it",
        "top": "the server",
    }

    text = tmp_path / "held.txt"
    text.write_text(" ".join(f"w{i % 71}" for i in range(400)))
    figures = tmp_path / "figures.json"
    said = call(
        "evaluate", run.folder, "--base", base, "--text", text, "--out", figures, "--window", 32
    )
    assert said.exit_code == 0, said.output
    rows = {row["label"]: row["text"] for row in json.loads(figures.read_text())["models"]}
    assert set(rows) == {"full, zero-shot", "tuned by split"}
    same = tmp_path / "same.json"
    call("evaluate", tmp_path / "out" / "model", "--text", text, "--out", same, "--window", 32)
    exported = json.loads(same.read_text())["models"][0]["text"]
    tuned = rows["tuned by split"]["nats_per_token"]
    assert exported["nats_per_token"] == pytest.approx(tuned, abs=1e-5)
    assert rows["full, zero-shot"]["nats_per_token"] != pytest.approx(tuned, abs=1e-3)

    said = call("compare", base, run.folder, "--no-run")
    assert said.exit_code == 0, said.output  # in lineage
    view = open_source(str(run.folder)).view
    assert view is not None
    assert view.depth == 3


def test_what_owners_trained_needs_their_consent(
    make_config: Any, run_locally: Any, tmp_path: Path
) -> None:
    run = run_locally(
        make_config(
            split__k=1,
            split__bottom="joint",
            labels__protection="client-head",
            train__rounds=1,
            output__evaluate_every=0,
            lineage__gate="off",
        )
    )
    said = call("export", run.folder, "--out", tmp_path / "out")
    assert isinstance(said.exception, ConfigError)
    assert "bottom and head were trained by the owners together" in str(said.exception)
    assert not (tmp_path / "out").exists()
    said = call("export", run.folder, "--out", tmp_path / "out", "--owners-agreed")
    assert said.exit_code == 0, said.output
    folder = tmp_path / "out" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
    ids = torch.tensor([[2, 9, 14, 3]])
    whole = whole_of_run(run.folder)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.eval()(ids).logits, whole.top(whole.bottom(ids)), rtol=0, atol=1e-5
        )
    owners = {n: t for n, t in load_file(run.folder / "top.safetensors").items() if "owners." in n}
    rows = owners["owners.model.embeddings.word_embeddings.weight"]
    torch.testing.assert_close(model.bert.embeddings.word_embeddings.weight, rows)


def test_folders_that_cannot_be_exported(
    make_config: Any, run_locally: Any, causal: dict[str, Any], tmp_path: Path
) -> None:
    said = call("export", tmp_path)
    assert isinstance(said.exception, ModelError)
    assert "must hold top.safetensors" in str(said.exception)
    save_file({"a": torch.ones(1)}, tmp_path / "top.safetensors", {"format": "fedsplit-top-1"})
    with pytest.raises(ModelError, match="does not say what it belongs to"):
        whole_of_run(tmp_path)
