"""What every row of MECHANISMS owes its users; a new row is tested without a new test."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from fedsplit.config import privacy as settings
from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy import MECHANISMS, Mechanism, OwnerSecret, SamplePerturber, build
from fedsplit.privacy.contributing_tokens import PUBLIC_STATISTICS, STATISTICS, ContributingTokens
from fedsplit.privacy.denoising.candidates import MatrixCandidates
from strategies.split_tuning.denoising import DENOISERS

PARAMS: dict[str, dict[str, Any]] = {
    "dchi": {"eta": 5.0},
    "gaussian": {"epsilon": 2.0, "delta": 1e-5, "clip": 3.0},
    "nearest-token": {
        "eta": 5.0,
        "candidates": MatrixCandidates(torch.randn(50, 16, generator=torch.Generator())),
    },
    "pac": {"budget": 3.0, "covariance": torch.eye(16)},
    "shaped": {
        "epsilon": 2.0,
        "delta": 1e-5,
        "clip": 3.0,
        "spare": 0.5,
        "directions": torch.eye(16)[:, :2],
    },
}
"""Parameters of rows that have no defaults for all of theirs."""

SECRET = OwnerSecret.for_simulation(0, "contract")
HIDDEN = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=sorted(MECHANISMS))
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    return build(request.param, **PARAMS.get(request.param, {}))


def test_shape_dtype_and_input_are_kept(mechanism: Mechanism):
    before = HIDDEN.clone()

    out = mechanism.privatise(HIDDEN, SECRET.stream("x"))

    assert out.shape == HIDDEN.shape
    assert out.dtype == HIDDEN.dtype
    assert torch.equal(HIDDEN, before)


def test_reproducible_from_the_secret(mechanism: Mechanism):
    a, b, c = (mechanism.privatise(HIDDEN, SECRET.stream(x)) for x in "aab")

    assert torch.equal(a, b)
    assert not mechanism.protects() or not torch.equal(a, c)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_what_is_not_finite(mechanism: Mechanism, bad: float):
    hidden = HIDDEN.clone()
    hidden[3, 2] = bad

    with pytest.raises(PrivacyError, match="1 NaN or infinite values: must be 0"):
        mechanism.privatise(hidden, SECRET.stream("x"))


@pytest.mark.parametrize("shape", [(9,), (2, 9, 16), (9, 0)])
def test_refuses_other_shapes(mechanism: Mechanism, shape: tuple[int, ...]):
    with pytest.raises(PrivacyError, match=r"hidden\.shape"):
        mechanism.privatise(torch.zeros(shape), SECRET.stream("x"))


@pytest.mark.parametrize("scale", [torch.ones(8), torch.full((9,), 1.5), torch.full((9,), -1.0)])
def test_refuses_other_multipliers(mechanism: Mechanism, scale: torch.Tensor):
    with pytest.raises(PrivacyError, match="scale"):
        mechanism.privatise(HIDDEN, SECRET.stream("x"), scale)


def test_integers_are_refused(mechanism: Mechanism):
    with pytest.raises(PrivacyError, match=r"hidden\.dtype"):
        mechanism.privatise(torch.zeros(2, 16, dtype=torch.int64), SECRET.stream("x"))


def test_an_empty_sample_is_fine(mechanism: Mechanism):
    assert mechanism.privatise(torch.zeros(0, 16), SECRET.stream("x")).shape == (0, 16)


def test_guarantee_is_in_words_and_grows_with_views(mechanism: Mechanism):
    assert len(mechanism.guarantee()) > 20
    once, twice = mechanism.per_token_epsilon(1.0), mechanism.per_token_epsilon(1.0, views=2)
    assert 0 < once <= twice
    assert mechanism.per_token_epsilon(0.0) == 0.0
    for misuse in (lambda: mechanism.guarantee(0), lambda: mechanism.per_token_epsilon(-1.0)):
        with pytest.raises(PrivacyError):
            misuse()


def test_description_names_the_mechanism_and_survives_json(mechanism: Mechanism):
    description = json.loads(json.dumps(mechanism.describe(), allow_nan=False))

    assert description["mechanism"] == mechanism.name
    assert MECHANISMS[mechanism.name] is type(mechanism)


def test_frozen(mechanism: Mechanism):
    with pytest.raises(AttributeError):
        mechanism.name = "x"  # type: ignore[misc]


def test_unknown_names_and_parameters_are_refused():
    with pytest.raises(ConfigError, match="mechanism='nope': must be one of"):
        build("nope")
    with pytest.raises(ConfigError, match="dchi parameter='epsilon'"):
        build("dchi", epsilon=1.0)
    with pytest.raises(ConfigError, match="eta"):
        build("dchi")


def test_settings_know_every_row_and_no_other():
    assert not STATISTICS.keys() & PUBLIC_STATISTICS.keys()
    assert set(settings.DENOISE) == {"off", *DENOISERS}
    fields = vars(settings.PrivacyConfig())
    for name, row in MECHANISMS.items():
        assert row.name == name
        assert row.protects() == (row.level is not None)
        assert row.level is None or row.level.setting in fields


def test_a_sample_never_shows_two_draws(mechanism: Mechanism):
    """Other epochs, other processes, other order, other samples between: the same bytes leave."""
    ids = torch.arange(9)
    cti = ContributingTokens("purity", {0: [(4, 1.0)]}, 0.1, 0.1)

    def owner() -> SamplePerturber:
        return SamplePerturber(mechanism, SECRET, "bottom:0", cti, 0.5)

    first = owner()
    sent = first.perturb(HIDDEN, ids)
    first.perturb(HIDDEN[:4], ids[:4])
    again = [first.perturb(HIDDEN, ids), owner().perturb(HIDDEN, ids)]

    assert all(torch.equal(sent, x) for x in again)
    if mechanism.protects():
        assert not torch.equal(sent, owner().perturb(HIDDEN, ids, view=1))


def test_other_parameters_draw_other_noise(mechanism: Mechanism):
    """One draw under two strengths would be solved for the text: see fedsplit.privacy.perturb."""
    if mechanism.level is None:
        return
    level = mechanism.level.setting
    params = PARAMS[mechanism.name]
    other = build(mechanism.name, **{**params, level: 2 * params[level]})

    a, b = (
        SamplePerturber(m, SECRET, "bottom:0").perturb(HIDDEN, torch.arange(9)) - HIDDEN
        for m in (mechanism, other)
    )

    # Text-to-text has no additive noise to compare: there it is enough that the identity differs.
    assert mechanism.describe() != other.describe()
    if mechanism.adds_noise:
        assert abs(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))) < 0.5
