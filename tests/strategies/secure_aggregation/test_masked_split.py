"""Joint bottoms and owners' heads under secure aggregation, over both transports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedMedian,
)

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy.secure_aggregation.numbers import Summed
from fedsplit.wire.secure_sum import MASKED
from strategies.rounds.averaging import make_averaging
from strategies.rounds.robust_rules import RULES
from strategies.secure_aggregation.averaging import check_mean, check_weight
from tests.strategies.run_local import run_local

FREE = {"robust__clip": 0.0, "robust__weight_cap": 0.0, "robust__screen": False}
MASKS = {**FREE, "secure__aggregation": True, "secure__bound": 1.0, "secure__most_targets": 64}


@pytest.mark.parametrize(
    ("transport", "part"),
    [
        ("stream", {"split__bottom": "joint"}),
        ("messages", {"labels__protection": "client-head"}),
    ],
)
def test_what_split_owners_average_is_the_plain_average(
    make_config: Any, tmp_path: Path, transport: str, part: dict[str, Any]
) -> None:
    same = {"train__rounds": 1, "output__evaluate_every": 0, "session__transport": transport}
    same |= {"data__owners": 4, "train__max_steps": 2, "train__bottom_lr": 1e-2, **part}
    plain = run_local(make_config(**same, **FREE, output__dir=str(tmp_path / "plain")))
    masked = run_local(make_config(**same, **MASKS))
    row = masked.server["rounds"][0]
    facts = row["secure_aggregation"]
    assert facts["in_sum"] == 4
    assert facts["error"] < 1e-6
    one, other = (run.result.arrays for run in (plain, masked))
    assert one.keys() == other.keys()
    assert len(one)
    worst = max(float(np.abs(one[n].numpy() - other[n].numpy()).max()) for n in one)
    assert worst <= facts["error"] + 1e-6
    moved = plain.strategy.parts.initial
    assert max(float(np.abs(one[n].numpy() - moved[n].numpy()).max()) for n in one) > 1e-4
    trained = [r for r in masked.grid.replies if r.metadata.message_type == "train"]
    assert [list(r.content.array_records) for r in trained] == [[MASKED]] * 4


def test_a_strategy_that_needs_single_updates_is_refused() -> None:
    check_mean(FedAvg())
    check_mean(make_averaging(RunConfig()))
    robust = FedMedian()
    noisy = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 3)
    for strategy in (robust, noisy, RULES["krum"](1, "targets")):
        with pytest.raises(ConfigError, match=type(strategy).__name__):
            check_mean(strategy)


def test_a_weight_that_the_server_did_not_count_is_noticed() -> None:
    summed = Summed(2, 30, {}, {}, None, 0.0)
    check_weight([10.0, 20.0], 100, summed)
    check_weight([15.0, 200.0], 15, summed)
    with pytest.raises(PrivacyError, match="weight=30: must be 31"):
        check_weight([10.0, 21.0], 100, summed)
