"""An owner's rules: what is refused, that it is named, and that nothing gets around it."""

from __future__ import annotations

import math
import os
import re
import sys
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, PolicyError
from fedsplit.owners.app_digest import digest_of_app, running_app
from fedsplit.owners.home import OwnerHome
from fedsplit.owners.ledger import Ledger
from fedsplit.owners.noise_ratio import noise_norm, noise_ratio, too_clear
from fedsplit.owners.outbox import Outbox, Trip
from fedsplit.owners.policy import RULES, Asked, Policy, refuse
from fedsplit.owners.policy_text import TEMPLATE, WORDS, openings, restrictions
from fedsplit.privacy import MECHANISMS, build
from fedsplit.privacy.mechanism import Mechanism
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.wire.frames import Kind

DIGEST = "ab" * 32
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


def policy(text: str) -> Policy:
    return Policy.parse(text.encode())


def flat(**overrides: Any) -> dict[str, Any]:
    """Return a run's settings; ``train__rounds=2`` is ``train.rounds``."""
    base: dict[str, Any] = {"privacy.mechanism": "dchi", "privacy.eta": 8.0}
    base |= {k.replace("__", ".").replace("_", "-"): v for k, v in overrides.items()}
    return dict(RunConfig.from_flat(base).to_flat())


def broken(rules: Policy, asked: Asked) -> list[str]:
    return [breach.rule for breach in rules.settings_breaches(asked, NOW)]


# ---- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[noise]\nmax_eta = nan", r"noise\.max_eta=nan: must be a number in \(0, inf\)"),
        ("[noise]\nmax_eta = inf", r"noise\.max_eta=inf: must be"),
        ("[noise]\nmax_eta = -1", r"noise\.max_eta=-1: must be"),
        ("[noise]\nmax_eta = 0", r"noise\.max_eta=0: must be"),
        ('[noise]\nmax_eta = "10"', r"noise\.max_eta='10': must be"),
        ("[noise]\nmax_eta = true", r"noise\.max_eta=True: must be"),
        ("[noise]\nmin_ratio = nan", r"noise\.min_ratio=nan: must be"),
        ("[noise]\nmechanisms = []", r"noise\.mechanisms=\[\]: must be a list"),
        ('[noise]\nmechanisms = "dchi"', r"noise\.mechanisms='dchi': must be a list"),
        ("[noise]\nmechanisms = [1]", r"noise\.mechanisms=1: must be"),
        ("[noise]\neta = 1", r"noise\.eta=1: must be a known rule; \[noise\] has mechanisms"),
        ("[nose]\neta = 1", r"nose=.*must be a table named app, budget"),
        ("max_eta = 1", r"max_eta=1: must be a table named"),
        ("noise = 1", r"noise=1: must be a table: \[noise\]"),
        ("[cti]\nmax_share = 1.5", r"cti\.max_share=1\.5: must be a number in \[0, 1\]"),
        ("[cti]\nmin_rho = -0.1", r"cti\.min_rho=-0\.1: must be"),
        ("[budget]\nrounds = 2.0", r"budget\.rounds=2\.0: must be an integer >= 1"),
        ("[budget]\nrounds = 0", r"budget\.rounds=0: must be"),
        ("[budget]\nbytes_total = -5", r"budget\.bytes_total=-5: must be"),
        ("[budget]\nsessions_per_day = true", r"budget\.sessions_per_day=True: must be"),
        ('[model]\nbottom = ["thawed"]', r"model\.bottom='thawed': must be one of frozen, joint"),
        ('[model]\nbottoms = ["abc"]', r"model\.bottoms='abc': must be digests"),
        ('[transport]\nallowed = ["pigeon"]', r"transport\.allowed='pigeon': must be one of"),
        ("[transport]\nown_ca = 1", r"transport\.own_ca=1: must be true or false"),
        (
            '[valid]\nnot_after = "2026-01-01"',
            r"valid\.not_after='2026-01-01': must be a TOML date",
        ),
        ("[valid]\nnot_after = 2026-01-01T00:00:00", r"valid\.not_after=.*with an offset"),
        (
            "[valid]\nnot_before = 2026-02-01\nnot_after = 2026-01-01",
            r"valid\.not_after=.*after valid\.not_before",
        ),
        ('[app]\ndigest = "12"', r"app\.digest='12': must be 64 hexadecimal digits"),
        ("[noise", r"must be TOML"),
        ("[noise]\nmax_eta = 1\nmax_eta = 2", r"must be TOML"),
    ],
)
def test_a_policy_that_is_none_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        policy(text)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_policy_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "owner.toml"
    path.write_text("")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=r"mode='0\d+': must be not writable for others"):
        Policy.load(path)
    path.chmod(0o644)  # others may read it
    assert Policy.load(path).rules == {}


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a readable file"):
        Policy.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="must be a"):
        Policy.load(tmp_path)
    (tmp_path / "long.toml").write_text("#" * (1 << 17))
    (tmp_path / "long.toml").chmod(0o600)
    with pytest.raises(ConfigError, match="bytes=131072: must be <= 65536"):
        Policy.load(tmp_path / "long.toml")


