"""The quality check of an average: the plugged-in model's loss on the server's own public text.

A tensor's direction and size can be honest while the model is not.  The server holds the whole
model and public text, so it asks: how much did one round add to the loss there, in units of the
base's?  Honest tuning on other text adds a little (docs/lineage.md has the figures); more than
``lineage.quality`` fails.  The loss is that which every accepted round reports anyway.

What breaks it: a model that is as good as before on public text, such as one with a backdoor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, Message

from fedsplit.config import LineageConfig
from fedsplit.wire.messages import WEIGHTS

from ..rounds.lineage_watch import LineageWatch


class QualityCheck:
    """Compares each round's public loss with the last accepted one's.

    Args:
        config: the run's lineage settings.
        base: the base's own loss in nats, above 0.
        loss_of: what owners train -> the plugged-in model's loss in nats.
    """

    def __init__(
        self, config: LineageConfig, base: float, loss_of: Callable[[ArrayRecord], float]
    ) -> None:
        self._config = config
        self._base = base
        self._loss_of = loss_of

    def bad(self, loss: float, before: float) -> bool:
        """Return whether a round that brought the loss from ``before`` to ``loss`` fails."""
        allowed = before + self._config.quality * self._base
        return not loss <= allowed  # also NaN

    def check(
        self,
        watch: LineageWatch,
        row: dict[str, Any],
        mean: ArrayRecord,
        before: float,
        replies: Mapping[str, Message],
        nodes: Mapping[str, int],
    ) -> float:
        """Evaluate a round's average and return its loss; a failure is laid to owners.

        Named is whoever's own change, plugged in alone, fails too.

        Args:
            watch: is told who is quarantined (``lineage.gate = "reject"``).
            row: the round's; gets ``quality``, and on failure verdict, reason and ``tests``.
            mean: the average.
            before: the last accepted round's loss, the base's at first.
            replies: what the average was made of, by owner.
            nodes: owner -> node.
        """
        loss = self._loss_of(mean)
        row["quality"] = {"loss": loss, "before": before}
        if self._config.gate == "off" or not self._config.quality or not self.bad(loss, before):
            return loss
        own = {n: self._loss_of(r.content.array_records[WEIGHTS]) for n, r in replies.items()}
        named = sorted(name for name, found in own.items() if self.bad(found, before))
        row["quality"]["owners"] = {n: v if math.isfinite(v) else None for n, v in own.items()}
        row["verdict"] = "not_shown"
        row["tests"] = [*row.get("tests", []), "quality"]
        told = f"quality: public loss {before:.3f} -> {loss:.3f} nats"
        row["reason"] = "; ".join(filter(None, (row.get("reason"), told)))
        self._blame(watch, row, named, nodes)
        return loss

    def _blame(
        self,
        watch: LineageWatch,
        row: dict[str, Any],
        named: Sequence[str],
        nodes: Mapping[str, int],
    ) -> None:
        if len(named) > len(row["quality"]["owners"]) // 2:
            return  # most owners' text is unlike the public one: nobody stands out
        row["charged"] = row.get("charged", {}) | dict.fromkeys(named, row["reason"])
        if self._config.gate == "reject":
            for name in named:
                watch.quarantine(name, f"round {row['round']}: {row['reason']}", nodes.get(name))
