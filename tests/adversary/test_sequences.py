"""Sequences of lies, drawn by hypothesis: all that left is handed to every attacker.

A few are drawn the same way every time; ``make fuzz`` draws as many as ADVERSARY_EXAMPLES says.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedsplit.privacy import MECHANISMS
from simulations.adversary.cases.table import play as play_case
from simulations.adversary.cases.table import quiet
from simulations.adversary.context import Field
from simulations.adversary.reading import Row
from simulations.adversary.sequences import ENDS, Lie, play_lies
from simulations.adversary.server import LyingServer

MANY = int(os.environ.get("ADVERSARY_EXAMPLES", "0"))
DRAWN = settings(
    max_examples=MANY or 2,
    derandomize=not MANY,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
MORE: dict[str, st.SearchStrategy[Any]] = {
    "model.max-tokens": st.integers(3, 40),
    "model.labels": st.integers(2, 5),
    "train.batch-size": st.sampled_from([1, 3, 8, 64]),
    "train.max-steps": st.integers(0, 3),
    "data.test-share": st.sampled_from([0.1, 0.5, 0.9]),
    "seed": st.integers(0, 3),
    "split.k": st.integers(0, 3),
    "split.bottom": st.sampled_from(["frozen", "joint"]),
    "session.codec": st.sampled_from(["fp32", "bf16", "int8"]),
    "privacy.noise-ratio": st.sampled_from([30.0, 40.0, 40.001, 60.0]),
    "privacy.mechanism": st.sampled_from(list(MECHANISMS)),
    "privacy.spare": st.sampled_from([0.01, 0.5, 1.0]),
    "privacy.task-words": st.sampled_from(["w1 w2 | w3", "w4 | w5 w6 w7"]),
    "privacy.cti": st.sampled_from(["off", "purity", "frequent"]),
    "privacy.cti-rho": st.sampled_from([0.0, 0.2, 1.0]),
    "labels.protection": st.sampled_from(["none", "max-norm", "marvell", "client-head"]),
    "labels.epsilon": st.sampled_from([0.999, 1.0, 5.0]),
    "strategy": st.sampled_from(["split-tuning", "serving", "offsite-tuning"]),
}


def lies(*, loud: bool) -> st.SearchStrategy[list[Lie]]:
    settings_of_run = st.lists(
        st.sampled_from(sorted(MORE)).flatmap(lambda k: st.tuples(st.just(k), MORE[k])), max_size=2
    ).map(tuple)
    one = st.builds(
        Lie,
        kind=st.sampled_from(["train", "train", "evaluate"]),
        mode=st.sampled_from(["train", "train", "evaluate", "predict"]),
        round=st.integers(1, 3),
        end=st.integers(-1, len(ENDS) - 1),
        table=st.integers(0, 1),
        loud=st.just(loud),
        logits=st.sampled_from(["zero", "sure", "random", "nan", "short"]),
        held=st.booleans(),
        more=settings_of_run,
    )
    return st.lists(one, min_size=1, max_size=12 if MANY else 6)


def play(drawn: list[Lie], count: int = 24) -> dict[str, Row]:
    with tempfile.TemporaryDirectory() as folder, LyingServer() as server, quiet():
        found = play_lies(Field(Path(folder), server, quick=True), drawn, count)
    return {row.unit: row for row in found}


@pytest.fixture(scope="module", autouse=True)
def honest_sessions_go_through() -> None:
    rows = {row.variant: row for row in play_case("honest", quick=True)}
    if rows["texts refused"].read:
        pytest.fail(f"honest sessions do not go through: {rows['texts refused'].told}")


@DRAWN
@given(lies(loud=False))
def test_no_sequence_of_lies_reads_tokens(drawn: list[Lie]) -> None:
    row = play(drawn)["tokens"]
    assert row.ok, f"{row.read:.3f} of {row.targets} tokens, allowed {row.allowance:.3f}"


@DRAWN
@given(lies(loud=True))
def test_no_sequence_with_loud_words_reads_tokens(drawn: list[Lie]) -> None:
    row = play([Lie(loud=True, more=(("model.max-tokens", 40),)), *drawn])["tokens"]
    assert row.ok, f"{row.read:.3f} of {row.targets} tokens, allowed {row.allowance:.3f}"


@DRAWN
@given(lies(loud=False))
def test_no_sequence_of_lies_reads_labels(drawn: list[Lie]) -> None:
    row = play([Lie(more=(("labels.protection", "max-norm"),)), *drawn], 80)["labels"]
    assert row.ok, f"{row.read:.3f} of {row.targets} labels, allowed {row.allowance:.3f}"
