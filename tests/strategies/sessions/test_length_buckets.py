"""Grouping texts by length must change nothing that the top computes."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.models import load, split
from strategies.sessions.length_buckets import LengthBuckets, groups_by_length
from strategies.split_tuning.cohort import pad_rows


@given(st.lists(st.integers(1, 512), min_size=1, max_size=200))
def test_groups_cover_everything_once_and_never_cost_more(lengths: list[int]) -> None:
    groups = groups_by_length(lengths)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    computed = sum(len(g) * max(lengths[i] for i in g) for g in groups)
    assert computed <= len(lengths) * max(lengths)


def test_equal_lengths_stay_together() -> None:
    assert len(groups_by_length([40] * 64)) == 1
    assert len(groups_by_length([5] * 32 + [60] * 32)) == 2


def test_logits_and_gradients_are_those_of_the_padded_batch(tiny_bert: Path) -> None:
    loaded = load(str(tiny_bert), "sequence-classification", num_labels=3, dropout=0.0)
    _, top = split(loaded.model, 1)
    top.train()
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 16, 4, 15, 3, 16, 5, 2] * 6
    rows = [torch.randn(n, top.hidden_size, generator=generator) for n in lengths]
    weights = torch.randn(len(rows), 3, generator=generator)
    found = []
    for model in (top, LengthBuckets(top)):
        hidden, mask = pad_rows(rows)
        hidden.requires_grad_()
        top.zero_grad()
        logits = model(hidden, mask)
        (logits * weights).sum().backward()
        assert hidden.grad is not None
        found.append(
            [logits.detach(), hidden.grad * mask[..., None]]
            + [p.grad.clone() for p in top.parameters() if p.grad is not None]
        )
    assert len(groups_by_length(lengths)) > 1
    for whole, grouped in zip(*found, strict=True):
        assert torch.allclose(whole, grouped, atol=1e-5, rtol=1e-4)


def test_rows_of_tokens_are_those_of_the_padded_batch(tiny_bert: Path) -> None:
    loaded = load(str(tiny_bert), "token-classification", num_labels=3, dropout=0.0)
    _, top = split(loaded.model, 1)
    generator = torch.Generator().manual_seed(0)
    for lengths in ([3, 16, 4, 15, 3, 16, 5, 2] * 6, [7, 7]):
        rows = [torch.randn(n, top.hidden_size, generator=generator) for n in lengths]
        hidden, mask = pad_rows(rows)
        with torch.no_grad():
            whole, grouped = top(hidden, mask)[mask.bool()], LengthBuckets(top).tokens(hidden, mask)
        assert grouped.shape == (sum(lengths), 3)
        assert torch.allclose(whole, grouped, atol=1e-5, rtol=1e-4)
