"""Alignment, unbiased CKA, AWM, aligned products and whitened invariants."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.errors import LineageError
from fedsplit.fingerprints import FINGERPRINTS, WeightView
from fedsplit.fingerprints.evasion.transforms import splice
from fedsplit.fingerprints.methods.align import align, assignment, procrustes
from fedsplit.fingerprints.methods.aligned_products import AlignedProducts
from fedsplit.fingerprints.methods.awm import balanced, kernels
from fedsplit.fingerprints.methods.cka import linear_cka, u_centred, unbiased_kernel
from fedsplit.fingerprints.methods.matching import cosine, similarities
from fedsplit.fingerprints.methods.whitened import WhitenedICS, orthonormal_rows
from fedsplit.registry import pick

Tiny = Callable[..., Any]


def test_assignment_recovers_a_signed_permutation_under_noise() -> None:
    torch.manual_seed(0)
    base = torch.randn(300, 40)
    order = torch.randperm(40)
    signs = torch.where(torch.rand(40) < 0.5, -1.0, 1.0)
    suspect = (base[:, order] * signs) + 0.3 * torch.randn(300, 40)
    found = assignment(base, suspect)
    expected = torch.zeros(40, 40, dtype=torch.float64)
    expected[torch.arange(40), order] = signs.double()
    torch.testing.assert_close(found.matrix, expected)
    assert align(base, suspect).kind == "assignment"


def test_procrustes_recovers_a_rotation_and_is_refused_to_strangers() -> None:
    torch.manual_seed(0)
    base = torch.randn(300, 40)
    turn = torch.linalg.qr(torch.randn(40, 40))[0]
    found = align(base, base @ turn)
    assert found.kind == "procrustes"
    torch.testing.assert_close(found.matrix, turn.T.double(), atol=1e-4, rtol=1e-4)
    assert procrustes(base, base).fit == pytest.approx(1.0)
    assert align(base, torch.randn(300, 40)).kind == "assignment"
    # with fewer rows than dimensions a rotation fits nearly anything
    assert align(torch.randn(20, 40), torch.randn(20, 40)).kind == "assignment"


def unbiased_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    return cosine(unbiased_kernel(x), unbiased_kernel(y))


def test_unbiased_cka_is_zero_for_strangers_where_the_biased_one_is_not() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 200), torch.randn(60, 200)
    assert linear_cka(x, y) > 0.5
    assert abs(unbiased_cka(x, y)) < 0.06
    turn = torch.linalg.qr(torch.randn(200, 200))[0]
    assert unbiased_cka(x, 3.0 * x @ turn) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(LineageError, match="same number of rows"):
        linear_cka(x, y[:50])
    with pytest.raises(LineageError, match=">= 4"):
        unbiased_kernel(x[:3])


def test_hsic_agrees_with_its_definition() -> None:
    """Song et al. 2012, eq. 3: the average over quadruples of distinct indices."""
    from itertools import permutations

    torch.manual_seed(1)
    a, b = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    k, m = a @ a.T, b @ b.T
    quads = list(permutations(range(6), 4))
    direct = sum(float(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])) for i, j, q, r in quads) / len(
        quads
    )
    assert float((u_centred(k) * u_centred(m)).sum()) / (6 * 3) == pytest.approx(direct)
    assert not u_centred(torch.full((6, 6), 0.3)).any()  # rounding is no kernel


def test_kernels_are_unbiased_cka() -> None:
    torch.manual_seed(2)
    one, two = torch.randn(12, 5), torch.randn(12, 7)
    turn = torch.linalg.qr(torch.randn(12, 12))[0]
    found = similarities(kernels({"qk": (one, two)}, None), kernels({"qk": (two, one)}, turn))
    expected = (unbiased_cka(one, turn @ two) + unbiased_cka(two, turn @ one)) / 2
    assert found["qk"] == pytest.approx(expected, abs=1e-6)


def test_balanced_features_depend_on_the_product_only() -> None:
    torch.manual_seed(0)
    a, b, mix = torch.randn(8, 30), torch.randn(8, 30), torch.randn(8, 8)
    first = balanced(a, b)
    second = balanced(mix @ a, torch.linalg.inv(mix).T @ b)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one @ one.T, two @ two.T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(first[0] @ first[1].T, a.T @ b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["score", "awm", "ics_whitened"])
def test_a_base_with_a_block_removed_is_still_recognised(tiny: Tiny, name: str) -> None:
    base = tiny("llama")
    shorter = copy.deepcopy(base)
    del shorter.model.layers[1]
    found = FINGERPRINTS[name]().compare(
        WeightView.of_module(base),
        WeightView.of_tensors(dict(shorter.named_parameters()), base.config),
    )
    assert found.value > 0.99
    assert found.per_block[1] == 0.0
    assert min(found.per_block[0], found.per_block[2]) > 0.99


@pytest.mark.parametrize("name", ["pcs", "ics", "ics_whitened", "awm", "score"])
def test_an_extended_vocabulary_is_compared_on_the_bases_rows(tiny: Tiny, name: str) -> None:
    base = tiny("llama")
    longer = copy.deepcopy(base)
    longer.resize_token_embeddings(200)
    found = FINGERPRINTS[name]().compare(WeightView.of_module(base), WeightView.of_module(longer))
    assert found.value > 0.999


@pytest.mark.parametrize("name", ["pcs", "awm", "score"])
def test_different_widths_are_named(tiny: Tiny, name: str) -> None:
    one, two = (
        WeightView.of_module(tiny("llama")),
        WeightView.of_module(tiny("llama", hidden_size=64)),
    )
    with pytest.raises(LineageError, match="width=64: the base's is 48"):
        FINGERPRINTS[name]().compare(one, two)


def test_whitened_invariants_compare_different_widths(tiny: Tiny) -> None:
    one, two = (
        WeightView.of_module(tiny("llama")),
        WeightView.of_module(tiny("llama", hidden_size=64)),
    )
    assert abs(WhitenedICS().compare(one, two).value) < 0.1
    rows = orthonormal_rows(torch.randn(50, 8), centre=False)
    torch.testing.assert_close(rows.T @ rows, torch.eye(8), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["score", "awm"])
def test_kept_embeddings_give_away_a_model_whose_blocks_were_replaced(
    tiny: Tiny, name: str
) -> None:
    base, stranger = tiny("llama"), tiny("llama", seed=9)
    gutted = splice(base, stranger, [0, 1, 2])
    views = [WeightView.of_module(m) for m in (base, gutted, stranger)]
    worked_on, foreign = (FINGERPRINTS[name]().compare(views[0], v) for v in views[1:])
    assert abs(worked_on.value) < 0.15
    assert worked_on.fit == pytest.approx(1.0)
    assert foreign.fit is not None
    assert foreign.fit < 0.6


def test_reef_needs_running_models_and_sees_function(tiny: Tiny) -> None:
    base = tiny("llama")
    view = WeightView.of_module(base)
    reef = pick(FINGERPRINTS, "reef", "fingerprint")()
    assert reef.compare(view, view).value == pytest.approx(1.0)
    weights = WeightView.of_tensors(dict(base.named_parameters()), base.config)
    with pytest.raises(LineageError, match="can run"):
        reef.compare(view, weights)


@pytest.mark.parametrize(
    ("one", "two"),
    [("gutenberg_llama_seed0", "gutenberg_llama_seed1"), ("babyllama_tok105", "babyllama_tok361")],
)
def test_independent_trained_models_are_apart(
    checkpoint: Callable[[str], Path], one: str, two: str
) -> None:
    from fedsplit.fingerprints.weights_file import open_view

    base, suspect = open_view(checkpoint(one)), open_view(checkpoint(two))
    assert abs(AlignedProducts().compare(base, suspect).value) <= 0.05
    assert abs(WhitenedICS().compare(base, suspect).value) <= 0.1
    assert FINGERPRINTS["awm"]().compare(base, suspect).value < 0.4


@pytest.mark.parametrize("name", ["rotation", "sign_flips", "qk_maps"])
def test_a_trained_model_under_a_map(checkpoint: Callable[[str], Path], name: str) -> None:
    """Its embedding has a few dominant directions, so that a permutation nearly fits a rotation."""
    from transformers import AutoModelForCausalLM

    from fedsplit.fingerprints.evasion.transforms import transform

    model = AutoModelForCausalLM.from_pretrained(checkpoint("babyllama_tok361")).eval()
    base, moved = WeightView.of_module(model), WeightView.of_module(transform(model, name).model)
    for kind in ("ics", "ics_whitened", "awm", "score"):
        assert FINGERPRINTS[kind]().compare(base, moved).value >= 0.999, kind


def test_a_fine_tuned_descendant_stays(checkpoint: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    path = checkpoint("stories260K")
    base, tuned = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=3e-4)
    inputs = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        optimizer.zero_grad()
        tuned(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
    views = [WeightView.of_module(m) for m in (base, tuned)]
    for kind in ("pcs", "ics", "ics_whitened", "awm", "score"):
        assert FINGERPRINTS[kind]().compare(*views).value >= 0.95, kind
