"""An owner's round of offsite tuning: its own text, the emulator it was sent, adapters back.

Nothing of the text leaves: what does is the adapters' weights (which an attacker may study, see
:mod:`fedsplit.attacks.gradients.update_inversion`) and averages.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.config.schedule import rate_factor
from fedsplit.data import TextDataset
from fedsplit.emulators.build import Emulator, tune_inside
from fedsplit.emulators.lm import IGNORED, mean_loss, pack, target_counts
from fedsplit.emulators.packing import Sample, check_packing, pack_samples, pieces_of
from fedsplit.emulators.settings import method_settings
from fedsplit.errors import ConfigError, DataError
from fedsplit.models.modes import keep_no_activations
from fedsplit.owners.ledger.disclosure import Training
from fedsplit.owners.offsite.steps import AdapterSteps, bounded
from fedsplit.owners.own_tokens import lines_of
from fedsplit.owners.reports import SessionReport
from fedsplit.owners.samples import tokenise_chat
from fedsplit.owners.split.schedule import train_steps
from fedsplit.owners.split.settings import DpSettings
from fedsplit.privacy.secret import OwnerSecret


@dataclass(frozen=True)
class Blocks:
    """An owner's text as token blocks.

    Attributes:
        train: (N, T).
        test: (N', T).
        train_labels: (N, T), what is to be predicted (see :func:`fedsplit.emulators.lm.lm_loss`).
        test_labels: (N', T).
        train_positions: (N, T) where blocks hold several samples each
            (:mod:`fedsplit.emulators.packing`); else None.
        test_positions: (N', T), likewise.
    """

    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor
    train_positions: Tensor | None = None
    test_positions: Tensor | None = None


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
            ids += tokenizer(lines_of(text), add_special_tokens=False)["input_ids"]
            if end is not None:
                ids.append(int(end))
        if len(ids) < length:
            raise DataError(
                f"owner's {name} split has {len(ids)} tokens: must be >= {length}, one block"
            )
        packed.append(pack(torch.tensor(ids, dtype=torch.int64), length))
    return Blocks(packed[0], packed[1], packed[0], packed[1])


def blocks_of_sets(
    tokenizer: Any, train: TextDataset, test: TextDataset, length: int, *, packing: bool = False
) -> Blocks:
    """Return data sets as blocks: plain text as one stream, a conversation to a block of its own.

    A conversation is padded on the right, where no token before it attends, and its completions
    alone are labels.

    Args:
        tokenizer: of the emulator.
        train: the owner's texts.
        test: those that it holds out.
        length: tokens of a block.
        packing: put texts and conversations into blocks in which none attends to another.

    Raises:
        DataError: see :func:`blocks_of` and :func:`fedsplit.owners.samples.tokenise_chat`.
        ModelError: the chat template fails or breaks its bounds.
    """
    if not (train.chat or packing):
        return blocks_of(tokenizer, train.texts, test.texts, length)
    pad = next(int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None)
    if packing:
        a, b = (pack_samples(_samples(tokenizer, d, length), length, pad) for d in (train, test))
        return Blocks(a.ids, b.ids, a.labels, b.labels, a.positions, b.positions)
    found: list[Tensor] = []
    for part in (train, test):
        samples = tokenise_chat(tokenizer, part.texts, max_tokens=length)
        ids = torch.full((len(samples), length), pad)
        labels = torch.full((len(samples), length), IGNORED)
        for slot, own in enumerate(samples.ids):
            ids[slot, : len(own)] = own
            after = 1 + samples.predicting(slot)
            labels[slot, after] = own[after]
        found += [ids, labels]
    return Blocks(found[0], found[2], found[1], found[3])


def _samples(tokenizer: Any, data: TextDataset, length: int) -> list[Sample]:
    """Return a data set's samples for packing: conversations, or texts with their end token."""
    if not data.chat:
        end = tokenizer.eos_token_id
        found = []
        for text in data.texts:
            ids = tokenizer(lines_of(text), add_special_tokens=False)["input_ids"]
            found += pieces_of(torch.tensor(ids + ([] if end is None else [int(end)])), length)
        return found
    samples = tokenise_chat(tokenizer, data.texts, max_tokens=length)
    found = []
    for slot, ids in enumerate(samples.ids):
        labels = torch.full_like(ids, IGNORED)
        after = 1 + samples.predicting(slot)
        labels[after] = ids[after]
        found.append((ids, labels))
    return found


class AdapterOwner:
    """Trains what the run's method trains inside an emulator's A on one owner's blocks.

    Args:
        emulator: as loaded; the method's modules are added to its adapter blocks.
        blocks: the owner's.
        config: the run's settings.
        name: the owner's public name, which orders its batches.
        secret: the owner's, for the noise of DP-SGD (``dp.*``).
        report: averages as they may leave; None: exact ones.

    Raises:
        ConfigError: the method finds nothing to train, or DP-SGD has no secret.
        UnsupportedModelError: the method, or packing, cannot be used in this family.
    """

    def __init__(
        self,
        emulator: Emulator,
        blocks: Blocks,
        config: RunConfig,
        name: str,
        secret: OwnerSecret | None = None,
        report: SessionReport | None = None,
    ) -> None:
        if config.dp.noise_multiplier and secret is None:
            raise ConfigError(
                f"dp.noise-multiplier={config.dp.noise_multiplier}: needs the owner's secret"
            )
        self.emulator = emulator
        self.blocks = blocks
        self.config = config
        self.name = name
        self._secret = secret
        self._report = report
        self.tuning = tune_inside(emulator, method_settings(config.offsite, config.seed))
        if blocks.train_positions is not None:
            check_packing(emulator.model)
        self._received = self.tuning.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Start from the round's average.

        Raises:
            ModelError: a missing, foreign, misshapen or non-finite tensor.
        """
        self.tuning.load(state)
        self._received = self.tuning.state()

    def plan(self, round_: int) -> Training:
        """Return what :meth:`train` will do, for the owner's rules and ledger."""
        batches, _ = self._steps(round_)
        dp = self._dp(round_, len(batches))
        count = len(self.blocks.train)
        return Training(
            steps=len(batches),
            batch=min(map(len, batches)),
            samples=count,
            epochs=sum(map(len, batches)) / count,
            noise=None if dp is None else dp.noisy(batches),
        )

    def _steps(self, round_: int) -> tuple[list[np.ndarray], list[int]]:
        train = self.config.train
        return train_steps(len(self.blocks.train), train, self.config.seed, self.name, round_)

    def _dp(self, round_: int, steps: int) -> DpSettings | None:
        samples = len(self.blocks.train)
        return DpSettings.of_round(self.config, self._secret, samples, round_, steps)

    def train(self, round_: int) -> dict[str, float | int]:
        """Take the round's local steps and return its averages.

        With DP-SGD what it has cost by now is among them (``dp-epsilon``, ``dp-delta``,
        ``dp-steps``); the averages themselves are exact, and no part of that guarantee.

        Raises:
            ModelError: the loss is not finite; nothing leaves then.
        """
        train = self.config.train
        began = time.perf_counter()
        batches, _ = self._steps(round_)
        model = self.emulator.model.train()
        if self.config.offsite.checkpointing:
            keep_no_activations(model)
        per_block = self._report is not None and self._report.per_text
        dp = self._dp(round_, len(batches))
        parameters = self.tuning.parameters()
        steps = AdapterSteps(model, parameters, self.config, dp, per_block=per_block)
        loss_sum, tokens = 0.0, 0
        try:
            for step, batch in enumerate(batches):
                rows = torch.as_tensor(batch)
                ids, labels = self.blocks.train[rows], self.blocks.train_labels[rows]  # (B, T)
                done = (round_ - 1 + step / len(batches)) / train.rounds
                packed = self.blocks.train_positions
                placed = None if packed is None else packed[rows]
                loss = steps.step(ids, labels, train.lr * rate_factor(train, done), placed)
                count = int(target_counts(labels).sum())
                self._add(batch, steps.losses)
                loss_sum += loss * count
                tokens += count
        finally:
            model.eval()
        exact = {
            "num-examples": len(self.blocks.train),
            "targets": float(tokens),
            "steps": len(batches),
            "loss": loss_sum / max(1, tokens),
            "train-seconds": time.perf_counter() - began,
            **steps.spent(),
        }
        return exact if self._report is None else self._report.private(exact)

    def evaluate(self) -> dict[str, float | int]:
        """Return the emulator's loss on the owner's held-out blocks (nats per token)."""
        test, labels = self.blocks.test, self.blocks.test_labels
        exact = {
            "num-examples": len(test),
            "targets": float(target_counts(labels).sum()),
            "loss": mean_loss(
                self.emulator.model, test, labels=labels, positions=self.blocks.test_positions
            ),
        }
        if self._report is None:
            return exact
        if self._report.per_text:
            pairs = zip(torch.split(test, 1), torch.split(labels, 1), strict=True)
            each = [mean_loss(self.emulator.model, ids, labels=own) for ids, own in pairs]
            self._add(range(len(test)), each)
        return self._report.private(exact)

    def _add(self, blocks: Iterable[int], losses: Sequence[float]) -> None:
        if self._report is not None and self._report.per_text:
            rows = torch.tensor([[loss, 0.0] for loss in losses])
            self._report.add([int(block) for block in blocks], rows)

    def weights(self) -> dict[str, Tensor]:
        """Return what is trained by its names in the full model, float32.

        With ``offsite.central-dp-clip`` the round's change is bounded before it leaves.
        """
        found = {name: t.float() for name, t in self.tuning.state().items()}
        if self.config.offsite.central_dp_clip:
            start = {name: t.float() for name, t in self._received.items()}
            found = bounded(found, start, self.config.offsite.central_dp_clip)
        return found
