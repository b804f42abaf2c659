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

AT_ONCE = 4096  # candidates carried together
POSITIONS = 64  # with an offset of their own
RIDGES = (1e-2, 1e-1, 1.0, 1e3)  # the last is next to a shift alone
RIVALS = 2048  # most frequent tokens that held-out rows are told apart from, beside their own
TRIED = 500  # held-out rows that decide between ridges
EVERY = 5  # public texts of which one is held out
Text = tuple[Tensor, Tensor]  # rows (T, d) and ids (T,)


def noise_covariance(clean: Sequence[Tensor], noise: DrawnNoise) -> Tensor:
    """Return the announced noise's covariance, ``(d, d)`` float64.

    Its shape is the law's, isotropic or so behind the mechanism's whitener; only its size is taken
    from draws, so that few of them tell it for any width.

    Raises:
        AttackError: what leaves has another width than what the bottom made.
    """
    side = torch.eye(clean[0].shape[1], dtype=torch.float64)
    if noise.mechanism is None:
        return torch.zeros_like(side)
    whitener = noise.mechanism.whitener()
    whiten = side if whitener is None else whitener.double().cpu()
    total, rows = 0.0, 0
    for x in clean:
        received = noise(x)
        if received.shape != x.shape:
            raise AttackError(f"received={tuple(received.shape)}: must be {tuple(x.shape)}")
        total += float(((received - x).double() @ whiten).square().sum())
        rows += len(x)
    power = total / max(1, rows * len(side))
    shape: Tensor = torch.linalg.inv(whiten @ whiten.T)
    return power * shape


@dataclass(frozen=True)
class Whitened:
    """Candidates' vectors, whitened, ready to be compared with rows.

    Attributes:
        whitener: W (d, d) with W S W^T = I, float32.
        centre: c, ``(d,)``, taken from vectors and rows: what all share would cost precision.
        candidates: W (m_v - c), ``(n, d)``.
    """

    whitener: Tensor
    centre: Tensor
    candidates: Tensor

    @classmethod
    def of(cls, means: Tensor, covariance: Tensor, floor: float) -> Whitened:
        """Return them by a covariance (d, d) with a floor on its diagonal."""
        whitener, centre = whitener_of(covariance, floor), means.mean(0)
        return cls(whitener, centre, (means.float() - centre) @ whitener.T)

    def scores(self, rows: Tensor) -> Tensor:
        """Return log densities up to a constant of each row, ``(t, d) -> (t, n)``."""
        white = (rows.float() - self.centre) @ self.whitener.T
        found: Tensor = white @ self.candidates.T - self.candidates.square().sum(1) / 2
        return found


