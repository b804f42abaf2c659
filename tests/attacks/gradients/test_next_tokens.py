"""Attacks of the table that read next tokens off recorded gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.attacks import Public, Step, Truth, View, make_attack, suited
from fedsplit.attacks.gradients.known_head import LinearHead
from fedsplit.attacks.gradients.token_recovery import GradientNoise
from fedsplit.errors import AttackError
from fedsplit.models.loading import load
from fedsplit.models.splitting.halves import split
from fedsplit.models.splitting.heads import detach_head
from tests.tiny_models import save_tiny_llama

V, D, TEXTS, LENGTH = 53, 16, 12, 9


def recorded(
    noise: float = 0.0,
    passes: int = 1,
    logits: bool = False,
    texts: int = TEXTS,
    words: int = V,
) -> tuple[View, Truth]:
    """Return what the server has of texts whose gradients carry Gaussian noise, and the truth."""
    draw = torch.Generator().manual_seed(0)
    head = LinearHead(torch.randn(V, D, generator=draw), torch.randn(V, generator=draw))
    ids, steps = [], []
    for _ in range(texts):
        mine, hidden = [], 0.4 * torch.randn(LENGTH, D, generator=draw)
        following = head.logits(hidden)[:, :words].softmax(1).multinomial(1, generator=draw)[:-1, 0]
        ids.append(text := torch.cat([torch.zeros(1).long(), following]))
        for _ in range(passes):
            sent = (head.logits(hidden) if logits else hidden).requires_grad_()
            scores = (sent if logits else head.logits(sent))[:-1]
            loss = functional.cross_entropy(scores, text[1:], reduction="sum")
            gradient = torch.autograd.grad(loss, sent)[0]
            gradient += noise * torch.randn(gradient.shape, generator=draw)
            mine.append(Step(sent.detach(), gradient))
        steps.append(mine)
    law = GradientNoise("gaussian", noise) if noise else GradientNoise()
    public = Public(head=None if logits else head, gradient_noise=law)
    return View(public, steps=steps), Truth(ids=ids)


@pytest.mark.parametrize(("name", "logits"), [("logit_gradients", True), ("closed_form", False)])
def test_gradients_without_noise_are_the_text(name: str, logits: bool) -> None:
    view, truth = recorded(logits=logits)
    result = make_attack(name).run(view, truth)
    assert name in [a.name for a in suited(view)]
    assert result.success == result.text_recovery == 1.0
    assert result.tokens == TEXTS * (LENGTH - 1)  # a text's first token has no gradient
    assert result.guess is not None
    assert result.guess[0] < 0.5
    assert result.to_dict()["text_interval"][0] < 1.0


def test_the_law_helps_and_passes_add_up() -> None:
    def success(name: str, passes: int) -> float:
        return make_attack(name).run(*recorded(noise=6.0, passes=passes)).success

    assert success("gradient_map", 1) > success("closed_form", 1)
    assert success("gradient_map", 12) > success("gradient_map", 1) + 0.2


def test_endless_noise_leaves_the_prediction() -> None:
    view, truth = recorded(noise=1e5)
    result = make_attack("gradient_map").run(view, truth)
    assert result.guess is not None
    assert result.success == pytest.approx(result.guess[0], abs=0.05)


def test_a_models_head_is_found_linear_or_refused(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(save_tiny_llama(tmp_path_factory.mktemp("llama")), "causal-lm").model
    head = detach_head(split(model, 1, verify=False)[1], share=True)
    hidden = torch.randn(3, head.hidden_size)
    found = LinearHead.of(head)
    torch.testing.assert_close(found.logits(hidden), head(hidden[None], torch.ones(1, 3).long())[0])

    plain = type(head).forward

    def capped(self: object, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return plain(head, hidden, mask).mul(30).tanh()

    monkeypatch.setattr(type(head), "forward", capped)
    with pytest.raises(AttackError, match="must be linear"):
        LinearHead.of(head)


def test_a_head_that_was_trained_away_is_estimated_from_its_gradients() -> None:
    view, truth = recorded(texts=60, words=12)
    known = view.public.head
    assert known is not None
    draw = torch.Generator().manual_seed(1)
    apart = 1.3 * torch.randn(known.weight.shape, generator=draw)  # as far as rows are apart
    view.public.head = LinearHead(known.weight + apart, known.bias)
    read = make_attack("closed_form").run(view, truth).success
    refitted = make_attack("head_refit").run(view, truth).success
    assert refitted > read + 0.1
