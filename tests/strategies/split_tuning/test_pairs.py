"""Texts of two columns: what each half works on is the tokenizer's pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedsplit.owners.data_source import simulated_shares
from fedsplit.owners.split.schedule import slot_order
from fedsplit.privacy.secret import OwnerSecret
from simulations.core.owner_samples import owner_samples


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {"question": f"w{i % 9} w{i % 7}", "answer": f"w{i % 5} w3", "label": i % 3}
        for i in range(60)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("transport", ["stream", "messages"])
@pytest.mark.parametrize("protection", ["none", "client-head"])
def test_pairs_of_texts_cross_as_pairs(
    make_config: Any, run_locally: Any, pairs: Path, transport: str, protection: str
) -> None:
    config = make_config(
        data__path=str(pairs),
        data__text_column="question, answer",
        session__transport=transport,
        labels__protection=protection,
        train__rounds=1,
        train__max_steps=0,
    )
    run = run_locally(config)
    row = run.server["rounds"][-1]
    assert row["train"]["lost"] == row["evaluate"]["lost"] == {}

    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    embed = AutoModelForSequenceClassification.from_pretrained(config.model.name).bert.embeddings
    secret = OwnerSecret.for_simulation(config.seed, "owner-0")
    train, _ = simulated_shares(config.data, config.seed, True)[0]
    first = train.texts[slot_order(secret, "train", len(train))[0]].split("\x1f")
    ids = tokenizer(*first)["input_ids"]
    assert ids.count(tokenizer.sep_token_id) == 2
    sent = run.strategy.store.get("owner-0", "train", [0])[0]
    with torch.no_grad():
        assert torch.allclose(sent, embed(torch.tensor([ids]))[0], atol=1e-6)
    # The centralised twin reads the very same tokens.
    assert owner_samples(config, tokenizer)[0].train.ids[0].tolist() == ids
