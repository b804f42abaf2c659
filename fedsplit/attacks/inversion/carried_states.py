"""How tokens' states in one context are carried to another: a linear map, and what that leaves.

What the attack of :mod:`fedsplit.attacks.inversion.token_states` learns from public text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.attacks.base import Public
from fedsplit.attacks.inversion.learned import DrawnNoise
from fedsplit.errors import AttackError

AT_ONCE = 1024  # candidates carried together
POSITIONS = 64  # with an offset of their own
RIDGES = (1e-2, 1e-1, 1.0, 1e3)  # the last is next to a shift alone
TRIED = 500  # held-out rows that decide between them
EVERY = 5  # public texts of which one is held out


def noise_covariance(clean: Sequence[Tensor], noise: DrawnNoise) -> Tensor:
    """Return E n n^T of the announced noise over public rows, ``(d, d)`` float64.

    Raises:
        AttackError: what leaves has another width than what the bottom made.
    """
    total = torch.zeros(clean[0].shape[1], clean[0].shape[1], dtype=torch.float64)
    rows = 0
    for x in clean:
        received = noise(x)
        if received.shape != x.shape:
            raise AttackError(f"received={tuple(received.shape)}: must be {tuple(x.shape)}")
        n = (received - x).double()
        total += n.T @ n
        rows += len(x)
    return total / max(1, rows)


@dataclass(frozen=True)
class Whitened:
    """Candidates' vectors, whitened, ready to be compared with rows.

    Attributes:
        whitener: W (d, d) with W S W^T = I, float32.
        candidates: W m_v, ``(n, d)``.
    """

    whitener: Tensor
    candidates: Tensor

    @classmethod
    def of(cls, means: Tensor, covariance: Tensor, floor: float) -> Whitened:
        """Return them by a covariance (d, d) with a floor on its diagonal."""
        side = torch.eye(len(covariance), dtype=torch.float64)
        factor = torch.linalg.cholesky(covariance + (floor + 1e-30) * side)
        whitener = torch.linalg.solve_triangular(factor, side, upper=False).float()
        return cls(whitener, means.float() @ whitener.T)

    def scores(self, rows: Tensor) -> Tensor:
        """Return log densities up to a constant of each row, ``(t, d) -> (t, n)``."""
        white = rows.float() @ self.whitener.T
        found: Tensor = white @ self.candidates.T - self.candidates.square().sum(1) / 2
        return found


@dataclass(frozen=True)
class Carried:
    """How a token's state in a public context is carried to a row, and what that leaves.

    Attributes:
        white: candidates as carried, whitened by what is left and the noise.
        offsets: what a position adds to every token, ``(P, d)``; later ones share the last.
    """

    white: Whitened
    offsets: Tensor

    @classmethod
    def of(
        cls,
        behind: Tensor,
        tokens: Tensor,
        clean: Sequence[Tensor],
        ids: Sequence[Tensor],
        of: Public,
        noise: Tensor,
    ) -> Carried:
        """Return the fit whose ridge reads most of held-out public text under the noise.

        Args:
            behind: states in public contexts, ``(n, d)``, clipped.
            tokens: whose, ``(n,)``.
            clean: public rows, per text ``(T_j, d)``, clipped.
            ids: their tokens.
            of: what is known.
            noise: its covariance.
        """
        place = torch.full((of.vocab,), -1)
        place[tokens] = torch.arange(len(tokens))
        place[list(of.special_ids)] = -1  # their states are like no word's
        taught = [pair for i, pair in enumerate(zip(clean, ids, strict=True)) if i % EVERY]
        held = [pair for i, pair in enumerate(zip(clean, ids, strict=True)) if not i % EVERY]
        if not taught:
            taught = held
        system = _System.of(behind, place, taught)
        drawn = DrawnNoise(of.mechanism, 1)
        tested = [(drawn(x), y) for x, y in held]
        best: tuple[float, Carried] | None = None
        for ridge in RIDGES:
            found = system.solved(ridge, behind, place, held, noise)
            share = found.share(tested, place)
            if best is None or share >= best[0]:
                best = share, found
        assert best is not None, "RIDGES is not empty"
        return best[1]

    def scores(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return log densities up to a constant of each row, ``(t, d) -> (t, n)``."""
        offsets = self.offsets[positions.clamp(max=len(self.offsets) - 1)]
        return self.white.scores(rows.float() - offsets)

    def share(self, texts: Sequence[tuple[Tensor, Tensor]], place: Tensor) -> float:
        """Return the share of texts' tokens that is read; those without a candidate are not."""
        right = seen = 0
        for x, ids in texts:
            known = place[ids] >= 0
            known[0] = False
            guess = self.scores(x[known], torch.arange(len(x))[known]).argmax(1)
            right += int((guess == place[ids[known]]).sum())
            seen += len(guess)
            if seen >= TRIED:
                break
        return right / max(1, seen)


