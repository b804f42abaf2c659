"""Reading next tokens off the gradients of a language model's loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.attacks.gradients.token_recovery import (
    GradientNoise,
    log_posterior,
    recover_tokens,
    tokens_from_logit_gradients,
)
from fedsplit.errors import AttackError

N, D, V = 64, 24, 101


def step(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (logits, head, true tokens, hidden gradients, logit gradients) of one mean loss."""
    torch.manual_seed(seed)
    head, truth = torch.randn(V, D), torch.randint(V, (N,))
    hidden = torch.randn(N, D).requires_grad_()
    logits = hidden @ head.T
    logits.retain_grad()
    functional.cross_entropy(logits, truth).backward()
    assert hidden.grad is not None
    assert logits.grad is not None
    return logits.detach(), head, truth, hidden.grad, logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_noise_every_token_is_read(dtype: torch.dtype) -> None:
    logits, head, truth, hidden, direct = step()
    none = GradientNoise()
    assert tokens_from_logit_gradients(direct.to(dtype)).equal(truth)
    assert recover_tokens(hidden.to(dtype), logits, none, head=head, targets=N).equal(truth)
    assert recover_tokens(direct.to(dtype), logits, none, head=None, targets=N).equal(truth)


def test_clipping_alone_hides_nothing() -> None:
    logits, head, truth, hidden, _ = step()
    clip = float(hidden.norm(dim=1).median())
    clipped = hidden * (clip / hidden.norm(dim=1, keepdim=True)).clamp(max=1)
    noise = GradientNoise(clip=clip)
    assert recover_tokens(clipped, logits, noise, head=head, targets=N).equal(truth)


@pytest.mark.parametrize("law", ["gaussian", "dchi"])
@pytest.mark.parametrize("with_head", [True, False])
def test_the_posterior_is_bayes_rule(law: str, with_head: bool) -> None:
    logits, head, _, hidden, direct = step()
    rows = hidden if with_head else direct
    noise = GradientNoise(law, 0.01 if law == "gaussian" else 300.0, clip=0.02)
    found = torch.cat(
        list(log_posterior(rows, logits, noise, head=head if with_head else None, targets=N))
    )
    p = logits.softmax(1)
    candidates = (p[:, None, :] - torch.eye(V)[None]) / N  # (N, V, V)
    if with_head:
        candidates = candidates @ head  # (N, V, d)
    norms = candidates.norm(dim=2, keepdim=True)
    candidates = candidates * (0.02 / norms).clamp(max=1)
    distance = (rows[:, None] - candidates).norm(dim=2)
    density = -(distance**2) / (2 * 0.01**2) if law == "gaussian" else -300.0 * distance
    expected = (logits.log_softmax(1) + density).log_softmax(1)
    torch.testing.assert_close(found.log_softmax(1), expected, atol=2e-3, rtol=1e-3)


def test_endless_noise_leaves_the_guess() -> None:
    logits, head, _, hidden, _ = step()
    noise = GradientNoise("gaussian", 1e6)
    noisy = hidden + 1e6 * torch.randn_like(hidden)
    found = recover_tokens(noisy, logits, noise, head=head, targets=N)
    assert (found == logits.argmax(1)).float().mean() > 0.95


def test_bad_input_is_named() -> None:
    logits, head, _, hidden, _ = step()
    with pytest.raises(AttackError, match=r"gradients.shape=\(64, 23\): must be \(64, 24\)"):
        recover_tokens(hidden[:, 1:], logits, GradientNoise(), head=head, targets=N)
    with pytest.raises(AttackError, match=r"gradients.shape"):
        tokens_from_logit_gradients(torch.zeros(3))
    for bad in ({"law": "x"}, {"law": "gaussian"}, {"clip": 0.0}, {"clip": -math.inf}):
        with pytest.raises(Exception, match="must be"):
            GradientNoise(**bad)  # type: ignore[arg-type]
