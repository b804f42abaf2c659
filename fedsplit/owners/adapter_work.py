"""An owner's round of offsite tuning: its own text, the emulator it was sent, adapters back.

Nothing of the text leaves: what does is the adapters' weights (which an attacker may study, see
:mod:`fedsplit.attacks.gradient_inversion`) and averages.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.config import RunConfig, TrainConfig
from fedsplit.config.schedule import rate_factor
from fedsplit.emulators.build import Emulator, adapter_state, load_adapters
from fedsplit.emulators.lm import lm_loss, logits_of, mean_loss, pack
from fedsplit.errors import DataError, ModelError
from fedsplit.owners.plan import train_steps


@dataclass(frozen=True)
class Blocks:
    """An owner's text as token blocks.

    Attributes:
        train: (N, T).
        test: (N', T).
    """

    train: Tensor
    test: Tensor


def blocks_of(tokenizer: Any, train: Sequence[str], test: Sequence[str], length: int) -> Blocks:
    """Return texts as packed blocks of ``length`` tokens, texts apart by the end token.

    Raises:
        DataError: one of the splits has less than one block.
    """
    end = tokenizer.eos_token_id
    packed = []
    for name, texts in (("train", train), ("test", test)):
        ids: list[int] = []
        for text in texts:
            ids += tokenizer(text, add_special_tokens=False)["input_ids"]
            if end is not None:
                ids.append(int(end))
        if len(ids) < length:
            raise DataError(
                f"owner's {name} split has {len(ids)} tokens: must be >= {length}, one block"
            )
        packed.append(pack(torch.tensor(ids, dtype=torch.int64), length))
    return Blocks(packed[0], packed[1])


class AdapterOwner:
    """Trains an emulator's adapters on one owner's blocks.

    Args:
        emulator: as loaded; its adapters require gradients.
        blocks: the owner's.
        config: the run's settings.
        name: the owner's public name, which orders its batches.
    """

    def __init__(self, emulator: Emulator, blocks: Blocks, config: RunConfig, name: str) -> None:
        self.emulator = emulator
        self.blocks = blocks
        self.config = config
        self.name = name

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Start from the round's average.

        Raises:
            ModelError: a missing, foreign, misshapen or non-finite tensor.
        """
        load_adapters(self.emulator, state)

    def train(self, round_: int) -> dict[str, float | int]:
        """Take the round's local steps and return its averages.

        Raises:
            ModelError: the loss is not finite; nothing leaves then.
        """
        train, offsite = self.config.train, self.config.offsite
        began = time.perf_counter()
        batches, _ = train_steps(len(self.blocks.train), train, self.config.seed, self.name, round_)
        named = self.emulator.adapter_parameters()
        parameters = [p for p in named.values() if p.requires_grad]
        start = [p.detach().clone() for p in parameters]
        optimizer = _optimizer(parameters, train)
        model = self.emulator.model.train()
        loss_sum, tokens = 0.0, 0
        try:
            for step, batch in enumerate(batches):
                ids = self.blocks.train[torch.as_tensor(batch)]  # (B, T)
                loss = lm_loss(logits_of(model, ids), ids)
                if not bool(torch.isfinite(loss)):
                    raise ModelError(f"local loss {float(loss)} at step {step}: must be finite")
                whole = loss
                if offsite.proximal:
                    distance = sum(
                        (p - s).pow(2).sum() for p, s in zip(parameters, start, strict=True)
                    )
                    whole = loss + 0.5 * offsite.proximal * distance
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward([whole])
                if train.clip:
                    nn.utils.clip_grad_norm_(parameters, train.clip)
                done = (round_ - 1 + step / len(batches)) / train.rounds
                for group in optimizer.param_groups:
                    group["lr"] = train.lr * rate_factor(train, done)
                optimizer.step()
                count = ids.shape[0] * (ids.shape[1] - 1)
                loss_sum += float(loss.detach()) * count
                tokens += count
        finally:
            model.eval()
        return {
            "num-examples": len(self.blocks.train),
            "targets": float(tokens),
            "steps": len(batches),
            "loss": loss_sum / max(1, tokens),
            "accuracy": 0.0,
            "share-touched": 0.0,
            "train-seconds": time.perf_counter() - began,
        }

    def evaluate(self) -> dict[str, float | int]:
        """Return the emulator's loss on the owner's held-out blocks (nats per token)."""
        test = self.blocks.test
        return {
            "num-examples": len(test),
            "targets": float(test.shape[0] * (test.shape[1] - 1)),
            "steps": 0,
            "loss": mean_loss(self.emulator.model, test),
            "accuracy": 0.0,
            "share-touched": 0.0,
        }

    def weights(self) -> dict[str, Tensor]:
        """Return the adapters by their names in the full model, float32."""
        return {name: t.float() for name, t in adapter_state(self.emulator).items()}


def _optimizer(parameters: list[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    if not parameters:
        raise ModelError("emulator has 0 trainable parameters: must be >= 1")
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=train.lr, weight_decay=train.weight_decay)
    return torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay)
