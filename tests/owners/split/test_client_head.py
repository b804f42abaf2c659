"""An owner that keeps its head and protects its labels, in whole runs within one process."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.config import LabelsConfig, RunConfig
from fedsplit.errors import ConfigError
from fedsplit.owners.data_source import simulated_shares
from fedsplit.owners.split.schedule import slot_order
from fedsplit.privacy.dp.accounting import spent_epsilon
from fedsplit.privacy.labels.table import build_protection, draw_labels
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.settings import read_settings
from fedsplit.wire.codecs import decode_rows
from fedsplit.wire.frames import Kind, decode
from tests.strategies.run_local import LocalRun, run_local
from tests.tiny_models import save_texts, save_tiny_bert

PLAIN: dict[str, Any] = {
    "model.labels": 3,
    "model.max-tokens": 16,
    "train.rounds": 1,
    "train.batch-size": 8,
    "train.max-steps": 2,
    "train.optimizer": "sgd",
    "train.lr": 0.05,
    "train.head-lr": 0.05,
    "train.bottom-lr": 0.05,
    "train.clip": 0.0,
    "train.weight-decay": 0.0,
    "train.warmup": 0.0,
    "train.schedule": "constant",
    "data.kind": "file",
    "data.owners": 2,
    "data.partition": "iid",
    "session.codec": "fp32",
    "session.wave-wait-s": 120.0,
    "session.deadline-s": 120.0,
    "split.k": 1,
    "lineage.gate": "off",
    "output.capture": True,
    "output.evaluate-every": 0,
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "model.name": str(save_tiny_bert(tmp_path_factory.mktemp("bert"))),
        "data.path": str(save_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl", 90)),
    }


@pytest.fixture
def go(material: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function from flat overrides to (settings, finished run)."""
    monkeypatch.setenv("FEDSPLIT_SIMULATION", "1")
    runs = iter(range(100))

    def run(**overrides: Any) -> tuple[RunConfig, LocalRun]:
        number = next(runs)
        monkeypatch.setenv("FEDSPLIT_HOME", str(tmp_path / f"homes{number}"))
        flat = PLAIN | material | {"output.dir": str(tmp_path / f"server{number}")}
        flat |= {k.replace("__", ".").replace("_", "-"): v for k, v in overrides.items()}
        config = read_settings(flat)
        return config, run_local(config)

    return run


def frames(run: LocalRun, kind: Kind) -> list[Any]:
    found = [decode(data, 1 << 26) for data in run.captured()]
    return [f for f in found if f.kind is kind]


def rows_of(run: LocalRun) -> list[tuple[list[int], torch.Tensor]]:
    """(slots, gradient rows) of every step, owner after owner."""
    pairs = zip(frames(run, Kind.BATCH), frames(run, Kind.GRAD), strict=True)
    return [(b["slots"], decode_rows(g.body, tuple(g["shape"]), g["codec"])) for b, g in pairs]


def true_labels(config: RunConfig, owner: int) -> torch.Tensor:
    train = simulated_shares(config.data, config.seed, True)[owner][0]
    secret = OwnerSecret.for_simulation(config.seed, f"owner-{owner}")
    assert train.labels is not None
    return torch.tensor([int(train.labels[i]) for i in slot_order(secret, "train", len(train))])


# ---- labels -------------------------------------------------------------------------------------


def test_a_servers_head_sees_every_label_and_drawn_labels_only_after_a_draw(go: Any) -> None:
    """The gradient's smallest entry is the label that was trained on, and nothing else is."""
    for protection in ("none", "randomised-response"):
        config, run = go(labels__protection=protection, labels__epsilon=0.5)
        steps = rows_of(run)  # nodes are in the reverse order of owners
        truth = {owner: true_labels(config, owner) for owner in (0, 1)}
        half = len(steps) // 2
        read = [
            (int(truth[owner][slot]), int(row.argmin()))
            for owner, own in ((1, steps[:half]), (0, steps[half:]))
            for slots, rows in own
            for slot, row in zip(slots, rows, strict=True)
        ]
        right = sum(a == b for a, b in read) / len(read)
        assert len(read) == 32
        if protection == "none":
            assert right == 1.0
        else:  # kept with probability 0.45
            assert right < 0.8


