"""Which block of the base plays which part in an emulator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsplit.errors import check

ADAPTER = "adapter"
KEEP = "keep"
DROP = "drop"
SHARE = "share"
HARMONIZER = "harmonizer"
COMPRESS = "compress"
ROLES = (ADAPTER, KEEP, DROP, SHARE, HARMONIZER, COMPRESS)
MAX_LAYERS = 1024


@dataclass(frozen=True)
class EmulatorPlan:
    """The part of every block of an L-block base model; positions are the base's, from 0.

    | role | in the emulator |
    | --- | --- |
    | adapter | the base's block, trained by the owners (A) |
    | keep | the base's block, frozen |
    | compress | the base's block, frozen, changed by the compressor (rank, channels, bits ...) |
    | harmonizer | a small trained network in the block's place |
    | share | runs the weights of another frozen block, ``source[i]`` |
    | drop | nothing: the emulator is one block shorter |

    Attributes:
        roles: (L,) one of :data:`ROLES` for each block; at least one adapter.
        source: (L,) the position whose weights block i runs: i itself unless it shares.
        alpha: share of the blocks outside A that harmonizers were meant to replace, in [0, 1].
        beta: rank reduction in [0, 1]; 0 keeps every rank.

    Raises:
        ConfigError: if a role is unknown, there is no adapter, alpha or beta is out of range, or a
            shared source is not a frozen block that the emulator holds.
    """

    roles: tuple[str, ...]
    source: tuple[int, ...] = ()
    alpha: float = 0.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        layers = len(self.roles)
        check(1 <= layers <= MAX_LAYERS, "layers", layers, f"in 1..{MAX_LAYERS}")
        for i, role in enumerate(self.roles):
            check(role in ROLES, f"roles[{i}]", role, f"one of {', '.join(ROLES)}")
        if not self.source:
            object.__setattr__(self, "source", tuple(range(layers)))
        check(len(self.source) == layers, "source", len(self.source), f"{layers} positions")
        for i, (role, origin) in enumerate(zip(self.roles, self.source, strict=True)):
            if role == SHARE:
                good = 0 <= origin < layers and self.roles[origin] in (KEEP, COMPRESS)
                check(good, f"source[{i}]", origin, "a block kept or compressed in the emulator")
            else:
                check(origin == i, f"source[{i}]", origin, f"{i} (only shared blocks borrow)")
        count = len(self.adapters)
        check(count >= 1, "adapters", count, f"in 1..{layers} (nothing would be trained)")
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            check_fraction(name, value)

    @property
    def num_layers(self) -> int:
        """Blocks of the base, L."""
        return len(self.roles)

    @property
    def positions(self) -> tuple[int, ...]:
        """Base positions of the emulator's blocks, in order (all but the dropped)."""
        return tuple(i for i, role in enumerate(self.roles) if role != DROP)

    @property
    def adapters(self) -> tuple[int, ...]:
        """Base positions of the adapter blocks A."""
        return self.having(ADAPTER)

    def having(self, role: str) -> tuple[int, ...]:
        """Return the base positions of the blocks with this role."""
        return tuple(i for i, r in enumerate(self.roles) if r == role)

    def to_json(self) -> dict[str, Any]:
        """Return plain values that :meth:`from_json` reads back."""
        return {
            "roles": list(self.roles),
            "source": list(self.source),
            "alpha": float(self.alpha),
            "beta": float(self.beta),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EmulatorPlan:
        """Read a plan written by :meth:`to_json`; the text may be hostile.

        Raises:
            ConfigError: if a key is missing or unknown, or a value is not of its type.
        """
        check(isinstance(value, Mapping), "plan", type(value).__name__, "an object")
        known = {"roles", "source", "alpha", "beta"}
        check(set(value) == known, "plan keys", sorted(value), f"{sorted(known)}")
        roles, source = value["roles"], value["source"]
        check(_list_of(roles, str), "roles", roles, "a list of texts")
        check(_list_of(source, int), "source", source, "a list of integers")
        return cls(tuple(roles), tuple(source), value["alpha"], value["beta"])

    @classmethod
    def with_adapters(cls, layers: int, adapters: Sequence[int], rest: str = KEEP) -> EmulatorPlan:
        """Return the plan with A at ``adapters`` and every other block in one role.

        Raises:
            ConfigError: if a position is repeated or outside 0..L-1.
        """
        chosen = check_positions(layers, adapters)
        roles = tuple(ADAPTER if i in chosen else rest for i in range(layers))
        return cls(roles)

    @classmethod
    def from_scores(
        cls,
        scores: Sequence[float],
        n_adapters: int,
        alpha: float = 0.0,
        beta: float = 0.0,
    ) -> EmulatorPlan:
        """Return ScaleOT's plan from (N_a, alpha, beta), arXiv 2412.09812, stage 2.

        The ``n_adapters`` highest scores become A at their own positions; of the rest the
        ``round(alpha * rest)`` lowest get harmonizers, the remainder is compressed when beta > 0
        and kept as it is when beta = 0.  Equal scores: the lower position counts as more important.

        Args:
            scores: (L,) importance; **a high score means "keep this block"**.
            n_adapters: N_a, at least 1.
            alpha: share of the other blocks that is replaced, in [0, 1].
            beta: rank reduction, in [0, 1].

        Raises:
            ConfigError: if N_a or a fraction is out of range, or a score not finite.
        """
        layers = len(scores)
        for i, score in enumerate(scores):
            check(math.isfinite(score), f"scores[{i}]", score, "finite")
        whole = isinstance(n_adapters, int) and not isinstance(n_adapters, bool)
        check(whole and 1 <= n_adapters <= layers, "n_adapters", n_adapters, f"in 1..{layers}")
        check_fraction("alpha", alpha)
        rest = layers - n_adapters
        replaced = math.floor(alpha * rest + 0.5)
        order = sorted(range(layers), key=lambda i: (-scores[i], i))
        chosen, least = set(order[:n_adapters]), set(order[layers - replaced :])
        frozen = COMPRESS if beta > 0 else KEEP
        roles = tuple(
            ADAPTER if i in chosen else HARMONIZER if i in least else frozen for i in range(layers)
        )
        return cls(roles, alpha=replaced / rest if rest else 0.0, beta=beta)


def ends(layers: int, first: int, last: int) -> tuple[int, ...]:
    """Return the positions of the first and last blocks (Offsite-Tuning's A, 2302.04870 sec. 4).

    Raises:
        ConfigError: if they overlap or there is none.
    """
    check(first >= 0 and last >= 0, "first, last", (first, last), ">= 0")
    check(1 <= first + last <= layers, "first + last", first + last, f"in 1..{layers}")
    return (*range(first), *range(layers - last, layers))


def outer_blocks(layers: int, count: int) -> tuple[int, ...]:
    """Return the first and last blocks, ``count`` of them, one more at the end where it is odd."""
    first = max(1, count // 2)
    return tuple(sorted({*range(first), *range(layers - (count - first), layers)}))


def check_positions(layers: int, positions: Sequence[int]) -> set[int]:
    """Return ``positions`` as a set.

    Raises:
        ConfigError: if one is repeated or outside 0..L-1.
    """
    for position in positions:
        good = isinstance(position, int) and 0 <= position < layers
        check(good, "adapter position", position, f"in 0..{layers - 1}")
    chosen = set(positions)
    check(len(chosen) == len(positions), "adapters", tuple(positions), "distinct positions")
    return chosen


def check_fraction(name: str, value: object) -> None:
    """Raise unless ``value`` is a number in [0, 1].

    Raises:
        ConfigError: names the value.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    check(number and 0.0 <= float(value) <= 1.0, name, value, "in [0, 1]")  # type: ignore[arg-type]


def _list_of(value: object, kind: type) -> bool:
    if not isinstance(value, list) or len(value) > MAX_LAYERS:
        return False
    return all(isinstance(x, kind) and not isinstance(x, bool) for x in value)
