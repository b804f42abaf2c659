"""Every parser takes damaged input or refuses it on purpose; and the bounds themselves hold."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, DataError, LedgerError, LineageError, ModelError
from fedsplit.fingerprints.evidence import chain as evidence
from fedsplit.fingerprints.evidence import public_file
from fedsplit.fingerprints.weights_file import open_view
from fedsplit.models.shards import INDEX, weight_files
from fedsplit.models.trained.weights import load_trained
from fedsplit.owners.ledger.chain import GENESIS, Ledger, canonical, chained
from fedsplit.owners.policy.rules import Policy
from simulations.fuzz.damage import damaged_json, damaged_safetensors, damaged_text, flipped
from simulations.fuzz.files import tiny_model
from simulations.fuzz.run import PARSERS, Outcome, fuzz_all, fuzz_parser


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

    monkeypatch.setattr("simulations.fuzz.run.SLOWEST_S", 0.005)
    monkeypatch.setattr("simulations.fuzz.run.MOST_BYTES", 32 << 20)
    monkeypatch.setattr("simulations.fuzz.run._peak", lambda: peak)
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


# ---- what it found, each once more by itself ----------------------------------------------------

DEEP = "[" * 3000


def test_deep_nesting_is_refused_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(DEEP + "\n")
    with pytest.raises(LineageError):
        evidence.verify(path)
    with pytest.raises(LineageError):
        public_file.read(path)
    with pytest.raises(ConfigError):
        Policy.parse(f"x = {DEEP}".encode())
    (tmp_path / INDEX).write_text(DEEP)
    with pytest.raises(ModelError):
        weight_files(tmp_path)


def test_a_number_of_many_digits_is_no_float() -> None:
    with pytest.raises(ConfigError, match=r"train\.lr: an integer of \d+ bits: must fit a float"):
        RunConfig.from_flat({"train.lr": 10**400})
    with pytest.raises(ConfigError, match=r"noise\.max_eta"):
        Policy.parse(b"[noise]\nmax_eta = " + b"9" * 400)


def test_a_small_file_does_not_get_the_memory_of_a_large_model(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    open_view(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 1 << 14}))
    with pytest.raises(ModelError, match=r"tells of \d+ parameters, the files hold \d+"):
        open_view(folder)


def test_tokens_of_a_fingerprint_file_are_distinct(tmp_path: Path) -> None:
    made = public_file.make(open_view(tiny_model(tmp_path)), "m", size=4)
    public_file.write(replace(made, tokens=made.tokens * 2), tmp_path / "f.json", None)
    with pytest.raises(LineageError, match="80 tokens: must be distinct"):
        public_file.read(tmp_path / "f.json")


def test_a_ledgers_line_with_a_good_hash_and_no_ledgers_values(tmp_path: Path) -> None:
    text = canonical({"kind": "hello", "bytes": "many", "n": 0})
    line = text[:-1] + f',"hash":"{chained(GENESIS, text)}"}}\n'.encode()
    (tmp_path / "ledger.jsonl").write_bytes(line)
    with pytest.raises(LedgerError, match="line 1"):
        Ledger(tmp_path)


def test_tensors_of_more_axes_than_can_be_computed_with(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "__metadata__": {"format": "fedsplit-top-1", "belongs": "{}"},
            "a": {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]},
        }
    ).encode()
    path = tmp_path / "top.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ModelError):
        load_trained(path, {})
