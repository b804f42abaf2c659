"""The benchmark of masked sums: its bytes are those of the messages, its sums exact."""

from __future__ import annotations

import pytest

from simulations.bench.secagg import measure


def test_bytes_of_a_masked_sum_grow_with_the_neighbours() -> None:
    few, more = measure(6, 300, 0.0), measure(12, 300, 0.2)
    assert (few["neighbours"], more["neighbours"], more["lost"]) == (5, 11, 3)
    for row in (few, more):
        assert row["error"] <= row["error_bound"]
        assert row["plain_bytes"] == 1200
        assert row["owner_seconds"] > 0
    # Keys, numbers (five beside the weights), commitment, signature; and for each neighbour sealed
    # shares and one in the clear, each with its place.
    numbers = 4 * (300 + 5)
    fixed = 160 + len("owner-0") + 32 + 64
    assert few["bytes_up"] == pytest.approx(fixed + numbers + 5 * (98 + 37))
    assert more["bytes_up"] < fixed + 1 + numbers + 11 * (98 + 37)
