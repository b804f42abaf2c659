"""How many different noisy views of each sample have left, over all runs, and what they add up to.

A *draw* is one noise for one map from text to vectors: the same mechanism with the same parameters,
bottom, contributing tokens and view.  Sending a draw again tells the server nothing new; two draws
of one sample compose.  Samples are known here by keyed digests of their content, so that a sample
stays the same one when the owner's file grows or is reordered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Draw:
    """One noise for one representation.

    Attributes:
        representation: bottom's digest and split point.
        bottom: the bottom's digest.
        mechanism: name and parameters.
        rho: noise multiplier of contributing tokens; 1 where there are none.
    """

    representation: str
    bottom: str
    mechanism: Mapping[str, Any]
    rho: float = 1.0

    @property
    def cost(self) -> tuple[str, float]:
        """Unit and amount per draw; unit ``none`` where the mechanism has no guarantee."""
        # Here, because the table loads torch: a ledger is also read and verified without it.
        from fedsplit.privacy.mechanisms.table import cost_of_draw

        return cost_of_draw(self.mechanism)


class Exposure:
    """Which draws of which samples have left."""

    def __init__(self) -> None:
        self._draws: list[Draw] = []
        self._index: dict[str, int] = {}
        self._masks: dict[str, int] = {}  # sample -> bit per draw
        self._counts: Counter[int] = Counter()  # how many samples have which mask
        self._of_bottom: dict[str, int] = {}  # the draws of each bottom, as a mask
        self._of_representation: dict[str, int] = {}
        self._known: dict[int, tuple[int, dict[str, float]]] = {}  # mask -> views, their cost

    def __len__(self) -> int:
        """Samples of which anything has left."""
        return len(self._masks)

    def apply(self, draw_id: str, draw: Draw, samples: Iterable[str]) -> None:
        """Take note that this draw of ``samples`` leaves; again is the same as once."""
        index = self._index.get(draw_id)
        if index is None:
            index = self._index[draw_id] = self._add(draw)
        bit = 1 << index
        for sample in samples:
            old = self._masks.get(sample, 0)
            if old & bit:
                continue
            self._masks[sample] = old | bit
            self._counts[old | bit] += 1
            if old:
                self._counts[old] -= 1
                if not self._counts[old]:
                    del self._counts[old]

    def views_after(self, draw_id: str, bottom: str, samples: Iterable[str]) -> tuple[int, int]:
        """Return the most views one of ``samples`` would have (of this bottom, of all)."""
        index = self._index.get(draw_id)
        bit = 0 if index is None else 1 << index
        of_bottom = self._of_bottom.get(bottom, 0)
        most_bottom = most = 0
        for sample in samples:
            mask = self._masks.get(sample, 0)
            new = not mask & bit
            most_bottom = max(most_bottom, (mask & of_bottom).bit_count() + new)
            most = max(most, mask.bit_count() + new)
        return most_bottom, most

    def summary(self, representation: str) -> dict[str, Any]:
        """Return the cumulative guarantee over the samples of one representation, JSON-able.

        ``views`` counts different draws; ``eta`` (d_chi, per unit of distance), ``epsilon`` (basic
        composition: deltas add up too) and ``nats`` are sums over them.  Maximum and median are
        over the samples of which anything has left; they hold for tokens with full noise.
        """
        mask = self._of_representation.get(representation, 0)
        rows: list[tuple[int, dict[str, float], int]] = []
        for held, count in self._counts.items():
            if held & mask:
                rows.append((*self._cost(held & mask), count))
        if not rows:
            return {"samples": 0}
        found: dict[str, Any] = {
            "samples": sum(count for _, _, count in rows),
            "views": _spread([(views, count) for views, _, count in rows]),
        }
        units = sorted({unit for _, cost, _ in rows for unit in cost})
        for unit in units:
            if unit != "none":
                found[unit] = _spread([(cost.get(unit, 0.0), count) for _, cost, count in rows])
        if "none" in units:
            found["guarantee"] = "none"
        return found

    def representations(self) -> list[str]:
        """Return every representation of which anything has left, oldest first."""
        return list(self._of_representation)

    def to_json(self) -> dict[str, Any]:
        """Return everything, JSON-able."""
        draws = [asdict(draw) | {"mechanism": dict(draw.mechanism)} for draw in self._draws]
        return {"draws": draws, "index": self._index, "masks": _hex(self._masks)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Exposure:
        """Return what :meth:`to_json` was taken of."""
        made = cls()
        for draw in content["draws"]:
            made._add(Draw(**draw))
        made._index = {str(k): int(v) for k, v in content["index"].items()}
        made._masks = {str(k): int(v, 16) for k, v in content["masks"].items()}
        made._counts = Counter(made._masks.values())
        return made

    def _add(self, draw: Draw) -> int:
        """Add a new draw and return its number."""
        index = len(self._draws)
        self._draws.append(draw)
        for masks, key in (
            (self._of_bottom, draw.bottom),
            (self._of_representation, draw.representation),
        ):
            masks[key] = masks.get(key, 0) | 1 << index
        return index

    def _cost(self, mask: int) -> tuple[int, dict[str, float]]:
        if mask in self._known:
            return self._known[mask]
        cost: dict[str, float] = {}
        for i, draw in enumerate(self._draws):
            if mask >> i & 1:
                unit, amount = draw.cost
                cost[unit] = cost.get(unit, 0.0) + amount
        self._known[mask] = mask.bit_count(), cost
        return self._known[mask]


def _hex(masks: Mapping[str, int]) -> dict[str, str]:
    return {sample: f"{mask:x}" for sample, mask in masks.items()}


def _spread(values: list[tuple[Any, int]]) -> dict[str, Any]:
    """Return maximum and (lower) median of values with multiplicities."""
    values.sort()
    half, seen = (sum(count for _, count in values) - 1) // 2, 0
    median = values[-1][0]
    for value, count in values:
        seen += count
        if seen > half:
            median = value
            break
    return {"max": values[-1][0], "median": median}
