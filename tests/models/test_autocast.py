"""A top whose products are in bfloat16: nearly the same function, weights and gradients stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedsplit.models.splitting.halves import Top, split
from tests.tiny_models import save_tiny_bert, save_tiny_llama


@pytest.fixture(params=["classifier", "language model"])
def top(request: pytest.FixtureRequest, tmp_path: Path) -> Top:
    if request.param == "classifier":
        folder = save_tiny_bert(tmp_path / "model")
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    else:
        model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "model"))
    return split(model.eval(), 1)[1]


def test_logits_and_gradients_are_close_and_float32(top: Top) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 9, top.hidden_size)
    mask = torch.ones(5, 9, dtype=torch.long)
    mask[2, 6:] = 0
    found = {}
    for autocast in (None, torch.bfloat16):
        top.autocast = autocast
        top.zero_grad()
        logits = top(hidden, mask)
        logits[mask.bool() if logits.ndim == 3 else slice(None)].pow(2).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in top.parameters() if p.grad is not None])
        assert logits.dtype == gradient.dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in top.parameters())
        found[autocast] = logits.detach()[mask.bool()] if logits.ndim == 3 else logits.detach()
        found[autocast, "gradient"] = gradient
    for key in (None, (None, "gradient")):
        exact = found[key]
        near = found[torch.bfloat16 if key is None else (torch.bfloat16, "gradient")]
        assert not torch.equal(exact, near), "nothing was computed in bfloat16"
        assert (exact - near).norm() < 0.03 * exact.norm()


def test_hidden_states_and_head_still_make_the_whole(top: Top) -> None:
    top.autocast = torch.bfloat16
    hidden = torch.randn(2, 7, top.hidden_size)
    states = top.hidden_states(hidden)
    assert states.dtype == torch.float32
    assert states.shape[:2] == (2, 7)
