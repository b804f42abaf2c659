"""The joint attacker: rows, gradients and language together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from fedsplit.attacks import Public, Step, Truth, View, make_attack, suited
from fedsplit.attacks.gradients.known_head import LinearHead
from fedsplit.attacks.gradients.text_evidence import CachedReader, TextEvidence
from fedsplit.attacks.gradients.token_recovery import GradientNoise
from fedsplit.models.loading import load
from fedsplit.models.splitting.halves import split
from fedsplit.models.splitting.heads import detach_head
from fedsplit.privacy.mechanisms.dchi import DChi
from tests.tiny_models import save_tiny_llama

LENGTH, TEXTS = 8, 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(save_tiny_llama(tmp_path_factory.mktemp("llama")), "causal-lm").model.eval()


def crossed(base: Any, k: int, eta: float, back: float) -> tuple[View, Truth]:
    """Return what the server has of random texts: d_chi noise on rows, Gaussian on gradients."""
    torch.manual_seed(k)
    draw = torch.Generator().manual_seed(k)
    bottom, top = split(base, k, verify=False)
    bottom.eval()
    head = detach_head(top, share=True)
    linear = LinearHead.of(head)
    ids = [torch.randint(5, bottom.vocab, (LENGTH,), generator=draw) for _ in range(TEXTS)]
    sent, steps = [], []
    for text in ids:
        with torch.no_grad():
            clean = bottom(text[None])[0]
            way = functional.normalize(torch.randn(clean.shape, generator=draw), dim=1)
            length = torch.distributions.Gamma(clean.shape[1], 1.0).sample((len(text), 1))
            sent.append(clean + way * length / eta if eta else clean)
            hidden = top.hidden_states(sent[-1][None])[0]
        hidden.requires_grad_()
        loss = functional.cross_entropy(linear.logits(hidden)[:-1], text[1:], reduction="sum")
        gradient = torch.autograd.grad(loss, hidden)[0]
        noise = back * torch.randn(gradient.shape, generator=draw)
        steps.append([Step(hidden.detach(), gradient + noise)])
    public = Public(
        bottom=bottom,
        model=base,
        head=linear,
        mechanism=DChi(eta) if eta else None,
        gradient_noise=GradientNoise("gaussian", back) if back else GradientNoise(),
    )
    return View(public, rows=sent, steps=steps), Truth(ids=ids)


@pytest.mark.parametrize("k", [0, 2])
def test_without_noise_whole_texts_are_read(base: Any, k: int) -> None:
    view, truth = crossed(base, k, 0.0, 0.0)
    result = make_attack("joint").run(view, truth)
    assert result.success == result.text_recovery == 1.0
    assert result.tokens == TEXTS * LENGTH  # the first token of each text as well
    assert "joint" in [attack.name for attack in suited(view)]
    assert make_attack("joint", beams=1, rereads=0).run(view, truth).success == 1.0


@pytest.mark.parametrize("gradients", [False, True])
def test_clean_rows_behind_blocks_are_read_whatever_gradients_say(
    base: Any, gradients: bool
) -> None:
    view, truth = crossed(base, 2, 0.0, 5.0)
    if not gradients:
        view = View(view.public, rows=view.rows)
    # Few candidates from language and noisy gradients: what none explains is searched for.
    assert make_attack("joint", shortlist=2).run(view, truth).success == 1.0


@pytest.mark.parametrize("k", [0, 1])
def test_both_directions_tell_more_than_either(base: Any, k: int) -> None:
    view, truth = crossed(base, k, 10.0, 0.5)
    joint = make_attack("joint").run(view, truth).success
    back = make_attack("gradient_map").run(view, truth).success
    rows = make_attack("joint").run(View(view.public, rows=view.rows), truth).success
    assert joint > max(back, rows) + 0.05
    assert min(back, rows) > 0.05


def test_behind_blocks_noisy_rows_are_read_from_tokens_states(base: Any) -> None:
    view, truth = crossed(base, 2, 40.0, 0.0)
    view.steps = ()  # rows alone
    without = make_attack("joint").run(view, truth)  # no public text: language alone proposes
    draw = torch.Generator().manual_seed(9)
    public = [torch.randint(5, view.public.vocab, (LENGTH,), generator=draw) for _ in range(400)]
    view.public.public_ids = [ids.tolist() for ids in public]
    learned = make_attack("learned", steps=40).run(view, truth)
    found = make_attack("joint").run(view, truth)
    assert view.public.token_reader is not None
    assert found.success > max(without.success, learned.success) + 0.05


def test_reading_in_pieces_is_reading_at_once(base: Any) -> None:
    view, _ = crossed(base, 1, 0.0, 0.0)
    text = torch.tensor([[5, 9, 11, 7], [6, 9, 8, 7]])
    whole = TextEvidence(view, 0).predictions(text)  # (2, 3, V)
    reader = CachedReader(base)
    for t in range(3):
        found = reader.advance(torch.arange(2), text[:, t])
        torch.testing.assert_close(found, whole[:, t], atol=1e-4, rtol=1e-4)
    swapped = reader.advance(torch.tensor([1, 0]), text[:, 3].flip(0))
    again = TextEvidence(view, 0).predictions(torch.cat([text.flip(0), text[:, :1]], 1))
    torch.testing.assert_close(swapped, again[:, 3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("loss", ["tag", "cosine"])
def test_matching_reads_texts_without_noise(base: Any, direction: str, loss: str) -> None:
    view, truth = crossed(base, 1, 0.0, 0.0)
    attack = make_attack(
        "matching", direction=direction, loss=loss, start="random", steps=200, lr=0.3, samples=2
    )
    result = attack.run(view, Truth(ids=truth.ids[:2]))
    assert result.success > (0.5 if direction == "forward" else 0.9)
    assert result.tokens == 2 * (LENGTH - (direction == "backward"))
    quick = make_attack("matching", direction=direction, loss=loss, steps=5, samples=2)
    if direction != "forward":
        assert quick.run(view, Truth(ids=truth.ids[:2])).success == 1.0
