"""FedAdam's measured step and central DP, on replies made here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.config import OffsiteConfig, RunConfig
from fedsplit.wire.messages import WEIGHTS, weights_record
from strategies.rounds.averaging import (
    WEIGHT,
    make_averaging,
    restore,
    set_current_arrays,
    state_of,
)

START = {
    "a": np.linspace(-1, 1, 4000, dtype=np.float32),
    "b": np.ones((20, 100), dtype=np.float32),
}
Arrays = Mapping[str, np.ndarray]


def reply(arrays: Arrays, weight: float = 1.0) -> Message:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    asked = Message(RecordDict(), dst_node_id=3, message_type="train")
    asked.metadata.__dict__["_message_id"] = "m"
    content = RecordDict(
        {WEIGHTS: weights_record(dict(arrays)), "metrics": MetricRecord({WEIGHT: weight})}
    )
    return Message(content, reply_to=asked)


def moved(by: float, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        n: (v + by * generator.normal(size=v.shape)).astype("float32") for n, v in START.items()
    }


def run_of(offsite: OffsiteConfig) -> RunConfig:
    return RunConfig(strategy="offsite-tuning", offsite=offsite)


def averaged(offsite: OffsiteConfig, replies: list[Message], start: Arrays = START) -> Any:
    strategy = make_averaging(run_of(offsite))
    set_current_arrays(strategy, weights_record(dict(start)))
    record: ArrayRecord | None = strategy.aggregate_train(1, replies)[0]
    assert record is not None
    return {n: a.numpy() for n, a in record.items()}


def size(a: Arrays, b: Arrays) -> float:
    flat = np.concatenate([(a[n].astype(np.float64) - b[n]).ravel() for n in b])
    return float(np.sqrt(np.mean(flat**2)))


@pytest.mark.parametrize("by", [1e-5, 1e-2, 3.0])
def test_fedadams_first_step_is_as_long_as_the_mean_change(by: float) -> None:
    replies = [reply(moved(by, 1)), reply(moved(by, 2))]
    plain = averaged(OffsiteConfig(), [reply(moved(by, 1)), reply(moved(by, 2))])
    adam = averaged(OffsiteConfig(averaging="fedadam"), replies)
    assert size(adam, START) == pytest.approx(size(plain, START), rel=1e-2)
    along = sum(float(((adam[n] - START[n]) * (plain[n] - START[n])).sum()) for n in START)
    count = sum(v.size for v in START.values())
    assert along / count > 0.8 * size(plain, START) ** 2


def test_fedadams_first_step_is_as_long_as_was_asked() -> None:
    offsite = OffsiteConfig(averaging="fedadam", server_lr=0.02)
    assert size(averaged(offsite, [reply(moved(1.0))]), START) == pytest.approx(0.02, rel=1e-2)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_fedadam_goes_down_a_bowl_of_any_scale(scale: float) -> None:
    # Owners go a tenth of the way to the minimum, at zero, each round.
    strategy = make_averaging(run_of(OffsiteConfig(averaging="fedadam")))
    now = {n: (scale * v).astype("float32") for n, v in START.items()}
    zero = {n: np.zeros_like(v) for n, v in START.items()}
    sizes = [size(now, zero)]
    for number in range(1, 26):
        set_current_arrays(strategy, weights_record(dict(now)))
        record = strategy.aggregate_train(number, [reply({n: 0.9 * v for n, v in now.items()})])[0]
        assert record is not None
        now = {n: a.numpy() for n, a in record.items()}
        sizes.append(size(now, zero))
    assert sizes[-1] < 0.25 * sizes[0]
    assert max(sizes) <= sizes[0] * 1.001


@pytest.mark.parametrize("offsite", [{}, {"central_dp_clip": 1e3}])
def test_a_round_that_is_undone_leaves_no_trace(offsite: dict[str, float]) -> None:
    config = OffsiteConfig(averaging="fedadam", **offsite)  # type: ignore[arg-type]
    rounds = [moved(0.1, 1), moved(5.0, 2), moved(0.1, 3)]

    def after(kept: tuple[int, ...]) -> dict[str, np.ndarray]:
        strategy = make_averaging(run_of(config))
        now = dict(START)
        for number, sent in enumerate(rounds):
            set_current_arrays(strategy, weights_record(now))
            before = state_of(strategy)
            record = strategy.aggregate_train(number if number < 2 else 1, [reply(sent)])[0]
            assert record is not None
            if number in kept:
                now = {n: a.numpy() for n, a in record.items()}
            else:
                restore(strategy, before)
        return now

    found = after((0, 2))
    rounds[1] = moved(1.0, 7)  # another bad round: it must not matter which
    again = after((0, 2))
    assert all(np.array_equal(found[n], again[n]) for n in START)
    assert all(v.dtype == np.float32 for v in found.values())


def test_nobody_changing_anything_is_no_step() -> None:
    assert size(averaged(OffsiteConfig(averaging="fedadam"), [reply(START)]), START) == 0.0


def norm(a: Arrays, b: Arrays = START) -> float:
    return float(np.sqrt(sum(((a[n].astype(np.float64) - b[n]) ** 2).sum() for n in b)))


def test_one_owner_moves_a_bounded_mean_by_its_share_at_most() -> None:
    offsite = OffsiteConfig(central_dp_clip=0.5, central_dp_noise=1e-9)
    others = [moved(1e-4, seed) for seed in (1, 2, 3)]
    quiet = averaged(offsite, [reply(o) for o in (*others, START)])
    loud = averaged(offsite, [reply(o) for o in others] + [reply(moved(100.0, 9), weight=1e9)])
    assert norm(loud, quiet) == pytest.approx(0.5 / 4, rel=1e-3)


def test_tensors_are_matched_by_name_whatever_their_order() -> None:
    offsite = OffsiteConfig(central_dp_clip=1e6, central_dp_noise=1e-12)
    one = moved(0.1)
    turned = averaged(offsite, [reply({n: one[n] for n in reversed(list(one))})])
    assert norm(turned, one) < 1e-3


@pytest.mark.parametrize("owners", [1, 4])
def test_noise_is_cut_to_the_owners_that_answered(owners: int) -> None:
    offsite = OffsiteConfig(central_dp_clip=2.0, central_dp_noise=3.0)
    noisy = averaged(offsite, [reply(START) for _ in range(owners)])
    assert size(noisy, START) == pytest.approx(3.0 * 2.0 / owners, rel=0.05)


def test_a_bound_alone_adds_no_noise() -> None:
    offsite = OffsiteConfig(central_dp_clip=0.5, averaging="fedmedian")
    assert averaged(offsite, [reply(START)])["a"] == pytest.approx(START["a"])
    assert norm(averaged(offsite, [reply(moved(1.0))])) == pytest.approx(0.5, rel=1e-3)


def test_an_experiments_seed_does_not_decide_central_noise() -> None:
    offsite = OffsiteConfig(central_dp_clip=2.0, central_dp_noise=3.0)
    np.random.seed(0)
    after = np.random.RandomState(0).random(3)
    first = averaged(offsite, [reply(START)])
    assert np.random.random(3) == pytest.approx(after), "others' draws are left as they were"
    np.random.seed(0)
    assert norm(averaged(offsite, [reply(START)]), first) > 1.0
