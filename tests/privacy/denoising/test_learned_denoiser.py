"""The learned denoiser: nearer to the clean vectors than what it is given, and kept by digest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy import DChi, OwnerSecret
from fedsplit.privacy.denoising.learned import Recipe, TrainingPairs, cached, train_denoiser
from fedsplit.privacy.denoising.posterior import Touched

V, D = 40, 12
RECIPE = Recipe(width=32, blocks=1, heads=2, steps=120, batch=16, lr=3e-3, max_tokens=8)
G = torch.Generator().manual_seed(0)
TEXTS = [torch.randint(0, V, (8,), generator=G).tolist() for _ in range(60)]


class Mixing(nn.Module):
    """A bottom with context: no candidate set."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(V, D)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.words(ids)
        return h + 0.5 * h.roll(1, dims=1)


def noisy(bottom: nn.Module, mechanism: DChi, n: int = 40) -> tuple[Tensor, list[Tensor]]:
    secret = OwnerSecret.for_simulation(1, "received")
    ids = torch.randint(0, V, (n, 6), generator=G)
    with torch.no_grad():
        clean = bottom(ids, torch.ones_like(ids))
    return clean, [mechanism.privatise(x, secret.stream(i)) for i, x in enumerate(clean)]


@pytest.fixture(scope="module")
def material() -> tuple[Mixing, DChi, TrainingPairs]:
    bottom, mechanism = Mixing().eval(), DChi(eta=3.0)
    return bottom, mechanism, TrainingPairs(bottom, mechanism, TEXTS, Touched(0.1, 0.2), RECIPE)


def test_error_falls_below_that_of_the_noise_and_of_any_rescaling(material):
    bottom, mechanism, practice = material
    clean, received = noisy(bottom, mechanism)
    x = torch.stack(received)

    denoiser = train_denoiser(practice, RECIPE)
    found = torch.stack(denoiser(received))

    def error(y: Tensor) -> float:
        return float((y - clean).square().mean())

    best_scale = float((x * clean).sum() / x.square().sum())
    assert error(found) < 0.9 * error(best_scale * x) < error(x)
    assert 0 < denoiser.facts["unexplained"] < 0.9
    assert [y.shape for y in denoiser([x[0], x[1, :2]])] == [(6, D), (2, D)]


def test_longer_texts_go_through_in_pieces(material):
    _, _, practice = material
    denoiser = train_denoiser(practice, Recipe(**{**RECIPE.__dict__, "steps": 2}))

    assert denoiser([torch.zeros(19, D)])[0].shape == (19, D)


def test_kept_by_identity_and_read_back_bit_for_bit(material, tmp_path: Path):
    _, _, practice = material
    recipe = Recipe(**{**RECIPE.__dict__, "steps": 3})
    x = [torch.randn(5, D, generator=G)]
    made: list[int] = []

    def make() -> TrainingPairs:
        made.append(1)
        return practice

    first = cached(tmp_path, {"mechanism": "a"}, recipe, make)
    again = cached(tmp_path, {"mechanism": "a"}, recipe, make)
    other = cached(tmp_path, {"mechanism": "b"}, recipe, make)

    assert torch.equal(first(x)[0], again(x)[0])
    assert len(made) == 2
    assert again.facts["from_cache"]
    assert "from_cache" not in other.facts
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_that_cannot_be_written_does_not_end_the_run(material, tmp_path: Path):
    _, _, practice = material
    recipe = Recipe(**{**RECIPE.__dict__, "steps": 2})
    (tmp_path / "file").write_text("no folder")

    found = cached(tmp_path / "file" / "cache", {}, recipe, lambda: practice)

    assert found([torch.zeros(3, D)])[0].shape == (3, D)


def test_same_seed_same_network(material):
    bottom, mechanism, _ = material
    recipe = Recipe(**{**RECIPE.__dict__, "steps": 3})
    x = [torch.randn(5, D, generator=G)]
    state = torch.random.get_rng_state()

    a, b = (
        train_denoiser(TrainingPairs(bottom, mechanism, TEXTS, None, recipe), recipe)(x)[0]
        for _ in range(2)
    )

    assert torch.equal(a, b)
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's randomness is its own


def test_misuse_is_refused(material):
    bottom, mechanism, _ = material
    with pytest.raises(ConfigError, match="width=33: must be a multiple of 2"):
        Recipe(width=33, heads=2)
    with pytest.raises(PrivacyError, match="public texts=0"):
        TrainingPairs(bottom, mechanism, [[]], None, RECIPE)
