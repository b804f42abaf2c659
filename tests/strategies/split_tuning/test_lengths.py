"""Lengths that a model cannot have are refused at the start, at the server and at owners."""

from __future__ import annotations

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
