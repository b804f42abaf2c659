"""Tuning a split language model under a protection of its gradients, in one process.

Owners' texts, the protections, the server's estimate of noisy gradients and the readers are the
library's own; what is left out is the wire (`tests/strategies/split_tuning` shows that runs through
it take the same steps).  Every scheme passes once over the same texts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsplit.attacks import Truth, View, make_attack
from fedsplit.attacks.files import public_knowledge
from fedsplit.attacks.gradients.known_head import LinearHead
from fedsplit.attacks.gradients.token_recovery import GradientNoise, recover_tokens
from fedsplit.emulators import make_compressor
from fedsplit.emulators.build import adapter_state, plug_in
from fedsplit.emulators.compressors.base import Material
from fedsplit.emulators.planning.plan import outer_blocks
from fedsplit.models.anatomy import probe
from fedsplit.models.splitting.halves import Top
from fedsplit.models.splitting.heads import Head
from fedsplit.privacy import SamplePerturber, build_mechanism
from fedsplit.privacy.labels.row_noise import RowNoise
from fedsplit.privacy.secret import OwnerSecret
from simulations.split.lm_material import (
    Batch,
    Below,
    LanguageModelSplit,
    Reading,
    Tuned,
    chunks,
    forward,
    padded,
)
from strategies.split_tuning.denoising import build_denoiser
from strategies.split_tuning.gradient_denoising import GradientDenoiser

CLIP = 1.0
"""Bound on the norm of every step's gradient."""


# ---- gradients return to the server -------------------------------------------------------------


def returned_gradients(
    work: LanguageModelSplit,
    lr: float,
    ratio: float = 0.0,
    *,
    posterior: bool = True,
    attacked: int = 4,
) -> Tuned:
    """Tune all of the server's blocks by the gradients that owners return; the head stays frozen.

    Args:
        work: base and texts.
        lr: peak rate of AdamW.
        ratio: of ``row-noise``, clipped to the vocabulary's median; 0: gradients are exact.
        posterior: whether the server uses the posterior mean of noisy rows.
        attacked: steps whose rows are read, evenly spread.
    """
    bottom, top, head = work.cut()
    known = LinearHead.of(head)
    matrix = known.weight
    noise = RowNoise(ratio, median_length(matrix)) if ratio else None
    denoise = GradientDenoiser(noise, known) if noise is not None and posterior else None
    secret = OwnerSecret.for_simulation(work.seed, "lm-frontier")
    optimizer = torch.optim.AdamW(server_blocks(top), lr, weight_decay=0.0)
    reading = Reading()
    read_at = {round(i * (work.steps - 1) / max(1, attacked - 1)) for i in range(attacked)}
    for step in range(work.steps):
        texts = [text for owner in work.owners for text in owner[step]]
        states, logits, targets = forward(bottom, top, head, texts)
        with torch.no_grad():
            p = logits.detach().softmax(1)
            rows = (p @ matrix - matrix[targets]) / len(targets)
            sent, law = rows, GradientNoise()
            if noise is not None:
                sent = noise.perturb(rows, targets, 0.0, secret.stream(step))
                n, width = len(targets), rows.shape[1]
                law = GradientNoise("gaussian", noise.sigma(width) / n, noise.gradient_clip / n)
            if step in read_at:
                found = recover_tokens(
                    sent, logits.detach(), law, head=matrix, targets=len(targets)
                )
                reading.add(texts, found, logits.argmax(1))
            if denoise is not None:
                sent = denoise(states.detach(), sent, len(targets))
        step_by(optimizer, work.rate(step, lr), [states], [sent])
    return Tuned(work.loss(bottom, top, head), reading)


