"""A base model cut for an experiment, owners' texts in batches, and what is read of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsplit.config import RunConfig
from fedsplit.models.anatomy import probe
from fedsplit.models.splitting.halves import Bottom, Top, split
from fedsplit.models.splitting.heads import Head, detach_head
from fedsplit.seeding import numpy_generator
from simulations.core.owner_samples import OwnerSamples, owner_samples
from strategies.base_model import AUTOCASTS, load_base

Batch = list[Tensor]


@dataclass
class Reading:
    """What an attacker read of owners' tokens, and what it would have guessed.

    Attributes:
        read: tokens that are right, tokens, texts that are right as a whole, texts.
        guess: the same of the guess.
    """

    read: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.int64))
    guess: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.int64))

    def add(self, texts: Batch, read: Tensor | None, guess: Tensor | None) -> None:
        """Add predictions of every token but a text's first, text after text."""
        lengths = [len(t) - 1 for t in texts]
        for found, into in ((read, self.read), (guess, self.guess)):
            if found is None:
                continue
            parts = torch.tensor_split(found, torch.tensor(lengths).cumsum(0)[:-1])
            for text, own in zip(texts, parts, strict=True):
                hit = own == text[1:]
                into += torch.tensor([int(hit.sum()), len(hit), int(hit.all()), 1])

    def shares(self) -> dict[str, float]:
        """Return the shares as columns of a row."""
        read, guess = self.read.tolist(), self.guess.tolist()
        return {
            "token_recovery": read[0] / max(1, read[1]),
            "guess": guess[0] / max(1, guess[1]),
            "text_recovery": read[2] / max(1, read[3]),
            "text_guess": guess[2] / max(1, guess[3]),
            "tokens": read[1],
            "texts": read[3],
        }


@dataclass
class Tuned:
    """What a scheme reached.

    Attributes:
        loss: held-out, nats per token.
        reading: what gradients or weights tell.
        joint: share of tokens that is read with the representations as well; None: the
            representations leave in the clear (or not at all).
    """

    loss: float
    reading: Reading = field(default_factory=Reading)
    joint: float | None = None


class LanguageModelSplit:
    """A base cut at ``split.k`` and three owners' texts, the same for every scheme of a seed.

    Args:
        config: the run's settings.
        seed: of owners' shares and batches.
        targets: per step, over all owners.
        steps: at most; one pass at most.
        held_out: tokens of held-out text at most.
    """

    def __init__(
        self, config: RunConfig, seed: int, targets: int, steps: int, held_out: int
    ) -> None:
        self.config, self.seed = config, seed
        self._loaded = load_base(config)
        owners = owner_samples(config, self._loaded.tokenizer)
        self.owners = [_batches(o, targets // len(owners), seed) for o in owners]
        self.steps = min(steps, *(len(b) for b in self.owners))
        self.held_out: Batch = []
        for text in (x for owner in owners for x in owner.test.ids if len(x) > 1):
            if sum(map(len, self.held_out)) < held_out:
                self.held_out.append(text)

    @property
    def autocast(self) -> bool:
        """Whether products are in bfloat16."""
        return self.config.model.autocast == "bfloat16"

    def shown(self, first: int, last: int) -> Batch:
        """Return all owners' texts of the steps ``first`` to ``last``, the latter left out."""
        return [t for owner in self.owners for batch in owner[first:last] for t in batch]

    def cut(self, blocks: int = 0, model: Any = None) -> tuple[Bottom, Top, Head]:
        """Return fresh parts of the base (or of ``model``), nothing of them trained.

        Args:
            blocks: last blocks that go with the head.
            model: cut as it is, instead of a copy of the base.
        """
        whole = copy.deepcopy(self._loaded.model) if model is None else model
        bottom, top = split(whole, self.config.split.k, verify=False)
        head = detach_head(top, blocks=blocks)
        top.autocast = AUTOCASTS[self.config.model.autocast]
        head.autocast = top.autocast if blocks else None
        for part in (bottom, top, head):
            part.eval().requires_grad_(False)
        return bottom, top, head

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self._loaded.tokenizer

    @property
    def whole(self) -> Any:
        """The base model."""
        return self._loaded.model

    def rate(self, step: int, peak: float) -> float:
        """Return the learning rate: a short warm-up, then linearly to zero."""
        return peak * min(1.0, (step + 1) / 5) * (1 - step / self.steps)

    @torch.no_grad()
    def loss(self, bottom: Below, top: Top, head: Head) -> float:
        """Return the mean held-out loss in nats."""
        total = count = 0.0
        for batch in chunks(self.held_out, 32):
            logits, targets = forward(bottom, top, head, batch)[1:]
            total += float(functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
        return total / count


Below = Callable[[Tensor, Tensor], Tensor]
"""(ids (N, T), mask) -> hidden states that enter the server's blocks: a bottom, or behind noise."""


def forward(bottom: Below, top: Top, head: Head, texts: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return states that enter the head (R, d), logits (R, V) and targets (R,) of predicting rows.

    A tail sees whole texts, so its states are not cut to the predicting rows.
    """
    ids, mask = padded(texts)
    predicts = mask[:, 1:].bool()
    with torch.no_grad():
        hidden = bottom(ids, mask)
    states = top.hidden_states(hidden, mask, tail=head.blocks).float()
    targets = ids[:, 1:][predicts]
    if head.blocks:
        logits = head(states, mask)[:, :-1][predicts]
        return states, logits.float(), targets
    rows = states[:, :-1][predicts]
    project = probe(head.model).output_embeddings
    assert project is not None, "a language model"
    with torch.autocast("cpu", torch.bfloat16, enabled=top.autocast is not None):
        return rows, project(rows).float(), targets


def padded(texts: Batch) -> tuple[Tensor, Tensor]:
    """Return ids and mask, (N, T) each."""
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(t) for t in texts])
    return ids, (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()


def chunks(texts: Batch, size: int) -> Iterator[Batch]:
    for at in range(0, len(texts), size):
        yield texts[at : at + size]


def _batches(owner: OwnerSamples, targets: int, seed: int) -> list[Batch]:
    """Return one pass over an owner's texts, each batch of at least ``targets`` targets."""
    texts = [ids for ids in owner.train.ids if len(ids) > 1]
    order = numpy_generator(seed, "lm-frontier", owner.name).permutation(len(texts))
    found: list[Batch] = [[]]
    count = 0
    for at in order:
        if count >= targets:
            found.append([])
            count = 0
        found[-1].append(texts[at])
        count += len(texts[at]) - 1
    return found if count >= targets or len(found) == 1 else found[:-1]
