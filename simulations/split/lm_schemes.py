"""Tuning a split language model under a protection of its gradients, in one process.

Owners' texts, the protections, the server's estimate of noisy gradients and the readers are the
library's own; what is left out is the wire (`tests/strategies/split_tuning` shows that runs through
it take the same steps).  Every scheme passes once over the same texts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsplit.attacks.gradients.token_recovery import GradientNoise, recover_tokens
from fedsplit.config import RunConfig
from fedsplit.emulators import make_compressor
from fedsplit.emulators.build import adapter_state, plug_in
from fedsplit.emulators.compressors.base import Material
from fedsplit.emulators.planning.plan import outer_blocks
from fedsplit.models.anatomy import probe
from fedsplit.models.splitting.halves import Bottom, Top, split
from fedsplit.models.splitting.heads import Head, detach_head
from fedsplit.privacy.labels.row_noise import RowNoise
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.seeding import numpy_generator
from simulations.core.owner_samples import OwnerSamples, owner_samples
from strategies.base_model import AUTOCASTS, load_base
from strategies.split_tuning.gradient_denoising import GradientDenoiser, linear_projection

Batch = list[Tensor]
CLIP = 1.0
"""Bound on the norm of every step's gradient."""


@dataclass
class Reading:
    """What an attacker read of owners' tokens, and what it would have guessed.

    Attributes:
        read: tokens that are right, tokens, texts that are right as a whole, texts.
        guess: the same of the guess.
    """

    read: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.int64))
    guess: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.int64))

    def add(self, texts: Batch, read: Tensor | None, guess: Tensor | None) -> None:
        """Add predictions of every token but a text's first, text after text."""
        lengths = [len(t) - 1 for t in texts]
        for found, into in ((read, self.read), (guess, self.guess)):
            if found is None:
                continue
            parts = torch.tensor_split(found, torch.tensor(lengths).cumsum(0)[:-1])
            for text, own in zip(texts, parts, strict=True):
                hit = own == text[1:]
                into += torch.tensor([int(hit.sum()), len(hit), int(hit.all()), 1])

    def shares(self) -> dict[str, float]:
        """Return the shares as columns of a row."""
        read, guess = self.read.tolist(), self.guess.tolist()
        return {
            "token_recovery": read[0] / max(1, read[1]),
            "guess": guess[0] / max(1, guess[1]),
            "text_recovery": read[2] / max(1, read[3]),
            "text_guess": guess[2] / max(1, guess[3]),
            "tokens": read[1],
            "texts": read[3],
        }


@dataclass
class Tuned:
    """What a scheme reached: held-out loss in nats, and what was read on the way."""

    loss: float
    reading: Reading = field(default_factory=Reading)