def test_which_policy_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str, rounds: int) -> Path:
        path = tmp_path / name
        path.write_text(f"[budget]\nrounds = {rounds}")
        path.chmod(0o600)
        return path

    monkeypatch.delenv("FEDSPLIT_POLICY", raising=False)
    home = OwnerHome(tmp_path)
    assert home.policy({}).rules == {}
    write("owner.toml", 1)
    assert home.policy({})["budget.rounds"] == 1
    monkeypatch.setenv("FEDSPLIT_POLICY", str(write("machine.toml", 2)))
    assert home.policy({})["budget.rounds"] == 2
    assert home.policy({"policy": str(write("node.toml", 3))})["budget.rounds"] == 3


def test_a_policy_that_cannot_be_used_lets_nothing_out(tmp_path: Path) -> None:
    home = OwnerHome(tmp_path)
    (tmp_path / "owner.toml").symlink_to(tmp_path / "gone.toml")  # there, and unreadable
    for node in ({}, {"policy": str(tmp_path / "other.toml")}):
        with pytest.raises(PolicyError, match="its own log says why") as caught:
            home.policy(node)
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("key", ["policy", "session.policy", "privacy.policy", "labels.policy"])
def test_the_run_config_names_no_policy(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key.partition('.')[2] or key}|unknown"):
        RunConfig.from_flat({key: ""})


# ---- settings -----------------------------------------------------------------------------------

SETTINGS_CASES: list[tuple[str, Any, Any, Any]] = [
    # rule, its bound as TOML, settings that just keep it, settings that break it
    ("noise.max_eta", "8.0", {}, {"privacy__eta": 8.001}),
    ("noise.max_eta", "8.0", {}, {"privacy__mechanism": "none", "privacy__eta": 0.0}),
    ("noise.mechanisms", '["dchi"]', {}, {"privacy__mechanism": "none", "privacy__eta": 0.0}),
    (
        "noise.min_ratio",
        "2",
        {"privacy__eta": 0.0, "privacy__noise_ratio": 2.0},
        {"privacy__eta": 0.0, "privacy__noise_ratio": 1.99},
    ),
    ("noise.min_ratio", "2", {}, {"privacy__mechanism": "none", "privacy__eta": 0.0}),
    ("model.names", '["a/b"]', {"model__name": "a/b"}, {"model__name": "a/c"}),
    ("model.bottom", '["frozen"]', {}, {"split__bottom": "joint"}),
    ("model.min_k", "2", {"split__k": 2}, {"split__k": 1}),
    ("model.max_tokens", "32", {"model__max_tokens": 32}, {"model__max_tokens": 33}),
    (
        "labels.protection",
        '["client-head"]',
        {"labels__protection": "client-head+max-norm"},
        {"labels__protection": "max-norm"},
    ),
    (
        "labels.max_epsilon",
        "1.5",
        {"labels__protection": "randomised-response", "labels__epsilon": 1.5},
        {"labels__protection": "randomised-response", "labels__epsilon": 1.6},
    ),
    (
        "cti.max_share",
        "0.01",
        {"privacy__cti": "purity", "privacy__cti_max_share": 0.01},
        {"privacy__cti": "purity", "privacy__cti_max_share": 0.02},
    ),
    ("cti.max_share", "0", {}, {"privacy__cti": "purity"}),
    (
        "cti.min_rho",
        "0.3",
        {"privacy__cti": "purity", "privacy__cti_rho": 0.3},
        {"privacy__cti": "purity", "privacy__cti_rho": 0.0},
    ),
    ("budget.rounds", "3", {"train__rounds": 3}, {"train__rounds": 4}),
    ("budget.epochs_per_run", "6", {"train__epochs": 2}, {"train__epochs": 3}),
    ("budget.epochs_per_bottom", "6", {"train__epochs": 2}, {"train__epochs": 3}),
    ("budget.views_per_bottom", "3", {"split__bottom": "joint"}, {"train__rounds": 4}),
    ("budget.views_total", "3", {"split__bottom": "joint"}, {"train__rounds": 4}),
    ("transport.allowed", '["stream"]', {}, {"session__transport": "messages"}),
]


