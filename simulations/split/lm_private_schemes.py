"""Two more protections of a language model's targets, tried in one process.

Targets that an owner draws once and for ever, and sums of gradients that an owner makes itself and
sends with the noise of DP-SGD.  As in :mod:`simulations.split.lm_schemes`, every scheme passes once
over the same texts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.attacks.gradients.known_head import LinearHead
from fedsplit.models.splitting.halves import Top
from fedsplit.models.splitting.heads import Head
from fedsplit.privacy.dp.optimizer import PrivateOptimizer
from fedsplit.privacy.secret import OwnerSecret
from simulations.split.lm_material import (
    Batch,
    Below,
    LanguageModelSplit,
    Reading,
    Tuned,
    forward,
)
from simulations.split.lm_schemes import average_tails, predict, server_blocks, step_by

DP_CLIP = 1.0
"""Bound on one text's gradient of a tail."""


def drawn_targets(work: LanguageModelSplit, lr: float, kept: float, attacked: int = 4) -> Tuned:
    """Tune all of the server's blocks against targets that owners drew once, with a corrected loss.

    A target y is drawn as r with probability proportional to exp(-beta |W_y - W_r|), W the public
    projection: metric differential privacy over the vocabulary, 2 beta |W_y - W_y'| between two
    targets (Feyisetan et al., arXiv 1910.08902, by the exponential mechanism).  The server's loss
    is that of the drawn token under its own prediction sent through the same channel (forward
    correction, Patrini et al., arXiv 1609.03683), whose minimum is where the clean loss has it.
    Gradients then tell r in full and y as far as the channel does: the reader takes the most
    probable y given r, with the server's prediction as prior.  Passes do not add up.

    Args:
        work: base and texts.
        lr: peak rate of AdamW.
        kept: mean share of the vocabulary's tokens that stay themselves, which sets beta.
        attacked: steps whose targets are read, evenly spread.
    """
    bottom, top, head = work.cut()
    channel = channel_of(LinearHead.of(head).weight, kept)  # (V, V), row = true
    secret = OwnerSecret.for_simulation(work.seed, "lm-frontier")
    optimizer = torch.optim.AdamW(server_blocks(top), lr, weight_decay=0.0)
    reading = Reading()
    read_at = {round(i * (work.steps - 1) / max(1, attacked - 1)) for i in range(attacked)}
    for step in range(work.steps):
        texts = [text for owner in work.owners for text in owner[step]]
        _, logits, targets = forward(bottom, top, head, texts)
        drawn = draw_targets(channel, targets, secret, step)
        if step in read_at:
            log = logits.detach().log_softmax(1)
            found = (log + channel[:, drawn].T.clamp_min(1e-30).log()).argmax(1)
            reading.add(texts, found, log.argmax(1))
        mixed = logits.softmax(1) @ channel  # (R, V): of what is drawn
        loss = functional.nll_loss(mixed.clamp_min(1e-30).log(), drawn)
        step_by(optimizer, work.rate(step, lr), [loss], None)
    return Tuned(work.loss(bottom, top, head), reading)


@torch.no_grad()
def channel_of(matrix: Tensor, kept: float) -> Tensor:
    """Return the law of drawn targets whose tokens stay themselves with mean probability ``kept``.

    Beta is found by bisection.
    """
    distance = torch.cdist(matrix, matrix)
    low, high = 0.0, 200.0 / float(distance.median())
    for _ in range(24):
        beta = (low + high) / 2
        stays = float(torch.softmax(-beta * distance, dim=1).diagonal().mean())
        low, high = (beta, high) if stays < kept else (low, beta)
    return torch.softmax(-high * distance, dim=1)


def draw_targets(channel: Tensor, targets: Tensor, secret: OwnerSecret, step: int) -> Tensor:
    """Return what is drawn for each target, (R,)."""
    at = torch.from_numpy(secret.stream("drawn", step).uniform(len(targets)))  # (R,)
    found = []
    for part, u in zip(torch.split(targets, 512), torch.split(at, 512), strict=True):
        total = channel[part].double().cumsum(1)
        found.append(torch.searchsorted(total, (u * total[:, -1])[:, None])[:, 0])
    return torch.cat(found).clamp(max=channel.shape[1] - 1)


def private_tail(
    work: LanguageModelSplit, lr: float, blocks: int, noise: float, rounds: int = 6
) -> Tuned:
    """Tune a tail at every owner by DP-SGD, and average the tails; no gradient of a row leaves.

    Each text's gradient is clipped to ``DP_CLIP``, an owner sums those of a step itself and adds
    noise: differential privacy of each text for whoever reads the weights.  In one pass every text
    is in one step, so its cost is that of one Gaussian mechanism, whatever the number of steps.

    Args:
        work: base and texts.
        lr: peak rate of AdamW.
        blocks: of a tail.
        noise: standard deviation over the clip.
        rounds: after which tails are averaged.
    """
    bottom, top, start = work.cut(blocks)
    tails = [copy.deepcopy(start) for _ in work.owners]
    plain = [
        torch.optim.AdamW(t.requires_grad_(True).parameters(), lr, weight_decay=0.0) for t in tails
    ]
    secrets = [OwnerSecret.for_simulation(work.seed, f"owner-{i}") for i in range(len(tails))]
    private = [
        PrivateOptimizer(o, noise_multiplier=noise, clip=DP_CLIP, secret=s, nonce=b"lm-frontier")
        for o, s in zip(plain, secrets, strict=True)
    ]
    reading, every = Reading(), max(1, work.steps // rounds)
    for step in range(work.steps):
        for owner, tail, optimizer, steps in zip(work.owners, tails, plain, private, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = work.rate(step, lr)
            own = _text_gradients(bottom, top, tail, owner[step])
            steps.step(list(tail.parameters()), own, len(owner[step]))
        if (step + 1) % every == 0 or step + 1 == work.steps:
            if step + 1 in (every, work.steps):
                for owner, tail in zip(work.owners, tails, strict=True):
                    shown = [t for batch in owner[max(0, step - 1) : step + 1] for t in batch]
                    predict(work, reading, (bottom, top, tail), shown)
            average_tails(tails)
    return Tuned(work.loss(bottom, top, tails[0]), reading)


def _text_gradients(
    bottom: Below, top: Top, tail: Head, texts: Batch
) -> Iterator[Sequence[Tensor]]:
    """Yield the gradient of each text's own mean loss by the tail's parameters."""
    for text in texts:
        _, logits, targets = forward(bottom, top, tail, [text])
        loss = functional.cross_entropy(logits, targets)
        yield torch.autograd.grad(loss, list(tail.parameters()))