class LanguageModelSplit:
    """A base cut at ``split.k`` and three owners' texts, the same for every scheme of a seed.

    Args:
        config: the run's settings.
        seed: of owners' shares and batches.
        targets: per step, over all owners.
        steps: at most; one pass at most.
        held_out: tokens of held-out text at most.
    """

    def __init__(
        self, config: RunConfig, seed: int, targets: int, steps: int, held_out: int
    ) -> None:
        self.config, self.seed = config, seed
        self._loaded = load_base(config)
        owners = owner_samples(config, self._loaded.tokenizer)
        self.owners = [_batches(o, targets // len(owners), seed) for o in owners]
        self.steps = min(steps, *(len(b) for b in self.owners))
        self.held_out: Batch = []
        for text in (x for owner in owners for x in owner.test.ids if len(x) > 1):
            if sum(map(len, self.held_out)) < held_out:
                self.held_out.append(text)

    @property
    def autocast(self) -> bool:
        """Whether products are in bfloat16."""
        return self.config.model.autocast == "bfloat16"

    def shown(self, first: int, last: int) -> Batch:
        """Return all owners' texts of the steps ``first`` to ``last``, the latter left out."""
        return [t for owner in self.owners for batch in owner[first:last] for t in batch]

    def cut(self, blocks: int = 0, model: Any = None) -> tuple[Bottom, Top, Head]:
        """Return fresh parts of the base (or of ``model``), nothing of them trained.

        Args:
            blocks: last blocks that go with the head.
            model: cut as it is, instead of a copy of the base.
        """
        whole = copy.deepcopy(self._loaded.model) if model is None else model
        bottom, top = split(whole, self.config.split.k, verify=False)
        head = detach_head(top, blocks=blocks)
        top.autocast = AUTOCASTS[self.config.model.autocast]
        head.autocast = top.autocast if blocks else None
        for part in (bottom, top, head):
            part.eval().requires_grad_(False)
        return bottom, top, head

    @property
    def whole(self) -> Any:
        """The base model."""
        return self._loaded.model

    def rate(self, step: int, peak: float) -> float:
        """Return the learning rate: a short warm-up, then linearly to zero."""
        return peak * min(1.0, (step + 1) / 5) * (1 - step / self.steps)

    @torch.no_grad()
    def loss(self, bottom: Bottom, top: Top, head: Head) -> float:
        """Return the mean held-out loss in nats."""
        total = count = 0.0
        for batch in _chunks(self.held_out, 32):
            logits, targets = forward(bottom, top, head, batch)[1:]
            total += float(functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
        return total / count


def forward(bottom: Bottom, top: Top, head: Head, texts: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return states that enter the head (R, d), logits (R, V) and targets (R,) of predicting rows.

    A tail sees whole texts, so its states are not cut to the predicting rows.
    """
    ids, mask = padded(texts)
    predicts = mask[:, 1:].bool()
    with torch.no_grad():
        hidden = bottom(ids, mask)
    states = top.hidden_states(hidden, mask, tail=head.blocks).float()
    targets = ids[:, 1:][predicts]
    if head.blocks:
        logits = head(states, mask)[:, :-1][predicts]
        return states, logits.float(), targets
    rows = states[:, :-1][predicts]
    project = probe(head.model).output_embeddings
    assert project is not None, "a language model"
    with torch.autocast("cpu", torch.bfloat16, enabled=top.autocast is not None):
        return rows, project(rows).float(), targets


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
    matrix = linear_projection(head)
    assert matrix is not None, "language models of this experiment have a plain projection"
    noise = RowNoise(ratio, median_length(matrix)) if ratio else None
    denoise = GradientDenoiser(noise, matrix) if noise is not None and posterior else None
    secret = OwnerSecret.for_simulation(work.seed, "lm-frontier")
    frozen = {id(p) for p in probe(top.model).output_embeddings.parameters()}  # type: ignore[union-attr]
    trained = [p for p in top.parameters() if id(p) not in frozen and p.is_floating_point()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
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
        _step(optimizer, work.rate(step, lr), [states], [sent])
    return Tuned(work.loss(bottom, top, head), reading)


def median_length(matrix: Tensor) -> float:
    """Return the median distance of the vocabulary's rows from their mean, a public clip."""
    return float((matrix - matrix.mean(0)).norm(dim=1).median())


# ---- nothing returns to the server --------------------------------------------------------------


def client_tail(
    work: LanguageModelSplit, lr: float, blocks: int, *, average: bool, rounds: int = 6
) -> Tuned:
    """Tune a tail at every owner; average the tails after each round, or never.

    The attacker has what left: the weights that each owner returned (or the base's, if none did).
    It predicts every token with them; the guess is what the same weights predict of other text.
    """
    bottom, top, start = work.cut(blocks)
    tails = [copy.deepcopy(start) for _ in work.owners]
    optimizers = [
        torch.optim.AdamW(t.requires_grad_(True).parameters(), lr, weight_decay=0.0) for t in tails
    ]
    reading, every = Reading(), max(1, work.steps // rounds)
    for step in range(work.steps):
        for owner, tail, optimizer in zip(work.owners, tails, optimizers, strict=True):
            _, logits, targets = forward(bottom, top, tail, owner[step])
            loss = functional.cross_entropy(logits, targets)
            _step(optimizer, work.rate(step, lr), [loss], None)
        if average and ((step + 1) % every == 0 or step + 1 == work.steps):
            if step + 1 in (every, work.steps):  # what the first and last weights tell
                for owner, tail in zip(work.owners, tails, strict=True):
                    shown = [t for batch in owner[max(0, step - 1) : step + 1] for t in batch]
                    _predict(work, reading, (bottom, top, tail), shown)
            _average(tails)
    if not average:
        _predict(work, reading, (bottom, top, start), work.shown(0, 2))
    losses = [work.loss(bottom, top, tail) for tail in (tails[:1] if average else tails)]
    return Tuned(sum(losses) / len(losses), reading)


def offsite(work: LanguageModelSplit, lr: float, adapters: int, keep: int) -> Tuned:
    """Tune outer blocks around an emulator of the middle at the owners; plug them into the base.

    No representation and no gradient leaves.  The attacker has the plugged-in model, and guesses
    with it as for :func:`client_tail`.
    """
    base = copy.deepcopy(work.whole).eval()
    outside = outer_blocks(probe(base).num_layers, adapters)
    plan_of = make_compressor("layerdrop", adapters=outside, keep=keep)
    emulator = plan_of.build(base, Material(torch.zeros(1, 2, dtype=torch.int64), None, ""))
    emulator.model.eval().requires_grad_(False)
    trained = list(emulator.adapter_parameters().values())
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
        _step(optimizer, work.rate(step, lr), [loss], None)
    plug_in(base, adapter_state(emulator), emulator.plan)
    parts, reading = work.cut(model=base), Reading()
    _predict(work, reading, parts, work.shown(0, 2))
    return Tuned(work.loss(*parts), reading)


def padded(texts: Batch) -> tuple[Tensor, Tensor]:
    """Return ids and mask, (N, T) each."""
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(t) for t in texts])
    return ids, (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()


def _step(
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
def _average(tails: Sequence[Head]) -> None:
    """Set every tail to the mean of all."""
    for same in zip(*(tail.parameters() for tail in tails), strict=True):
        mean = torch.stack([p.detach() for p in same]).mean(0)
        for parameter in same:
            parameter.copy_(mean)


@torch.no_grad()
def _predict(
    work: LanguageModelSplit, reading: Reading, model: tuple[Bottom, Top, Head], texts: Batch
) -> None:
    """Read ``texts`` with a model's own predictions; guess with those of held-out text."""
    for batch, read in ((texts, True), (work.held_out[: len(texts)], False)):
        for chunk in _chunks(batch, 32):
            _, logits, _ = forward(*model, chunk)
            reading.add(
                chunk, logits.argmax(1) if read else None, None if read else logits.argmax(1)
            )


def _chunks(texts: Batch, size: int) -> Iterator[Batch]:
    for at in range(0, len(texts), size):
        yield texts[at : at + size]


def _batches(owner: OwnerSamples, targets: int, seed: int) -> list[Batch]:
    """Return one pass over an owner's texts, each batch of at least ``targets`` targets."""
    texts = [ids for ids in owner.train.ids if len(ids) > 1]
    order = numpy_generator(seed, "lm-frontier", owner.name).permutation(len(texts))
    found: list[Batch] = [[]]
    count = 0
    for at in order:
        if count >= targets:
            found.append([])
            count = 0
        found[-1].append(texts[at])
        count += len(texts[at]) - 1
    return found if count >= targets or len(found) == 1 else found[:-1]
