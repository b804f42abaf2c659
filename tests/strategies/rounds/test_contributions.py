"""What one owner can do to an average, at most; and Flower's robust rules underneath."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, Strategy
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.config import LineageConfig, RobustConfig, RunConfig
from fedsplit.config.offsite import OffsiteConfig
from fedsplit.config.robust import AVERAGINGS
from fedsplit.wire.messages import WEIGHTS, weights_record
from strategies.rounds.aggregate import average_owners
from strategies.rounds.averaging import adds_noise, make_averaging, set_current_arrays
from strategies.rounds.contributions import (
    bound_contributions,
    capped,
    find_opposed,
    likeness_weights,
)
from strategies.rounds.lineage_watch import LineageWatch

SIZE = (40, 50)
START = {"a": 100 * np.ones(SIZE, np.float32), "b": np.linspace(-1, 1, 500, dtype=np.float32)}
Change = dict[str, np.ndarray]


def honest(count: int, seed: int = 0, shared: float = 0.4) -> list[Change]:
    """Changes of norm about 1 whose directions agree a little, as of owners with other texts."""
    generator = np.random.default_rng(seed)

    def draw() -> Change:
        drawn = {n: generator.normal(size=v.shape) for n, v in START.items()}
        return {n: d / 50 for n, d in drawn.items()}  # 2,500 weights

    common = draw()
    return [
        {n: shared * common[n] + (1 - shared**2) ** 0.5 * d for n, d in draw().items()}
        for _ in range(count)
    ]


def times(change: Change, factor: float) -> Change:
    return {n: factor * c for n, c in change.items()}


def reply(node: int, change: Change, targets: float = 100.0) -> Message:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    asked = Message(RecordDict(), dst_node_id=node, message_type="train")
    asked.metadata.__dict__["_message_id"] = "m"
    sent = {n: (START[n] + c).astype(np.float32) for n, c in change.items()}
    metrics = MetricRecord({"targets": targets, "num-examples": 7})
    made = Message(RecordDict({WEIGHTS: weights_record(sent), "m": metrics}), reply_to=asked)
    made.metadata.__dict__["_src_node_id"] = node
    return made


def averaged(
    replies: list[Message], averaging: Strategy | None = None, robust: RobustConfig | None = None
) -> tuple[Change | None, dict[str, Any]]:
    """Return (the round's mean change, its row) for the owners o0, o1 ..."""
    watch = LineageWatch(LineageConfig(gate="off"), None)
    row = watch.open_round(1)
    names = {m.metadata.src_node_id: f"o{m.metadata.src_node_id}" for m in replies}
    start: ArrayRecord = weights_record(dict(START))
    averaging = averaging or make_averaging(RunConfig())
    set_current_arrays(averaging, start)
    robust = robust or RobustConfig()
    found = average_owners(watch, row, replies, names, averaging, start, robust)
    if found is None:
        return None, row
    return {n: a.numpy() - START[n] for n, a in found.items()}, row


def norm(change: Change, other: Change | None = None) -> float:
    away = {n: c - (0 if other is None else other[n]) for n, c in change.items()}
    return float(np.sqrt(sum(float((c.astype(np.float64) ** 2).sum()) for c in away.values())))


def mean(changes: list[Change]) -> Change:
    return {n: np.mean([c[n] for c in changes], axis=0) for n in START}


def test_one_of_four_that_claims_every_target_gets_a_capped_share() -> None:
    changes = honest(4)
    greedy = [reply(i, c, 1e29 if i == 3 else 100.0) for i, c in enumerate(changes)]
    found, row = averaged(greedy)
    assert found is not None
    share = 2 / 5  # twice the median, of three honest owners and itself
    expected = {n: share * changes[3][n] + (1 - share) * mean(changes[:3])[n] for n in START}
    assert norm(found, expected) < 1e-3
    assert list(row["charged"]) == ["o3"]
    assert "1e+27 times the round's median" in row["charged"]["o3"]


@pytest.mark.parametrize("factor", [30.0, -4000.0, 1e20])
def test_a_scaled_change_moves_the_mean_by_a_bounded_step(factor: float) -> None:
    changes = honest(5)
    replies = [reply(i, times(c, factor if i == 2 else 1.0)) for i, c in enumerate(changes)]
    found, row = averaged(replies)
    assert found is not None
    others = mean([c for i, c in enumerate(changes) if i != 2])
    assert norm(found, others) <= 2 * 2 / 6 * 1.2  # f cap clip / (n - f + f cap), norms about 1
    assert list(row["charged"]) == ["o2"]


@pytest.mark.parametrize("colluders", [1, 2, 3])
def test_colluders_that_go_the_other_way_are_left_out_and_named(colluders: int) -> None:
    changes = honest(10, shared=0.5)
    replies = [reply(i, times(c, -1.0 if i < colluders else 1.0)) for i, c in enumerate(changes)]
    found, row = averaged(replies)
    assert found is not None
    assert norm(found, mean(changes[colluders:])) < 1e-3
    assert sorted(row["charged"]) == [f"o{i}" for i in range(colluders)]
    assert "points against the others'" in row["charged"]["o0"]
    all_in = averaged(replies, robust=RobustConfig(screen=False))[0]
    assert all_in is not None
    assert norm(all_in, mean(changes[colluders:])) > 0.1


@pytest.mark.parametrize("shared", [0.0, 0.1, 0.4, 0.99])
def test_honest_rounds_charge_nobody_and_change_nothing(shared: float) -> None:
    for seed in range(6):
        changes = honest(10, seed, shared)
        found, row = averaged([reply(i, c) for i, c in enumerate(changes)])
        assert found is not None
        assert row["charged"] == {}
        assert norm(found, mean(changes)) < 1e-3  # float32 of weights around 100
        assert all(part["share"] == 1.0 for part in row["contributions"].values())


@pytest.mark.parametrize("owners", [4, 5, 10, 30])
def test_directions_of_honest_owners_raise_no_alarm(owners: int) -> None:
    generator = np.random.default_rng(owners)
    for shared in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8):
        for _ in range(250):
            common, own = generator.normal(size=300), generator.normal(size=(owners, 300))
            units = shared * common + (1 - shared**2) ** 0.5 * own
            units /= np.linalg.norm(units, axis=1, keepdims=True)
            others = units.sum(0) - units
            cosines = (units * others).sum(1) / np.linalg.norm(others, axis=1)
            assert not find_opposed({str(i): float(c) for i, c in enumerate(cosines)}, 300)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("colluders", [2, 3])
