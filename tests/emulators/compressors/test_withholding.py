"""An emulator that withholds: the margin it was made for, and what an owner is not told."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsplit.attacks.extraction.attack import Extraction
from fedsplit.emulators import Material
from fedsplit.emulators.build import Emulator
from fedsplit.emulators.compressors.withholding import CLOSE, Withholding
from fedsplit.emulators.lm import mean_loss
from fedsplit.errors import ConfigError
from fedsplit.models.anatomy import probe
from tests.emulators.emulator_families import tiny, tokens

A = (0, 3)
TEXT = Material(tokens=tokens())
MADE = Withholding(A, margin=0.2, rank=4, secret=1)


def _head(model: Any) -> torch.Tensor:
    weight: torch.Tensor = probe(model).output_embeddings.weight.detach()
    return weight


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma3"])
@pytest.mark.parametrize("margin", [0.05, 0.5])
def test_the_untuned_emulator_loses_the_margin(name: str, margin: float) -> None:
    model = tiny(name)
    emulator = replace(MADE, margin=margin).build(model, TEXT)
    lost = mean_loss(emulator.model, tokens()) - mean_loss(model, tokens())
    assert lost == pytest.approx(margin, rel=CLOSE + 0.01)
    assert emulator.details["reached"] == pytest.approx(lost, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_the_noise_is_of_its_rank_and_nowhere_else(name: str) -> None:
    model = tiny(name)
    emulator = MADE.build(model, TEXT)
    noise = _head(emulator.model) - _head(model)
    assert torch.linalg.matrix_rank(noise, rtol=1e-3) == MADE.rank
    base = dict(model.named_parameters())
    changed = {n for n, p in emulator.model.named_parameters() if not torch.equal(p, base[n])}
    assert changed == set(emulator.details["changed"])
    assert len(changed) == 1


def test_the_secret_is_not_in_the_emulator_and_a_new_one_is_drawn_for_each() -> None:
    model = tiny()
    marked = replace(MADE, secret=123_456_789).build(model, TEXT)
    assert "123456789" not in json.dumps(marked.details)
    assert "secret" not in marked.details["settings"]

    drawn = replace(MADE, secret=None)
    one, other = drawn.build(model, TEXT), drawn.build(model, TEXT)
    assert not torch.equal(_head(one.model), _head(other.model))
    again, same = MADE.build(model, TEXT), MADE.build(model, TEXT)
    assert torch.equal(_head(again.model), _head(same.model))
    # Every bit of a secret counts: 32 of them could all be tried.
    other = replace(MADE, secret=1 + 2**128).build(model, TEXT)
    assert not torch.allclose(_head(again.model), _head(other.model))


def test_every_draw_of_the_noise_costs_the_margin() -> None:
    model = tiny()
    one_word = replace(TEXT, tokens=torch.full_like(TEXT.needed_tokens("x"), 7))
    for secret in range(12):
        emulator = replace(MADE, secret=secret).build(model, one_word)
        assert emulator.details["reached"] == pytest.approx(MADE.margin, rel=0.05)


def test_an_attacker_trains_the_changed_head_too() -> None:
    model = tiny("llama-tied")
    emulator = MADE.build(model, TEXT)

    def trained(given: Emulator) -> bool:
        attack = Extraction(steps=2, batch_size=4, queries=True)
        after = attack.train(given, tokens(seed=3), teacher=model)
        return not torch.equal(_head(after), _head(given.model))

    assert trained(emulator)
    assert not trained(replace(emulator, details={}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"margin": -0.1}, "margin=-0.1: must be >= 0"),
        ({"margin": float("nan")}, "margin=nan"),
        ({"rank": 0}, "rank=0"),
        ({"beta": 1.5}, "beta=1.5"),
        ({"calibration": 0}, "calibration=0"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(MADE, **change)
