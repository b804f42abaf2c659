"""What a federation of offsite owners must equal: the same steps in one process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fedsplit.config import RunConfig
from fedsplit.emulators.lm import lm_loss, logits_of
from fedsplit.owners.data_source import simulated_shares
from fedsplit.owners.offsite.owner import blocks_of
from fedsplit.owners.split.schedule import train_steps
from strategies.base_model import load_base


def train_on_the_union(
    config: RunConfig, model: Any, parameters: Iterable[torch.nn.Parameter]
) -> None:
    """Take a step a round, by SGD, on the union of the owners' first batches of the round."""
    tokenizer = load_base(config).tokenizer
    owners = [
        (f"owner-{i}", blocks_of(tokenizer, train.texts, test.texts, config.offsite.block).train)
        for i, (train, test) in enumerate(simulated_shares(config.data, config.seed, False))
    ]
    optimizer = torch.optim.SGD(list(parameters), lr=config.train.lr)
    for round_ in range(1, config.train.rounds + 1):
        union = []
        for name, blocks in owners:
            batches, _ = train_steps(len(blocks), config.train, config.seed, name, round_)
            union.append(blocks[torch.as_tensor(batches[0])])
        ids = torch.cat(union)
        optimizer.zero_grad()
        lm_loss(logits_of(model, ids), ids).backward()
        optimizer.step()
