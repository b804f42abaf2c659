"""The last blocks at the owner: the same steps, and nothing of the labels in a session."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsplit.wire.frames import Kind, decode
from tests.strategies.split_tuning.test_centralised_equivalence import (
    PLAIN_SGD,
    Centralised,
    family,
    moved,
    worst,
)
from tests.strategies.split_tuning.test_client_head_equivalence import averaged_head

TAIL: dict[str, Any] = {
    "labels__protection": "client-tail",
    "labels__tail_blocks": 1,
    "train__method": "head",
    "split__k": 0,
}


def blocks_of(path: str) -> int:
    return int(json.loads((Path(path) / "config.json").read_text())["num_hidden_layers"])


@pytest.mark.parametrize("transport", ["stream", "messages"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_one_owner_with_its_tail_equals_training_the_last_blocks(
    make_config: Any,
    run_locally: Any,
    tiny_bert: Path,
    tiny_llama: Path,
    name: str,
    transport: str,
) -> None:
    options = PLAIN_SGD | family(name, tiny_bert, tiny_llama) | TAIL
    options |= {"data__partition": "iid", "data__owners": 1, "train__max_steps": 3}
    config = make_config(train__rounds=2, session__transport=transport, **options)
    run = run_locally(config)
    first = blocks_of(config.model.name) - 1
    reference = Centralised(replace(config, split=replace(config.split, k=first)))
    reference.run()
    assert not run.state, "the server trains nothing"
    tail = averaged_head(run, first)
    assert len(tail) == len(reference.trained)
    assert worst(tail, reference.model) < 2e-6
    assert moved(reference.model, config.model.name, name == "llama") > 1e-3


def test_sessions_are_the_same_bytes_whatever_the_labels(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = TAIL | {"labels__tail_weights": "own", "output__capture": True, "train__rounds": 2}
    options |= {"data__partition": "iid"}
    seen, results = [], []
    source = Path(make_config(**options).data.path)
    for turn in range(2):
        monkeypatch.setenv("FEDSPLIT_HOME", str(tmp_path / f"homes{turn}"))
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        path = tmp_path / f"texts{turn}.jsonl"
        path.write_text("".join(json.dumps(row | {"label": turn}) + "\n" for row in rows))
        folder = tmp_path / f"server{turn}"
        run = run_locally(make_config(data__path=str(path), output__dir=str(folder), **options))
        seen.append(run.captured())
        results.append(run)
    first, second = ([f for f in frames if kind_of(f) is not Kind.HELLO] for frames in seen)
    assert first == second
    returned = [decode(f, 1 << 26) for f in first if kind_of(f) is Kind.GRAD]
    assert returned
    assert all(len(frame.body) == 0 for frame in returned)
    assert not len(results[0].result.arrays), "no weight leaves"


def kind_of(data: bytes) -> Kind:
    return decode(data, 1 << 26).kind


def test_a_tail_of_ones_own_goes_on_where_it_was(make_config: Any, run_locally: Any) -> None:
    options = TAIL | {"labels__tail_weights": "own", "train__max_steps": 0}
    run = run_locally(make_config(train__rounds=3, **options))
    losses = [r["evaluate"]["metrics"]["loss"] for r in run.server["rounds"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_private_steps_of_a_tail_without_noise_and_with_a_wide_clip_are_plain_steps(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = PLAIN_SGD | TAIL | {"data__owners": 1, "data__partition": "iid"}
    options |= {"train__max_steps": 2, "train__rounds": 1}
    plain = run_locally(make_config(**options))
    monkeypatch.setenv("FEDSPLIT_HOME", str(tmp_path / "private"))
    dp = {"dp__noise_multiplier": 1e-9, "dp__clip": 1e3}
    private = run_locally(make_config(output__dir=str(tmp_path / "s"), **options, **dp))
    assert len(plain.result.arrays) > 5
    for name, array in plain.result.arrays.items():
        assert abs(array.numpy() - private.result.arrays[name].numpy()).max() < 2e-6, name