@pytest.mark.parametrize(("rule", "bound", "kept", "over"), SETTINGS_CASES)
def test_each_rule_is_kept_at_its_bound_and_named_beyond(
    rule: str, bound: str, kept: dict[str, Any], over: dict[str, Any]
) -> None:
    table, key = rule.split(".")
    rules = policy(f"[{table}]\n{key} = {bound}")
    if rule.startswith("budget.views"):
        over = kept | over
    assert broken(rules, Asked(flat(**kept))) == []
    assert broken(rules, Asked(flat(**over))) == [rule]
    with pytest.raises(PolicyError, match=rf"owner's policy: {rule}: asked .*, must be "):
        refuse(rules.settings_breaches(Asked(flat(**over)), NOW))
    assert broken(Policy({}), Asked(flat(**over))) == []


def test_what_the_offer_says_counts_beside_the_settings() -> None:
    rules = policy(f'[model]\nbottoms = ["{DIGEST}"]')
    assert broken(rules, Asked(flat(), bottom=DIGEST)) == []
    assert broken(rules, Asked(flat(), bottom="cd" * 32)) == ["model.bottoms"]
    rules = policy('[transport]\nallowed = ["stream"]')
    assert broken(rules, Asked(flat(), transport="messages")) == ["transport.allowed"]
    rules = policy("[transport]\nown_ca = true")
    assert broken(rules, Asked(flat())) == ["transport.own_ca"]
    assert broken(rules, Asked(flat(), own_ca=True)) == []
    rules = policy("[budget]\nrounds = 3")
    assert broken(rules, Asked(flat(), round=4)) == ["budget.rounds"]  # whatever was announced
    rules = policy(f'[app]\ndigest = "{DIGEST}"')
    assert broken(rules, Asked(flat(), app_digest=DIGEST)) == []
    for other in ("cd" * 32, ""):  # an app that is not visible is not the pinned one
        assert broken(rules, Asked(flat(), app_digest=other)) == ["app.digest"]


def test_dates_are_whole_days_in_utc() -> None:
    rules = policy("[valid]\nnot_before = 2026-03-01\nnot_after = 2026-03-31")
    start, end = datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 4, 1, tzinfo=UTC)
    tick = timedelta(microseconds=1)
    asked = Asked(flat())
    for moment, rule in (
        (start - tick, ["valid.not_before"]),
        (start, []),
        (end - tick, []),
        (end, ["valid.not_after"]),
    ):
        assert [b.rule for b in rules.settings_breaches(asked, moment)] == rule


