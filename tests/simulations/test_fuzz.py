"""Every parser takes damaged input or refuses it on purpose; and the bounds themselves hold."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import DataError
from simulations.bench_fuzz import PARSERS, Outcome, fuzz_all, fuzz_parser
from simulations.fuzz_damage import damaged_json, damaged_safetensors, damaged_text, flipped


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return {o.parser: o for o in fuzz_all(3000, seed=11)}


@pytest.mark.parametrize("parser", PARSERS)
def test_no_parser_crashes_hangs_or_grows(parser: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[parser]
    assert outcome.failed == []
    assert outcome.cases >= 6


def test_most_damage_is_refused_and_some_is_none(outcomes: dict[str, Outcome]) -> None:
    """A fuzzer whose cases are all refused at the first check, or all taken, tries nothing."""
    for parser, outcome in outcomes.items():
        if outcome.cases >= 60:
            assert outcome.accepted, parser
            assert outcome.refused or parser.startswith("run folder")


def test_what_breaks_a_bound_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peak = 0

    def busy() -> None:
        sum(range(3_000_000))

    def greedy() -> None:
        nonlocal peak
        peak += 33 << 20

    def wrong() -> None:
        raise KeyError("x")

    def right() -> None:
        raise DataError("x")

    monkeypatch.setattr("simulations.bench_fuzz.SLOWEST_S", 0.005)
    monkeypatch.setattr("simulations.bench_fuzz.MOST_BYTES", 32 << 20)
    monkeypatch.setattr("simulations.bench_fuzz._peak", lambda: peak)
    drawn = iter([right, right, busy, greedy, wrong])
    found = fuzz_parser("x", lambda _: lambda rng: next(drawn), range(5), 0, tmp_path)

    told = dict(found.failed)
    assert told.keys() == {2, 3, 4}
    assert told[2].endswith("s: must be <= 0.005 s")
    assert told[3] == "33 MiB more: must be <= 32"
    assert told[4].startswith("KeyError")
    assert found.refused == {"DataError": 2}
    assert (found.failures, found.growth_bytes) == (3, 33 << 20)


def test_a_case_can_be_drawn_again(tmp_path: Path) -> None:
    make, _ = PARSERS["owner.toml"]

    def kinds(numbers: range) -> list[dict[str, int]]:
        rows = []
        for number in numbers:
            one = fuzz_parser("owner.toml", make, [number], 5, tmp_path)
            rows.append({"accepted": one.accepted, **one.refused})
        return rows

    assert kinds(range(8)) == kinds(range(8))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@given(JSON, st.integers())
@settings(max_examples=100, deadline=None)
def test_damage_is_drawn_by_the_seed_alone(value: object, seed: int) -> None:
    text = json.dumps(value)
    for damage, given_ in (
        (damaged_json, value),
        (damaged_text, text),
        (flipped, text.encode()),
    ):
        assert damage(given_, random.Random(seed)) == damage(given_, random.Random(seed))


def test_damage_reaches_every_part_of_a_file() -> None:
    from safetensors.torch import save
    from torch import ones

    sound = save({"a": ones(3)})
    length = int.from_bytes(sound[:8], "little")
    found = [damaged_safetensors(sound, random.Random(n)) for n in range(300)]
    assert {f[:8] == sound[:8] for f in found} == {True, False}
    headers = [f for f in found if f[:8] != sound[:8] and f.endswith(sound[8 + length :])]
    assert len({f[8:] for f in headers}) > 20
    assert any(f[: 8 + length] == sound[: 8 + length] and f != sound for f in found)
