"""How many different noisy views of each text have left, over all runs, and what they add up to.

A *view* is one noise on one text's rows, by the name that :class:`fedsplit.privacy.perturb.View`
gives it: sending it again tells the server nothing new; two views of one text compose.  A *draw* is
the way in which texts become noisy vectors: mechanism with parameters, bottom, contributing tokens.
Texts are known by keyed digests of their raw bytes, so that a text stays the same one when the
owner's file grows, and whatever bottom, tokenizer, cut, mode or strategy asks for it.

Lines without a version are of a time when texts were known by their token ids and one name stood
for the noise of a whole line.  Those names cannot be matched to texts any more.  So every text is
taken to have had as many views of each such bottom as the most-shown of those names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

RAW_TEXT = 2
"""Version of lines whose texts are known by their raw bytes."""

Held = tuple[tuple[int, int], ...]
"""Draws by number, each with the views that a text had of it."""


@dataclass(frozen=True)
class Draw:
    """One way in which texts become noisy vectors.

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
        """Unit and amount per view; unit ``none`` where the mechanism has no guarantee."""
        # Here, because the table loads torch: a ledger is also read and verified without it.
        from fedsplit.privacy.mechanisms.table import cost_of_draw

        return cost_of_draw(self.mechanism)


@dataclass(frozen=True)
class Exposed:
    """What has left of one text.

    Attributes:
        name: keyed digest of its raw bytes.
        views: different noises.
        bottoms: how many bottoms they are of.
        cost: what they add up to, by unit.
    """

    name: str
    views: int
    bottoms: int
    cost: Mapping[str, float]


class Exposure:
    """Which views of which texts have left."""

    def __init__(self) -> None:
        self._draws: list[Draw] = []
        self._index: dict[str, int] = {}
        self._views: dict[str, dict[str, int]] = {}  # text -> view -> number of its draw
        self._counts: Counter[Held] = Counter()  # how many texts hold what
        self._old: dict[str, int] = {}  # bottom -> most views of one text known by its token ids
        self._known: dict[tuple[Held, str], tuple[int, dict[str, float]]] = {}

    def __len__(self) -> int:
        """Texts of which anything has left."""
        return len(self._views)

    def apply(self, draw_id: str, draw: Draw, views: Iterable[tuple[str, str]]) -> None:
        """Take note that (text, view) pairs of a draw leave; again is the same as once."""
        index = self._index.get(draw_id)
        if index is None:
            index = self._index[draw_id] = len(self._draws)
            self._draws.append(draw)
        for text, view in views:
            held = self._views.setdefault(text, {})
            if view in held:
                continue
            if held:
                self._move(held, -1)
            held[view] = index
            self._move(held, 1)

    def apply_old(self, draw_id: str, draw: Draw, texts: Iterable[str]) -> None:
        """Take note of a line without a version: one noise for all ``texts``."""
        texts = list(texts)
        self.apply(draw_id, draw, ((text, draw_id) for text in texts))
        most = max((self._of(text, draw.bottom) for text in texts), default=0)
        self._old[draw.bottom] = max(most, self._old.get(draw.bottom, 0))

    def views_after(self, bottom: str, views: Iterable[tuple[str, str]]) -> tuple[int, int]:
        """Return the most views that a text would have (of this bottom, of all bottoms).

        Args:
            bottom: that the views are of.
            views: (text, view) that are about to leave.
        """
        fresh: dict[str, set[str]] = {}
        for text, view in views:
            new = fresh.setdefault(text, set())
            if view not in self._views.get(text, {}):
                new.add(view)
        most_bottom = most = 0
        for text, new in fresh.items():
            most_bottom = max(most_bottom, self._of(text, bottom) + len(new))
            most = max(most, len(self._views.get(text, {})) + len(new))
        return most_bottom + self._old.get(bottom, 0), most + sum(self._old.values())

    def summary(self, representation: str) -> dict[str, Any]:
        """Return the cumulative guarantee over the texts of one representation, JSON-able.

        ``views`` counts different noises; ``eta`` (d_chi, per unit of distance), ``epsilon`` (basic
        composition: deltas add up too) and ``nats`` are sums over them.  Maximum and median are
        over the texts of which anything has left; they hold for tokens with full noise.
        """
        rows = [(*self._cost(held, representation), count) for held, count in self._counts.items()]
        rows = [row for row in rows if row[0]]
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
        return list(dict.fromkeys(draw.representation for draw in self._draws))

    def most_exposed(self, count: int) -> list[Exposed]:
        """Return the texts with the most views, over all bottoms, the most-shown first."""
        order = sorted(self._views, key=lambda text: (-len(self._views[text]), text))
        found = []
        for text in order[:count]:
            held = self._views[text]
            bottoms = {self._draws[index].bottom for index in held.values()}
            found.append(Exposed(text, len(held), len(bottoms), self._cost(_counted(held), "")[1]))
        return found

    def to_json(self) -> dict[str, Any]:
        """Return everything, JSON-able."""
        draws = [asdict(draw) | {"mechanism": dict(draw.mechanism)} for draw in self._draws]
        return {"draws": draws, "index": self._index, "views": self._views, "old": self._old}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Exposure:
        """Return what :meth:`to_json` was taken of."""
        made = cls()
        made._draws = [Draw(**draw) for draw in content["draws"]]
        made._index = {str(k): int(v) for k, v in content["index"].items()}
        made._views = {str(k): dict(v) for k, v in content["views"].items()}
        made._old = {str(k): int(v) for k, v in content["old"].items()}
        made._counts = Counter(_counted(held) for held in made._views.values())
        return made

    def _of(self, text: str, bottom: str) -> int:
        """Return how many views of one bottom a text has had."""
        held = self._views.get(text, {}).values()
        return sum(self._draws[index].bottom == bottom for index in held)

    def _move(self, held: Mapping[str, int], count: int) -> None:
        key = _counted(held)
        self._counts[key] += count
        if not self._counts[key]:
            del self._counts[key]

    def _cost(self, held: Held, representation: str) -> tuple[int, dict[str, float]]:
        """Return views and what they add up to; of one representation, or of all where empty."""
        known = self._known.get((held, representation))
        if known is not None:
            return known
        views, cost = 0, dict[str, float]()
        for index, count in held:
            draw = self._draws[index]
            if representation in ("", draw.representation):
                unit, amount = draw.cost
                cost[unit] = cost.get(unit, 0.0) + count * amount
                views += count
        self._known[held, representation] = views, cost
        return views, cost


def _counted(held: Mapping[str, int]) -> Held:
    return tuple(sorted(Counter(held.values()).items()))


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
