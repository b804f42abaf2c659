"""Noise that spares directions: how much lies where, what it promises, and what it buys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsplit.config import PrivacyConfig
from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy import Mechanism, OwnerSecret, build, build_mechanism
from fedsplit.privacy.denoising.candidates import MatrixCandidates
from fedsplit.privacy.denoising.posterior import posterior_search
from fedsplit.privacy.mechanisms.gaussian import gaussian_delta

V, D = 400, 32
SECRET = OwnerSecret.for_simulation(0, "shaped")
GOOD, BAD = range(100, 140), range(200, 240)
SETTINGS: dict[str, Any] = {
    "mechanism": "shaped",
    "row_clip": "auto",
    "task_words": " ".join(map(str, GOOD[:20])) + " | " + " ".join(map(str, BAD[:20])),
}


class Polar(nn.Module):
    """Words at random, but for one direction that tells the good from the bad."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
        self.rows[:, 3] *= 0.3
        self.rows[list(GOOD), 3] = 2.0
        self.rows[list(BAD), 3] = -2.0
        self.hidden_size, self.k, self.vocab = D, 0, V

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.rows[ids]


class Numbers:
    """A tokenizer whose words are the ids themselves, between two special tokens."""

    all_special_ids = (0, 1)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [0, *map(int, text.split()), 1]}


def made(**options: Any) -> Any:
    config = PrivacyConfig(**{**SETTINGS, **options})
    return build_mechanism(config, Polar(), V, Numbers())


def sent(mechanism: Mechanism, ids: Tensor) -> Tensor:
    return mechanism.privatise_sample(Polar().rows[ids], ids, SECRET.stream("s"))


def test_the_direction_is_what_tells_the_groups_apart() -> None:
    u = made(noise_ratio=1.0).directions

    assert u.shape == (D, 1)
    assert abs(float(u[3, 0])) > 0.9
    three = made(noise_ratio=1.0, task_words=SETTINGS["task_words"] + " | 300 301 302")
    assert three.directions.shape == (D, 2)


@pytest.mark.parametrize("spare", [0.2, 1.0])
def test_noise_is_less_along_the_spared_directions_alone(spare: float) -> None:
    u = torch.linalg.qr(torch.randn(16, 2, generator=torch.Generator().manual_seed(1)))[0]
    mechanism = build("shaped", epsilon=3.0, delta=1e-5, clip=2.0, spare=spare, directions=u)

    noise = mechanism.privatise(torch.zeros(20_000, 16), SECRET.stream("n")).double()

    along = noise @ u.double()
    across = noise - along @ u.double().T
    assert along.std() == pytest.approx(mechanism.sigma, rel=0.02)
    assert across.square().sum(1).mean().sqrt() == pytest.approx(
        14**0.5 * mechanism.sigma / spare, rel=0.02
    )
    white = torch.cov((noise @ mechanism.whitener()).T) / mechanism.sigma**2
    assert torch.allclose(white, torch.eye(16, dtype=white.dtype), atol=0.05)


def test_epsilon_is_that_of_the_worst_pair_of_rows() -> None:
    """Exactly delta for rows 2 clip apart along a spared direction, less for all others."""
    u = torch.eye(16)[:, :1]
    mechanism = build("shaped", epsilon=3.0, delta=1e-4, clip=2.0, spare=0.25, directions=u)

    noise = mechanism.privatise(torch.zeros(40_000, 16), SECRET.stream("n"))

    assert gaussian_delta(3.0, float(noise[:, 0].std()) / 4.0) == pytest.approx(1e-4, rel=0.2)
    assert gaussian_delta(3.0, float(noise[:, 5].std()) / 4.0) < 1e-8


def test_a_ratio_is_that_of_the_spared_directions() -> None:
    """The server chooses the bottom and the words, so the weakest noise is what a policy bounds."""
    mechanism = made(noise_ratio=2.0, spare=0.25)
    flat = made(noise_ratio=2.0, mechanism="gaussian")

    assert mechanism.noise_ratio(Polar(), V) == pytest.approx(2.0, rel=2e-3)
    assert mechanism.sigma == flat.sigma
    noise = sent(mechanism, torch.arange(2, V)) - Polar().rows[2:]
    assert float(noise.norm(dim=1).mean()) > 3.5 * 2.0 * mechanism.row_clip


def test_it_keeps_the_task_and_hides_the_words() -> None:
    """Beside isotropic noise that hides as many words, the spared direction tells the groups."""
    ids = torch.tensor([*GOOD, *BAD] * 10)
    truth = torch.tensor([1.0] * 40 + [-1.0] * 40).repeat(10)
    shaped, flat = made(noise_ratio=1.0, spare=0.25), made(noise_ratio=3.0, mechanism="gaussian")
    candidates = MatrixCandidates(Polar().rows)
    read, told = [], []

    for mechanism in (shaped, flat):
        rows = sent(mechanism, ids)
        best, _ = posterior_search([rows], candidates, mechanism, 1)
        read.append(float((best[0][:, 0] == ids).float().mean()))
        told.append(float((rows[:, 3].sign() == truth).float().mean()))

    assert read[0] < read[1] + 0.05 < 0.5
    assert told[0] > told[1] + 0.1


def test_another_direction_is_another_noise() -> None:
    given: dict[str, Any] = {"epsilon": 3.0, "delta": 1e-5, "clip": 2.0, "spare": 0.5}
    one, other = (build("shaped", **given, directions=torch.eye(16)[:, i : i + 1]) for i in (0, 1))

    assert one.describe() != other.describe()


@pytest.mark.parametrize("words", ["", "good fine", "good | ", " | bad"])
def test_groups_are_asked_for(words: str) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.task-words"):
        made(noise_ratio=1.0, task_words=words)


def test_rows_must_be_clipped() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.row-clip='off'"):
        made(noise_ratio=1.0, row_clip="off")


def test_words_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(PrivacyError, match="must differ"):
        made(noise_ratio=1.0, task_words="5 6 | 5 6")
    with pytest.raises(PrivacyError, match="must be a word"):
        made(noise_ratio=1.0, task_words="5 6 | 1")
    with pytest.raises(PrivacyError, match="tokenizer"):
        build_mechanism(PrivacyConfig(**SETTINGS, noise_ratio=1.0), Polar(), V)


def test_columns_must_be_orthonormal() -> None:
    for bad in (torch.ones(16, 1), torch.ones(16), torch.zeros(16, 0)):
        with pytest.raises(ConfigError, match="directions"):
            build("shaped", epsilon=1.0, delta=1e-5, clip=1.0, spare=0.5, directions=bad)
    with pytest.raises(ConfigError, match="spare"):
        PrivacyConfig(spare=0.0)
