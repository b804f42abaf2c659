"""Every kind of record that an attack reads from a file, through the command that runs one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from fedsplit.attacks.recorded_frames import read_capture
from fedsplit.attacks.transcripts import (
    Transcript,
    read_true_labels,
    read_whole_transcript,
    write_transcript,
    write_truth,
)
from fedsplit.cli import app_cli
from fedsplit.errors import AttackError
from fedsplit.models import load, split
from fedsplit.privacy import DChi, OwnerSecret
from fedsplit.wire.codecs import encode_rows
from fedsplit.wire.frames import Frame, Kind, encode
from tests.tiny_models import save_tiny_bert

KEY = ("owner-0", "train")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


def attack(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    out = tmp_path / "out.json"
    words = ["attack", "run", *map(str, arguments), "--json", str(out)]
    done = CliRunner().invoke(app_cli, words)
    assert done.exit_code == 0, done.output
    (row,) = json.loads(out.read_text())
    return dict(row)


def texts(n: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 90, (5 + i,), generator=generator) for i in range(n)]


def test_views_drawn_anew_are_averaged(model: Path, tmp_path: Path) -> None:
    ids = texts()
    bottom = split(load(model, "sequence-classification", num_labels=3).model, 0)[0].eval()
    secret, views = OwnerSecret.for_simulation(0, "owner-0"), []
    with torch.no_grad():
        clean = [bottom(x[None], torch.ones_like(x[None]))[0] for x in ids]
    for view in range(12):
        rows = [DChi(4.0).privatise(x, secret.stream(view, i)) for i, x in enumerate(clean)]
        views.append({KEY: dict(enumerate(rows))})
    write_transcript(tmp_path / "transcript.safetensors", Transcript(rows=views))
    write_truth(tmp_path / "truth.safetensors", {KEY: dict(enumerate(ids))})
    common = (
        *(tmp_path / "transcript.safetensors", "--model", model),
        *("--set", "model.labels=3", "--set", "model.max-tokens=16"),
    )

    once = attack(tmp_path, "nearest", *common)
    often = attack(tmp_path, "averaging", *common)

    assert often["success"] > once["success"] + 0.1


def gradients(labels: Tensor) -> Tensor:
    z = torch.randn(len(labels), 3, requires_grad=True)
    F.cross_entropy(z, labels, reduction="sum").backward()
    assert z.grad is not None
    return z.grad


def test_labels_are_read_from_recorded_gradients(tmp_path: Path) -> None:
    ids, labels = texts(), torch.tensor([0, 2, 1, 1, 0, 2])
    passes = [{KEY: dict(enumerate(gradients(labels)))} for _ in range(2)]
    path = tmp_path / "transcript.safetensors"
    write_transcript(path, Transcript(gradients=passes))
    write_truth(
        tmp_path / "truth.safetensors",
        {KEY: dict(enumerate(ids))},
        {KEY: dict(enumerate(labels.tolist()))},
    )

    row = attack(tmp_path, "label_leakage", path, "--known", 2)

    assert (row["name"], row["success"], row["tokens"]) == ("label_leakage:logits", 1.0, 4)
    assert len(read_whole_transcript(path).gradients) == 2
    assert len(read_true_labels(tmp_path / "truth.safetensors")[KEY]) == 6


def test_a_capture_gives_every_view_and_gradient_of_a_session(tmp_path: Path) -> None:
    rows = [torch.randn(3, 4), torch.randn(2, 4)]
    back = torch.randn(2, 3)

    def batch(step: int, fresh: list[int]) -> Frame:
        body = encode_rows(torch.cat([rows[i] for i in fresh]), "fp32") if fresh else b""
        sizes = [len(rows[i]) for i in fresh]
        header = {"step": step, "slots": [0, 1], "fresh": fresh, "lengths": sizes}
        return Frame(Kind.BATCH, {**header, "codec": "fp32", "dim": 4, "last": step == 1}, body)

    def grad(step: int) -> Frame:
        header = {"step": step, "codec": "fp32", "shape": [2, 3], "weight": 1.0}
        return Frame(Kind.GRAD, header, encode_rows(back, "fp32"))

    (tmp_path / "7.owner").write_text("owner-0")
    session = [batch(0, [0, 1]), grad(0), batch(1, []), grad(1)]
    frames = [encode(frame, i, 1 << 20) for i, frame in enumerate(session)]
    data = b"".join(len(x).to_bytes(8, "little") + x for x in frames)
    (tmp_path / "7-train.bin").write_bytes(data)

    found = read_capture(tmp_path)

    assert len(found.rows) == 1
    assert all(torch.equal(found.rows[0][KEY][i], rows[i]) for i in (0, 1))
    assert len(found.gradients) == 2
    assert torch.allclose(found.gradients[1][KEY][1].float(), 2 * back[1])  # its own loss
    (tmp_path / "7-train.bin").write_bytes(data[:-1])
    with pytest.raises(AttackError, match="byte"):
        read_capture(tmp_path)
    (tmp_path / "7-train.bin").unlink()
    with pytest.raises(AttackError, match="recorded sessions"):
        read_capture(tmp_path)


def test_an_update_is_read_for_tokens_labels_and_texts(model: Path, tmp_path: Path) -> None:
    loaded = load(model, "sequence-classification", num_labels=3, dropout=0.0).model.eval()
    ids, label = torch.tensor([[9, 20, 31, 42]]), torch.tensor([2])
    named = dict(loaded.named_parameters())
    loss = loaded(input_ids=ids, labels=label).loss
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    gradient = {n: g for n, g in zip(named, found, strict=True) if g is not None}
    table = "bert.embeddings.word_embeddings.weight"
    before = {table: named[table].detach().clone()}
    moved, batch = tmp_path / "update.safetensors", tmp_path / "gradient.safetensors"
    save_file(
        {f"before/{table}": before[table], f"after/{table}": before[table] - 0.1 * gradient[table]},
        moved,
    )
    own = {f"gradient/{n}": g.contiguous() for n, g in gradient.items()}
    save_file({**own, "shape": torch.tensor([1, 4]), "labels": label}, batch)
    write_truth(tmp_path / "truth.safetensors", {KEY: {0: ids[0]}}, {KEY: {0: 2}})
    common = ("--model", model, "--set", "model.labels=3", "--set", "model.max-tokens=16")

    tokens = attack(tmp_path, "embedding_update", moved, *common)
    labels = attack(tmp_path, "bias_gradient", batch, *common)
    read = attack(tmp_path, "gradient", batch, *common, "--budget", "gradient.restarts=1")

    assert (tokens["success"], tokens["precision"]) == (1.0, 1.0)
    assert labels["success"] == 1.0
    assert read["success"] >= 0.5  # guessing among the batch's own four tokens: 0.25


def test_membership_is_read_from_a_tuned_models_answers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    member = np.arange(60) < 30
    logits = torch.zeros(60, 2)
    logits[:, 1] = torch.from_numpy(rng.normal(size=60) + 2.0 * member)
    path = tmp_path / "answers.safetensors"
    save_file({"logits": logits, "labels": torch.ones(60, dtype=torch.int64)}, path)
    save_file({"members": torch.from_numpy(member)}, tmp_path / "truth.safetensors")

    row = attack(tmp_path, "membership", path)

    assert row["metric"] == "auc"
    assert row["success"] > 0.8
    done = CliRunner().invoke(
        app_cli, ["attack", "run", "membership", str(path), "--budget", "membership.method=lira"]
    )
    assert isinstance(done.exception, AttackError) or "shadows: missing" in done.output


def test_what_a_record_lacks_is_named(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "transcript.safetensors"
    write_transcript(path, Transcript(gradients=[{KEY: {0: torch.zeros(3)}}]))
    write_truth(tmp_path / "truth.safetensors", {KEY: {0: torch.tensor([5])}})
    words = ["attack", "run", "nearest", str(path), "--model", str(model)]
    done = CliRunner().invoke(app_cli, words)
    assert done.exit_code != 0
    assert "rows" in f"{done.output}{done.exception}"


def test_a_pass_over_fewer_samples_keeps_its_own_slots(tmp_path: Path) -> None:
    rows = {KEY: {i: torch.randn(i + 2, 4) for i in range(3)}}
    part = {KEY: {2: torch.randn(4, 4)}}
    write_transcript(tmp_path / "t", Transcript([rows], [rows, part], [rows, part]))

    found = read_whole_transcript(tmp_path / "t")

    assert found.gradients[1][KEY].keys() == {2}
    assert torch.equal(found.outputs[1][KEY][2], part[KEY][2])
    assert found.answered()[KEY].keys() == {0, 1, 2}
