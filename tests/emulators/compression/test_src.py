"""Rank compression: optimal error, factors where they pay, fused and transposed layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.emulators import Material, make_compressor
from fedsplit.emulators.build import build_emulator
from fedsplit.emulators.compression.linears import LowRankLinear
from fedsplit.emulators.compression.src import (
    compress_block,
    compressed_numel,
    module_of,
    read_site,
    roots_of,
)
from fedsplit.emulators.compression.svd import (
    input_root,
    truncate,
    truncate_outputs,
    truncated_rank,
)
from fedsplit.emulators.lm import logits_of
from fedsplit.emulators.planning.plan import EmulatorPlan
from fedsplit.errors import ConfigError, ModelError, UnsupportedModelError
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


def lost(matrix: torch.Tensor, low: torch.Tensor, second: torch.Tensor) -> float:
    """E ||(W - W') x||^2 with C = E x x^T."""
    gap = (matrix - low).double()
    return float((gap @ second.double() * gap).sum())


def least_lost(matrix: torch.Tensor, second: torch.Tensor, rank: int) -> float:
    """What the best matrix of that rank loses (Eckart and Young in this metric)."""
    root = torch.linalg.cholesky(second)
    return float(torch.linalg.svdvals(matrix @ root)[rank:].square().sum())


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_outputs_kept_closest_are_the_closest_of_their_rank(
    m: int, n: int, beta: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(m, n, generator=generator).double()
    few = torch.randn(n, max(1, n // 2), generator=generator).double() * 10  # some large directions
    second = few @ few.T + 0.1 * torch.eye(n)
    rank = truncated_rank(m, n, beta)
    got = truncate_outputs(matrix, torch.linalg.cholesky(second), rank)
    least = least_lost(matrix, second, rank)
    reached = lost(matrix, got.dense(), second)
    assert reached == pytest.approx(least, rel=1e-6, abs=1e-8 * float(second.trace()))
    assert reached <= lost(matrix, truncate(matrix, rank).dense(), second) * (1 + 1e-9) + 1e-9
    # The metric's scale says nothing, and without a metric it is the truncation of the weights.
    again = truncate_outputs(matrix, input_root(7.0 * second, 0.0), rank)
    torch.testing.assert_close(again.dense(), got.dense(), atol=1e-6, rtol=1e-6)
    plain = truncate_outputs(matrix, torch.eye(n), rank)
    torch.testing.assert_close(plain.dense(), truncate(matrix, rank).dense(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("largest", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("rank", [8, 24, 48])
def test_damping_costs_little_where_few_directions_have_most_variance(
    largest: float, rank: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 96, generator=generator).double()
    turn = torch.linalg.qr(torch.randn(96, 96, generator=generator).double()).Q
    variances = torch.logspace(0, -3, 96, dtype=torch.float64)
    variances[:2] = largest
    second = turn * variances @ turn.T
    got = truncate_outputs(matrix, input_root(second), rank)
    least = least_lost(matrix, second, rank)
    assert lost(matrix, got.dense(), second) <= 1.02 * least
    assert lost(matrix, truncate(matrix, rank).dense(), second) > 2 * least


def test_directions_that_the_text_did_not_have_are_not_given_up() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, seen = (torch.randn(*s, generator=generator).double() for s in ((24, 32), (32, 6)))
    got = truncate_outputs(matrix, input_root(seen @ seen.T), 16)
    assert lost(matrix, got.dense(), seen @ seen.T) < 1e-3 * float(seen.square().sum())
    # Ten ranks are left for what was not seen.
    unseen = torch.eye(32).double() - seen @ torch.linalg.pinv(seen)
    assert lost(matrix, got.dense(), unseen) < 0.2 * lost(matrix, 0 * matrix, unseen)


def test_a_metric_of_nothing_not_finite_or_of_another_size() -> None:
    matrix = torch.randn(5, 4)
    nothing = truncate_outputs(matrix, input_root(torch.zeros(4, 4)), 2)
    torch.testing.assert_close(nothing.dense(), truncate(matrix, 2).dense())
    negative = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1e-9]))  # rounding
    assert torch.isfinite(truncate_outputs(matrix, input_root(negative), 2).dense()).all()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match="must be finite"):
            input_root(torch.full((4, 4), bad))
    with pytest.raises(ConfigError, match="root"):
        truncate_outputs(matrix, torch.eye(5), 2)
    with pytest.raises(ConfigError, match="rank"):
        truncate_outputs(matrix, torch.eye(4), 5)


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


@pytest.mark.parametrize("name", PROBED)
def test_each_projections_outputs_stay_closer_than_by_its_weights(name: str) -> None:
    model = tiny(name)
    layout = layout_of(model.config)
    roots = roots_of(model, layout, [2, 4], tokens(), ffn=True, batch_size=5)
    before = _effective(probe(model).blocks[2], layout)
    found = {}
    seconds = {role: root @ root.T for role, root in roots[2].items()}
    for truncation, metric in (("weights", None), ("outputs", roots[2])):

        def edit(position: int, block: Any, metric: Any = metric) -> None:
            if position == 2:
                compress_block(block, layout, 0.6, ffn=True, roots=metric)

        emulator = build_emulator(model, PLAN, edit=edit)
        after = _effective(probe(emulator.model).blocks[2], layout)
        found[truncation] = {r: lost(before[r], after[r], seconds[r]) for r in before}
    for role in before:
        assert found["outputs"][role] < found["weights"][role] * (1 + 1e-3), role
    assert sum(found["outputs"].values()) < 0.95 * sum(found["weights"].values())


@pytest.mark.parametrize("name", PROBED)
def test_moments_are_of_what_enters_each_projection(name: str) -> None:
    model = tiny(name)
    layout = layout_of(model.config)
    roots = roots_of(model, layout, [3], tokens(), ffn=True, batch_size=5)[3]
    block = probe(model).blocks[3]
    for role, site in layout.sites().items():
        if role not in roots:
            continue
        seen: list[torch.Tensor] = []
        layer = block.get_submodule(module_of(site))
        with layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])):
            logits_of(model, tokens())
        x = seen[0].detach().flatten(0, -2).double()
        largest = torch.linalg.eigvalsh(x.T @ x)[-1]
        expected = input_root(x.T @ x)
        both = (root @ root.T * largest for root in (roots[role], expected))
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
    assert set(roots) >= set("qkvo")


