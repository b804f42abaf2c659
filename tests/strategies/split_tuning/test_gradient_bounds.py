"""Gradients of logits: honest ones pass bit for bit, others are bounded and laid to their owner."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.config import RunConfig
from fedsplit.privacy.labels.marvell import Marvell
from fedsplit.wire.codecs import decode_rows, encode_rows
from fedsplit.wire.frames import Kind
from strategies.split_tuning.gradient_bounds import GradientBounds
from tests.owners.interfere import Outgoing, tamper_with
from tests.strategies.failing import QUICK, VICTIM, warm

__all__ = ["warm"]  # a fixture that runs by itself
SQRT2 = math.sqrt(2.0)


def bounds(**settings: Any) -> GradientBounds:
    flat = {key.replace("__", ".").replace("_", "-"): v for key, v in settings.items()}
    return GradientBounds(RunConfig.from_flat(flat))


def rounded(rows: Tensor, codec: str) -> Tensor:
    return decode_rows(encode_rows(rows, codec), rows.shape, codec)


def honest(logits: Tensor, targets: Tensor, codec: str) -> Tensor:
    """What an owner returns for logits that came down with ``codec``."""
    seen = rounded(logits, codec).requires_grad_()
    loss = functional.cross_entropy(seen, targets)
    return rounded(torch.autograd.grad(loss, seen)[0], codec)


def drawn(rows: int, classes: int, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator)
    return logits, torch.randint(0, classes, (rows,), generator=generator)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("rows", "classes", "scale"),
    [(1, 2, 1.0), (16, 8, 3.0), (700, 50, 8.0), (20, 5000, 2.0), (30, 40, 60.0)],
)
def test_an_honest_gradient_is_left_as_it_is(
    codec: str, rows: int, classes: int, scale: float
) -> None:
    logits, targets = drawn(rows, classes, scale)
    gradient = honest(logits, targets, codec)
    gradient[::5] = 0.0  # rows without a target, as the last token of a text
    assert float(gradient.norm(dim=1).max()) * rows <= SQRT2 * 1.02
    bound = bounds(session__logits_codec=codec)
    found, charged = bound([("a", (gradient, float(rows)))], {"a": logits})
    assert not charged
    assert torch.equal(found[0][1][0], gradient)


def test_a_gradient_that_was_turned_around_is_not_used_and_held_against_its_owner() -> None:
    logits, targets = drawn(16, 8)
    good = honest(logits, targets, "fp32")
    sent = [("a", (good, 16.0)), ("b", (-good, 16.0)), ("c", (-4000 * good, 16.0))]
    found, charged = bounds()(sent, dict.fromkeys("abc", logits))
    rows = {name: gradient for name, (gradient, _) in found}
    assert torch.equal(rows["a"], good)
    assert float(rows["b"].abs().max()) == 0.0
    assert float(rows["c"].abs().max()) == 0.0
    assert "16 gradient rows that no label explains" in charged["b"]
    assert set(charged) == {"b", "c"}


def test_with_drawn_labels_a_row_is_cut_to_the_honest_bound() -> None:
    options = {"labels__protection": "randomised-response", "labels__debias": True}
    logits, targets = drawn(16, 8)
    good = honest(logits, targets, "fp32")
    found, charged = bounds(**options)(
        [("a", (good, 16.0)), ("b", (-4000 * good, 16.0))], dict.fromkeys("ab", logits)
    )
    assert torch.equal(found[0][1][0], good)
    norms = found[1][1][0].norm(dim=1) * 16.0
    assert float(norms.max()) <= SQRT2 * 1.021
    assert list(charged) == ["b"]
    assert "times the honest bound" in charged["b"]


@pytest.mark.parametrize("protection", ["client-head", "max-norm", "marvell"])
def test_where_no_bound_is_known_the_other_owners_give_it(protection: str) -> None:
    bound = bounds(labels__protection=protection, model__labels=2)
    generator = torch.Generator().manual_seed(1)
    rows = {name: torch.randn(16, 24, generator=generator) for name in "abcd"}
    rows["d"] = -4000 * rows["d"]
    found, charged = bound([(n, (r, 16.0)) for n, r in rows.items()], rows)
    kept = {name: gradient for name, (gradient, _) in found}
    assert all(torch.equal(kept[n], rows[n]) for n in "abc")
    peak = max(float(rows[n].norm(dim=1).max()) for n in "abc")
    assert float(kept["d"].norm(dim=1).max()) <= 2.1 * peak
    assert list(charged) == ["d"]
    alone, charged = bound([("d", (rows["d"], 16.0))], rows)
    assert torch.equal(alone[0][1][0], rows["d"])
    assert not charged


def test_honest_noise_on_gradients_is_no_outlier() -> None:
    assert Marvell.changes_gradients()
    bound = bounds(labels__protection="marvell", model__labels=2)
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        sent = [(n, (torch.randn(16, 2, generator=generator), 16.0)) for n in "abcde"]
        assert not bound(sent, {n: g for n, (g, _) in sent})[1]


def test_no_bound_is_no_bound() -> None:
    logits, targets = drawn(16, 8)
    turned = -honest(logits, targets, "fp32")
    found, charged = bounds(robust__clip=0.0)([("a", (turned, 16.0))], {"a": logits})
    assert torch.equal(found[0][1][0], turned)
    assert not charged


# ---- in a run -----------------------------------------------------------------------------------


def times(factor: float) -> Any:
    def tamper(outgoing: Outgoing) -> None:
        if outgoing.kind is Kind.GRAD:
            values = struct.unpack(f"<{len(outgoing.body) // 4}f", outgoing.body)
            outgoing.body = struct.pack(f"<{len(values)}f", *(factor * v for v in values))

    return tamper


@pytest.mark.parametrize("factor", [-1.0, -4000.0])
def test_turned_gradients_cost_the_others_nothing_and_their_owner_is_benched(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    options = QUICK | {"data__owners": 4, "train__rounds": 3, "train__bench_after": 2}
    options |= {"train__max_steps": 4, "train__bench_rounds": 1, "lineage__gate": "warn"}
    honest_run = run_locally(make_config(**options)).server["rounds"]
    tamper_with(monkeypatch, {VICTIM: times(factor)})
    rows = run_locally(make_config(**options)).server["rounds"]
    for row in rows[:2]:
        assert list(row["lineage"]["charged"]) == ["owner-1"]
        assert "no label explains" in row["train"]["charged"]["owner-1"]
    assert "no label explains" in rows[2]["train"]["benched"]["owner-1"]
    for row, good in zip(rows, honest_run, strict=True):
        assert "charged" not in good["lineage"]
        ours = {n: r["loss"] for n, r in row["train"]["metrics"]["owners"].items()}
        theirs = {n: r["loss"] for n, r in good["train"]["metrics"]["owners"].items()}
        for name in ("owner-0", "owner-2", "owner-3"):
            assert ours[name] < 1.1 * theirs[name]


def test_a_session_of_more_steps_or_larger_batches_than_the_settings_make_is_refused(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(outgoing: Outgoing) -> None:
        if outgoing.kind is Kind.READY:
            outgoing.header["batches"] = 1_000_000

    tamper_with(monkeypatch, {VICTIM: endless})
    train = run_locally(make_config(**QUICK)).server["rounds"][0]["train"]
    assert list(train["lost"]) == ["owner-1"]
    assert "READY with 1000000 batches" in train["lost"]["owner-1"]
    assert "must be <= 2" in train["lost"]["owner-1"]
