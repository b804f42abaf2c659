"""Blocks of two models in their best order-keeping match."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fedsplit.fingerprints.methods.matching import (
    KINDS,
    BlockMatrices,
    compare_matching_blocks,
    cosine,
    match_blocks,
    unit,
)

DROPPED = 3
SIZE = 5 * 5 * 4 * len(KINDS)  # bytes of a block here


def block(index: int) -> BlockMatrices:
    generator = torch.Generator().manual_seed(index)
    return {kind: (unit(torch.randn(5, 5, generator=generator)),) for kind in KINDS}


def shorter(index: int) -> BlockMatrices:
    return block(index + (index >= DROPPED))


def test_match_blocks_keeps_order() -> None:
    table = torch.tensor([[0.9, 0.0], [0.1, 0.2], [0.0, 0.8]], dtype=torch.float64)
    assert match_blocks(table) == [0, None, 1]


@pytest.mark.parametrize(("held", "groups"), [(0, 7), (SIZE, 7), (3 * SIZE, 3), (2**30, 1)])
def test_groups_of_base_blocks_change_no_result(held: int, groups: int) -> None:
    ours, theirs = Counter[int](), Counter[int]()

    def first(index: int) -> BlockMatrices:
        ours[index] += 1
        return block(index)

    def second(index: int) -> BlockMatrices:
        theirs[index] += 1
        return shorter(index)

    found = compare_matching_blocks((7, 6), first, second, held=held)
    expected = [0.0 if i == DROPPED else 1.0 for i in range(7)]
    assert found.per_block == pytest.approx(expected, abs=1e-6)
    assert found.matched == 6
    assert found.parts == pytest.approx(dict.fromkeys(KINDS, 1.0), abs=1e-6)
    assert set(ours.values()) == {1}
    assert set(theirs.values()) == {groups}


def test_a_longer_model_is_matched_too() -> None:
    found = compare_matching_blocks((6, 7), shorter, block)
    assert found.per_block == pytest.approx([1.0] * 6, abs=1e-6)


def test_a_dot_product_of_units_is_the_cosine_and_zero_stays_zero() -> None:
    one, two = torch.randn(4, 6), torch.randn(4, 6)
    assert float((unit(one) * unit(two)).sum()) == pytest.approx(cosine(one, two), abs=1e-6)
    assert not unit(torch.zeros(3, 3)).any()
    assert unit(1e-30 * torch.ones(2, 2)).norm() == pytest.approx(1.0)
