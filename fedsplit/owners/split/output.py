"""Reading what the server sends for a step: logits, or hidden states for the owner's own head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedsplit.errors import FrameError
from fedsplit.models.splitting.heads import Head, positions_read
from fedsplit.owners.samples import Samples

MAX_CLASSES = 1 << 20


class OutputReader:
    """Turns the server's output for a step into logits.

    With the head at the server, logits come down.  With the head here (U-shape), final hidden
    states come down, of those positions alone that the head reads.

    Args:
        samples: the split that this session works on.
        classify: whether a text has one row of logits, not one per token.
        head: run without dropout, so that the answer to a repeated frame is the same; None: the
            head is at the server.
        trained: whether the head's parameters are trained (all float ones).
        classes: numbers in a row of output that the parties agreed on, or entries of the
            vocabulary at least; 0: any number.
        exact: whether there are exactly so many; None: where a text has one row.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        classify: bool,
        head: Head | None = None,
        trained: bool = False,
        classes: int = 0,
        exact: bool | None = None,
    ) -> None:
        self.samples = samples
        self.classes = classes
        self.exact = classify if exact is None else exact
        self.classify = classify
        self.head = None if head is None else head.eval()
        self.positions = "all" if head is None else positions_read(head)
        # One row per sample, or one per token?
        self.per_sample = classify and (head is None or self.positions != "all")
        self.parameters: dict[str, nn.Parameter] = {}
        if head is not None:
            for parameter in head.parameters():
                parameter.requires_grad_(trained and parameter.is_floating_point())
            self.parameters = {n: p for n, p in head.named_parameters() if p.requires_grad}

    def check(self, shape: tuple[int, ...], slots: Sequence[int]) -> None:
        """Refuse a shape that does not answer a step on ``slots``.

        Raises:
            FrameError: names what it must be.
        """
        rows = len(slots) if self.per_sample else sum(self._lengths(slots))
        if self.head is not None:
            width = self.head.hidden_size
            if shape != (rows, width):
                raise FrameError(f"LOGITS shape {shape}: must be ({rows}, {width}) hidden states")
            return
        fewest = min(2, self.classes or 2)
        if len(shape) != 2 or shape[0] != rows or not fewest <= shape[1] <= MAX_CLASSES:
            raise FrameError(f"LOGITS shape {shape}: must be ({rows}, classes)")
        least = self.classes
        if least and not (shape[1] == least if self.exact else shape[1] >= least):
            raise FrameError(f"LOGITS with {shape[1]} classes: must be {least}, as agreed")

    def logits(self, values: Tensor, slots: Sequence[int]) -> Tensor:
        """Return logits (B, C), or (tokens, V) for language modelling.

        Args:
            values: what came down, of a shape that :meth:`check` let pass.
            slots: the step's samples.
        """
        if self.head is None:
            return values
        if self.positions != "all":
            alone = values[:, None]  # (B, 1, d): to this head, a text of one token
            logits: Tensor = self.head(alone, torch.ones(alone.shape[:2], dtype=torch.int64))
            return logits
        rows = self.rows(values, slots)
        hidden = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)  # (B, T, d)
        lengths = torch.tensor([len(r) for r in rows])
        mask = (torch.arange(hidden.shape[1])[None, :] < lengths[:, None]).long()
        logits = self.head(hidden, mask)
        return logits if self.classify else logits[mask.bool()]

    def rows(self, values: Tensor, slots: Sequence[int]) -> tuple[Tensor, ...]:
        """Return each sample's own rows of ``values``."""
        return torch.split(values, 1 if self.per_sample else self._lengths(slots))

    def _lengths(self, slots: Sequence[int]) -> list[int]:
        return [int(self.samples.ids[s].shape[0]) for s in slots]
