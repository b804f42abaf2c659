"""The learned inverter: reads through blocks, adapts to announced noise, and is reproducible."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsplit.attacks import LearnedInversion, score_tokens
from fedsplit.attacks.inversion.learned import represent
from fedsplit.errors import AttackError
from fedsplit.models import load, probe, split
from fedsplit.privacy import DChi, OwnerSecret, eta_from_ratio
from tests.tiny_models import save_tiny_bert

G = torch.Generator().manual_seed(5)
V = 94


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A bottom of two blocks, public and private texts, and what the latter look like there."""
    loaded = load(
        save_tiny_bert(tmp_path_factory.mktemp("bert")), "sequence-classification", num_labels=3
    )
    bottom = split(loaded.model, 2)[0].eval()
    zipf = 1.0 / torch.arange(1, V + 1)

    def texts(n: int) -> list[Tensor]:
        sizes = torch.randint(3, 12, (n,), generator=G).tolist()
        return [torch.multinomial(zipf, s, replacement=True, generator=G) for s in sizes]

    public, private = texts(400), texts(40)
    table = probe(bottom.model).input_embeddings.weight.detach()
    return represent(bottom, public), public, represent(bottom, private), private, table


def test_blocks_do_not_hide_the_text(world):
    seen, public, received, private, table = world

    result = score_tokens(
        "learned", LearnedInversion(steps=60).invert(received, seen, public, table), private
    )

    assert result.success > 0.9
    assert result.success > result.baseline + 0.3
    assert result.top10 >= result.success


def test_knowing_the_noise_helps(world):
    seen, public, clean, private, table = world
    norm = float(torch.cat(clean).norm(dim=1).median())
    mechanism = DChi(eta_from_ratio(1.5, clean[0].shape[1], norm))
    secret = OwnerSecret.for_simulation(0, "owner")
    received = [mechanism.privatise(x, secret.stream(i)) for i, x in enumerate(clean)]
    attack = LearnedInversion(steps=60)

    naive, informed = (
        score_tokens("learned", attack.invert(received, seen, public, table, law), private)
        for law in (None, mechanism)
    )

    assert informed.success > naive.success
    assert informed.success > informed.baseline


def test_same_seed_same_guesses(world):
    seen, public, received, _, table = world
    attack = LearnedInversion(steps=3)

    first, second = (attack.invert(received, seen, public, table) for _ in range(2))

    assert all(torch.equal(a, b) for a, b in zip(first.top, second.top, strict=True))


def test_misfits_are_refused(world):
    seen, public, received, _, table = world
    with pytest.raises(AttackError, match="public=0"):
        LearnedInversion().invert(received, [], [], table)
    with pytest.raises(AttackError, match=r"public\[0\]"):
        LearnedInversion().invert(received, [seen[0][:1]], [public[0]], table)
    with pytest.raises(AttackError, match="must be"):
        LearnedInversion(steps=0).invert([torch.zeros(2, 3)], seen, public, table)
