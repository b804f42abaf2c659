"""Lengths that a model cannot have are refused at the start, at the server and at owners."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsplit.errors import ConfigError, FedsplitError
from strategies.base_model import load_base


def test_texts_longer_than_the_positions(make_config: Any) -> None:
    most = load_base(make_config()).model.config.max_position_embeddings
    load_base(make_config(model__max_tokens=most))
    with pytest.raises(ConfigError, match=rf"model.max-tokens={most + 1}: must be <= {most}"):
        load_base(make_config(model__max_tokens=most + 1))


def test_texts_shorter_than_the_special_tokens(make_config: Any, tiny_llama: Path) -> None:
    for tokens in (1, 2):
        with pytest.raises(ConfigError, match=rf"model.max-tokens={tokens}: must be >= 3"):
            load_base(make_config(model__max_tokens=tokens))
    causal = {"model__name": str(tiny_llama), "model__task": "causal-lm"}
    with pytest.raises(ConfigError, match=r"model.max-tokens=1: must be >= 2"):
        load_base(make_config(model__max_tokens=1, **causal))


def test_an_owner_believes_no_servers_lengths(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategies.base_model._check_lengths", lambda *_: None)
    with pytest.raises(FedsplitError, match=r"model.max-tokens=100000: must be <="):
        run_locally(make_config(model__max_tokens=100_000))


@pytest.mark.parametrize("transport", ["stream", "messages"])
def test_an_owner_with_fewer_steps_than_the_others_stays_in_the_round(
    make_config: Any, run_locally: Any, tmp_path: Path, transport: str
) -> None:
    path, rows = tmp_path / "unequal.jsonl", []
    for writer, count in (("a", 40), ("b", 8), ("c", 20)):
        rows += [{"text": f"w{n} w{n % 7}", "label": n % 3, "writer": writer} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        data__path=str(path),
        data__partition="column",
        data__column="writer",
        train__max_steps=0,
        session__transport=transport,
    )

    run = run_locally(config)

    for row in run.server["rounds"]:
        for mode in ("train", "evaluate"):
            assert row[mode]["lost"] == {}
            assert len(row[mode]["metrics"]["owners"]) == 3
