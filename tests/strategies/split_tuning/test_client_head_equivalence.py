"""The head at the owner changes who computes what, and nothing that is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.owners.split import message_session
from fedsplit.wire.frames import Kind, decode
from tests.strategies.split_tuning.test_centralised_equivalence import (
    PLAIN_SGD,
    Centralised,
    family,
    moved,
    whole_name,
    worst,
)

HEAD = {"labels__protection": "client-head"}


def averaged_head(run: Any, k: int) -> list[tuple[str, torch.Tensor]]:
    arrays = {n: torch.tensor(a.numpy()) for n, a in run.result.arrays.items()}
    found = [(n.removeprefix("head."), p) for n, p in arrays.items() if n.startswith("head.")]
    return [(whole_name(n, k), p) for n, p in found]


@pytest.mark.parametrize("transport", ["stream", "messages"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_one_owner_with_its_head_equals_training_the_whole(
    make_config: Any,
    run_locally: Any,
    tiny_bert: Path,
    tiny_llama: Path,
    name: str,
    transport: str,
) -> None:
    options = PLAIN_SGD | family(name, tiny_bert, tiny_llama) | HEAD
    options |= {"data__partition": "iid", "data__owners": 1, "train__max_steps": 4}
    config = make_config(split__k=1, train__rounds=2, session__transport=transport, **options)
    run = run_locally(config)
    reference = Centralised(config)
    reference.run()
    head = averaged_head(run, 1)
    top = [(whole_name(n, 1), p) for n, p in run.state.items()]
    assert len(top) + len(head) == len(reference.trained)
    assert not {n for n, _ in top} & {n for n, _ in head}
    assert worst(top, reference.model) < 2e-6
    assert worst(head, reference.model) < 2e-6
    assert moved(reference.model, config.model.name, name == "llama") > 1e-3


@pytest.mark.parametrize(
    ("name", "bottom"), [("bert", "frozen"), ("bert", "joint"), ("llama", "joint")]
)
def test_several_owners_with_one_step_a_round_equal_training_the_whole(
    make_config: Any, run_locally: Any, tiny_bert: Path, tiny_llama: Path, name: str, bottom: str
) -> None:
    """Heads are local between averages: with more steps a round they drift apart, as in FedAvg."""
    options = PLAIN_SGD | family(name, tiny_bert, tiny_llama) | HEAD
    options |= {"split__bottom": bottom, "train__max_steps": 1, "train__rounds": 3}
    options |= {"train__batch_size": 31, "data__alpha": 1.0}
    config = make_config(split__k=1, **options)
    reference = Centralised(config, joint=bottom == "joint")
    run = run_locally(config)
    reference.run()
    top = [(whole_name(n, 1), p) for n, p in run.state.items()]
    assert worst(top, reference.model) < 2e-6
    assert worst(averaged_head(run, 1), reference.model) < 2e-6
    assert moved(reference.model, config.model.name, name == "llama") > 1e-3


def test_the_server_trains_no_head_and_neither_logits_nor_labels_cross(
    make_config: Any, run_locally: Any
) -> None:
    config = make_config(split__k=1, train__rounds=1, output__capture=True, **HEAD)
    run = run_locally(config)
    assert not [n for n in run.state if "classifier" in n or "pooler" in n]
    frames = [decode(data, 1 << 26) for data in run.captured()]
    gradients = [f for f in frames if f.kind is Kind.GRAD]
    batches = [f for f in frames if f.kind is Kind.BATCH]
    assert len(gradients) == 9
    # One row of the hidden width per text, since this head reads one position alone.
    shapes = sorted(tuple(f["shape"]) for f in gradients)
    sizes = sorted((len(f["slots"]), 32) for f in batches if f["step"] < 3)
    assert set(shapes) <= set(sizes)
    assert run.server["rounds"][-1]["evaluate"]["metrics"]["num-examples"] == 24


@pytest.mark.parametrize("schedule", ["parallel", "sequential"])
def test_heads_are_evaluated_and_continued_as_averaged(
    make_config: Any, run_locally: Any, schedule: str
) -> None:
    options = HEAD | {"session__schedule": schedule, "train__max_steps": 0}
    one = run_locally(make_config(split__k=1, train__rounds=3, **options))
    losses = [r["evaluate"]["metrics"]["loss"] for r in one.server["rounds"]]
    assert losses == sorted(losses, reverse=True), "a head that starts anew would not get better"


def test_a_new_process_for_every_message_takes_the_same_steps(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = HEAD | {"session__transport": "messages", "train__max_steps": 2, "split__k": 1}
    options |= {"data__owners": 1, "train__rounds": 2, "output__evaluate_every": 0}
    kept = run_locally(make_config(**options))

    class Forgetful(dict):  # type: ignore[type-arg]
        def __setitem__(self, key: Any, value: Any) -> None:
            pass

    monkeypatch.setattr(message_session, "_LIVE", Forgetful())
    monkeypatch.setenv("FEDSPLIT_HOME", str(tmp_path / "other"))
    fresh = run_locally(make_config(**options, output__dir=str(tmp_path / "other-server")))
    assert len(kept.result.arrays)
    for name, array in kept.result.arrays.items():
        assert (array.numpy() == fresh.result.arrays[name].numpy()).all(), name
    for name, value in kept.state.items():
        assert torch.equal(value, fresh.state[name]), name
