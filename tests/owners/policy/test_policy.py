"""An owner's rules: what is refused, that it is named, and that nothing gets around it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, PolicyError
from fedsplit.owners.home import OwnerHome
from fedsplit.owners.policy.rules import Asked, Policy, refuse
from fedsplit.settings import read_settings

DIGEST = "ab" * 32
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


def policy(text: str) -> Policy:
    return Policy.parse(text.encode())


def flat(**overrides: Any) -> dict[str, Any]:
    """Return a run's settings; ``train__rounds=2`` is ``train.rounds``."""
    base: dict[str, Any] = {"privacy.mechanism": "dchi", "privacy.eta": 8.0}
    base |= {k.replace("__", ".").replace("_", "-"): v for k, v in overrides.items()}
    return dict(read_settings(base).to_flat())


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


def test_a_mark_of_the_encoding_is_no_part_of_a_policy() -> None:
    assert policy("\ufeff[noise]\nmax_eta = 1").rules == policy("[noise]\nmax_eta = 1").rules


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
