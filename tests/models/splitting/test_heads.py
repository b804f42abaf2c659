"""A head detached from its top computes the same logits, for every family."""

from __future__ import annotations

import pytest
import torch

from fedsplit.errors import ConfigError
from fedsplit.models.splitting.halves import split
from fedsplit.models.splitting.heads import detach_head, head_parameters
from tests.models.split_families import CASES, batch, tiny


@pytest.mark.parametrize(("name", "task"), CASES)
def test_head_after_hidden_states_equals_the_top(name: str, task: str) -> None:
    bottom, top = split(tiny(name, task), 1, verify=False)
    ids, mask = batch()
    hidden = bottom(ids, mask)

    head = detach_head(top)
    state = top.hidden_states(hidden, mask)
    logits = head(state, mask)

    compare = mask.bool() if logits.ndim == 3 else slice(None)
    torch.testing.assert_close(logits[compare], top(hidden, mask)[compare])
    blocks = {id(p) for p in top.model.get_submodule(_blocks(top)).parameters()}
    assert not blocks & head_parameters(top)
    assert sum(p.numel() for p in head.parameters()) < sum(p.numel() for p in top.parameters()) / 2
    assert (head.num_labels, head.vocab, head.task) == (top.num_labels, top.vocab, top.task)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_tail_after_the_states_that_enter_it_equals_the_top(name: str, task: str) -> None:
    bottom, top = split(tiny(name, task), 1, verify=False)
    ids, mask = batch()
    hidden = bottom(ids, mask)

    tail = detach_head(top, blocks=1)
    logits = tail(top.hidden_states(hidden, mask, tail=1), mask)

    compare = mask.bool() if logits.ndim == 3 else slice(None)
    torch.testing.assert_close(logits[compare], top(hidden, mask)[compare])
    inside = {id(p) for p in tail.model.get_submodule(_blocks(tail)).parameters()}
    assert len(inside) == len(list(_last_block(top).parameters()))
    assert head_parameters(top), "the top keeps its own way to the final state"


def test_a_tail_leaves_a_block_to_the_top() -> None:
    _, top = split(tiny("llama", "causal-lm"), 1)
    for blocks in (-1, 2):
        with pytest.raises(ConfigError, match=rf"blocks={blocks}: must be in 0\.\.1"):
            detach_head(top, blocks=blocks)


def _last_block(top: object) -> torch.nn.Module:
    from fedsplit.models.anatomy import probe

    return probe(top.model).blocks[-1]  # type: ignore[attr-defined]


def _blocks(top: object) -> str:
    from fedsplit.models.anatomy import probe

    return probe(top.model).blocks_path  # type: ignore[attr-defined]


def test_head_holds_what_acts_after_the_final_state() -> None:
    _, bert = split(tiny("bert", "sequence-classification"), 1)
    _, llama = split(tiny("llama", "causal-lm"), 1)
    assert {n for n, _ in detach_head(bert).named_parameters()} == {
        "model.bert.pooler.dense.weight",
        "model.bert.pooler.dense.bias",
        "model.classifier.weight",
        "model.classifier.bias",
    }
    assert [n for n, _ in detach_head(llama).named_parameters()] == ["model.lm_head.weight"]


def test_head_owns_copies_unless_shared() -> None:
    _, top = split(tiny("bert", "sequence-classification"), 1)
    mine = {p.data_ptr() for p in top.parameters()}
    assert not mine & {p.data_ptr() for p in detach_head(top).parameters()}
    assert {p.data_ptr() for p in detach_head(top, share=True).parameters()} <= mine


def test_gradients_cross_the_second_cut() -> None:
    """U-shape: owner -> top's body -> owner's head gives the gradient of the plain split."""
    bottom, top = split(tiny("gpt2", "sequence-classification"), 1)
    ids, mask = batch()
    hidden = bottom(ids, mask).detach().requires_grad_()
    top(hidden, mask).square().sum().backward()
    expected, hidden.grad = hidden.grad, None

    detach_head(top)(top.hidden_states(hidden, mask), mask).square().sum().backward()

    assert expected is not None
    torch.testing.assert_close(hidden.grad, expected)
