"""How long the noise is beside what it hides: the one measure that no choice of eta gets around.

E||n|| / median ||h||, with the mechanism as it was built and the bottom as it was received: an eta
says nothing without the length of the representation, and that length is the server's choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.privacy.mechanisms.base import Mechanism
from fedsplit.privacy.mechanisms.calibration import norms_of, word_table
from fedsplit.privacy.mechanisms.factory import representation_norm
from fedsplit.privacy.mechanisms.gaussian import Gaussian
from fedsplit.privacy.mechanisms.nearest_token import NearestToken
from fedsplit.privacy.mechanisms.pac import Pac


def _by_eta(mechanism: Any, width: int) -> float:
    return width / float(mechanism.eta)


def _gaussian(mechanism: Mechanism, width: int) -> float:
    assert isinstance(mechanism, Gaussian)
    chi = math.lgamma((width + 1) / 2) - math.lgamma(width / 2)
    return mechanism.sigma * math.sqrt(2) * math.exp(chi)


def _pac(mechanism: Mechanism, width: int) -> float:
    assert isinstance(mechanism, Pac)
    return mechanism.mean_noise_norm  # root mean square: a few per cent above the mean


# Mechanism -> (mechanism, d) -> E||n||.  One that is not here cannot satisfy a bound on the ratio.
NOISE_NORMS: dict[str, Callable[[Any, int], float]] = {
    "dchi": _by_eta,
    "nearest-token": _by_eta,
    "gaussian": _gaussian,
    "pac": _pac,
    "none": lambda mechanism, width: 0.0,
}


def noise_norm(mechanism: Mechanism, width: int) -> float | None:
    """Return E||n|| per token (representation units), None for a mechanism that is not known."""
    found = NOISE_NORMS.get(mechanism.name)
    return None if found is None else found(mechanism, width)


def noise_ratio(mechanism: Mechanism, bottom: nn.Module, vocabulary: int) -> float | None:
    """Return E||n|| / median ||h|| over public inputs; None if the noise cannot be measured.

    What a mechanism clips is measured as it is after clipping: a small ``clip`` shortens the noise
    and what it hides alike.
    """
    if isinstance(mechanism, NearestToken) and mechanism.bottom is not None:
        words = norms_of(word_table(bottom))  # where this one puts its noise
        return _by_eta(mechanism, words.dim) / words.median if words.median else math.inf
    norm = representation_norm(bottom, vocabulary)
    if isinstance(mechanism, Gaussian):
        norm = min(norm, mechanism.clip)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        width = int(bottom(ids, torch.ones_like(ids)).shape[2])
    length = noise_norm(mechanism, width)
    if length is None:
        return None
    return math.inf if norm == 0 else length / norm


def too_clear(sent: Tensor, length: float, ratio: float) -> bool:
    """Whether the rows of one batch are longer than the demanded ratio explains.

    The bottom is the server's: one whose representations are short on public inputs and long on
    real text would pass :func:`noise_ratio`.  What is about to leave cannot be shaped like that:
    ||sent||^2 is ||h||^2 + ||n||^2 up to the random angle between them, so its median bounds the
    median of ||h||.  Half the demanded ratio is accepted, since medians of different texts differ.

    Args:
        sent: what would leave, ``(N, d)``.
        length: E||n|| of the mechanism (representation units).
        ratio: the demanded E||n|| / median ||h||.
    """
    tokens, width = sent.shape
    squared = float(sent.float().norm(dim=1).median()) ** 2
    # Five standard errors of a median of ||n||^2, whose relative spread is 2 / sqrt(d).
    chance = 12.5 / math.sqrt(tokens * width)
    return squared > length**2 * (1 + chance + 4 / ratio**2)
