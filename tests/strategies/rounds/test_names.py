"""Owners' names as a server sorts them, whatever an owner calls itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from strategies.rounds.report import natural

# Superscripts and other scripts' digits among them, which is not what int() reads.
NAMES = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=20)


@given(st.lists(NAMES, max_size=6))
def test_any_names_have_an_order(names: list[str]) -> None:
    assert sorted(sorted(names, key=natural)) == sorted(names)


def test_numbers_are_ordered_by_value() -> None:
    assert sorted(["owner-10", "²", "owner-9"], key=natural) == ["owner-9", "owner-10", "²"]