def test_colluders_of_one_direction_weigh_together_as_about_one(
    colluders: int, noise: float
) -> None:
    changes = honest(10, shared=0.5)
    (aim,) = honest(1, seed=9)
    for i, own in enumerate(honest(colluders, seed=10, shared=0.0)):
        changes[i] = {n: aim[n] + noise * own[n] for n in START}
    found, row = averaged([reply(i, c) for i, c in enumerate(changes)])
    assert found is not None
    assert row["charged"] == {}, "honest owners may have the same texts: nobody is blamed for it"
    parts = row["contributions"]
    assert {name for name in parts if "alike" in parts[name]} == {f"o{i}" for i in range(colluders)}
    together = sum(parts[f"o{i}"]["weighed"] for i in range(colluders))
    assert 80.0 < together < 140.0, "an owner weighs 100"
    others, plain = mean(changes[colluders:]), mean(changes)
    assert norm(found, others) < 0.65 * norm(plain, others)


def test_other_rules_keep_more_of_what_colluders_have_in_common() -> None:
    """Three of ten with one aim, in honest norm: the part of their own direction in the average."""
    changes = honest(10, shared=0.4)
    (aim,) = honest(1, seed=9)
    for i, own in enumerate(honest(3, seed=10, shared=0.0)):
        changes[i] = {n: 0.95 * aim[n] + 0.3 * own[n] for n in START}
    off = RobustConfig(clip=0.0, screen=False, malicious=3)
    rules: dict[str, tuple[str, RobustConfig]] = {
        "mean": ("fedavg", off),
        "mean, norms at the median": ("fedavg", RobustConfig(clip=1.0, screen=False)),
        "median": ("fedmedian", off),
        "trimmed mean": ("fedtrimmedavg", off),
        "likeness": ("fedavg", RobustConfig()),
    }
    kept = {}
    for name, (rule, robust) in rules.items():
        made = make_averaging(RunConfig.from_flat({"split.averaging": rule, "robust.malicious": 3}))
        found, _ = averaged([reply(i, c) for i, c in enumerate(changes)], made, robust)
        assert found is not None
        along = sum(float((found[n] * aim[n]).sum()) for n in START)
        kept[name] = along / norm(aim) ** 2
    print({name: round(share, 3) for name, share in kept.items()})
    assert kept["likeness"] < 0.5 * kept["mean"]
    assert all(kept[name] > 0.9 * kept["mean"] for name in rules if name != "likeness")


