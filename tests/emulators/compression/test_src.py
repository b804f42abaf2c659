"""Rank compression: optimal error, factors where they pay, fused and transposed layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.emulators.build import build_emulator
from fedsplit.emulators.compression.linears import LowRankLinear
from fedsplit.emulators.compression.src import compress_block, compressed_numel, read_site
from fedsplit.emulators.compression.svd import truncate, truncated_rank
from fedsplit.emulators.lm import logits_of
from fedsplit.emulators.planning.plan import EmulatorPlan
from fedsplit.errors import ConfigError, UnsupportedModelError
from fedsplit.models.anatomy import probe
from fedsplit.models.layout.projections import dense_layout_of, layout_of
from tests.emulators.emulator_families import FAMILIES, LAYERS, UNPROBED, tiny, tokens

PROBED = sorted(set(FAMILIES) - UNPROBED)
PLAN = EmulatorPlan(("adapter", *["compress"] * (LAYERS - 1)), beta=0.6)


@pytest.mark.parametrize(
    ("shape", "beta", "rank"),
    [
        ((4, 6), 0.0, 4),
        ((4, 6), 1.0, 1),
        ((4, 6), 0.5, 2),
        ((10, 10), 0.9, 1),
        ((10, 10), 0.1, 9),
        ((7, 9), 0.5, 3),
        ((256, 128), 0.6, 51),
        ((1, 5), 0.0, 1),
    ],
)
def test_the_rank_is_the_papers(shape: tuple[int, int], beta: float, rank: int) -> None:
    assert truncated_rank(*shape, beta) == rank


@given(st.integers(1, 24), st.integers(1, 24), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_error_is_the_full_svds(m: int, n: int, beta: float, seed: int) -> None:
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).double()
    rank = truncated_rank(m, n, beta)
    got = truncate(matrix, rank)
    best = truncate(matrix, rank, "full")
    assert got.up.shape == (m, rank)
    assert got.error == pytest.approx(best.error, abs=1e-9)
    torch.testing.assert_close(got.dense(), best.dense(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(96, 200), (200, 96)])
@pytest.mark.parametrize("method", ["eigen", "randomised"])
def test_a_slowly_falling_spectrum(shape: tuple[int, int], method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(shape[0], 96, generator=generator).double()).Q
    right = torch.linalg.qr(torch.randn(shape[1], 96, generator=generator).double()).Q
    values = torch.arange(1, 97, dtype=torch.float64) ** -0.5
    matrix = left * values @ right.T
    rank = 12
    optimum = float(values[rank:].norm() / values.norm())

    got = truncate(matrix, rank, method)

    assert got.error == pytest.approx(float((matrix - got.dense()).norm() / matrix.norm()))
    bound = 1e-9 if method == "eigen" else 0.02
    assert optimum - 1e-9 <= got.error <= optimum * (1 + bound) + 1e-9
    again = truncate(matrix, rank, method)
    assert torch.equal(got.up, again.up)


def test_float32_and_half_weights() -> None:
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    best = truncate(matrix.double(), 10, "full").error
    assert truncate(matrix, 10).error == pytest.approx(best, rel=1e-5)
    half = truncate(matrix.to(torch.bfloat16), 10)
    assert half.up.dtype == torch.bfloat16
    assert half.error == pytest.approx(best, rel=0.05)
    assert truncate(torch.zeros(4, 3), 2).error == 0.0


@pytest.mark.parametrize(("rank", "method"), [(0, "auto"), (4, "auto"), (1, "fast")])
def test_rank_and_method_are_checked(rank: int, method: str) -> None:
    with pytest.raises(ConfigError):
        truncate(torch.zeros(4, 3), rank, method)


def _effective(block: Any, layout: Any) -> dict[str, torch.Tensor]:
    """The projections that the block applies, read through its own modules."""
    return {role: read_site(block, site) for role, site in layout.sites().items()}


@pytest.mark.parametrize("ffn", [False, True])
@pytest.mark.parametrize("name", PROBED)
def test_each_projection_is_its_own_truncation(name: str, ffn: bool) -> None:
    model = tiny(name)
    layout = layout_of(model.config)
    before = _effective(probe(model).blocks[2], layout)
    emulator = build_emulator(
        model, PLAN, edit=lambda _, block: compress_block(block, layout, 0.6, ffn=ffn) and None
    )
    after = _effective(probe(emulator.model).blocks[2], layout)
    for role, matrix in before.items():
        expected = matrix
        if ffn or role in "qkvo":
            rank = truncated_rank(*matrix.shape, 0.6)
            expected = truncate(matrix, rank, "full").dense()
        torch.testing.assert_close(after[role], expected, atol=2e-5, rtol=1e-4)
    saved = compressed_numel(layout, 0.6, True, ffn) * (LAYERS - 1)
    assert saved > 0
    whole = sum(p.numel() for p in model.parameters())
    assert emulator.parameter_count() == whole - saved


@pytest.mark.parametrize("beta", [0.2, 0.8])
@pytest.mark.parametrize("name", PROBED)
def test_factors_and_dense_weights_compute_the_same(name: str, beta: float) -> None:
    model = tiny(name)
    layout = layout_of(model.config)
    emulator = build_emulator(
        model, PLAN, edit=lambda _, block: compress_block(block, layout, beta) and None
    )
    factored = any(isinstance(m, LowRankLinear) for m in emulator.model.modules())
    assert factored == (beta == 0.8)
    with torch.no_grad():
        got = logits_of(emulator.model, tokens())
        for block in probe(model).blocks[1:]:
            for role in "qkvo":
                site = layout.sites()[role]
                matrix = read_site(block, site)
                low = truncate(matrix, truncated_rank(*matrix.shape, beta), "full").dense()
                stored = block.get_parameter(site.weight)
                view = stored.T if site.transposed else stored
                view[list(site.rows) if site.rows is not None else slice(None)] = low
        torch.testing.assert_close(got, logits_of(model, tokens()), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", PROBED)
def test_beta_zero_changes_no_bit(name: str) -> None:
    model = tiny(name)
    layout = layout_of(model.config)
    emulator = build_emulator(
        model, PLAN, edit=lambda _, block: compress_block(block, layout, 0.0, ffn=True) and None
    )
    with torch.no_grad():
        assert torch.equal(logits_of(emulator.model, tokens()), logits_of(model, tokens()))


def test_records_name_rank_and_error() -> None:
    model = tiny()
    records = compress_block(probe(model).blocks[1], layout_of(model.config), 0.5)
    assert [r["role"] for r in records] == ["q", "k", "v", "o"]
    assert [r["rank"] for r in records] == [16, 8, 8, 16]
    assert all(0 < r["error"] < 1 for r in records)


def test_what_cannot_be_compressed() -> None:
    model = tiny()
    with pytest.raises(ConfigError, match=r"beta=1\.5"):
        compress_block(probe(model).blocks[1], layout_of(model.config), 1.5)
    with pytest.raises(ConfigError, match="must select projections"):
        compress_block(probe(model).blocks[1], layout_of(model.config), 0.5, attention=False)
    with pytest.raises(UnsupportedModelError):
        dense_layout_of(tiny("mixtral").config)


def test_real_weights_reach_the_optimum_quickly() -> None:
    from fedsplit.models.loading import load
    from tests.emulators.emulator_families import shared

    model = load(shared("models", "gutenberg_llama_seed0"), "causal-lm").model
    layout = layout_of(model.config)
    for position in (0, 11):
        for role in "qkvo":
            matrix = read_site(probe(model).blocks[position], layout.sites()[role])
            rank = truncated_rank(*matrix.shape, 0.7)
            best = truncate(matrix, rank, "full").error
            assert truncate(matrix, rank).error <= best * (1 + 1e-5)
            assert truncate(matrix, rank, "randomised").error <= best * 1.03