@settings(max_examples=100, deadline=None)
@given(
    asked=st.fixed_dictionaries(
        {
            "privacy__eta": st.floats(0.1, 1e3),
            "split__k": st.integers(0, 12),
            "train__rounds": st.integers(1, 50),
            "model__max_tokens": st.integers(1, 512),
        }
    )
)
def test_no_rule_makes_another_weaker(asked: dict[str, Any]) -> None:
    """All rules together refuse exactly what one of them refuses alone."""
    texts = {
        "noise.max_eta": "[noise]\nmax_eta = 10",
        "model.min_k": "[model]\nmin_k = 3",
        "budget.rounds": "[budget]\nrounds = 20",
        "model.max_tokens": "[model]\nmin_k = 3\nmax_tokens = 128",
    }
    alone = {r for text in texts.values() for r in broken(policy(text), Asked(flat(**asked)))}
    whole = policy("[noise]\nmax_eta=10\n[model]\nmin_k=3\nmax_tokens=128\n[budget]\nrounds=20")
    assert set(broken(whole, Asked(flat(**asked)))) == alone


# ---- mechanisms as they were built --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mechanism", "parameters", "rules"),
    [
        ("max_eta = 5", "dchi", {"eta": 5.0}, []),
        ("max_eta = 5", "dchi", {"eta": 5.1}, ["noise.max_eta"]),
        ("max_eta = 5", "nearest-token", {"eta": 5.1}, ["noise.max_eta"]),
        # Another mechanism, or one that nobody knows, is no way around a bound on eta.
        ("max_eta = 5", "gaussian", {"epsilon": 1e6}, ["noise.max_eta"]),
        ("max_eta = 5", "pac", {"budget": 1e6}, ["noise.max_eta"]),
        ("max_eta = 5", "new", {}, ["noise.max_eta"]),
        ("max_eta = 5", "none", {}, ["noise.max_eta"]),
        ("max_eta = 5\nmax_epsilon = 1", "gaussian", {"epsilon": 1.0}, []),
        ("max_eta = 5\nmax_epsilon = 1", "gaussian", {"epsilon": 1.1}, ["noise.max_epsilon"]),
        ("max_nats = 0.5", "pac", {"budget": 0.6}, ["noise.max_nats"]),
        ('mechanisms = ["dchi"]', "gaussian", {"epsilon": 0.1}, ["noise.mechanisms"]),
        ("min_ratio = 2", "new", {}, ["noise.min_ratio"]),
    ],
)
def test_what_was_really_built_is_judged(
    text: str, mechanism: str, parameters: dict[str, float], rules: list[str]
) -> None:
    found = policy(f"[noise]\n{text}").mechanism_breaches(mechanism, parameters, None)
    assert [breach.rule for breach in found] == rules


class Embedding(nn.Module):
    """A bottom whose vectors have a given length."""

    def __init__(self, length: float, width: int = 48, vocab: int = 2048) -> None:
        super().__init__()
        self.vocab, self.k = vocab, 0
        rows = torch.randn(vocab, width, generator=torch.Generator().manual_seed(0))
        self.rows = rows / rows.norm(dim=1, keepdim=True) * length

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.rows[ids]


def mechanisms(width: int) -> list[Mechanism]:
    covariance = torch.diag(torch.linspace(0.1, 2.0, width, dtype=torch.float64))
    return [
        build("dchi", eta=6.0),
        build("gaussian", epsilon=5.0, delta=1e-5, clip=3.0),
        build("pac", budget=4.0, covariance=covariance),
        build("none"),
    ]


def test_noise_is_as_long_as_it_is_said_to_be() -> None:
    hidden = torch.zeros(600, 48)
    for mechanism in mechanisms(48):
        stream = OwnerSecret.for_simulation(0, "x").stream(mechanism.name)
        found = float(mechanism.privatise(hidden, stream).norm(dim=1).mean())
        assert found == pytest.approx(noise_norm(mechanism, 48), rel=0.05)
    assert set(MECHANISMS) == {m.name for m in mechanisms(48)} | {"nearest-token"}


