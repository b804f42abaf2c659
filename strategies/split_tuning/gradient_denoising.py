"""The server's estimate of what the owners' noise on gradient rows hides.

A noisy row of a language model's gradient is evidence about its target y.  With the model's own
prediction p as prior, the posterior q(v) over the vocabulary is known in closed form
(:mod:`fedsplit.attacks.gradients.token_recovery`), and the row is replaced by its mean under q:

    E[dL/dh | row] = W^T (p - q) / N,

which is the gradient of the marginal likelihood -log sum_v p(v) density(row | v).  That is
post-processing: it costs no privacy, and an attacker computes the same q.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fedsplit.attacks.gradients.known_head import LinearHead
from fedsplit.attacks.gradients.token_recovery import GradientNoise, log_posterior
from fedsplit.config import RunConfig
from fedsplit.errors import AttackError
from fedsplit.models.splitting.heads import Head
from fedsplit.privacy.labels.row_noise import RowNoise
from fedsplit.privacy.labels.table import build_protection
from fedsplit.tasks import task_of

log = logging.getLogger(__name__)


class GradientDenoiser:
    """Replaces noisy gradient rows by their posterior means.

    Args:
        noise: the announced protection.
        head: the owners'; None: rows are gradients of logits.
    """

    def __init__(self, noise: RowNoise, head: LinearHead | None) -> None:
        self._noise = noise
        self._head = head

    def __call__(self, sent: Tensor, rows: Tensor, targets: float) -> Tensor:
        """Return the estimate of one owner's gradient rows, (R, d).

        Args:
            sent: what the server sent, (R, d) hidden states or (R, V) logits.
            rows: what came back; rows of zeros predict nothing and stay.
            targets: N of the owner's mean loss.
        """
        predicts = rows.abs().amax(dim=1) > 0  # (R,)
        states, found = sent[predicts].float().cpu(), torch.zeros_like(rows)
        logits = states if self._head is None else self._head.logits(states)
        weight = None if self._head is None else self._head.weight  # (V, d)
        law = GradientNoise(
            "gaussian",
            self._noise.sigma(rows.shape[1]) / targets,
            self._noise.gradient_clip / targets,
        )
        blocks = log_posterior(rows[predicts].cpu(), logits, law, head=weight, targets=targets)
        q = torch.cat([block.softmax(1) for block in blocks])  # (R', V)
        means = logits.softmax(1) - q
        means = (means if weight is None else means @ weight) / targets
        found[predicts] = means.to(found)
        return found


def build_gradient_denoiser(config: RunConfig, head: Head | None) -> GradientDenoiser | None:
    """Return what the settings allow: an estimate needs a known law, and a linear head if any."""
    protection = build_protection(config.labels)
    if not isinstance(protection, RowNoise) or task_of(config).labelled:
        return None
    if head is None:
        return GradientDenoiser(protection, None)
    try:
        return GradientDenoiser(protection, LinearHead.of(head))
    except AttackError as error:
        log.warning("noisy gradients are used as they come: %s", error)
        return None
