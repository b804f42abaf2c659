"""Plans: which block plays which part, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.emulators.planning.plan import EmulatorPlan, ends
from fedsplit.errors import ConfigError

SCORES = [3.0, -1.0, 0.5, 0.5, -2.0, 1.0]


def test_high_scores_become_adapters_and_low_ones_harmonizers() -> None:
    plan = EmulatorPlan.from_scores(SCORES, 2, alpha=0.5, beta=0.3)
    assert plan.adapters == (0, 5)
    assert plan.having("harmonizer") == (1, 4)
    assert plan.having("compress") == (2, 3)
    assert (plan.alpha, plan.beta) == (0.5, 0.3)


def test_without_beta_the_rest_is_kept_as_it_is() -> None:
    plan = EmulatorPlan.from_scores(SCORES, 2, alpha=0.5)
    assert plan.having("keep") == (2, 3)
    assert plan.having("compress") == ()


def test_equal_scores_count_by_position() -> None:
    plan = EmulatorPlan.from_scores([0.0] * 4, 1, alpha=1 / 3)
    assert plan.roles == ("adapter", "keep", "keep", "harmonizer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_adapters": 0}, r"n_adapters=0: must be in 1\.\.6"),
        ({"n_adapters": 7}, r"n_adapters=7"),
        ({"n_adapters": True}, r"n_adapters=True"),
        ({"alpha": 1.5}, r"alpha=1\.5: must be in \[0, 1\]"),
        ({"alpha": float("nan")}, r"alpha=nan"),
        ({"beta": -0.1}, r"beta=-0\.1: must be in \[0, 1\]"),
        ({"beta": True}, r"beta=True"),
        ({"scores": [0.0, float("inf")]}, r"scores\[1\]=inf: must be finite"),
    ],
)
def test_out_of_range(changes: dict[str, object], message: str) -> None:
    settings = {"scores": SCORES, "n_adapters": 2} | changes
    with pytest.raises(ConfigError, match=message):
        EmulatorPlan.from_scores(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("roles", "source", "message"),
    [
        ((), (), "layers=0"),
        (("keep", "keep"), (), "adapters=0"),
        (("adapter", "gone"), (), r"roles\[1\]='gone'"),
        (("adapter", "share"), (0, 0), r"source\[1\]=0: must be a block kept"),
        (("adapter", "share"), (0, 7), r"source\[1\]=7"),
        (("adapter", "keep"), (0, 0), r"source\[1\]=0: must be 1"),
        (("adapter", "keep"), (0,), "source=1: must be 2 positions"),
    ],
)
def test_a_plan_that_contradicts_itself(
    roles: tuple[str, ...], source: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        EmulatorPlan(roles, source)


def test_adapter_positions_are_checked() -> None:
    with pytest.raises(ConfigError, match="distinct"):
        EmulatorPlan.with_adapters(4, [1, 1])
    with pytest.raises(ConfigError, match=r"adapter position=4: must be in 0\.\.3"):
        EmulatorPlan.with_adapters(4, [4])


def test_ends_are_offsite_tunings_adapters() -> None:
    assert ends(12, 2, 2) == (0, 1, 10, 11)
    assert ends(3, 0, 1) == (2,)
    with pytest.raises(ConfigError, match=r"first \+ last=5"):
        ends(4, 3, 2)


@given(
    st.lists(st.floats(-9, 9), min_size=1, max_size=20),
    st.integers(1, 20),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.4]),
)
def test_every_block_has_one_part_and_json_brings_it_back(
    scores: list[float], n_adapters: int, alpha: float, beta: float
) -> None:
    n_adapters = min(n_adapters, len(scores))
    plan = EmulatorPlan.from_scores(scores, n_adapters, alpha, beta)
    assert len(plan.adapters) == n_adapters
    kept = [scores[i] for i in plan.positions if plan.roles[i] in ("keep", "compress")]
    replaced = [scores[i] for i in plan.having("harmonizer")]
    assert min([*kept, 9]) >= max([*replaced, -9])
    assert EmulatorPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "change",
    [{"roles": "keep"}, {"roles": [1]}, {"source": [True]}, {"alpha": "1"}, {"more": 1}],
)
def test_hostile_json(change: dict[str, object]) -> None:
    value = EmulatorPlan(("adapter",)).to_json() | change
    with pytest.raises(ConfigError):
        EmulatorPlan.from_json(value)
