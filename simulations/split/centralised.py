"""The centralised twin: the same model, steps and learning rates in one process, without privacy.

Each step takes the union of the batches that the federation's owners contributed to one cohort
step, so what differs from the federated run is the split, the wire and the noise, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsplit.config import RunConfig
from fedsplit.errors import check
from fedsplit.models.adapters.trainable import make_trainable, method_options
from fedsplit.models.splitting.halves import split
from fedsplit.models.splitting.heads import head_parameters
from fedsplit.owners.samples import Samples
from fedsplit.owners.split.schedule import train_steps
from fedsplit.seeding import derive_seed
from simulations.core.owner_samples import OwnerSamples
from strategies.base_model import AUTOCASTS, load_base
from strategies.rounds.report import natural
from strategies.sessions.length_buckets import LengthBuckets
from strategies.split_tuning.optimisation import Optimisation

Step = list[tuple[Samples, list[int]]]


def padded(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Return a step's token ids and mask, (N, T) each, and its labels, (N,); none: (0,)."""
    ids_list = [s.ids[slot] for s, slots in step for slot in slots]
    ids = nn.utils.rnn.pad_sequence(ids_list, batch_first=True)
    lengths = torch.tensor([x.shape[0] for x in ids_list])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    labels = [s.labels[slots] for s, slots in step if s.labels is not None]
    return ids, mask, torch.cat(labels) if labels else torch.empty(0)


@dataclass
class TwinReport:
    """What the twin reached.

    Attributes:
        accuracy: share of right predictions on all owners' held-out samples.
        loss: mean held-out cross-entropy (nats per target).
        zero_shot_loss: the same before any step.
        majority: share of the most frequent training class among the held-out samples.
        steps: steps taken.
        train_s: seconds inside the steps.
    """

    accuracy: float
    loss: float
    zero_shot_loss: float
    majority: float
    steps: int
    train_s: float


class CentralisedTwin:
    """One process that holds everything; privacy, label and lineage settings are ignored."""

    def __init__(self, config: RunConfig, owners: Sequence[OwnerSamples]) -> None:
        accumulate = config.train.accumulate
        check(accumulate == 1, "train.accumulate", accumulate, "1 beside a centralised twin")
        self.config = config
        self.owners = {owner.name: owner for owner in owners}
        loaded = load_base(config)
        self.bottom, self.top = split(loaded.model, config.split.k, verify=False)
        self.top.autocast = AUTOCASTS[config.model.autocast]
        self._buckets = LengthBuckets(self.top)
        self.joint = config.split.bottom == "joint"
        self.bottom.eval().requires_grad_(self.joint)
        trainable = make_trainable(self.top, config.train.method, **method_options(config.train))
        head = (
            head_parameters(self.top) if config.model.task == "sequence-classification" else set()
        )
        parameters = trainable.parameters()
        self.optimisation = Optimisation(
            [p for p in parameters if id(p) not in head],
            [p for p in parameters if id(p) in head],
            config.train,
        )
        self.bottom_optimizer: torch.optim.Optimizer | None = None
        if self.joint:
            kind = torch.optim.SGD if config.train.optimizer == "sgd" else torch.optim.AdamW
            self.bottom_optimizer = kind(
                self.bottom.parameters(),
                lr=config.train.bottom_lr,
                weight_decay=config.train.weight_decay,
            )

    def logits(self, samples: Step) -> tuple[Tensor, Tensor]:
        """Return (logits rows, targets) of one step's samples."""
        ids, mask, labels = padded(samples)
        with torch.set_grad_enabled(self.joint and torch.is_grad_enabled()):
            hidden = self.bottom(ids, mask)
        if self.config.model.task == "sequence-classification":
            return self._buckets(hidden, mask), labels  # the server pads as little
        logits = self.top(hidden, mask)
        predicts = torch.zeros_like(mask[:, 1:], dtype=torch.bool)
        for row, (own, slot) in enumerate((s, slot) for s, slots in samples for slot in slots):
            predicts[row, own.predicting(slot)] = True
        return logits[:, :-1][predicts], ids[:, 1:][predicts]

    def step(self, samples: Step, progress: float) -> float:
        """Take one step and return its loss."""
        self.top.train()
        self.optimisation.zero_grad()
        if self.bottom_optimizer is not None:
            self.bottom_optimizer.zero_grad(set_to_none=True)
        logits, targets = self.logits(samples)
        loss = functional.cross_entropy(logits.float(), targets)
        torch.autograd.backward([loss])
        self.optimisation.step(progress)
        if self.bottom_optimizer is not None:
            if self.config.train.clip:
                nn.utils.clip_grad_norm_(self.bottom.parameters(), self.config.train.clip)
            self.bottom_optimizer.step()
        return float(loss.detach())

    def schedule(self, waves: Sequence[Sequence[Sequence[str]]]) -> list[tuple[Step, float]]:
        """Return every step with its progress; ``waves``: per round, owners stepped together."""
        config = self.config
        parallel = config.session.schedule == "parallel"
        out: list[tuple[Step, float]] = []
        for index, round_waves in enumerate(waves):
            groups: list[list[str]] = []
            for wave in round_waves:
                groups += [list(wave)] if parallel else [[name] for name in wave]
            for number, group in enumerate(groups):
                batches = {
                    name: train_steps(
                        len(self.owners[name].train), config.train, config.seed, name, index + 1
                    )[0]
                    for name in sorted(group, key=natural)
                }
                longest = max(len(b) for b in batches.values())
                for at in range(longest):
                    step: Step = [
                        (self.owners[name].train, [int(i) for i in own[at]])
                        for name, own in batches.items()
                        if at < len(own)
                    ]
                    done = (number + at / longest) / len(groups)
                    out.append((step, (index + done) / config.train.rounds))
        return out

    def run(
        self,
        waves: Sequence[Sequence[Sequence[str]]],
        on_step: Callable[[int, int], None] | None = None,
    ) -> TwinReport:
        """Train and evaluate; ``on_step`` is called with (steps done, steps in all) after each."""
        zero_shot, _ = self.evaluate()
        plan = self.schedule(waves)
        torch.manual_seed(derive_seed(self.config.seed, "dropout", "train", 1))
        began = time.perf_counter()
        for number, (step, progress) in enumerate(plan):
            self.step(step, progress)
            if on_step is not None:
                on_step(number + 1, len(plan))
        train_s = time.perf_counter() - began
        loss, accuracy = self.evaluate()
        return TwinReport(accuracy, loss, zero_shot, self.majority(), len(plan), train_s)

    def evaluate(self) -> tuple[float, float]:
        """Return (mean loss, accuracy) over all owners' held-out samples."""
        self.top.eval()
        size = 2 * self.config.train.batch_size
        loss = right = count = 0.0
        with torch.inference_mode():
            for owner in self.owners.values():
                n = len(owner.test)
                for at in range(0, n, size):
                    slots = list(range(at, min(at + size, n)))
                    logits, targets = self.logits([(owner.test, slots)])
                    nats = functional.cross_entropy(logits.float(), targets, reduction="sum")
                    loss += float(nats)
                    right += int((logits.argmax(1) == targets).sum())
                    count += int(targets.shape[0])
        return loss / count, right / count

    def majority(self) -> float:
        """Return the accuracy of always answering the most frequent training class."""
        if self.config.model.task != "sequence-classification":
            return 0.0
        train, test = (
            torch.cat([s.labels for s in samples if s.labels is not None])
            for samples in zip(*((o.train, o.test) for o in self.owners.values()), strict=True)
        )
        return float((test == train.bincount().argmax()).double().mean())
