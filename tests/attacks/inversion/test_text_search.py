"""Texts judged by the bottom itself: they explain the rows best, and read more than an inverter."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsplit.attacks import TextSearch, Truth, make_attack, suited
from fedsplit.attacks.inversion.row_evidence import RowEvidence
from fedsplit.attacks.inversion.text_search import _Reader
from fedsplit.attacks.inversion.token_search import reads_left_to_right
from fedsplit.errors import ConfigError
from tests.attacks.inversion.behind_blocks import SAVE, seen, tiny_bottom

BUDGET: dict[str, dict[str, Any]] = {"learned": {"steps": 40}, "text_search": {"samples": 12}}


@pytest.fixture(scope="module", params=sorted(SAVE))
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A classifier's bottom of two blocks, and public and private texts."""
    bottom = tiny_bottom(request.param, tmp_path_factory.mktemp(request.param))
    draw = torch.Generator().manual_seed(5)
    weight = 1.0 / torch.arange(1, bottom.vocab + 1)

    def texts(count: int) -> list[Tensor]:
        sizes = torch.randint(3, 10, (count,), generator=draw).tolist()
        return [torch.multinomial(weight, n, replacement=True, generator=draw) for n in sizes]

    return request.param, bottom, texts(300), texts(12)


def test_a_classifier_on_a_causal_model_is_read_exactly(world: Any) -> None:
    family, bottom, public, private = world
    assert reads_left_to_right(bottom) == (family == "llama")
    view = seen(bottom, public, private, 0.0)
    names = [attack.name for attack in suited(view)]
    assert names == ["optimisation", "learned", "token_states", "text_search"]
    results = [a.run(view, Truth(ids=private)) for a in suited(view, budget=BUDGET)[1:]]
    assert results[-1].success == 1.0


def test_the_bottom_itself_reads_more_than_what_was_taught_of_it(world: Any) -> None:
    _, bottom, public, private = world
    view = seen(bottom, public, private, 1.0)
    learned, _, searched = suited(view, budget=BUDGET)[-3:]
    assert (learned.name, searched.name) == ("learned", "text_search")
    by_examples = learned.run(view, Truth(ids=private))
    assert view.public.inverter is not None
    found = searched.run(view, Truth(ids=private))
    assert found.success > by_examples.success + 0.05
    assert found.success > found.baseline
    assert found.top10 >= found.success
    assert found.extra["samples"] == len(private)


def test_short_texts_are_the_posteriors_maximum(world: Any) -> None:
    _, bottom, public, private = world
    view = seen(bottom, public, [x[:2] for x in private], 1.0)
    vocabulary = range(40)  # the private texts' most frequent
    every = torch.tensor(list(product(vocabulary, vocabulary)))
    attack = TextSearch(shortlist=bottom.vocab, retried=bottom.vocab, rereads=4)
    guesses = attack.read(view).top
    reader = _Reader.of(attack, view.public)
    for received, top in zip(view.rows, guesses, strict=False):
        evidence = RowEvidence(view.public, received)
        best = float(reader._totals(evidence, every).max())
        assert float(reader._totals(evidence, top[None, :, 0])) >= best - 1e-3


def test_a_spent_bound_of_seconds_leaves_the_proposed_reading_of_a_text(world: Any) -> None:
    _, bottom, public, private = world
    view = seen(bottom, public, private, 1.0)
    found = TextSearch(seconds=1e-9).read(view)
    (top,) = found.top
    assert torch.equal(top[:, 0], view.public.token_reader.rank(view.rows[:1], 1)[0][:, 0])


def test_fields_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="retried=1: must be >= 2"):
        make_attack("text_search", retried=1)
