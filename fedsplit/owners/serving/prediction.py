"""The owner's half of prediction: what the server answers becomes probabilities, and stays here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsplit.errors import FrameError
from fedsplit.models.splitting.heads import Head
from fedsplit.owners.samples import Samples
from fedsplit.owners.split.label_side import Answer, LabelSide


class Readout(LabelSide):
    """Keeps the logits of texts whose labels nobody knows.

    Args:
        samples: the texts; their labels are placeholders.
        classes: number of classes the parties agreed on.
        head: where that is the owner's.
    """

    def __init__(self, samples: Samples, classes: int, head: Head | None = None) -> None:
        super().__init__(samples, head=head, trained=False)
        self._classes = classes
        self._answers: dict[int, Tensor] = {}

    def answer(self, values: Tensor, slots: Sequence[int], train: bool) -> Answer:
        """Keep the logits of ``slots``; there is no loss.

        Raises:
            FrameError: another number of classes than was agreed on.
        """
        with torch.no_grad():
            scores, _ = self._scores(values, slots)
        if scores.shape[1] != self._classes:
            raise FrameError(f"LOGITS with {scores.shape[1]} classes: must be {self._classes}")
        self._answers.update(zip(slots, scores, strict=True))
        return Answer(0.0, float(len(slots)), 0, torch.empty(0), [])

    def probabilities(self) -> Tensor:
        """Return (texts, classes) once every text is answered."""
        rows = [self._answers[slot] for slot in range(len(self.samples))]
        return torch.softmax(torch.stack(rows).double(), dim=1)
