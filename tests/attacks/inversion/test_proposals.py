"""Candidates that searches start from: who reads first comes first, and nothing stands twice."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.attacks import Public
from fedsplit.attacks.inversion.proposals import proposals


class Ranking:
    """Ranks the same ids for every row."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def taught(self, of: Any) -> Ranking:
        return self

    def rank(self, rows: Any, count: int) -> list[torch.Tensor]:
        return [torch.tensor([self.ids[:count]]).repeat(len(x), 1) for x in rows]


ROWS = [torch.zeros(3, 4), torch.zeros(1, 4)]


@given(st.permutations(range(12)), st.permutations(range(12)), st.integers(1, 12))
def test_the_first_readers_ids_come_first_and_none_twice(
    first: list[int], second: list[int], count: int
) -> None:
    of = Public(token_reader=Ranking(first), inverter=Ranking(second))
    found = proposals(of, ROWS, count)
    assert found is not None
    for x, ids in zip(ROWS, found, strict=True):
        assert len(ids) == len(x)
        for row in ids.tolist():
            assert row[0] == first[0]
            assert len(set(row)) == len(row) <= count + max(1, count // 2)
            assert set(first[:count]) <= set(row) <= {*first[:count], *second[:count]}
            kept = [v for v in row if v in first[:count] and v not in second[:count]]
            assert kept == [v for v in first[:count] if v not in second[:count]]


def test_nobody_reads_without_public_text_and_inverter() -> None:
    assert proposals(Public(), ROWS, 4) is None
    found = proposals(Public(inverter=Ranking([3, 1, 2])), ROWS, 2)
    assert found is not None
    assert found[0].tolist() == [[3, 1]] * 3
