"""Noisy gradients of a language model: what arrives, and what the server makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.attacks.gradients.known_head import LinearHead
from fedsplit.attacks.gradients.token_recovery import GradientNoise, log_posterior, recover_tokens
from fedsplit.privacy.labels.row_noise import RowNoise
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.wire.codecs import decode_rows
from fedsplit.wire.frames import Kind, decode
from strategies.split_tuning.gradient_denoising import GradientDenoiser

D, V, N = 24, 50, 4000


def step(ratio: float, hidden_rows: bool = True) -> dict[str, Any]:
    """Return one owner's step: states, targets drawn from the prediction, clean and noisy rows."""
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(V, D, generator=generator)
    states = 0.3 * torch.randn(N, D, generator=generator)
    logits = states @ head.T
    truth = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    clean = logits.softmax(1) - functional.one_hot(truth, V)
    clean = clean @ head if hidden_rows else clean
    clip = float(clean.norm(dim=1).median())
    noise = RowNoise(ratio, clip)
    stream = OwnerSecret.for_simulation(0, "rows").stream("x")
    noisy = noise.perturb(clean / N, truth, 0.0, stream)
    sent, projection = (states, head) if hidden_rows else (logits, None)
    return {
        "noise": noise,
        "sent": sent,
        "logits": logits,
        "head": projection,
        "truth": truth,
        "clean": clean / N,
        "noisy": noisy,
    }


def test_noise_has_the_length_that_the_ratio_says() -> None:
    noise = RowNoise(8.0, 0.5)
    stream = OwnerSecret.for_simulation(0, "rows").stream("x")
    rows = torch.full((N, D), 1e6)
    sent = noise.perturb(rows, torch.zeros(N), 0.0, stream) * N
    clipped = 0.5 * functional.normalize(rows, dim=1)
    assert float((sent - clipped).norm(dim=1).mean()) == pytest.approx(8.0 * 0.5, rel=0.01)
    assert float((sent.mean(0) - clipped[0]).norm()) < 5 * noise.sigma(D) * (D / N) ** 0.5


def test_information_bounds_what_the_best_reader_gains() -> None:
    """Mutual information of row and token, from exact posteriors, is below the channel's bound."""
    for ratio in (2.0, 6.0):
        s = step(ratio)
        q = posterior(s)
        prior = s["logits"].log_softmax(1)
        at = torch.arange(N), s["truth"]
        gained = (q.log_softmax(1)[at] - prior[at]).double()
        error = float(gained.std()) / N**0.5
        assert float(gained.mean()) - 3 * error <= s["noise"].information(D)
        assert float(gained.mean()) > 0


def denoiser(s: dict[str, Any]) -> GradientDenoiser:
    known = None if s["head"] is None else LinearHead(s["head"], torch.zeros(V))
    return GradientDenoiser(s["noise"], known)


def posterior(s: dict[str, Any]) -> Tensor:
    blocks = log_posterior(s["noisy"], s["logits"], law(s), head=s["head"], targets=N)
    return torch.cat(list(blocks))


def law(s: dict[str, Any]) -> GradientNoise:
    width = s["noisy"].shape[1]
    return GradientNoise("gaussian", s["noise"].sigma(width) / N, s["noise"].gradient_clip / N)


@pytest.mark.parametrize("hidden_rows", [True, False])
@pytest.mark.parametrize("ratio", [2.0, 8.0, 1e4])
def test_estimates_are_nearer_to_the_clean_rows_and_unbiased(
    ratio: float, hidden_rows: bool
) -> None:
    """Targets are drawn from the prior: then the posterior mean is the best estimate there is."""
    s = step(ratio, hidden_rows)
    estimate = denoiser(s)(s["sent"], s["noisy"], N)
    clean = s["clean"]
    error = float((estimate - clean).square().sum())
    assert error < float((s["noisy"] - clean).square().sum())
    assert error <= 1.001 * float(clean.square().sum())  # no worse than to learn nothing
    if ratio < 1e3:  # E[estimate . (estimate - clean)] = 0
        overlap = (estimate * (estimate - clean)).sum(1)
        assert abs(float(overlap.mean())) < 4 * float(overlap.std()) / N**0.5
    else:
        assert float(estimate.norm()) < 0.1 * float(clean.norm())


def test_rows_that_predict_nothing_stay_zero() -> None:
    s = step(4.0)
    s["noisy"][7] = 0
    estimate = denoiser(s)(s["sent"], s["noisy"], N)
    assert not estimate[7].any()
    assert estimate[8].any()


def test_a_run_returns_noisy_rows_that_hide_the_tokens_and_still_learns(
    make_config: Any, run_locally: Any, tiny_llama: Path
) -> None:
    options = {
        "model__name": str(tiny_llama),
        "model__task": "causal-lm",
        "labels__protection": "client-head+row-noise",
        "labels__noise_ratio": 300.0,
        "train__method": "lora",
        "train__rounds": 1,
        "output__capture": True,
    }
    run = run_locally(make_config(**options))
    frames = [decode(data, 1 << 26) for data in run.captured()]
    rows = [
        decode_rows(f.body, tuple(f["shape"]), f["codec"]) for f in frames if f.kind is Kind.GRAD
    ]
    assert rows
    for sent in rows:
        targets = int((sent.abs().amax(1) > 0).sum())
        assert targets < len(sent), "the last token of a text predicts nothing"
        lengths = sent[sent.abs().amax(1) > 0].norm(dim=1) * targets
        assert float(lengths.mean()) == pytest.approx(300.0, rel=0.1)
    assert run.strategy.parts.model.denoise_gradients is not None


def test_the_strongest_reader_falls_to_the_guess_as_noise_grows() -> None:
    shares = []
    for ratio in (0.5, 4.0, 1e3):
        s = step(ratio)
        read = recover_tokens(s["noisy"], s["logits"], law(s), head=s["head"], targets=N)
        shares.append(float((read == s["truth"]).double().mean()))
    guess = float((s["logits"].argmax(1) == s["truth"]).double().mean())
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert abs(shares[-1] - guess) < 0.02
