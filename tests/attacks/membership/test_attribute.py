"""Attribute inference: finds what is there, chance where there is nothing, nobody on both sides."""

from __future__ import annotations

import pytest
import torch

from fedsplit.attacks import AttributeInference, Truth, View
from fedsplit.attacks.membership.attribute import fit_logistic, known_part
from fedsplit.errors import AttackError, ConfigError

G = torch.Generator().manual_seed(0)
PEOPLE = torch.arange(400) // 4
SEX = (PEOPLE % 2 + 1).tolist()  # coded 1 and 2


def sent(signal: float):
    shift = signal * torch.randn(16, generator=G)
    return [
        torch.randn(int(torch.randint(2, 9, (1,), generator=G)), 16, generator=G) + s * shift
        for s in SEX
    ]


def infer(samples, attribute, groups=None):
    groups = list(range(len(samples))) if groups is None else groups
    view = View(rows=samples, known=known_part(attribute, groups, 0.5), groups=groups)
    return AttributeInference().run(view, Truth(labels=torch.tensor(attribute)))


def test_attribute_in_the_representations_is_found():
    result = infer(sent(1.0), SEX, PEOPLE.tolist())

    assert result.success > 0.9
    assert result.tokens == 200
    assert result.baseline == pytest.approx(0.5, abs=0.1)


def test_nothing_there_is_chance_even_if_people_repeat():
    """Each person's samples share a vector: a split by sample would recognise people."""
    person = 3 * torch.randn(100, 16, generator=G)
    samples = [x + person[p] for x, p in zip(sent(0.0), PEOPLE, strict=True)]

    by_person = infer(samples, SEX, PEOPLE.tolist())
    by_sample = infer(samples, SEX)

    assert by_person.interval[0] < 0.5 < by_person.interval[1] + 0.1
    assert by_sample.success > by_person.success


def test_logistic_regression_is_at_its_optimum():
    x, y = torch.randn(300, 3, generator=G), torch.randint(0, 2, (300,), generator=G)

    weight = fit_logistic(x, y, 2, l2=0.1)

    design = torch.nn.functional.pad(x, (0, 1), value=1.0)
    error = torch.softmax(design @ weight, 1) - torch.nn.functional.one_hot(y, 2)
    penalty = torch.cat([0.1 * weight[:-1], torch.zeros(1, 2)])
    assert (design.T @ error / 300 + penalty).abs().max() < 1e-3


def test_misuse_is_refused():
    with pytest.raises(AttackError, match="attribute=2"):
        infer(sent(0.0), [1, 2])
    with pytest.raises(AttackError, match="must hold two classes"):
        infer(sent(0.0), [1] * 400)
    with pytest.raises(ConfigError, match="share=1"):
        known_part([1, 2], [0, 1], 1.0)
