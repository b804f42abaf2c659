"""What every fingerprint is, to the commands, tables and plots that show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from fedsplit.fingerprints.view import Similarity, WeightView


class Fingerprint(Protocol):
    """One way to compare two models.

    Attributes:
        name: its row in :data:`fedsplit.fingerprints.FINGERPRINTS`.
        label: its name in plots.
        colour: its line in plots, ``#rrggbb``.
        strangers: the most that independent models reached, as tables show it (docs/lineage.md).
        descendants: the least that descendants reached.
        needs_running: whether it runs both models; the others read weights.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    colour: ClassVar[str]
    strangers: ClassVar[str] = ""
    descendants: ClassVar[str] = ""
    needs_running: ClassVar[bool] = False

    def compare(
        self, base: WeightView, suspect: WeightView, tokens: Sequence[int] | None = None
    ) -> Similarity:
        """Return the similarity of ``suspect`` to ``base``.

        Args:
            base: the model it is compared with.
            suspect: the other model.
            tokens: the base's public token list; None: the public draw.
        """
        ...
