"""What every row of LABEL_PROTECTIONS owes its users; a new row is tested without a new test."""

from __future__ import annotations

import json

import pytest
import torch

from fedsplit.config import LabelsConfig
from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy.labels.base import LabelProtection
from fedsplit.privacy.labels.table import (
    LABEL_PROTECTIONS,
    build_protection,
    head_at_owner,
    parts_of,
    protection_names,
)
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.tasks import TASKS

SECRET = OwnerSecret.for_simulation(0, "labels")
ROWS = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 2


@pytest.fixture(params=list(LABEL_PROTECTIONS))
def protection(request: pytest.FixtureRequest) -> LabelProtection:
    return build_protection(LabelsConfig(protection=request.param))


def test_named_and_described(protection: LabelProtection) -> None:
    described = json.loads(json.dumps(protection.describe(), allow_nan=False))
    assert described["protection"] == protection.name
    assert LABEL_PROTECTIONS[protection.name] is type(protection)
    assert len(protection.guarantee()) > 20
    assert any(protection.fits(task) for task in TASKS.values())


def test_its_level_is_a_setting(protection: LabelProtection) -> None:
    config = LabelsConfig(protection=protection.name)
    if protection.level is None:
        assert protection.label(config) == ""
    else:
        value = getattr(config, protection.level.setting)
        assert protection.label(config) == f"{protection.level.key}={value:g}"


def test_gradients_change_where_it_says_so(protection: LabelProtection) -> None:
    out = protection.perturb(ROWS, LABELS, 0.3, SECRET.stream("x"))
    assert out.shape == ROWS.shape
    assert out.dtype == ROWS.dtype
    assert torch.equal(out, ROWS) != protection.changes_gradients()
    assert torch.equal(out, protection.perturb(ROWS, LABELS, 0.3, SECRET.stream("x")))
    if protection.changes_gradients():
        with pytest.raises(PrivacyError, match="NaN"):
            protection.perturb(ROWS / 0, LABELS, 0.3, SECRET.stream("x"))


def test_labels_change_where_it_says_so(protection: LabelProtection) -> None:
    drawn = [protection.relabel(1, 3, SECRET.stream(i)) for i in range(64)]
    assert set(drawn) <= {0, 1, 2}
    assert (set(drawn) != {1}) == protection.changes_labels()
    matrix = protection.transition(3)
    assert (matrix is not None) == protection.changes_labels()
    assert matrix is None or torch.allclose(matrix.sum(1), torch.ones(3, dtype=torch.float64))


def test_the_place_of_the_head_goes_with_what_changes_something(
    protection: LabelProtection,
) -> None:
    names = protection_names()
    both = f"client-head+{protection.name}"
    changes = protection.changes_labels() or protection.changes_gradients()
    changes |= protection.name == "none"  # says that nothing is done beside
    assert (both in names) == (changes and not protection.owner_head)
    assert head_at_owner(protection.name) == protection.owner_head
    if both in names:
        assert head_at_owner(both)
        assert build_protection(LabelsConfig(protection=both)) == protection
    else:
        with pytest.raises(ConfigError, match=r"labels\.protection='client-head\+.*must be one of"):
            parts_of(both)
