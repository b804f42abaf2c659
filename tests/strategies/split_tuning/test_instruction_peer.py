"""Prompts with answers beside TRL's SFTTrainer: ids, labels, loss and gradients, packed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.data import load_splits
from fedsplit.emulators.lm import IGNORED, lm_loss, logits_of
from fedsplit.models.loading import load
from fedsplit.owners.offsite.owner import blocks_of_sets
from tests.strategies.split_tuning.test_instruction_data import asked

pytest.importorskip("jinja2")
trl = pytest.importorskip("trl")

__all__ = ["asked"]  # a fixture
LENGTH = 16


@pytest.fixture
def peer(asked: dict[str, Any], tmp_path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return TRL's trainer and its batch of the first samples, as its own collator makes it."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in Path(asked["data__path"]).read_text().splitlines()]
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_length=LENGTH,
        completion_only_loss=True,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    name = asked["model__name"]
    trainer = trl.SFTTrainer(
        model=load(name, "causal-lm", dropout=0.0).model,
        args=arguments,
        train_dataset=Dataset.from_list(chats),
        processing_class=AutoTokenizer.from_pretrained(name, local_files_only=True),
    )
    chosen = [trainer.train_dataset[i] for i in range(len(rows))]
    return trainer, trainer.data_collator(chosen)


def test_loss_and_gradients_are_trls(
    asked: dict[str, Any], peer: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    trainer, batch = peer
    loaded = load(asked["model__name"], "causal-lm", dropout=0.0)
    data, _ = load_splits("instructions", path=asked["data__path"], label_column="")
    wanted = trainer.compute_loss(trainer.model.eval(), dict(batch))
    wanted.backward()
    theirs = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    for packing in (False, True):
        blocks = blocks_of_sets(loaded.tokenizer, data, data, LENGTH, packing=packing)
        if not packing:
            width = batch["input_ids"].shape[1]
            assert torch.equal(blocks.train_labels[:, :width], batch["labels"])
            seen = batch["attention_mask"] == 1
            assert torch.equal(blocks.train[:, :width][seen], batch["input_ids"][seen])
            assert int((blocks.train_labels[:, width:] != IGNORED).sum()) == 0
        else:
            assert len(blocks.train) < len(data.texts)
        loaded.model.zero_grad(set_to_none=True)
        logits = logits_of(loaded.model.eval(), blocks.train, blocks.train_positions)
        loss = lm_loss(logits, blocks.train_labels)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), abs=1e-5)
        mine = dict(loaded.model.named_parameters())
        assert len(theirs) > 10
        for name, gradient in theirs.items():
            own = mine[name].grad
            assert own is not None
            assert float((own - gradient).abs().max()) < 1e-5, name
