"""Read the next token of each position off the gradient that an owner returns for it.

In causal language modelling the labels are the text.  For one position with the model's prediction
p = softmax(z) and the true next token y, a mean loss over N targets has

- dL/dz = (p - onehot(y)) / N, whose one negative entry is y;
- dL/dh = W^T (p - onehot(y)) / N for a head z = W h that the server knows, so that
  W[y] = W^T p - N dL/dh: the nearest row of W is y, in closed form.

Noise of a known law turns both into a likelihood over the vocabulary; the model's own prediction p
is its prior.  The maximum a posteriori reader is then

    argmax_v  log p(v) + log density(g - clip(candidate_v)),

with candidate_v = W^T (p - onehot(v)) / N (or p - onehot(v) over N).  Nothing that reads one row at
a time does better under that law (Neyman-Pearson); what it reads at infinite noise is the model's
own top-1, the guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.errors import AttackError, check, one_of

LAWS = ("none", "gaussian", "dchi")
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class GradientNoise:
    """The announced protection of gradient rows: clip to a norm, then add noise.

    Attributes:
        law: ``none``, ``gaussian`` (scale = standard deviation per coordinate) or ``dchi``
            (density proportional to exp(-scale ||n||)).
        scale: > 0 where there is noise, in units of the gradients (1/units for ``dchi``).
        clip: largest norm of a row before noise; inf = not clipped.
    """

    law: str = "none"
    scale: float = 0.0
    clip: float = math.inf

    def __post_init__(self) -> None:
        one_of("law", self.law, LAWS)
        noisy = self.law != "none"
        check(self.scale > 0 or not noisy, "scale", self.scale, "> 0 (noise)")
        check(self.clip > 0, "clip", self.clip, "> 0 (norm of a gradient row)")

    def log_density(self, squared: Tensor) -> Tensor:
        """Return the log density at squared distances, up to a constant of the row."""
        if self.law == "gaussian":
            return -squared / (2 * self.scale**2)
        if self.law == "dchi":
            return -self.scale * squared.clamp(min=0).sqrt()
        # Without noise the nearest candidate is the answer, whatever the prior says.
        return -squared * 1e30 / squared.amax(dim=1, keepdim=True).clamp(min=1e-30)


def tokens_from_logit_gradients(gradients: Tensor) -> Tensor:
    """Return each row's next token, ``(N, V) -> (N,)``: the one negative entry.

    Raises:
        AttackError: for another shape.
    """
    if gradients.dim() != 2 or gradients.shape[1] < 2:
        raise AttackError(f"gradients.shape={tuple(gradients.shape)}: must be (N, V >= 2)")
    return gradients.argmin(dim=1)


def log_posterior(
    gradients: Tensor,
    logits: Tensor,
    noise: GradientNoise,
    *,
    head: Tensor | None,
    targets: float,
) -> Iterator[Tensor]:
    """Yield log p(v | row) + constant for blocks of rows, ``(block, V)``; arguments as below."""
    found = log_likelihood(gradients, logits, noise, head=head, targets=targets)
    for block, own in zip(found, torch.split(logits, ROWS_AT_ONCE), strict=True):
        yield block if noise.law == "none" else block + own.float().log_softmax(1)


def log_likelihood(
    gradients: Tensor,
    logits: Tensor,
    noise: GradientNoise,
    *,
    head: Tensor | None,
    targets: float,
) -> Iterator[Tensor]:
    """Yield log p(row | v) + constant for blocks of rows, ``(block, V)`` float32.

    Args:
        gradients: received rows, ``(N, d)`` of hidden states or ``(N, V)`` of logits.
        logits: the server's own prediction at those positions, ``(N, V)``.
        noise: the law that the settings announce.
        head: ``(V, d)``, the projection that the loss was computed through; None: ``gradients``
            are those of the logits.
        targets: N of the owner's mean loss; 1 where the loss is a sum.

    Raises:
        AttackError: shapes that do not fit, or ``targets`` < 1.
    """
    width = logits.shape[1] if head is None else head.shape[1]
    if logits.dim() != 2 or gradients.shape != (logits.shape[0], width):
        raise AttackError(
            f"gradients.shape={tuple(gradients.shape)}: must be ({logits.shape[0]}, {width}) for "
            f"logits {tuple(logits.shape)}"
        )
    if head is not None and head.shape[0] != logits.shape[1]:
        raise AttackError(f"head.shape={tuple(head.shape)}: must be ({logits.shape[1]}, {width})")
    check(targets >= 1, "targets", targets, ">= 1")
    weights = None if head is None else head.float()
    norms = None if weights is None else weights.pow(2).sum(1)  # (V,)
    blocks = (torch.split(x, ROWS_AT_ONCE) for x in (gradients, logits))
    for rows, own in zip(*blocks, strict=True):
        g, p = rows.float() * targets, own.float().softmax(1)  # in units of N = 1
        if weights is None or norms is None:
            dot = (g * p).sum(1, keepdim=True) - g  # g . (p - e_v)
            length = p.pow(2).sum(1, keepdim=True) - 2 * p + 1  # |p - e_v|^2
        else:
            mean = p @ weights  # (block, d)
            dot = (g * mean).sum(1, keepdim=True) - g @ weights.T
            length = mean.pow(2).sum(1, keepdim=True) - 2 * mean @ weights.T + norms
        shrink: float | Tensor = 1.0
        if math.isfinite(noise.clip):
            norm = length.clamp(min=1e-30).sqrt()
            shrink = (noise.clip * targets / norm).clamp(max=1.0)
        squared = g.pow(2).sum(1, keepdim=True) - 2 * shrink * dot + shrink**2 * length
        yield noise.log_density((squared / targets**2).clamp(min=0))


def recover_tokens(
    gradients: Tensor,
    logits: Tensor,
    noise: GradientNoise,
    *,
    head: Tensor | None,
    targets: float,
) -> Tensor:
    """Return the most probable next token of every row, ``(N,)``; see :func:`log_posterior`."""
    blocks = log_posterior(gradients, logits, noise, head=head, targets=targets)
    return torch.cat([block.argmax(dim=1) for block in blocks])