def test_drawn_labels_are_those_of_the_owners_secret(go: Any) -> None:
    config, run = go(labels__protection="randomised-response", labels__epsilon=0.5, data__owners=1)
    train = simulated_shares(config.data, config.seed, True)[0][0]
    secret = OwnerSecret.for_simulation(config.seed, "owner-0")
    order = slot_order(secret, "train", len(train))
    drawn = draw_labels(
        build_protection(LabelsConfig(protection="randomised-response", epsilon=0.5)),
        secret,
        [hashlib.sha256(train.texts[i].encode()).digest() for i in order],
        true_labels(config, 0),
        3,
    )
    for slots, rows in rows_of(run):
        assert rows.argmin(1).tolist() == drawn[slots].tolist()
    assert 0 < float((drawn == true_labels(config, 0)).double().mean()) < 1


def test_debiasing_changes_the_loss_and_not_the_labels(go: Any) -> None:
    options = {"labels__protection": "randomised-response", "labels__epsilon": 1.0}
    plain = rows_of(go(**options)[1])
    corrected = rows_of(go(**options, labels__debias=True)[1])
    assert plain[0][0] == corrected[0][0]
    assert torch.equal(plain[0][1].argmin(1), corrected[0][1].argmin(1))
    # A correction expects some labels to be wrong: it pulls less.
    assert float(corrected[0][1].norm()) < 0.9 * float(plain[0][1].norm())


@pytest.mark.parametrize("protection", ["max-norm", "client-head+max-norm"])
def test_shielded_gradients_differ_from_clean_ones_on_either_side_of_the_head(
    go: Any, protection: str
) -> None:
    clean = go(labels__protection=protection.partition("+")[0].replace("max-norm", "none"))[1]
    noisy = go(labels__protection=protection)[1]
    (slots, before), (same, after) = rows_of(clean)[0], rows_of(noisy)[0]
    assert slots == same
    assert before.shape == after.shape
    assert not torch.allclose(before, after)
    longest = int(before.norm(dim=1).argmax())
    torch.testing.assert_close(before[longest], after[longest])
    again = go(labels__protection=protection)[1]
    for (_, one), (_, two) in zip(rows_of(noisy), rows_of(again), strict=True):
        assert torch.equal(one, two)


def test_the_heads_place_changes_no_representation(go: Any) -> None:
    """Else a server could ask twice, with a head and without, and average the noise."""
    options = {"privacy__mechanism": "dchi", "privacy__eta": 20.0}
    bodies = []
    for protection in ("none", "client-head"):
        run = go(labels__protection=protection, **options)[1]
        bodies.append([bytes(f.body) for f in frames(run, Kind.BATCH)])
    assert bodies[0] == bodies[1]
    assert sum(map(len, bodies[0])) > 0


def test_a_head_at_the_owner_leaves_a_head_method_nothing_to_do(go: Any) -> None:
    with pytest.raises(ConfigError, match="leaves the server something to train"):
        go(labels__protection="client-head", train__method="head")


# ---- DP-SGD -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bottom", ["frozen", "joint"])
def test_without_noise_and_with_a_wide_clip_private_steps_are_plain_steps(
    go: Any, bottom: str
) -> None:
    options = {"labels__protection": "client-head", "split__bottom": bottom}
    _, plain = go(**options)
    _, private = go(**options, dp__noise_multiplier=1e-9, dp__clip=1e3)
    assert len(plain.result.arrays) > (3 if bottom == "frozen" else 10)
    for name, array in plain.result.arrays.items():
        other = private.result.arrays[name].numpy()
        assert abs(array.numpy() - other).max() < 2e-6, name


def test_the_cost_is_reported_per_owner_and_adds_up_over_rounds(go: Any) -> None:
    options = {"labels__protection": "client-head", "train__rounds": 2}
    config, run = go(**options, dp__noise_multiplier=1.5, dp__clip=0.5)
    for row in run.server["rounds"]:
        for index in (0, 1):
            found = row["train"]["metrics"]["owners"][f"owner-{index}"]
            samples = len(simulated_shares(config.data, config.seed, True)[index][0])
            steps = 2 * row["round"]
            expected = spent_epsilon(1.5, 8 / samples, steps, 1e-5)
            assert found["dp-epsilon"] == pytest.approx(expected)
            assert found["dp-steps"] == steps
    _, joint = go(split__bottom="joint", dp__noise_multiplier=1.5, **options)
    both = joint.server["rounds"][0]["train"]["metrics"]["owners"]["owner-0"]
    assert both["dp-steps"] == 4, "head and bottom are two releases"
    assert "dp-epsilon" not in go()[1].server["rounds"][0]["train"]["metrics"]["owners"]["owner-0"]
