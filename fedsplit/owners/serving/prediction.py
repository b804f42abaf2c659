"""The owner's half of prediction: what the server answers becomes probabilities, and stays here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedsplit.errors import FrameError
from fedsplit.owners.ledger.disclosure import Outgoing
from fedsplit.owners.measuring import OwnTexts
from fedsplit.owners.split.batches import BatchSession
from fedsplit.owners.split.output import OutputReader
from fedsplit.privacy.perturb import SamplePerturber


class PredictionOwner(BatchSession):
    """Answers the frames of a session that asks about texts; there are no labels and no loss.

    Args:
        bottom: see :class:`~fedsplit.owners.split.batches.BatchSession`.
        reader: reads the server's output for the texts.
        batches: slots of each step, in order.
        perturber: the privacy mechanism with the owner's secret.
        classes: numbers in a row of output, as the parties agreed.
        codec: wire form of representations.
        own: what the owner measures its own protection on.
    """

    def __init__(
        self,
        bottom: nn.Module,
        reader: OutputReader,
        batches: Sequence[np.ndarray],
        perturber: SamplePerturber,
        *,
        classes: int,
        codec: str,
        own: OwnTexts | None = None,
    ) -> None:
        super().__init__(bottom, reader, batches, perturber, mode="predict", codec=codec, own=own)
        self._classes = classes
        self._logits: dict[int, Tensor] = {}

    def _on_output(self, step: int, slots: Sequence[int], values: Tensor) -> Iterator[Outgoing]:
        with torch.no_grad():
            logits = self.reader.logits(values, slots)
        if logits.shape[1] != self._classes:
            raise FrameError(f"LOGITS with {logits.shape[1]} classes: must be {self._classes}")
        own = torch.split(logits, 1) if self.reader.classify else self.reader.rows(logits, slots)
        self._logits.update(zip(slots, own, strict=True))
        yield from self._advance()

    def scores(self) -> Tensor:
        """Return a row of output for each text, (texts, C), once every text is answered."""
        return torch.cat(self.rows())

    def rows(self) -> list[Tensor]:
        """Return each text's rows of output, (1, C) or (T, C), once every text is answered."""
        return [self._logits[slot] for slot in range(len(self.samples))]