def whitener_of(covariance: Tensor, floor: float) -> Tensor:
    """Return W (d, d) float32 with W (S + floor I) W^T = I."""
    side = torch.eye(len(covariance), dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance + (floor + 1e-30) * side)
    whitener: Tensor = torch.linalg.solve_triangular(factor, side, upper=False)
    return whitener.float()


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
        texts: Sequence[Text],
        of: Public,
        noise: Tensor,
        skipped: int = 1,
    ) -> Carried:
        """Return the fit whose ridge reads most of held-out public text under the noise.

        Args:
            behind: states in public contexts, ``(n, d)``, clipped.
            tokens: whose, ``(n,)``, the most frequent first.
            texts: public ones, clipped.
            of: what is known.
            noise: its covariance.
            skipped: leading tokens of a text whose states follow another law.

        Raises:
            AttackError: no token of the texts was sent through the bottom.
        """
        place = torch.full((of.vocab,), -1)
        place[tokens] = torch.arange(len(tokens))
        place[list(of.special_ids)] = -1  # their states are like no word's
        held = [text for i, text in enumerate(texts) if not i % EVERY]
        taught = [text for i, text in enumerate(texts) if i % EVERY] or held
        system = _System.of(behind, place, taught, skipped)
        drawn = DrawnNoise(of.mechanism, 1)
        tested, seen = [], 0
        for x, y in held:
            tested.append((drawn(x), y))
            seen += len(y)
            if seen >= TRIED:
                break
        rivals = torch.unique(
            torch.cat([torch.arange(min(RIVALS, len(tokens))), *(place[y] for _, y in tested)])
        )
        rivals = rivals[rivals >= 0]
        among = torch.full_like(place, -1)
        among[tokens[rivals]] = torch.arange(len(rivals))
        among[place < 0] = -1
        best: tuple[float, _Map] | None = None
        for ridge in RIDGES:
            found = system.solved(ridge, behind, held, noise)
            share = found.carried(behind[rivals]).share(tested, among, skipped)
            if best is None or share >= best[0]:
                best = share, found
        assert best is not None, "RIDGES is not empty"
        return best[1].carried(behind)

    def scores(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return log densities up to a constant of each row, ``(t, d) -> (t, n)``."""
        offsets = self.offsets[positions.clamp(max=len(self.offsets) - 1)]
        return self.white.scores(rows.float() - offsets)

    def share(self, texts: Sequence[Text], place: Tensor, skipped: int) -> float:
        """Return the share of texts' tokens that is read; those without a candidate are not."""
        right = seen = 0
        for x, ids in texts:
            known = place[ids] >= 0
            known[:skipped] = False
            guess = self.scores(x[known], torch.arange(len(x))[known]).argmax(1)
            right += int((guess == place[ids[known]]).sum())
            seen += len(guess)
        return right / max(1, seen)


@dataclass(frozen=True)
class _Map:
    """An affine map of context states, with positions' offsets, and the covariance it leaves."""

    carry: Tensor
    mean_x: Tensor
    mean_y: Tensor
    offsets: Tensor
    covariance: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return states as carried, float64, without a position's offset."""
        moved: Tensor = (x.double() - self.mean_x) @ self.carry + self.mean_y
        return moved

    def carried(self, behind: Tensor) -> Carried:
        """Return candidates as they are compared with rows."""
        floor = 1e-8 * float(self.covariance.trace()) / len(self.covariance)
        whitener = whitener_of(self.covariance, floor)
        centre = self(behind[:AT_ONCE]).mean(0).float()
        candidates = torch.empty(len(behind), len(centre))
        for at in range(0, len(behind), AT_ONCE):
            part = self(behind[at : at + AT_ONCE]).float() - centre
            candidates[at : at + AT_ONCE] = part @ whitener.T
        return Carried(Whitened(whitener, centre, candidates), self.offsets.float())


@dataclass(frozen=True)
class _System:
    """Normal equations of the map from context states to public rows, rare tokens weighing more.

    Attributes:
        gram: ``(d, d)`` of centred inputs.
        cross: ``(d, d)`` of centred inputs and what rows are beside them.
        mean_x: of the inputs.
        mean_y: of the rows.
        place: id -> place among the inputs, -1 for none.
        taught: the texts.
        skipped: leading tokens that are left out.
    """

    gram: Tensor
    cross: Tensor
    mean_x: Tensor
    mean_y: Tensor
    place: Tensor
    taught: Sequence[Text]
    skipped: int

    @classmethod
    def of(cls, behind: Tensor, place: Tensor, taught: Sequence[Text], skipped: int) -> _System:
        d = behind.shape[1]
        counts = torch.bincount(torch.cat([y for _, y in taught]), minlength=len(place)).double()
        gram, cross = torch.zeros(d, d).double(), torch.zeros(d, d).double()
        sum_x, sum_y, total = torch.zeros(d).double(), torch.zeros(d).double(), 0.0
        for x, y, ids, _ in _placed(behind, place, taught, skipped):
            w = counts[ids].clamp(min=1).rsqrt().unsqueeze(1)
            gram += x.T @ (w * x)
            cross += x.T @ (w * y)
            sum_x, sum_y = sum_x + (w * x).sum(0), sum_y + (w * y).sum(0)
            total += float(w.sum())
        if not total:
            raise AttackError("public text: 0 of its tokens have a state: must be >= 1")
        mean_x, mean_y = sum_x / total, sum_y / total
        gram -= total * torch.outer(mean_x, mean_x)
        cross -= total * torch.outer(mean_x, mean_y)
        return cls(gram, cross, mean_x, mean_y, place, taught, skipped)

    def solved(self, ridge: float, behind: Tensor, held: Sequence[Text], noise: Tensor) -> _Map:
        """Return the map that a ridge draws towards the identity, and what it leaves of others."""
        d = behind.shape[1]
        side = torch.eye(d, dtype=torch.float64)
        weight = ridge * float(self.gram.trace()) / d + 1e-30
        carry = torch.linalg.solve(self.gram + weight * side, self.cross + weight * side)
        offsets = torch.zeros(POSITIONS, d).double()
        found = _Map(carry, self.mean_x, self.mean_y, offsets, noise)
        seen = torch.full((POSITIONS, 1), 20.0).double()  # offsets of rare positions are near 0
        for x, y, _, at in _placed(behind, self.place, self.taught, self.skipped):
            offsets.index_add_(0, at, y - found(x))
            seen.index_add_(0, at, torch.ones(len(at), 1).double())
        offsets /= seen
        total, rows = torch.zeros(d, d).double(), 0
        for x, y, _, at in _placed(behind, self.place, held, self.skipped):
            left = y - found(x) - offsets[at]
            total += left.T @ left
            rows += len(left)
        total /= max(1, rows)
        spread = float(total.trace()) / d
        share = max(1e-2, d / (d + rows))  # few rows tell little of directions
        covariance = (1 - share) * total + share * spread * side + noise
        return _Map(carry, self.mean_x, self.mean_y, offsets, covariance)


def _placed(
    behind: Tensor, place: Tensor, texts: Sequence[Text], skipped: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield context states, rows, ids and positions of texts, without their first tokens."""
    for at in range(0, len(texts), 256):
        group = [(x, ids) for x, ids in texts[at : at + 256] if len(ids) > skipped]
        if not group:
            continue
        rows = torch.cat([x[skipped:] for x, _ in group]).double()
        ids = torch.cat([y[skipped:] for _, y in group])
        where = torch.cat([torch.arange(skipped, len(y)) for _, y in group])
        known = place[ids] >= 0
        ids, where = ids[known], where[known].clamp(max=POSITIONS - 1)
        yield behind[place[ids]].double(), rows[known], ids, where
