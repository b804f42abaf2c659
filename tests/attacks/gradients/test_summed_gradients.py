"""What the sum of a batch's head gradients tells a server that knows head and hidden states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.models.loading import load
from fedsplit.models.splitting.halves import split
from fedsplit.models.splitting.heads import detach_head
from tests.tiny_models import save_tiny_llama

VOCAB = 200


def read_sum(summed: Tensor, hidden: Tensor, logits: Tensor) -> Tensor:
    """Return each target's token read from a projection's summed gradient, ``(T,)``.

    The sum is ``sum_t (p_t - onehot(y_t)) h_t^T``, ``(V, d)``; hidden states ``(T, d)`` and logits
    ``(T, V)`` are the server's own.  Its least-squares solution over the targets has no freedom
    left where T <= d and hidden states are independent.
    """
    labels = logits.softmax(1).T @ hidden - summed  # sum_t onehot(y_t) h_t^T
    return (labels @ torch.linalg.pinv(hidden)).argmax(0)


@pytest.mark.parametrize(
    ("targets", "least", "most"),
    [(32, 1.0, 1.0), (64, 1.0, 1.0), (512, 0.9, 1.0), (4096, 0.0, 0.9)],
)
def test_a_sum_over_few_targets_hides_nothing(targets: int, least: float, most: float) -> None:
    width, draw = 64, torch.Generator().manual_seed(targets)
    hidden = torch.randn(targets, width, generator=draw, dtype=torch.float64)
    weight = 0.1 * torch.randn(VOCAB, width, generator=draw, dtype=torch.float64)
    tokens = torch.randint(VOCAB, (targets,), generator=draw)
    weight.requires_grad_()
    logits = hidden @ weight.T
    loss = functional.cross_entropy(logits, tokens, reduction="sum")
    (summed,) = torch.autograd.grad(loss, weight)
    share = float((read_sum(summed, hidden, logits.detach()) == tokens).double().mean())
    print(f"{targets} targets, width {width}: {100 * share:.1f} % read")
    assert least <= share <= most


def test_so_it_is_for_a_language_models_head(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = load(save_tiny_llama(tmp_path_factory.mktemp("llama")), "causal-lm").model.eval()
    bottom, top = split(base, 1, verify=False)
    head = detach_head(top, share=True)
    text = torch.randint(5, bottom.vocab, (9,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = top.hidden_states(bottom(text[None], torch.ones(1, 9, dtype=torch.int64)))[0]
    (weight,) = (p for p in head.parameters() if p.shape == (bottom.vocab, hidden.shape[1]))
    weight.requires_grad_()
    logits = hidden[:-1] @ weight.T
    loss = functional.cross_entropy(logits, text[1:], reduction="sum")
    (summed,) = torch.autograd.grad(loss, weight)
    found = read_sum(summed.double(), hidden[:-1].double(), logits.detach().double())
    assert torch.equal(found, text[1:])
