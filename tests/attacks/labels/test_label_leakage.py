"""Labels read off gradients: exact from logits, nearly so from the cut."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedsplit.attacks import LabelLeakage, Truth, View
from fedsplit.attacks.labels.leakage import labels_from_logit_gradients
from fedsplit.errors import AttackError, ConfigError

G = torch.Generator().manual_seed(0)


def leak(attack: LabelLeakage, gradients: torch.Tensor, labels: torch.Tensor, known=None):
    view = View(gradients=list(gradients), known=known or {})
    return attack.run(view, Truth(labels=labels))


@pytest.mark.parametrize("classes", [2, 5])
def test_logit_gradients_are_the_labels(classes: int):
    z = torch.randn(200, classes, generator=G, requires_grad=True)
    y = torch.randint(0, classes, (200,), generator=G)
    F.cross_entropy(z, y).backward()

    result = leak(LabelLeakage(), z.grad, y)

    assert result.success == 1.0
    assert result.baseline < 0.7


def test_one_logit():
    z = torch.randn(50, 1, generator=G, requires_grad=True)
    y = torch.randint(0, 2, (50,), generator=G)
    F.binary_cross_entropy_with_logits(z[:, 0], y.float()).backward()

    assert torch.equal(labels_from_logit_gradients(z.grad), y)


def test_a_head_at_the_owner_does_not_hide_two_classes():
    head = torch.nn.Linear(32, 2)
    hidden = torch.randn(300, 32, generator=G, requires_grad=True)
    y = (torch.rand(300, generator=G) < 0.3).long()
    F.cross_entropy(head(hidden), y).backward()
    first = {int((y == c).nonzero()[0]): c for c in (0, 1)}

    result = leak(LabelLeakage("direction"), hidden.grad, y, first)

    assert result.success > 0.98
    assert result.tokens == 298


def test_strong_gradient_noise_hides_them():
    y = torch.randint(0, 2, (2000,), generator=G)
    gradients = torch.randn(2000, 2, generator=G)

    low, high = leak(LabelLeakage(), gradients, y).interval

    assert low < 0.5 < high


def test_misuse_is_refused():
    with pytest.raises(ConfigError, match="method='x'"):
        LabelLeakage("x")
    with pytest.raises(AttackError, match="must be \\(N, C\\)"):
        LabelLeakage().infer(torch.zeros(3))
    with pytest.raises(AttackError, match="at least one row"):
        LabelLeakage("direction").infer(torch.zeros(3, 4))
    with pytest.raises(AttackError, match=r"truth\.labels"):
        leak(LabelLeakage(), torch.zeros(3, 2), torch.zeros(4))