def test_a_projection_that_is_not_run_as_a_layer_is_refused() -> None:
    model = tiny()
    layout = layout_of(model.config)
    block = probe(model).blocks[3]
    attention = block.self_attn
    block.self_attn.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    with pytest.raises(UnsupportedModelError, match="block 3"):
        roots_of(model, layout, [3], tokens())
    del attention.forward


@pytest.mark.parametrize("compressor", ["scaleot", "withholding"])
def test_compressors_keep_outputs_closest_when_asked(compressor: str) -> None:
    model, ids = tiny(), tokens(40)
    material = Material(tokens=ids)

    def divergence(truncation: str) -> float:
        made = make_compressor(compressor, adapters=(0, 5), beta=0.5, truncation=truncation)
        assert made.streams == (compressor == "scaleot" and truncation == "weights")
        emulator = made.build(model, material)
        with torch.no_grad():
            ours = torch.log_softmax(logits_of(model, ids), -1)
            theirs = torch.log_softmax(logits_of(emulator.model, ids), -1)
        return float((ours.exp() * (ours - theirs)).sum(-1).mean())

    assert divergence("outputs") < divergence("weights")
    with pytest.raises(ConfigError, match="truncation='x'"):
        make_compressor(compressor, adapters=(0, 5), truncation="x")
    asked = make_compressor(compressor, adapters=(0, 5), beta=0.5, truncation="outputs")
    with pytest.raises(ConfigError, match="tokens to calibrate"):
        asked.build(model, Material())


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