def test_honest_owners_of_like_texts_lose_little_and_are_not_blamed() -> None:
    changes = honest(10, shared=0.4)
    pair = honest(2, seed=7, shared=0.8)  # of the same texts
    own = {n: 0.9 * pair[0][n] + 0.4 * changes[0][n] for n in START}
    changes[0], changes[1] = own, {n: 0.6 * own[n] + 0.8 * pair[1][n] for n in START}
    row = averaged([reply(i, c) for i, c in enumerate(changes)])[1]
    assert row["charged"] == {}
    assert all(part["share"] == 1.0 for part in row["contributions"].values())
    assert min(part["weighed"] for part in row["contributions"].values()) > 50.0


def cosines(rows: np.ndarray) -> np.ndarray:
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return units @ units.T


@pytest.mark.parametrize("owners", [5, 10, 30])
def test_honest_changes_are_hardly_ever_too_much_alike(owners: int) -> None:
    generator = np.random.default_rng(owners)
    names, weighed = [str(i) for i in range(owners)], 0
    for shared in (0.0, 0.2, 0.4, 0.8):
        for _ in range(100):
            common, own = generator.normal(size=2000), generator.normal(size=(owners, 2000))
            rows = shared * common + (1 - shared**2) ** 0.5 * own
            weighed += bool(likeness_weights(names, cosines(rows), 2000))
    assert weighed <= 2, "of 400 rounds, and nobody is blamed then either"


def test_groups_of_owners_of_equal_size_weigh_the_same() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat(generator.normal(size=(5, 3000)), 2, axis=0)  # five authors, two owners each
    rows = 0.6 * groups + 0.8 * generator.normal(size=(10, 3000))
    found = likeness_weights([str(i) for i in range(10)], cosines(rows), 3000)
    assert len(found) == 10
    assert max(found.values()) - min(found.values()) < 0.05
    # Most owners are of one kind: they are the measure, and the few others are no more alike.
    common = np.concatenate([np.repeat(groups[:1], 7, axis=0), np.repeat(groups[2:3], 3, axis=0)])
    rows = 0.6 * common + 0.8 * generator.normal(size=(10, 3000))
    assert not likeness_weights([str(i) for i in range(10)], cosines(rows), 3000)


def test_a_copy_of_the_rounds_mean_weighs_less_and_leaves_the_others_equal() -> None:
    changes = honest(10, shared=0.4)
    changes[0] = mean(changes[1:])
    row = averaged([reply(i, c) for i, c in enumerate(changes)])[1]
    weights = {name: part["weighed"] for name, part in row["contributions"].items()}
    others = [weight for name, weight in weights.items() if name != "o0"]
    assert weights["o0"] < min(others)
    assert max(others) < 1.1 * min(others)


def test_a_direction_is_the_cosine_with_the_sum_of_the_others() -> None:
    changes = [times(c, 3.0**i) for i, c in enumerate(honest(6, shared=0.5))]
    replies = {f"o{i}": reply(i, c) for i, c in enumerate(changes)}
    found = bound_contributions(replies, START, RobustConfig())
    sent = [
        np.concatenate([((START[n] + c[n]).astype(np.float32) - START[n]).ravel() for n in START])
        for c in changes
    ]
    units = [c / np.linalg.norm(c.astype(np.float64)) for c in sent]
    for i, own in enumerate(units):
        others = np.sum(units, axis=0) - own
        expected = float(own @ others / np.linalg.norm(others))
        assert found[f"o{i}"].agreement == pytest.approx(expected, abs=1e-5)
    off = bound_contributions(replies, START, RobustConfig(screen=False))
    assert all(part.agreement is None for part in off.values()), "not judged, not computed"


def test_few_owners_are_bounded_and_nobody_is_blamed() -> None:
    changes = honest(2)
    found, row = averaged([reply(0, changes[0]), reply(1, times(changes[1], 1e9), 1e9)])
    assert found is not None
    assert row["charged"] == {}
    assert row["contributions"]["o1"]["weighed"] == 200.0
    quiet, _ = averaged([reply(0, changes[0]), reply(1, times(changes[1], 0.0))])
    assert quiet is not None
    assert norm(quiet, times(changes[0], 0.5)) < 1e-3, "an owner that learns nothing stops nobody"


def test_counts_are_capped_by_what_most_owners_have() -> None:
    assert capped({"a": 1.0, "b": 3.0, "c": 9.0}, 2.0) == {"a": 1.0, "b": 3.0, "c": 6.0}
    assert capped({"a": 1.0, "b": 3.0, "c": 9.0}, 0.0) == {"a": 1.0, "b": 3.0, "c": 9.0}
    assert capped({}, 2.0) == {}


