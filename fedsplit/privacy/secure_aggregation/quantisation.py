"""Numbers that are added up under masks: integers modulo 2^b, without ever wrapping around.

An owner of weight w sends ``q = round(w / W * clip(x, -c, c) / c * L)`` for each coordinate x of
its change, and w itself, both modulo 2^b.  With n owners ``L = floor((2^(b-1) - 1) / n)``, so the
sum of n such numbers stays within a signed b-bit integer whatever honest owners send.  The server
gets ``mean = c W / L * sum(q) / sum(w)``.

Guarantee:
    ``|mean - sum(w clip(x)) / sum(w)| <= n c W / (2 L sum(w))`` in every coordinate: half a unit
    per owner.  :meth:`Quantiser.error` is that bound.

What breaks it: an owner that sends numbers which no honest one would; it can make the sum anything,
as in any sum whose parts nobody sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fedsplit.errors import ConfigError

NDArray: TypeAlias = np.ndarray[Any, Any]
FEWEST_LEVELS = 1 << 10
MOST_LEVELS = 1 << 52  # beyond it float64 has no half units


@dataclass(frozen=True)
class Quantiser:
    """Turns changes into integers modulo 2^b, and their sum into a mean.

    Attributes:
        bits: b, 32 or 64.
        owners: n, that may be in the sum.
        bound: c, on the size of each coordinate.
        most_weight: W, largest weight of an owner.

    Raises:
        ConfigError: n owners of weight W could wrap around, or leave less than 1,024 levels.
    """

    bits: int
    owners: int
    bound: float
    most_weight: int

    def __post_init__(self) -> None:
        if self.owners * self.most_weight > self._largest:
            raise ConfigError(
                f"secure.most-targets={self.most_weight}: must be <= "
                f"{self._largest // self.owners} with {self.owners} owners and secure.bits="
                f"{self.bits}: their sum would wrap around"
            )
        if self._largest // self.owners < FEWEST_LEVELS:
            raise ConfigError(
                f"owners={self.owners}: must be <= {self._largest // FEWEST_LEVELS} with "
                f"secure.bits={self.bits}: less than {FEWEST_LEVELS} levels would be left"
            )

    @property
    def _largest(self) -> int:
        return int(2 ** (self.bits - 1)) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The unsigned integers that are added up."""
        return np.dtype(np.uint32 if self.bits == 32 else np.uint64)

    @property
    def levels(self) -> int:
        """L: the integer that the bound itself becomes at the largest weight."""
        return min(self._largest // self.owners, MOST_LEVELS)

    def error(self, owners: int, weight: float) -> float:
        """Return the bound on each coordinate's error of a mean of ``owners`` owners.

        Args:
            owners: in the sum.
            weight: the sum of their weights.
        """
        return owners * self.bound * self.most_weight / (2 * self.levels * weight)

    def encode(self, values: NDArray, weight: int, bound: float | None = None) -> NDArray:
        """Return weighted values as integers modulo 2^b.

        Args:
            values: (d,), float; those beyond the bound are clipped to it.
            weight: in [0, W].
            bound: on these values; None: c.

        Raises:
            ConfigError: a weight out of its range, or a value that is not finite.
        """
        if not 0 <= weight <= self.most_weight:
            raise ConfigError(f"weight={weight}: must be in [0, {self.most_weight}]")
        limit = self.bound if bound is None else bound
        scale = weight / self.most_weight * self.levels / limit
        found = np.clip(values.astype(np.float64), -limit, limit)
        found *= scale
        np.rint(found, out=found)
        if not bool(np.isfinite(found).all()):
            raise ConfigError("values to be added up: must be finite")
        return found.astype(np.int64).astype(self.dtype)

    def count(self, number: float) -> NDArray:
        """Return a count as (1,) integers; one beyond its part of the range is cut to it."""
        kept = min(max(0, int(number)), self._largest // self.owners)
        return np.array([kept], dtype=self.dtype)

    def signed(self, total: NDArray) -> NDArray:
        """Return a sum modulo 2^b as signed 64-bit integers."""
        signed = np.int32 if self.bits == 32 else np.int64
        return total.view(signed).astype(np.int64)

    def mean(self, total: NDArray, weight: float, bound: float | None = None) -> NDArray:
        """Return the weighted mean, float64, of what the sum is of.

        Args:
            total: (d,), the sum modulo 2^b.
            weight: the sum of the weights, above 0.
            bound: as :meth:`encode` had it.
        """
        limit = self.bound if bound is None else bound
        unit = limit * self.most_weight / (self.levels * weight)
        return self.signed(total).astype(np.float64) * unit
