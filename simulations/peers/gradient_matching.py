"""TAG, LAMP and BiSR as published, on one text of a split language model at a time.

Settings are those of the papers' split-learning form (Chen et al., arXiv 2409.00960, and its public
configuration): AdamW at 0.09 (betas 0.9 and 0.999, weight decay 0.01) on the logits of dummy next
tokens, 0.85 squared and 0.15 absolute differences; LAMP every 30 steps tries 100 changes of order,
judged with 0.2 of the language model's loss; BiSR starts from an inverter that was taught on
public text, sharpens it by matching states (cosine, AdamW at 0.005), then matches gradients for 18
steps from a softmax at temperature 1.2.  How long the inverter is taught is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LR, BETA, TAG_STEPS = 0.09, 0.85, 300
LAMP_EVERY, LAMP_TRIALS, LAMP_LANGUAGE = 30, 100, 0.2
FORWARD_LR, FORWARD_STEPS, FORWARD_DECAY = 0.005, 800, 0.02
BACKWARD_STEPS, TEMPERATURE = 18, 1.2


@dataclass
class Crossed:
    """What a server has of one text.

    Attributes:
        hidden: final hidden states that it sent, ``(T, d)``.
        gradient: of the mean loss over the T - 1 targets, ``(T, d)``.
        rows: representations it received, ``(T, d)``.
        head: the vocabulary projection as it knows it, ``(V, d)``.
        model: the public base, a Hugging Face language model.
        bottom: soft embeddings (T, d) -> states at the cut (T, d).
    """

    hidden: Tensor
    gradient: Tensor
    rows: Tensor
    head: Tensor
    model: Any
    bottom: Callable[[Tensor], Tensor]


def _optimiser(parameter: Tensor, lr: float, decay: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter], lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=decay)


def _difference(seen: Crossed, dummy: Tensor) -> Tensor:
    """Return TAG's distance of the gradients of dummy texts ``(T, V)`` (logits)."""
    hidden = seen.hidden.detach().requires_grad_()
    logits = hidden @ seen.head.T
    loss = functional.cross_entropy(logits[:-1], dummy.softmax(1)[1:])
    (found,) = torch.autograd.grad(loss, hidden, create_graph=True)
    gap = found - seen.gradient
    return BETA * gap.square().sum() + (1 - BETA) * gap.abs().sum()


def _match(seen: Crossed, dummy: Tensor, steps: int) -> Tensor:
    dummy = dummy.clone().requires_grad_()
    optimiser = _optimiser(dummy, LR)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.autograd.backward(_difference(seen, dummy))
        optimiser.step()
    return dummy.detach()


def _random(seen: Crossed, generator: torch.Generator) -> Tensor:
    draw = torch.randn(len(seen.hidden), len(seen.head), generator=generator)
    return draw.softmax(1)


def tag(seen: Crossed, generator: torch.Generator) -> Tensor:
    """Return the ids that TAG reads, ``(T,)``."""
    return _match(seen, _random(seen, generator), TAG_STEPS).argmax(1)


def lamp(seen: Crossed, generator: torch.Generator) -> Tensor:
    """Return the ids that LAMP reads, ``(T,)``."""
    dummy = _random(seen, generator)
    for _ in range(TAG_STEPS // LAMP_EVERY):
        dummy = _match(seen, dummy, LAMP_EVERY)
        best, least = dummy, _judged(seen, dummy)
        for trial in range(1, LAMP_TRIALS):
            changed = dummy[_order(len(dummy), trial, generator)]
            score = _judged(seen, changed)
            if score < least:
                best, least = changed, score
        dummy = best
    return dummy.argmax(1)


def _judged(seen: Crossed, dummy: Tensor) -> float:
    ids = dummy.argmax(1)[None]
    with torch.no_grad():
        language = float(seen.model(input_ids=ids, labels=ids).loss)
    return float(_difference(seen, dummy).detach()) + LAMP_LANGUAGE * language


def _order(length: int, trial: int, generator: torch.Generator) -> Tensor:
    """Return an order of the positions: two swapped, one or several moved, a prefix at the end."""
    order = list(range(length))
    i, j = (1 + int(torch.randint(length - 1, (1,), generator=generator)) for _ in range(2))
    low, high = min(i, j), max(i, j)
    if trial % 4 == 0:
        order[i], order[j] = order[j], order[i]
    elif trial % 4 == 1:
        order.insert(j, order.pop(i))
    elif trial % 4 == 2:
        piece = order[low:high]
        rest = order[:low] + order[high:]
        at = 1 + int(torch.randint(max(1, len(rest)), (1,), generator=generator))
        order = rest[:at] + piece + rest[at:]
    else:
        order = order[:1] + order[i:] + order[1:i]
    return torch.tensor(order)


class Inverter(nn.Module):
    """BiSR's start: a recurrent network from states at the cut to tokens."""

    def __init__(self, width: int, vocab: int, hidden: int = 256) -> None:
        super().__init__()
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.out = nn.Linear(hidden, vocab)

    def forward(self, states: Tensor) -> Tensor:
        """Return logits ``(B, T, V)`` for states ``(B, T, d)``."""
        read, _ = self.gru(states)
        logits: Tensor = self.out(read)
        return logits


def teach(
    states: list[Tensor], ids: list[Tensor], vocab: int, *, epochs: int = 20, lr: float = 1e-3
) -> Inverter:
    """Return an inverter taught on public texts: their states ``(T, d)`` and ids ``(T,)``."""
    network = Inverter(states[0].shape[1], vocab)
    optimiser = torch.optim.Adam(network.parameters(), lr)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = [order[at : at + 16] for at in range(0, len(order), 16)]
    for _ in range(epochs):
        for batch in batches:
            x = nn.utils.rnn.pad_sequence([states[i] for i in batch], batch_first=True)
            y = nn.utils.rnn.pad_sequence(
                [ids[i] for i in batch], batch_first=True, padding_value=-100
            )
            loss = functional.cross_entropy(network(x).flatten(0, 1), y.flatten())
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
    return network.eval()


def bisr(seen: Crossed, inverter: Inverter) -> Tensor:
    """Return the ids that BiSR reads, forward then backward, ``(T,)``."""
    table = seen.model.get_input_embeddings().weight.detach()
    with torch.no_grad():
        start = table[inverter(seen.rows[None])[0].argmax(1)]
    soft = start.clone().requires_grad_()
    optimiser = _optimiser(soft, FORWARD_LR, FORWARD_DECAY)
    for _ in range(FORWARD_STEPS):
        alike = functional.cosine_similarity(seen.bottom(soft), seen.rows, dim=1)
        optimiser.zero_grad()
        torch.autograd.backward(1 - alike.mean())
        optimiser.step()
    choices = (soft.detach() @ table.T).softmax(1)
    return _match(seen, (choices / TEMPERATURE).softmax(1), BACKWARD_STEPS).argmax(1)
