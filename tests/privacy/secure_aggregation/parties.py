"""Owners and a server of one masked sum, in this process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedsplit.privacy.secure_aggregation.masks import NDArray, new_key
from fedsplit.privacy.secure_aggregation.owner import OwnerSide
from fedsplit.privacy.secure_aggregation.roster import Advert, Occasion, Roster
from strategies.secure_aggregation.masked_sum import MaskedSum

OCCASION = Occasion(7, 1, bytes(32))


def everyone(advert: Advert) -> bool:
    return True


@dataclass
class Round:
    """A round that is played step by step, honestly unless a test does otherwise.

    Attributes:
        vectors: owner's name -> its numbers.
        owners: by index in the roster.
    """

    vectors: Mapping[str, NDArray]
    neighbours: int = 0
    share: float = 0.66
    fewest: int = 2
    counts: Callable[[Advert], bool] = everyone
    occasion: Occasion = OCCASION
    owners: dict[int, OwnerSide] = field(default_factory=dict)
    server: MaskedSum = field(init=False)

    def __post_init__(self) -> None:
        sides = [OwnerSide(self.occasion, n, new_key(), self.fewest) for n in self.vectors]
        adverts = [side.begin() for side in sides]
        self.server = MaskedSum.of(self.occasion, adverts, self.neighbours, self.share)
        self.owners = {self.server.place(side.name): side for side in sides}

    @property
    def roster(self) -> Roster:
        return self.server.roster

    def adverts_for(self, at: int) -> list[Advert]:
        return [self.server.adverts[near] for near in self.roster.around(at)]

    def exchange_shares(self, lost: Collection[int] = ()) -> None:
        for at, side in self.owners.items():
            if at not in lost:
                shared = side.share(self.roster, self.adverts_for(at), self.counts)
                self.server.take_shares(at, shared.sealed, shared.commitment)

    def send_numbers(self, lost: Collection[int] = ()) -> None:
        for at, side in self.owners.items():
            if at in self.server.sealed:
                side.accept(self.server.shares_for(at))
                if at not in lost:
                    vector = self.vectors[side.name]
                    masked = side.mask(vector)
                    self.server.take_numbers(at, masked, vector.dtype, vector.size)

    def confirm(self, lost: Collection[int] = ()) -> None:
        for at in sorted(self.server.survivors - set(lost)):
            told = sorted(self.server.survivors)
            self.server.take_confirmation(at, self.owners[at].confirm(told))

    def reveal(self, lost: Collection[int] = ()) -> None:
        for at in sorted(self.server.survivors - set(lost)):
            reveals = self.owners[at].reveal(self.server.signatures_for(at))
            self.server.take_reveals(at, reveals)

    def sum_of(self, survivors: Collection[int]) -> NDArray:
        rows = [self.vectors[self.owners[at].name] for at in survivors]
        return np.sum(rows, axis=0, dtype=rows[0].dtype)


def some_vectors(owners: int, size: int = 50, bits: int = 32, seed: int = 0) -> dict[str, NDArray]:
    generator = np.random.default_rng(seed)
    kind = np.uint32 if bits == 32 else np.uint64
    return {f"owner-{i}": generator.integers(0, 2**bits, size, dtype=kind) for i in range(owners)}
