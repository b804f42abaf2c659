"""An owner's rules against what was really built and sent: mechanisms, noise, the check."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsplit.errors import PolicyError
from fedsplit.owners.ledger.chain import Ledger, read_ledger
from fedsplit.owners.ledger.check import DisclosureCheck
from fedsplit.owners.ledger.disclosure import (
    Announcement,
    Averages,
    Outgoing,
    Representations,
    Source,
    Words,
)
from fedsplit.owners.ledger.session import SessionFacts
from fedsplit.owners.policy.noise_ratio import too_clear
from fedsplit.owners.policy.rules import Policy
from fedsplit.owners.reports import SessionReport
from fedsplit.owners.samples import piece_identity, text_identity
from fedsplit.privacy import MECHANISMS, build
from fedsplit.privacy.mechanisms.base import Mechanism
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.wire.frames import Kind

DIGEST = "ab" * 32


def policy(text: str) -> Policy:
    return Policy.parse(text.encode())


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
    axis = torch.eye(width)[:, :1]
    return [
        build("dchi", eta=6.0),
        build("gaussian", epsilon=5.0, delta=1e-5, clip=3.0),
        build("pac", budget=4.0, covariance=covariance),
        build("shaped", epsilon=5.0, delta=1e-5, clip=3.0, spare=1.0, directions=axis),
        build("none"),
    ]


def test_noise_is_as_long_as_it_is_said_to_be() -> None:
    hidden = torch.zeros(600, 48)
    for mechanism in mechanisms(48):
        stream = OwnerSecret.for_simulation(0, "x").stream(mechanism.name)
        found = float(mechanism.privatise(hidden, stream).norm(dim=1).mean())
        assert found == pytest.approx(mechanism.mean_noise_norm(48), rel=0.05)
    assert set(MECHANISMS) == {m.name for m in mechanisms(48)} | {"nearest-token"}


def test_an_eta_is_worth_what_the_bottom_makes_of_it() -> None:
    dchi = build("dchi", eta=6.0)
    assert dchi.noise_ratio(Embedding(4.0), 2048) == pytest.approx(2.0)
    assert dchi.noise_ratio(Embedding(400.0), 2048) == pytest.approx(0.02)
    # A small clip shortens signal and noise alike: the ratio stays what epsilon makes it.
    ratios = [
        build("gaussian", epsilon=50.0, delta=1e-5, clip=clip).noise_ratio(Embedding(4.0), 2048)
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
    length = mechanism.mean_noise_norm(width)
    assert length is not None
    for seed in range(40):
        stream = OwnerSecret.for_simulation(seed, "x").stream("rows")
        ids = torch.randint(0, 2048, (64,), generator=torch.Generator().manual_seed(seed))
        clean = bottom.rows[ids]
        assert not too_clear(mechanism.privatise(clean, stream), length, ratio)
        # The same bottom, a hundred times as long on this very text.
        assert too_clear(mechanism.privatise(100 * clean, stream), length, ratio)


def check(home: Path, rules: Policy, mode: str = "train") -> DisclosureCheck:
    strategy = "serving" if mode == "predict" else "split-tuning"
    session = SessionFacts(7, "x", 0, mode, DIGEST, strategy=strategy)
    return DisclosureCheck(Ledger(home), session, rules, OwnerSecret.for_simulation(0, "x"))


def perturber(mechanism: Mechanism, **parts: Any) -> Any:
    known = {"cti": None, "rho": 1.0, "representation_id": "b:0"} | parts
    return SimpleNamespace(mechanism=mechanism, **known)


def ready(mechanism: Mechanism, longest: int = 9, **parts: Any) -> Outgoing:
    """Return the frame that announces an owner's batches."""
    source = Source(Embedding(4.0), perturber(mechanism, **parts), longest, 12)
    header = {"batches": 1, "samples": 2, "mechanism": ""}
    return Outgoing(Kind.READY, header, Announcement(batches=1, source=source))


