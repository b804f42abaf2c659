"""A server whose settings break an owner's policy is refused, whatever it asks, in whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsplit.errors import RunError
from fedsplit.owners.ledger.chain import Entry, Ledger, read_ledger
from strategies.split_tuning.strategy import SplitTuning
from tests.strategies.local_grid import LocalGrid

VICTIM = "owner-1"
QUICK: dict[str, Any] = {
    "train__rounds": 1,
    "train__max_steps": 2,
    "output__evaluate_every": 0,
    "lineage__gate": "off",
    "privacy__mechanism": "dchi",
    "privacy__eta": 8.0,
    "session__wave_wait_s": 60.0,
}


@pytest.fixture
def rules(tmp_path: Path) -> Any:
    """Return a function: TOML text -> the path of a policy that its owner alone may write."""

    def write(text: str, name: str = "owner.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o600)
        return path

    return write


@pytest.fixture
def left(tmp_path: Path) -> Any:
    """Return a function: owner -> every line of its ledger, checked."""

    def read(owner: str = VICTIM) -> list[Entry]:
        return list(read_ledger(tmp_path / "homes" / owner))

    return read


def for_victim(policy: Path) -> Any:
    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        grid.node_configs[1] = {"policy": str(policy)}

    return prepare


def kinds(entries: list[Entry]) -> list[str]:
    return [entry["kind"] for entry in entries]


@pytest.mark.parametrize(
    ("text", "overrides", "told"),
    [
        ("[noise]\nmax_eta = 2.0", {}, "noise.max_eta: asked 8, must be <= 2"),
        (
            '[noise]\nmechanisms = ["dchi"]',
            {"privacy__mechanism": "none", "privacy__eta": 0.0},
            "noise.mechanisms: asked 'none', must be one of dchi",
        ),
        (
            '[labels]\nprotection = ["client-head"]',
            {},
            "labels.protection: asked 'none', must be one of client-head",
        ),
        ('[transport]\nallowed = ["messages"]', {}, "transport.allowed: asked 'stream'"),
        (
            '[model]\nbottom = ["frozen"]',
            {"split__bottom": "joint"},
            "model.bottom: asked 'joint', must be one of frozen",
        ),
    ],
)
def test_what_settings_break_is_refused_before_anything_leaves(
    make_config: Any,
    run_locally: Any,
    rules: Any,
    left: Any,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    overrides: Any,
    told: str,
) -> None:
    monkeypatch.setenv("FEDSPLIT_POLICY", str(rules(text)))  # for all owners of this machine
    # Nobody connects, so there is nobody to wait for.
    config = make_config(**QUICK | overrides | {"session__wave_wait_s": 0.2})
    with pytest.raises(RunError, match="no owner took a step") as caught:
        run_locally(config)
    assert str(caught.value).count("PolicyError") == 3
    assert str(caught.value).count(told) == 3
    for owner in ("owner-0", "owner-1", "owner-2"):
        assert set(kinds(left(owner))) == {"error"}


@pytest.mark.parametrize("transport", ["stream", "messages"])
def test_noise_is_measured_on_the_bottom_that_came(
    make_config: Any, run_locally: Any, rules: Any, left: Any, transport: str
) -> None:
    config = make_config(**QUICK | {"privacy__eta": 400.0, "session__transport": transport})
    run = run_locally(config, prepare=for_victim(rules("[noise]\nmin_ratio = 1.0")))
    train = run.server["rounds"][0]["train"]
    (why,) = train["lost"].values()
    assert train["finished"] == ["owner-0", "owner-2"]
    assert "noise.min_ratio: asked" in why
    assert "must be >= 1" in why
    assert set(kinds(left())) <= {"hello", "need", "error"}


def test_a_budget_of_bytes_ends_a_session_and_outlives_it(
    make_config: Any, run_locally: Any, rules: Any, left: Any
) -> None:
    policy = rules("[budget]\nbytes_total = 12000")
    config = make_config(**QUICK | {"train__max_steps": 0, "train__rounds": 2})
    run = run_locally(config, prepare=for_victim(policy))
    first, second = [row["train"]["lost"][VICTIM] for row in run.server["rounds"]]
    assert "budget.bytes_total: asked" in first
    assert "budget.bytes_total: asked" in second
    entries = left()
    within = [entry["bytes"] for entry in entries if entry["kind"] != "error"]
    assert 0 < sum(within) <= 12000
    assert "representations" in kinds(entries)


def test_views_are_counted_over_runs(
    make_config: Any, run_locally: Any, rules: Any, left: Any
) -> None:
    policy = rules("[budget]\nviews_total = 1")
    why = []
    for number, eta in enumerate((8.0, 8.0, 4.0)):  # the second shows nothing new
        config = make_config(**QUICK | {"privacy__eta": eta})
        run = run_locally(config, prepare=for_victim(policy), run_id=20 + number)
        why.append(run.server["rounds"][0]["train"]["lost"].get(VICTIM, ""))
    assert why[:2] == ["", ""]
    assert "budget.views_total: asked 2, must be <= 1" in why[2]
    last = [entry for entry in left() if "cumulative" in entry][-1]["cumulative"]
    assert last["views"]["max"] == 1
    assert last["eta"]["max"] == pytest.approx(8.0)


def test_an_honest_run_passes_and_is_recorded_whole(
    make_config: Any, run_locally: Any, rules: Any, left: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
    [noise]
    mechanisms = ["dchi"]
    max_eta = 8.0
    min_ratio = 0.2
    [model]
    bottom = ["frozen"]
    max_tokens = 16
    [budget]
    rounds = 1
    views_total = 1
    sessions_per_run = 2
    [transport]
    allowed = ["stream"]
    """
    monkeypatch.setenv("FEDSPLIT_POLICY", str(rules(text)))  # for all owners of this machine
    options = QUICK | {"output__evaluate_every": 1, "output__capture": True}
    run = run_locally(make_config(**options))
    for row in run.server["rounds"]:
        for mode in {"train", "evaluate"} & row.keys():
            assert row[mode]["lost"] == {}
    sent = sum(len(frame) for frame in run.captured())
    entries = [e for owner in ("owner-0", "owner-1", "owner-2") for e in left(owner)]
    carried = {"representations", "slots", "logit-gradients", "ready", "need", "done"}
    assert sum(e["bytes"] for e in entries if e["kind"] in carried) == sent
    rows = sum(e["shape"][0] for e in entries if e["kind"] == "representations")
    assert rows == sum(
        row[mode]["row_tokens"]
        for row in run.server["rounds"]
        for mode in {"train", "evaluate"} & row.keys()
    )


def test_a_joint_bottoms_weights_are_recorded(
    make_config: Any, run_locally: Any, rules: Any, left: Any
) -> None:
    config = make_config(**QUICK | {"split__bottom": "joint", "train__rounds": 2})
    run_locally(config, prepare=for_victim(rules("[budget]\nviews_total = 2")))
    entries = left()
    assert kinds(entries).count("weights") == 2


def test_nothing_leaves_that_cannot_be_recorded(
    make_config: Any, run_locally: Any, left: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Ledger._write
    victims: list[str] = []

    def full(self: Ledger, entry: Entry) -> None:
        if VICTIM in str(self.path) and entry["kind"] == "logit-gradients":
            victims.append(entry["kind"])
            raise OSError(28, "No space left on device")
        written(self, entry)

    monkeypatch.setattr(Ledger, "_write", full)
    run = run_locally(make_config(**QUICK | {"output__capture": True}))
    train = run.server["rounds"][0]["train"]
    assert list(train["lost"]) == [VICTIM]
    assert victims == ["logit-gradients"]
    assert "logit-gradients" not in kinds(left())
    assert "No space" not in str(train["lost"])