def test_an_eta_is_worth_what_the_bottom_makes_of_it() -> None:
    dchi = build("dchi", eta=6.0)
    assert noise_ratio(dchi, Embedding(4.0), 2048) == pytest.approx(2.0)
    assert noise_ratio(dchi, Embedding(400.0), 2048) == pytest.approx(0.02)
    # A small clip shortens signal and noise alike: the ratio stays what epsilon makes it.
    ratios = [
        noise_ratio(build("gaussian", epsilon=50.0, delta=1e-5, clip=clip), Embedding(4.0), 2048)
        for clip in (4.0, 4e-3, 4e-6)
    ]
    assert ratios == pytest.approx([ratios[0]] * 3)


@pytest.mark.parametrize("width", [16, 48, 384])
@pytest.mark.parametrize("ratio", [0.5, 2.0, 8.0])
def test_rows_are_refused_when_they_are_longer_than_the_noise_explains(
    width: int, ratio: float
) -> None:
    bottom = Embedding(4.0, width)
    mechanism = build("dchi", eta=width / (ratio * 4.0))
    length = noise_norm(mechanism, width)
    assert length is not None
    for seed in range(40):
        stream = OwnerSecret.for_simulation(seed, "x").stream("rows")
        ids = torch.randint(0, 2048, (64,), generator=torch.Generator().manual_seed(seed))
        clean = bottom.rows[ids]
        assert not too_clear(mechanism.privatise(clean, stream), length, ratio)
        # The same bottom, a hundred times as long on this very text.
        assert too_clear(mechanism.privatise(100 * clean, stream), length, ratio)


def outbox(rules: Policy) -> Outbox:
    trip: Any = SimpleNamespace(labels={})
    return Outbox(SimpleNamespace(), rules, trip, OwnerSecret.for_simulation(0, "x"))  # type: ignore[arg-type]


def owner(mechanism: Mechanism, **parts: Any) -> Any:
    perturber = SimpleNamespace(mechanism=mechanism, cti=None, rho=1.0)
    perturber.__dict__.update(parts.pop("perturber", {}))
    samples = SimpleNamespace(lengths=parts.pop("lengths", [3, 9]))
    return SimpleNamespace(bottom=Embedding(4.0), perturber=perturber, samples=samples, **parts)


@pytest.mark.parametrize(
    ("text", "parts", "rule"),
    [
        ("[noise]\nmin_ratio = 2.1", {}, "noise.min_ratio"),
        ("[noise]\nmax_eta = 5", {}, "noise.max_eta"),
        ("[model]\nmin_k = 1", {}, "model.min_k"),
        ("[model]\nmax_tokens = 8", {}, "model.max_tokens"),
        (
            "[cti]\nmax_share = 0.01",
            {"perturber": {"cti": SimpleNamespace(running_share=0.02), "rho": 0.5}},
            "cti.max_share",
        ),
        (
            "[cti]\nmin_rho = 0.6",
            {"perturber": {"cti": SimpleNamespace(running_share=0.0), "rho": 0.5}},
            "cti.min_rho",
        ),
    ],
)
def test_the_built_owner_is_checked_whatever_the_settings_said(
    text: str, parts: dict[str, Any], rule: str
) -> None:
    with pytest.raises(PolicyError, match=rule):
        outbox(policy(text)).attach(owner(build("dchi", eta=6.0), **parts))
    outbox(policy("[noise]\nmin_ratio = 2.0\nmax_eta = 6")).attach(owner(build("dchi", eta=6.0)))


