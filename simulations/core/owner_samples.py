"""What the experimenter knows and no server does: the owners' tokens and labels, slot by slot.

Used to score attacks and to train the centralised twin; the federation itself never sees this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedsplit.config import RunConfig
from fedsplit.data import TextDataset
from fedsplit.owners.data_source import simulated_data
from fedsplit.owners.samples import Samples, tokenise_set
from fedsplit.owners.split.schedule import slot_order
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.tasks import task_of


@dataclass(frozen=True)
class OwnerSamples:
    """One simulated owner's samples, in the slots that it uses in a run."""

    name: str
    train: Samples
    test: Samples

    def parts(self) -> dict[str, Samples]:
        """Return the samples by the name of their split."""
        return {"train": self.train, "test": self.test}


def owner_samples(config: RunConfig, tokenizer: Any) -> list[OwnerSamples]:
    """Return every simulated owner's samples exactly as the owner itself prepares them.

    Raises:
        DataError: see :func:`fedsplit.owners.data_source.simulated_data`.
    """
    owners = []
    for index, (train, test) in enumerate(_shares(config)):
        name = f"owner-{index}"
        secret = OwnerSecret.for_simulation(config.seed, name)
        parts = [
            tokenise_set(
                tokenizer,
                texts,
                task=task_of(config),
                max_tokens=config.model.max_tokens,
                order=slot_order(secret, split, len(texts)),
                every_choice=split != "train",
            )
            for split, texts in (("train", train), ("test", test))
        ]
        owners.append(OwnerSamples(name, parts[0], parts[1]))
    return owners


def label_names(config: RunConfig) -> tuple[str, ...]:
    """Return the names of the classes, for tables."""
    return tuple(_shares(config)[0][0].label_names)


def data_digest(config: RunConfig) -> str:
    """Return one digest over all owners' texts, labels and their order."""
    digests = [train.digest + test.digest for train, test in _shares(config)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _shares(config: RunConfig) -> Sequence[tuple[TextDataset, TextDataset]]:
    return [simulated_data(config, owner) for owner in range(config.data.owners)]
