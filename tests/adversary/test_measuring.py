"""The owner reads its own texts and labels as an attacker would, before anything leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedsplit.attacks.measuring import measure
from fedsplit.cli import app_cli as cli
from fedsplit.commands.attacks.policy import FAR, LOUD
from fedsplit.errors import ConfigError, PolicyError
from fedsplit.models import load, split
from fedsplit.models.bundle.bottom import Bundle
from fedsplit.owners.ledger.chain import Ledger
from fedsplit.owners.ledger.check import DisclosureCheck
from fedsplit.owners.ledger.disclosure import Announcement, Outgoing, Source
from fedsplit.owners.ledger.session import SessionFacts
from fedsplit.owners.policy.rules import Policy
from fedsplit.privacy import SamplePerturber
from fedsplit.privacy.empirical import Exposed, Reading
from fedsplit.privacy.mechanisms.dchi import DChi
from fedsplit.privacy.mechanisms.none import NoNoise
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.wire.frames import Kind
from tests.adversary.lying import LyingServer, Owner, settings
from tests.tiny_models import WORDS, save_tiny_bert

WIDTH = 32


def zeros(slots: list[int]) -> torch.Tensor:
    return torch.zeros(len(slots), 2)


FLOOR = """
[measure]
min_empirical_privacy = 0.6
texts = 24
[budget]
views_total = 1
views_per_bottom = 1
"""
SECRET = OwnerSecret.for_simulation(0, "measured")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = save_tiny_bert(tmp_path_factory.mktemp("tiny"), classes=2)
    return folder, load(folder, "sequence-classification", num_labels=2)


def exposed(
    loaded: Any, ids: list[torch.Tensor], ratio: float, views: int = 1, k: int = 0
) -> Exposed:
    bottom, _ = split(loaded.model, k)
    bottom.eval()
    with torch.no_grad():
        clean = [bottom(x[None], torch.ones_like(x)[None])[0] for x in ids]
    size = float(torch.cat(clean).norm(dim=1).median())
    mechanism = DChi(clean[0].shape[1] / (ratio * size))
    perturber = SamplePerturber(mechanism, SECRET, "x")
    pairs = list(zip(clean, ids, strict=True))
    shown = [
        [perturber.trial(h, x, str(i).encode(), v) for i, (h, x) in enumerate(pairs)]
        for v in range(views)
    ]
    known = [x.tolist() for x in ids]
    return Exposed(
        bottom=bottom, mechanism=mechanism, views=shown, ids=ids, known=known, seconds=3.0
    )


def random_ids(count: int, vocab: int, ends: tuple[int, int] = (2, 3)) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    return [
        torch.cat(
            [
                torch.tensor([ends[0]]),
                torch.randint(5, vocab, (6,), generator=chance),
                torch.tensor([ends[1]]),
            ]
        )
        for _ in range(count)
    ]


# ---- what the attackers read --------------------------------------------------------------------


def test_more_noise_hides_more_and_more_views_hide_less(tiny: tuple[Path, Any]) -> None:
    ids = random_ids(30, tiny[1].model.config.vocab_size)
    read = [measure(exposed(tiny[1], ids, ratio))[0].read for ratio in (0.1, 3.0, 100.0)]
    assert read[0] > 0.95
    assert read[2] < 0.3
    assert read[0] >= read[1] >= read[2]
    averaged = measure(exposed(tiny[1], ids, 3.0, views=64))[0].read
    assert averaged > read[1] + 0.2


def test_ends_that_all_texts_share_are_not_scored(tiny: tuple[Path, Any]) -> None:
    ids = random_ids(30, tiny[1].model.config.vocab_size)
    found = measure(exposed(tiny[1], ids, 0.1))
    assert found[0].targets == sum(len(x) - 2 for x in ids)


def test_fillers_between_words_do_not_hide_the_words(tiny: tuple[Path, Any]) -> None:
    # Three positions of four are one filler that nobody can read; every word is read.
    words = torch.arange(5, 14)
    ids = [torch.cat([torch.stack([w, *([torch.tensor(4)] * 3)]) for w in words]) for _ in "ab"]
    ids = [torch.cat([torch.tensor([i]), x, torch.tensor([i])]) for i, x in enumerate(ids)]
    given = exposed(tiny[1], ids, 0.1)
    rows = [
        torch.where((x == 4)[:, None], torch.randn(len(x), WIDTH) * 100, r)
        for x, r in zip(ids, given.views[0], strict=True)
    ]
    shown = Exposed(
        bottom=given.bottom, mechanism=given.mechanism, views=[rows], ids=ids, known=given.known
    )
    assert measure(shown)[0].read > 0.8


def test_a_mechanism_without_noise_hides_nothing(tiny: tuple[Path, Any]) -> None:
    ids = random_ids(5, 30)
    given = exposed(tiny[1], ids, 1.0)
    shown = Exposed(bottom=given.bottom, mechanism=NoNoise(), views=given.views, ids=ids, known=[])
    assert measure(shown)[0].read == 1.0


def test_behind_blocks_an_inverter_is_taught_and_its_texts_are_searched(
    tiny: tuple[Path, Any],
) -> None:
    ids = random_ids(60, tiny[1].model.config.vocab_size)
    found = {r.attack: r for r in measure(exposed(tiny[1], ids, 0.01, k=1))}
    assert found.keys() == {"learned", "token_states", "text_search"}
    assert found["text_search"].read >= found["learned"].read > 0.5
    assert all(0 < reading.seconds < 30 for reading in found.values())
    assert 0 < found["text_search"].targets <= found["learned"].targets


# ---- the owner ----------------------------------------------------------------------------------


def asked(ratio: float, **more: Any) -> dict[str, Any]:
    return settings(privacy__mechanism="dchi", privacy__noise_ratio=ratio, **more)


def lines(owner: Owner) -> list[dict[str, Any]]:
    return [line for line in owner.ledger() if line["kind"] == "measured"]


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_nothing_leaves_below_the_floor(
    server: LyingServer, bundles: dict[str, Bundle], owner: Callable[..., Owner], kind: str
) -> None:
    victim = owner(FLOOR)
    taken = server.split(victim, asked(0.5), bundles["bottom"], zeros, kind)
    assert not [f for f in taken.up if f.kind in (Kind.READY, Kind.BATCH)]
    assert "measure.min_empirical_privacy" in taken.told[0]
    assert not any(digit in taken.told[0] for digit in "0123456789")  # a type, never a value
    (line,) = lines(victim)
    assert line["measured"]["value"] < 0.6
    assert line["bytes"] == 0
    # Asked again, the owner does not try again.
    server.split(victim, asked(0.5), bundles["bottom"], zeros, kind)
    assert len(lines(victim)) == 1


def test_what_is_hidden_leaves_and_is_measured_once(
    server: LyingServer, bundles: dict[str, Bundle], owner: Callable[..., Owner]
) -> None:
    victim = owner(FLOOR)
    for kind in ("train", "evaluate", "train"):
        taken = server.split(victim, asked(60.0), bundles["bottom"], zeros, kind)
        assert not taken.told
    (line,) = lines(victim)
    assert line["measured"]["value"] >= 0.6
    assert {r["attack"] for r in line["measured"]["readings"]} >= {"nearest", "map", "contextual"}
    shown = CliRunner().invoke(cli, ["ledger", "show", "--home", str(victim.home)])
    assert "measured before anything left" in shown.stdout
    kinds = [x["kind"] for x in victim.ledger()]
    assert kinds.index("measured") < kinds.index("ready") < kinds.index("representations")
    # Another strength, or the same bottom with a head, is measured anew.
    server.split(victim, asked(61.0), bundles["bottom"], zeros)
    server.split(victim, asked(60.0), bundles["head"], zeros)
    assert len(lines(victim)) == 3


def test_figures_of_weaker_attackers_are_not_taken_for_todays(
    server: LyingServer,
    bundles: dict[str, Bundle],
    owner: Callable[..., Owner],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    victim = owner(FLOOR)
    for number in (1, 1, 2, 2):
        monkeypatch.setattr("fedsplit.privacy.empirical.ATTACKERS", number)
        server.split(victim, asked(60.0), bundles["bottom"], zeros, "evaluate")
    assert len(lines(victim)) == 2


@pytest.mark.parametrize(
    ("protection", "passes"),
    [
        ({"labels__protection": "none"}, False),
        ({"labels__protection": "max-norm"}, False),
        ({"labels__protection": "marvell", "labels__noise_power": 0.1}, False),
        ({"labels__protection": "randomised-response", "labels__epsilon": 0.5}, True),
    ],
)
def test_labels_are_measured_before_a_gradient_leaves(
    server: LyingServer,
    bundles: dict[str, Bundle],
    owner: Callable[..., Owner],
    protection: dict[str, Any],
    passes: bool,
) -> None:
    victim = owner("[measure]\nmax_label_recovery = 0.7\n[budget]\nepochs_per_run = 4\n", 120)
    taken = server.split(victim, asked(1.0, **protection), bundles["bottom"], zeros)
    (line,) = lines(victim)
    assert (line["measured"]["value"] < 0.8) is passes
    assert (len(taken.gradients) > 0) is passes
    if not passes:
        assert "measure.max_label_recovery" in taken.told[0]
    # Evaluation sends no gradients: nothing to measure.
    other = owner("[measure]\nmax_label_recovery = 0.7\n", 40, "other")
    flat = asked(1.0, **protection)
    server.split(other, flat, bundles["bottom"], zeros, "evaluate")
    assert not lines(other)


def test_a_policy_that_asks_for_figures_refuses_where_nothing_can_measure(tmp_path: Path) -> None:
    rules = Policy({"measure": {"min_empirical_privacy": 0.1}, "budget": {"views_total": 1}})
    facts = SessionFacts(1, "x", mode="train", digest="d", strategy="split-tuning")
    source = Source(torch.nn.Identity(), SamplePerturber(DChi(1.0), SECRET, "x"), 1, 1)
    frame = Outgoing(Kind.READY, {}, Announcement(batches=1, source=source))

    def attackers(given: Exposed) -> list[Reading]:
        raise AssertionError("there is nothing to measure on")

    for able in (None, attackers):
        with Ledger(tmp_path) as ledger, pytest.raises(PolicyError, match="cannot be measured"):
            DisclosureCheck(ledger, facts, rules, SECRET, able).record(frame)


def test_a_floor_needs_a_bound_on_views() -> None:
    with pytest.raises(ConfigError, match="views_total"):
        Policy({"measure": {"min_empirical_privacy": 0.5}})


def save_own(folder: Path, policy: str) -> list[str]:
    """Write texts and a policy, and return the arguments that name them."""
    rows = [{"text": " ".join(WORDS[i : i + 5]), "label": i % 2} for i in range(len(WORDS) - 5)]
    data = folder / "own.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    path = folder / "owner.toml"
    path.write_text(policy)
    path.chmod(0o600)
    home = ["--home", str(folder / "home"), "--json", str(folder / "found.json")]
    return [str(path), "--data", str(data), "--label-column", "label", *home]


def test_playing_the_lying_server_by_hand(tmp_path: Path, tiny: tuple[Path, Any]) -> None:
    loose = '[noise]\nmechanisms = ["dchi"]\nmin_ratio = 0.3\n[cti]\nmax_share = 0.0\n'
    loose += '[labels]\nprotection = ["randomised-response", "max-norm"]\nmax_epsilon = 1.0\n'
    for policy, code in ((loose, 1), (loose + FLOOR + "epochs_per_run = 2\n", 0)):
        args = save_own(
            tmp_path, policy.replace("[measure]", "[measure]\nmax_label_recovery = 0.8")
        )
        told = CliRunner().invoke(cli, ["attack", "policy", *args, "--model", str(tiny[0])])
        assert told.exit_code == code, (told.output, told.exception)
        found = json.loads((tmp_path / "found.json").read_text())
        tried = [row for row in found if "read" in row]
        assert {row["bottom"] for row in tried} == {"as it is", FAR, LOUD}
        assert {row["offer"] for row in tried} == {"dchi, randomised-response", "dchi, max-norm"}
        assert max(row["read"] for row in tried if row["of"] == "tokens") > 0.5
        assert any(row["too much"] for row in tried) is (code == 1)
        refused = {row["refused"] for row in tried}
        assert ("measure.min_empirical_privacy" in refused) is (code == 0)


def test_measuring_by_hand(tmp_path: Path, tiny: tuple[Path, Any]) -> None:
    own = save_own(tmp_path, FLOOR + '[labels]\nprotection = ["randomised-response"]\n')
    args = ["policy", "measure", *own, "--model", str(tiny[0])]
    args += ["--set", "privacy.mechanism=dchi"]
    for ratio, code in ((0.2, 1), (80.0, 0)):
        told = CliRunner().invoke(cli, [*args, "--set", f"privacy.noise-ratio={ratio}"])
        assert told.exit_code == code, told.output
        assert isinstance(told.exception, (SystemExit, type(None))), told.exception
        assert "contextual" in told.stdout
        found = json.loads((tmp_path / "found.json").read_text())
        assert [f["rule"].startswith("measure.") for f in found] == [True, True]
        assert (found[0]["value"] < 0.6) is (code == 1)