def test_pieces_of_a_text_being_generated_are_one_view_each(tmp_path: Path) -> None:
    """The same token after another text is other content, not another noise of the same one."""
    trip = Trip(7, 0, "predict", "x", DIGEST, {})
    box = Outbox(
        Ledger(tmp_path),
        policy("[budget]\nviews_total = 1"),
        trip,
        OwnerSecret.for_simulation(0, "x"),
    )
    ids = (torch.tensor([5, 6]), torch.tensor([9]), torch.tensor([9]))
    samples: Any = type("Samples", (), {"ids": ids, "lengths": [2, 1, 1], "__len__": len})()
    mechanism = build("dchi", eta=2.0)
    perturber = SimpleNamespace(mechanism=mechanism, cti=None, rho=1.0, representation_id="b:0")
    generating: Any = SimpleNamespace(
        bottom=Embedding(4.0),
        perturber=perturber,
        samples=samples,
        views=[0, 12345, 67890],
        settings=SimpleNamespace(joint=False),
    )
    box.attach(generating)
    for step, piece in enumerate(ids):
        header = {"step": step, "slots": [step], "fresh": [step], "lengths": [len(piece)]}
        header |= {"codec": "fp32", "dim": 4, "last": False}
        line = box.record(Kind.BATCH, header, bytes(16 * len(piece)))
    assert line["cumulative"]["samples"] == 3
    assert line["cumulative"]["views"]["max"] == 1
    perturber.mechanism = build("dchi", eta=1.0)
    with pytest.raises(PolicyError, match=r"budget\.views_total: asked 2"):
        box.record(Kind.BATCH, header, bytes(16))


# ---- the app ------------------------------------------------------------------------------------


def test_a_bundle_and_its_installed_folder_have_one_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "flwr" / "apps" / "fedsplit.fedsplit.0.1.0.12345678"
    files = {"pyproject.toml": b"[project]", "strategies/server_app.py": b"app = 1"}
    bundle = tmp_path / "app.fab"
    with zipfile.ZipFile(bundle, "w") as archive:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            archive.writestr(name, content)
        archive.writestr(".info/CONTENT", "hashes")
    (folder / "strategies" / "__pycache__").mkdir()
    (folder / "strategies" / "__pycache__" / "server_app.pyc").write_bytes(b"x")
    before = digest_of_app(bundle)
    assert digest_of_app(folder) == before

    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert running_app() is None
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    assert running_app() == folder.resolve()
    (folder / "strategies" / "server_app.py").write_bytes(b"app = 2")
    assert digest_of_app(folder) != before
    with pytest.raises(ConfigError, match=r"must be a \.fab file"):
        digest_of_app(folder / "pyproject.toml")


# ---- in words -----------------------------------------------------------------------------------


def test_every_rule_has_words_and_the_template_is_a_policy() -> None:
    assert set(WORDS) == set(RULES)
    template = policy(TEMPLATE)
    # A rule that is commented out stands at the start of its line.
    active = re.sub(r"(?m)^# (?=[a-z_]+ = )", "", TEMPLATE).replace('"..."', f'"{DIGEST}"')
    full = policy(active)  # what is commented out is valid too
    missing = {"model.names", "noise.max_epsilon", "noise.max_nats"}  # of what it does not allow
    assert set(RULES) - set(full.rules) == missing
    for rules in (template, full, Policy({})):
        said = {rule for rule, _, _ in restrictions(rules)}
        assert said == set(rules.rules)
        assert not said & {rule for rule, _ in openings(rules)}
    assert len(openings(Policy({}))) == len(RULES) - 1  # no date to begin with means nothing


def test_init_and_check(tmp_path: Path) -> None:
    run = CliRunner()
    path = str(tmp_path / "owner.toml")
    assert run.invoke(app_cli, ["policy", "init", path]).exit_code == 0
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert isinstance(run.invoke(app_cli, ["policy", "init", path]).exception, ConfigError)
    told = run.invoke(app_cli, ["policy", "check", path])
    assert told.exit_code == 0
    assert "not restricted" in told.stdout
    (tmp_path / "run.toml").write_text('[privacy]\nmechanism = "dchi"\nnoise-ratio = 2.0\n')
    asked = ["policy", "check", path, "--against", str(tmp_path / "run.toml")]
    refused = run.invoke(app_cli, asked)
    assert refused.exit_code == 1
    assert "labels.protection: asked 'none'" in refused.stdout
    accepted = run.invoke(app_cli, [*asked, "--against", "labels.protection=client-head"])
    assert accepted.exit_code == 0
    assert "accepted" in accepted.stdout
    assert math.isclose(policy(TEMPLATE)["noise.min_ratio"], 2.0)
