"""Noise identity: one sample shows one draw for ever, any change of mechanism an unrelated one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy import DChi, NoNoise, OwnerSecret, SamplePerturber
from fedsplit.privacy.contributing_tokens import ContributingTokens

SECRET = OwnerSecret.for_simulation(0, "owner")
TABLE = torch.randn(256, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDS = torch.arange(100)


def tokens(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def perturber(eta: float = 2.0, representation: str = "bottom k=0", **options) -> SamplePerturber:
    return SamplePerturber(DChi(eta=eta), SECRET, representation, **options)


def noise(p: SamplePerturber, ids: Tensor, view: int = 0, text: bytes = b"") -> Tensor:
    return p.perturb(TABLE[ids], ids, view, text) - TABLE[ids]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=6))
def test_a_sample_never_shows_two_draws(texts: list[str]):
    """In any order, in any number of epochs, across restarts: the same bytes leave."""
    first = perturber()
    sent = {text: first.perturb(TABLE[tokens(text)], tokens(text)) for text in texts}

    restarted = perturber()
    for text in reversed(texts + texts):
        again = restarted.perturb(TABLE[tokens(text)], tokens(text))
        assert torch.equal(again, sent[text])


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_other_content_gets_other_noise(a: str, b: str):
    p = perturber()

    one, two = noise(p, tokens(a)), noise(p, tokens(b))

    assert torch.allclose(one[0], two[0]) == (a == b)


CHANGES = {
    "eta": (perturber(eta=1.0), 0),
    "view": (perturber(), 1),
    "secret": (
        SamplePerturber(DChi(eta=2.0), OwnerSecret.for_simulation(0, "other"), "bottom k=0"),
        0,
    ),
    "multipliers": (
        perturber(cti=ContributingTokens("tfidf", {0: [(3, 1.0)]}, 0.01, 0.01), rho=0.5),
        0,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_gives_an_independent_draw(change: str):
    other, view = CHANGES[change]

    a, b = noise(perturber(), IDS), noise(other, IDS, view)

    assert abs(cosine(a, b)) < 5 / np.sqrt(a.numel())


def test_rows_that_moved_by_one_bit_get_an_independent_draw():
    """Whatever moved them: with one noise on both, the server would hold their difference."""
    p, moved = perturber(), TABLE[IDS].clone()
    moved[7, 3] = torch.nextafter(moved[7, 3], torch.tensor(torch.inf, dtype=torch.float64))

    one, two = p.view(TABLE[IDS], IDS, b"text"), p.view(moved, IDS, b"text")

    assert one.noise != two.noise
    assert abs(cosine(one.rows - TABLE[IDS], two.rows - moved)) < 5 / np.sqrt(moved.numel())
    assert p.report()["views"] == 2


def test_equal_rows_of_a_text_keep_their_draw_whatever_made_them():
    """Another bottom's name, or other token ids for the same rows, buy no second draw."""
    one = perturber().view(TABLE[IDS], IDS, b"text")
    two = perturber(representation="bottom k=2").view(TABLE[IDS], IDS + 1, b"text")

    assert torch.equal(one.rows, two.rows)
    assert one.noise == two.noise


def test_two_texts_with_equal_rows_get_independent_draws():
    a, b = noise(perturber(), IDS, 0, b"one"), noise(perturber(), IDS, 0, b"two")

    assert abs(cosine(a, b)) < 5 / np.sqrt(a.numel())


def test_another_precision_gives_an_independent_draw():
    """h + n and bf16(h) + n would show how h was rounded, coordinate by coordinate."""
    n = noise(perturber(), IDS)

    coarse = perturber().perturb(TABLE[IDS].float(), IDS).double() - TABLE[IDS]

    assert abs(cosine(n, coarse)) < 5 / np.sqrt(n.numel())


def test_reusing_one_draw_under_two_etas_would_solve_for_the_text():
    """What the independence is for: h + n and h + 2n give h; ours do not."""
    h = TABLE[IDS]
    n = noise(perturber(eta=2.0), IDS)
    assert torch.allclose(2 * (h + n) - (h + 2 * n), h)

    solved = 2 * perturber(eta=2.0).perturb(h, IDS) - perturber(eta=1.0).perturb(h, IDS)

    assert float((solved - h).norm() / h.norm()) > 1.0


def test_equal_eta_of_another_type_is_the_same_mechanism():
    assert torch.equal(noise(perturber(eta=2), IDS), noise(perturber(eta=2.0), IDS))


def test_fresh_draws_would_average_away():
    """The error of the mean of v views falls by sqrt(v): why a view costs eta again."""
    p = perturber()

    one = noise(p, IDS)
    mean = torch.stack([noise(p, IDS, view) for view in range(16)]).mean(0)

    assert float(mean.norm() / one.norm()) == pytest.approx(0.25, rel=0.05)


def test_contributing_tokens_are_scaled_and_counted():
    cti = ContributingTokens("tfidf", {0: [(1, 1.0)], 1: [(2, 1.0)]}, 0.01, 0.01)
    p = perturber(cti=cti, rho=0.0)

    n = noise(p, torch.tensor([1, 5, 2, 6]))
    noise(p, torch.tensor([7, 8, 9, 10]))

    assert (n.norm(dim=1) == 0).tolist() == [True, False, True, False]
    assert p.share_touched == 0.25
    report = p.report()
    assert (report["tokens"], report["tokens_touched"], report["views"]) == (8, 2, 1)


def test_a_sample_without_contributing_tokens_keeps_its_draw():
    """Choosing other contributing tokens must not show untouched samples a second time."""
    cti = ContributingTokens("tfidf", {0: [(200, 1.0)]}, 0.01, 0.01)

    assert torch.equal(noise(perturber(cti=cti, rho=0.5), IDS), noise(perturber(), IDS))


def test_no_noise_sends_the_vectors():
    p = SamplePerturber(NoNoise(), SECRET, "r")

    assert torch.equal(p.perturb(TABLE[IDS], IDS), TABLE[IDS])


def test_misfits_are_refused():
    p = perturber()

    with pytest.raises(PrivacyError, match=r"must be \(T, d\) and \(T,\)"):
        p.perturb(TABLE[:3], torch.arange(4))
    with pytest.raises(PrivacyError, match=r"view=-1"):
        p.perturb(TABLE[:3], torch.arange(3), view=-1)
    with pytest.raises(ConfigError, match=r"rho=1\.5"):
        perturber(rho=1.5)
