"""The centralised twin: the same model, steps and learning rates in one process, without privacy.

Each step takes the union of the batches that the federation's owners contributed to one cohort
step, so what differs from the federated run is the split, the wire and the noise, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.config import RunConfig
from fedsplit.errors import check
from fedsplit.models.adapters.trainable import make_trainable, method_options
from fedsplit.models.frozen_linear import AS_LOADED, recompute, store_frozen
from fedsplit.models.splitting.halves import split
from fedsplit.models.splitting.heads import head_parameters
from fedsplit.owners.samples import Samples
from fedsplit.owners.split.protected_labels import own_class_weights
from fedsplit.owners.split.schedule import evaluation_steps, train_steps
from fedsplit.seeding import derive_seed
from fedsplit.sums import add_up
from fedsplit.tasks import BALANCED, task_of
from simulations.core.owner_samples import OwnerSamples
from strategies.base_model import AUTOCASTS, load_base
from strategies.rounds.report import natural
from strategies.sessions.length_buckets import LengthBuckets
from strategies.split_tuning.optimisation import Optimisation

Step = list[tuple[Samples, list[int]]]


def padded(step: Step) -> tuple[Tensor, Tensor]:
    """Return a step's token ids and mask, (N, T) each."""
    ids_list = [s.ids[slot] for s, slots in step for slot in slots]
    ids = nn.utils.rnn.pad_sequence(ids_list, batch_first=True)
    lengths = torch.tensor([x.shape[0] for x in ids_list])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return ids, mask


@dataclass
class TwinReport:
    """What the twin reached.

    Attributes:
        metrics: loss, accuracy where there is one, and the task's scores, on all owners' held-out
            samples.
        zero_shot: the same before any step.
        majority: share of the most frequent training class among the held-out samples.
        steps: steps taken.
        train_s: seconds inside the steps.
    """

    metrics: dict[str, Any]
    zero_shot: dict[str, Any]
    majority: float
    steps: int
    train_s: float

    @property
    def loss(self) -> float:
        """Mean held-out loss per target (nats, or squares)."""
        return float(self.metrics["loss"])

    @property
    def accuracy(self) -> float:
        """Share of right predictions, where the task has any."""
        return float(self.metrics["accuracy"])

    @property
    def zero_shot_loss(self) -> float:
        """The same before any step."""
        return float(self.zero_shot["loss"])


class CentralisedTwin:
    """One process that holds everything; privacy, label and lineage settings are ignored."""

    def __init__(self, config: RunConfig, owners: Sequence[OwnerSamples]) -> None:
        accumulate = config.train.accumulate
        check(accumulate == 1, "train.accumulate", accumulate, "1 beside a centralised twin")
        self.config, self.task = config, task_of(config)
        self.owners = {owner.name: owner for owner in owners}
        self._balanced: dict[int, Tensor] = {}  # by the owner's training samples
        if config.train.class_weights == BALANCED:
            for owner in self.owners.values():
                own = own_class_weights(owner.train, self.task.outputs or 0)
                self._balanced[id(owner.train)] = torch.tensor(own)
        loaded = load_base(config)
        self.bottom, self.top = split(loaded.model, config.split.k, verify=False)
        self.top.autocast = AUTOCASTS[config.model.autocast]
        self._buckets = LengthBuckets(self.top)
        self.joint = config.split.bottom == "joint"
        self.bottom.eval().requires_grad_(self.joint)
        if config.server.frozen_weights != AS_LOADED:
            store_frozen(self.top, config.server.frozen_weights)
        if config.server.checkpointing:
            recompute(self.top)
        trainable = make_trainable(self.top, config.train.method, **method_options(config.train))
        head = head_parameters(self.top) if self.task.labelled else set()
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
        ids, mask = padded(samples)
        with torch.set_grad_enabled(self.joint and torch.is_grad_enabled()):
            hidden = self.bottom(ids, mask)
        tokens = self.task.per_token  # the server pads as little
        rows = self._buckets.tokens(hidden, mask) if tokens else self._buckets(hidden, mask)
        kept, targets, at = [], [], 0
        for own, slots in samples:
            keep, wanted = own.targets_of(slots)
            count = sum(own.lengths[slot] for slot in slots) if self.task.per_token else len(slots)
            kept.append(at + (torch.arange(count) if keep is None else keep))
            targets.append(wanted)
            at += count
        return rows[torch.cat(kept)], torch.cat(targets)

    def step(self, samples: Step, progress: float) -> float:
        """Take one step and return its loss."""
        self.top.train()
        self.optimisation.zero_grad()
        if self.bottom_optimizer is not None:
            self.bottom_optimizer.zero_grad(set_to_none=True)
        logits, targets = self.logits(samples)
        loss = self._loss(samples, logits, targets)
        torch.autograd.backward([loss])
        self.optimisation.step(progress)
        if self.bottom_optimizer is not None:
            if self.config.train.clip:
                nn.utils.clip_grad_norm_(self.bottom.parameters(), self.config.train.clip)
            self.bottom_optimizer.step()
        return float(loss.detach())

    def _loss(self, samples: Step, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss, each owner's targets by its own weights where they are balanced."""
        if not self._balanced:
            return self.task.loss(logits, targets)
        weights = [self._balanced[id(own)][own.targets_of(slots)[1]] for own, slots in samples]
        return (self.task.losses(logits, targets) * torch.cat(weights)).mean()

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
                        len(self.owners[name].train),
                        config.train,
                        config.seed,
                        name,
                        index + 1,
                        self.owners[name].train.classes,
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
        zero_shot = self.evaluate()
        plan = self.schedule(waves)
        torch.manual_seed(derive_seed(self.config.seed, "dropout", "train", 1))
        began = time.perf_counter()
        for number, (step, progress) in enumerate(plan):
            self.step(step, progress)
            if on_step is not None:
                on_step(number + 1, len(plan))
        train_s = time.perf_counter() - began
        return TwinReport(self.evaluate(), zero_shot, self.majority(), len(plan), train_s)

    def evaluate(self) -> dict[str, Any]:
        """Return loss, accuracy and scores over all owners' held-out samples."""
        self.top.eval()
        size = self.config.train.batch_size
        loss, count, right = 0.0, 0, 0
        told, sums = True, dict[str, float]()
        with torch.inference_mode():
            for owner in self.owners.values():
                held = owner.test
                together = None if held.choices is None else held.choices.sizes
                for batch in evaluation_steps(len(held), size, together):
                    slots = [int(slot) for slot in batch]
                    scores, targets = self.logits([(held, slots)])
                    parts, about = [held.target_count(s) for s in slots], held.about(slots)
                    sums = add_up([sums, self.task.count(scores, targets, parts, about)])
                    averaged = self.task.averaged(about)
                    if averaged is not None:
                        own = torch.tensor(averaged).repeat_interleave(torch.tensor(parts))
                        scores, targets = scores[own], targets[own]
                    loss += float(self.task.losses(scores, targets).sum())
                    hits = self.task.right(scores, targets)
                    told = hits is not None
                    right += 0 if hits is None else int(hits.sum())
                    count += int(targets.shape[0])
        found: dict[str, Any] = {"loss": loss / count}
        if told:
            found["accuracy"] = right / count
        return found | (self.task.scores(sums) if sums else {})

    def majority(self) -> float:
        """Return the accuracy of always answering the most frequent training class."""
        if not self.task.exclusive:
            return 0.0
        train, test = (
            torch.cat([s.labels for s in samples if s.labels is not None])
            for samples in zip(*((o.train, o.test) for o in self.owners.values()), strict=True)
        )
        return float((test == train.bincount().argmax()).double().mean())
