"""Check of what is about to leave against the noise ratio that a policy demands.

The ratio of a mechanism as it was built is :meth:`fedsplit.privacy.Mechanism.noise_ratio`; here the
rows themselves are judged, since the bottom that they come from is the server's.
"""

from __future__ import annotations

import math

from torch import Tensor


def too_clear(sent: Tensor, length: float, ratio: float) -> bool:
    """Return whether the rows of one batch are longer than the demanded ratio explains.

    The bottom is the server's: one whose representations are short on public inputs and long on
    real text would pass the mechanism's own ratio.  What is about to leave cannot be shaped so:
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