def test_off_means_as_it_came() -> None:
    off = RobustConfig(clip=0.0, weight_cap=0.0, screen=False)
    changes = honest(4)
    found, _ = averaged(
        [reply(i, c, 1e6 if i == 1 else 1e-6) for i, c in enumerate(changes)], None, off
    )
    assert found is not None
    assert norm(found, changes[1]) < 1e-3


NEEDED = {"fedmedian": 7, "fedtrimmedavg": 7, "krum": 7, "multikrum": 7, "bulyan": 11}


@pytest.mark.parametrize("rule", NEEDED)
def test_flowers_robust_rules_hold_against_two_liars_by_themselves(rule: str) -> None:
    config = RunConfig.from_flat({"split.averaging": rule, "robust.malicious": 2})
    off = RobustConfig(clip=0.0, weight_cap=0.0, screen=False, malicious=2)
    changes = honest(NEEDED[rule], shared=0.8)
    replies = [
        reply(i, times(c, 1.0 if i > 1 else -1e4), 1.0 if i > 1 else 1e29)
        for i, c in enumerate(changes)
    ]
    found, _ = averaged(replies, make_averaging(config), off)
    assert found is not None
    assert all(v.dtype == np.float32 for v in found.values())
    away = norm(found, mean(changes[2:]))
    assert away < (1.0 if rule == "krum" else 0.65)  # Krum takes one owner's change as it is
    plain, _ = averaged(
        [reply(i, times(c, 1.0 if i > 1 else -1e4)) for i, c in enumerate(changes)],
        make_averaging(RunConfig()),
        off,
    )
    assert plain is not None
    assert norm(plain, mean(changes[2:])) > 1e3


def test_distances_are_those_of_the_changes_not_of_the_weights() -> None:
    """Weights of norm 4,000 and changes of 1e-2: in float32 nothing of a distance is left."""
    config = RunConfig.from_flat({"split.averaging": "krum", "robust.malicious": 1})
    off = RobustConfig(clip=0.0, screen=False)
    changes = [times(c, 1e-2) for c in honest(5, shared=0.95)]
    changes[4] = times(changes[4], -3.0)
    for turned in range(5):  # whoever comes first
        order = changes[turned:] + changes[:turned]
        found, _ = averaged([reply(i, c) for i, c in enumerate(order)], make_averaging(config), off)
        assert found is not None
        assert norm(found, mean(changes[:4])) < 0.6 * norm(changes[0])


@pytest.mark.parametrize("rule", ["fedtrimmedavg", "krum", "multikrum", "bulyan"])
def test_a_round_with_too_few_owners_for_the_rule_changes_nothing(rule: str) -> None:
    config = RunConfig.from_flat({"split.averaging": rule, "robust.malicious": 2})
    found, row = averaged(
        [reply(i, c) for i, c in enumerate(honest(NEEDED[rule] - 3))], make_averaging(config)
    )
    assert found is None
    assert "robust.malicious" in row["note"]


def test_every_rule_of_the_settings_is_made() -> None:
    for name in AVERAGINGS:
        assert make_averaging(RunConfig.from_flat({"split.averaging": name}))


def test_noise_that_is_cut_to_one_owners_bound_is_left_alone() -> None:
    private = RunConfig(
        strategy="offsite-tuning",
        offsite=OffsiteConfig(central_dp_clip=1.0, central_dp_noise=1.0),
    )
    assert adds_noise(make_averaging(private))
    assert adds_noise(DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 1.0, 3))
    clipped = RunConfig(strategy="offsite-tuning", offsite=OffsiteConfig(central_dp_clip=1.0))
    assert not adds_noise(make_averaging(clipped))
    row = averaged([reply(i, c) for i, c in enumerate(honest(4))], make_averaging(private))[1]
    assert "contributions" not in row


def test_an_owner_that_changed_nothing_is_no_outlier() -> None:
    changes = [*honest(4), {n: np.zeros_like(v) for n, v in START.items()}]
    replies = {f"o{i}": reply(i, c) for i, c in enumerate(changes)}
    found = bound_contributions(replies, START, RobustConfig())
    assert not any(part.reason for part in found.values())
    still = {f"o{i}": reply(i, times(c, 0.0)) for i, c in enumerate(changes)}
    assert all(
        part.share == 1.0 for part in bound_contributions(still, START, RobustConfig()).values()
    )