@dataclass(frozen=True)
class _System:
    """Normal equations of the map from context states to public rows, rare tokens weighing more.

    Attributes:
        gram: ``(d, d)`` of centred inputs.
        cross: ``(d, d)`` of centred inputs and what rows are beside them.
        mean_x: of the inputs.
        mean_y: of the rows.
        taught: the texts.
    """

    gram: Tensor
    cross: Tensor
    mean_x: Tensor
    mean_y: Tensor
    taught: Sequence[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, behind: Tensor, place: Tensor, taught: Sequence[tuple[Tensor, Tensor]]) -> _System:
        d = behind.shape[1]
        counts = torch.bincount(torch.cat([y for _, y in taught]), minlength=len(place)).double()
        gram, cross = torch.zeros(d, d).double(), torch.zeros(d, d).double()
        sum_x, sum_y, total = torch.zeros(d).double(), torch.zeros(d).double(), 0.0
        for x, y, ids in _pairs(behind, place, taught):
            w = counts[ids].clamp(min=1).rsqrt().unsqueeze(1)
            gram += x.T @ (w * x)
            cross += x.T @ (w * y)
            sum_x, sum_y = sum_x + (w * x).sum(0), sum_y + (w * y).sum(0)
            total += float(w.sum())
        if not total:
            raise AttackError("public text: none of its tokens was sent through the bottom")
        mean_x, mean_y = sum_x / total, sum_y / total
        gram -= total * torch.outer(mean_x, mean_x)
        cross -= total * torch.outer(mean_x, mean_y)
        return cls(gram, cross, mean_x, mean_y, taught)

    def solved(
        self,
        ridge: float,
        behind: Tensor,
        place: Tensor,
        held: Sequence[tuple[Tensor, Tensor]],
        noise: Tensor,
    ) -> Carried:
        """Return the fit with a map that a ridge draws towards the identity."""
        d = behind.shape[1]
        side = torch.eye(d, dtype=torch.float64)
        weight = ridge * float(self.gram.trace()) / d + 1e-30
        carry = torch.linalg.solve(self.gram + weight * side, self.cross + weight * side)

        def carried(x: Tensor) -> Tensor:
            moved: Tensor = (x.double() - self.mean_x) @ carry + self.mean_y
            return moved

        offsets = torch.zeros(POSITIONS, d).double()
        seen = torch.full((POSITIONS, 1), 20.0).double()  # offsets of rare positions are near 0
        for x, y, _, at in _placed(behind, place, self.taught):
            offsets.index_add_(0, at, y - carried(x))
            seen.index_add_(0, at, torch.ones(len(at), 1).double())
        offsets /= seen
        total, rows = torch.zeros(d, d).double(), 0
        for x, y, _, at in _placed(behind, place, held):
            left = y - carried(x) - offsets[at]
            total += left.T @ left
            rows += len(left)
        total /= max(1, rows)
        spread = float(total.trace()) / d
        share = max(1e-2, d / (d + rows))  # few rows tell little of directions
        covariance = (1 - share) * total + share * spread * side + noise
        floor = 1e-8 * float(covariance.trace()) / d
        means = torch.cat([carried(part).float() for part in torch.split(behind, AT_ONCE)])
        return Carried(Whitened.of(means, covariance, floor), offsets.float())


def _placed(
    behind: Tensor, place: Tensor, texts: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield context states, rows, ids and positions of texts, without their first tokens."""
    for at in range(0, len(texts), 256):
        group = [(x, ids) for x, ids in texts[at : at + 256] if len(ids) > 1]
        if not group:
            continue
        rows = torch.cat([x[1:] for x, _ in group]).double()
        ids = torch.cat([y[1:] for _, y in group])
        where = torch.cat([torch.arange(1, len(y)) for _, y in group]).clamp(max=POSITIONS - 1)
        known = place[ids] >= 0
        ids = ids[known]
        yield behind[place[ids]].double(), rows[known], ids, where[known]


def _pairs(
    behind: Tensor, place: Tensor, texts: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for x, rows, ids, _ in _placed(behind, place, texts):
        yield x, rows, ids