@pytest.mark.parametrize(
    ("text", "parts", "rule"),
    [
        ("[noise]\nmin_ratio = 2.1", {}, "noise.min_ratio"),
        ("[noise]\nmax_eta = 5", {}, "noise.max_eta"),
        ("[model]\nmin_k = 1", {}, "model.min_k"),
        ("[model]\nmax_tokens = 8", {}, "model.max_tokens"),
        (
            "[cti]\nmax_share = 0.01",
            {"cti": SimpleNamespace(running_share=0.02), "rho": 0.5},
            "cti.max_share",
        ),
        (
            "[cti]\nmin_rho = 0.6",
            {"cti": SimpleNamespace(running_share=0.0), "rho": 0.5},
            "cti.min_rho",
        ),
    ],
)
def test_the_built_owner_is_checked_whatever_the_settings_said(
    tmp_path: Path, text: str, parts: dict[str, Any], rule: str
) -> None:
    with pytest.raises(PolicyError, match=rule):
        check(tmp_path, policy(text)).record(ready(build("dchi", eta=6.0), **parts))
    assert list(read_ledger(tmp_path)) == []
    rules = policy("[noise]\nmin_ratio = 2.0\nmax_eta = 6")
    check(tmp_path, rules).record(ready(build("dchi", eta=6.0)))


def piece(mechanism: Mechanism, ids: list[int], step: int, after: list[int]) -> Outgoing:
    """Return the frame with one piece of a text that is being generated."""
    text = piece_identity(text_identity("prompt"), after)
    noise = json.dumps([mechanism.describe(), ids, after]).encode()
    shown = Representations(
        used=1,
        epochs=None,
        texts=(text,),
        noises=(hashlib.sha256(noise).digest(),),
        rows=torch.ones(len(ids), 4),
        touched=0,
        source=Source(Embedding(4.0), perturber(mechanism), len(ids), len(ids)),
    )
    header = {"step": step, "slots": [step], "fresh": [step], "lengths": [len(ids)]}
    return Outgoing(Kind.BATCH, header | {"codec": "fp32", "dim": 4, "last": False}, shown)


def test_pieces_of_a_text_being_generated_are_one_view_each(tmp_path: Path) -> None:
    """The same token after another text is other content, not another noise of the same one."""
    out = check(tmp_path, policy("[budget]\nviews_total = 1"), "predict")
    first, second = build("dchi", eta=2.0), build("dchi", eta=1.0)
    pieces = (([5, 6], []), ([9], [9]), ([9], [9, 9]))
    for step, (ids, after) in enumerate(pieces):
        out.record(piece(first, ids, step, after))
    line = list(read_ledger(tmp_path))[-1]
    assert line["cumulative"]["samples"] == 3
    assert line["cumulative"]["views"]["max"] == 1
    with pytest.raises(PolicyError, match=r"budget\.views_total: asked 2"):
        out.record(piece(second, [9], 2, [9, 9]))


def test_only_words_leave_before_the_rules_are_read(tmp_path: Path) -> None:
    out = DisclosureCheck(Ledger(tmp_path), SessionFacts(7, "x"))
    out.release(Words(kind="name", text="x"))
    with pytest.raises(PolicyError, match="ready must not leave"):
        out.record(ready(build("none")))
    with pytest.raises(PolicyError, match="metrics must not leave"):
        out.release(Averages(metrics={"loss": 1.0}, texts=9))
    assert [line["kind"] for line in read_ledger(tmp_path)] == ["name"]


@pytest.mark.parametrize(("simulated", "leave"), [("1", True), ("", False)])
def test_counts_without_any_policy_single_no_text_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated: str, leave: bool
) -> None:
    monkeypatch.setenv("FEDSPLIT_SIMULATION", simulated)
    rules, secret = Policy({}), OwnerSecret.for_simulation(0, "x")
    fine = {"loss": 1.0, "confusion-0-0": 12.0, "confusion-1-1": 30.0}
    alone = {"loss": 1.0, "confusion-0-0": 41.0, "confusion-1-1": 1.0}
    report = SessionReport(rules, secret)
    assert report.private(fine) == fine
    assert report.private(alone) == (alone if leave else {"loss": 1.0})
    with Ledger(tmp_path) as ledger:
        out = DisclosureCheck(
            ledger,
            SessionFacts(7, "x", mode="evaluate", digest=DIGEST, strategy="split-tuning"),
            rules,
            secret,
        )
        out.release(Averages(metrics=fine, texts=42))
        if leave:
            out.release(Averages(metrics=alone, texts=42))
        else:
            with pytest.raises(PolicyError, match=r"reports\.counts"):
                out.release(Averages(metrics=alone, texts=42))