def unprotected_with_head(work: LanguageModelSplit, lr: float) -> Tuned:
    """Tune all of the server's blocks by exact gradients, and the owners' head with them.

    Only the first step's rows are read, where the head is the base's.
    """
    bottom, top, head = work.cut()
    matrix, reading = LinearHead.of(head).weight, Reading()
    own = list(head.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW([*server_blocks(top), *own], lr, weight_decay=0.0)
    for step in range(work.steps):
        texts = [text for owner in work.owners for text in owner[step]]
        states, logits, targets = forward(bottom, top, head, texts)
        loss = functional.cross_entropy(logits, targets)
        if step == 0:
            (rows,) = torch.autograd.grad(loss, [states], retain_graph=True)
            found = recover_tokens(
                rows, logits.detach(), GradientNoise(), head=matrix, targets=len(targets)
            )
            reading.add(texts, found, logits.argmax(1))
        step_by(optimizer, work.rate(step, lr), [loss], None)
    return Tuned(work.loss(bottom, top, head), reading)


def server_blocks(top: Top) -> list[nn.Parameter]:
    """Return a top's parameters but for the projection, marked as trained."""
    projection = probe(top.model).output_embeddings
    assert projection is not None, "a language model"
    frozen = {id(p) for p in projection.parameters()}
    chosen = [p for p in top.parameters() if id(p) not in frozen]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def median_length(matrix: Tensor) -> float:
    """Return the median distance of the vocabulary's rows from their mean, a public clip."""
    return float((matrix - matrix.mean(0)).norm(dim=1).median())


# ---- noise on representations -------------------------------------------------------------------


class NoisyBottom:
    """A bottom behind d_chi noise and the server's posterior mean; each text is drawn once.

    Args:
        work: base and texts.
        ratio: mean length of the noise over the median representation.
    """

    def __init__(self, work: LanguageModelSplit, ratio: float) -> None:
        privacy = replace(
            work.config.privacy, mechanism="dchi", noise_ratio=ratio, denoise="unigram"
        )
        self.config = replace(work.config, privacy=privacy)
        self._bottom = work.cut()[0]
        mechanism = build_mechanism(privacy, self._bottom, self._bottom.vocab, work.tokenizer)
        secret = OwnerSecret.for_simulation(work.seed, "lm-frontier")
        self._perturber = SamplePerturber(mechanism, secret, "lm-frontier:0")
        self._denoise = build_denoiser(self.config, self._bottom, work.tokenizer, mechanism)
        self._held: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def rows(self, text: Tensor) -> Tensor:
        """Return what leaves for a text, (T, d)."""
        clean = self._bottom(text[None], torch.ones(1, len(text), dtype=torch.int64))[0]
        return self._perturber.perturb(clean, text)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return what the server computes with, (N, T, d)."""
        texts = [row[: int(kept)] for row, kept in zip(ids, mask.sum(1), strict=True)]
        fresh = [t for t in texts if tuple(t.tolist()) not in self._held]
        assert self._denoise is not None
        for text, row in zip(fresh, self._denoise.once([self.rows(t) for t in fresh]), strict=True):
            self._held[tuple(text.tolist())] = row
        found = [self._held[tuple(t.tolist())] for t in texts]
        return nn.utils.rnn.pad_sequence(found, batch_first=True)

    def read(self, texts: Batch) -> float:
        """Return the share of tokens that the strongest reader of representations has right."""
        view = View(public=public_knowledge(self.config), rows=[self.rows(t) for t in texts])
        truth = Truth(ids=texts)
        return max(make_attack(name).run(view, truth).success for name in ("map", "contextual"))


def noisy_tail(work: LanguageModelSplit, lr: float, blocks: int, ratio: float) -> Tuned:
    """Tune tails of one's own above noisy representations: no gradient and no weight leaves.

    Nothing beside the representations tells of the text, so the joint reader reads these.
    """
    below = NoisyBottom(work, ratio)
    tuned = client_tail(work, lr, blocks, average=False, sent=below)
    return replace(tuned, joint=below.read(work.shown(0, 2)[:60]))


# ---- nothing returns to the server --------------------------------------------------------------


def client_tail(
    work: LanguageModelSplit,
    lr: float,
    blocks: int,
    *,
    average: bool,
    rounds: int = 6,
    sent: Below | None = None,
) -> Tuned:
    """Tune a tail at every owner; average the tails after each round, or never.

    The attacker has what left: the weights that each owner returned (or the base's, if none did).
    It predicts every token with them; the guess is what the same weights predict of other text.

    Args:
        work: base and texts.
        lr: peak rate of AdamW.
        blocks: of a tail.
        average: whether tails are averaged.
        rounds: after which they are.
        sent: (ids, mask) -> what the server computes with; None: the bottom's output.
    """
    clean, top, start = work.cut(blocks)
    bottom: Below = sent or clean
    tails = [copy.deepcopy(start) for _ in work.owners]
    optimizers = [
        torch.optim.AdamW(t.requires_grad_(True).parameters(), lr, weight_decay=0.0) for t in tails
    ]
    reading, every = Reading(), max(1, work.steps // rounds)
    for step in range(work.steps):
        for owner, tail, optimizer in zip(work.owners, tails, optimizers, strict=True):
            _, logits, targets = forward(bottom, top, tail, owner[step])
            loss = functional.cross_entropy(logits, targets)
            step_by(optimizer, work.rate(step, lr), [loss], None)
        if average and ((step + 1) % every == 0 or step + 1 == work.steps):
            if step + 1 in (every, work.steps):  # what the first and last weights tell
                for owner, tail in zip(work.owners, tails, strict=True):
                    shown = [t for batch in owner[max(0, step - 1) : step + 1] for t in batch]
                    predict(work, reading, (bottom, top, tail), shown)
            average_tails(tails)
    if not average:
        predict(work, reading, (bottom, top, start), work.shown(0, 2))
    losses = [work.loss(bottom, top, tail) for tail in (tails[:1] if average else tails)]
    return Tuned(sum(losses) / len(losses), reading)


def offsite(
    work: LanguageModelSplit, lr: float, adapters: int, keep: int, *, head: bool = False
) -> Tuned:
    """Tune outer blocks around an emulator of the middle at the owners; plug them into the base.

    No representation and no gradient leaves.  The attacker has the plugged-in model, and guesses
    with it as for :func:`client_tail`.

    Args:
        work: base and texts.
        lr: peak rate of AdamW.
        adapters: outer blocks that are tuned.
        keep: of the others, in the emulator.
        head: whether the vocabulary projection is tuned too (an untied copy).
    """
    base = copy.deepcopy(work.whole).eval()
    outside = outer_blocks(probe(base).num_layers, adapters)
    plan_of = make_compressor("layerdrop", adapters=outside, keep=keep)
    emulator = plan_of.build(base, Material(torch.zeros(1, 2, dtype=torch.int64), None, ""))
    emulator.model.eval().requires_grad_(False)
    trained = list(emulator.adapter_parameters().values())
    for model in (emulator.model, base) if head else ():
        projection = probe(model).output_embeddings
        assert isinstance(projection, nn.Linear), "a language model"
        projection.weight = nn.Parameter(projection.weight.detach().clone())
        trained += [projection.weight] if model is emulator.model else []
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
    for step in range(work.steps):
        ids, mask = padded([text for owner in work.owners for text in owner[step]])
        with torch.autocast("cpu", torch.bfloat16, enabled=work.autocast):
            logits = emulator.model(input_ids=ids, attention_mask=mask).logits
        predicts = mask[:, 1:].bool()
        rows = logits[:, :-1][predicts].float()
        loss = functional.cross_entropy(rows, ids[:, 1:][predicts])
        step_by(optimizer, work.rate(step, lr), [loss], None)
    plug_in(base, adapter_state(emulator), emulator.plan)
    if head:
        probe(base).output_embeddings.weight.data.copy_(trained[-1])  # type: ignore[union-attr,operator]
    parts, reading = work.cut(model=base), Reading()
    predict(work, reading, parts, work.shown(0, 2))
    return Tuned(work.loss(*parts), reading)


def step_by(
    optimizer: torch.optim.Optimizer,
    rate: float,
    outputs: list[Tensor],
    gradients: list[Tensor] | None,
) -> None:
    """Step by the gradient of ``outputs`` (weighed by ``gradients``; None: they are losses)."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(outputs, gradients)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()


@torch.no_grad()
def average_tails(tails: Sequence[Head]) -> None:
    """Set every tail to the mean of all."""
    for same in zip(*(tail.parameters() for tail in tails), strict=True):
        mean = torch.stack([p.detach() for p in same]).mean(0)
        for parameter in same:
            parameter.copy_(mean)


@torch.no_grad()
def predict(
    work: LanguageModelSplit, reading: Reading, model: tuple[Below, Top, Head], texts: Batch
) -> None:
    """Read ``texts`` with a model's own predictions; guess with those of held-out text."""
    for batch, read in ((texts, True), (work.held_out[: len(texts)], False)):
        for chunk in chunks(batch, 32):
            _, logits, _ = forward(*model, chunk)
            reading.add(
                chunk, logits.argmax(1) if read else None, None if read else logits.argmax(1)
            )
