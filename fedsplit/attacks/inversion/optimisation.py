"""Inversion by optimisation: for bottoms with blocks (k >= 1), where no candidate set exists.

Split-and-Privatize, arXiv 2312.15603, section 4 (EIA for k >= 1).  Token-selection logits Z (T, V)
are relaxed to soft embeddings softmax(Z / tau) E, sent through the known bottom, and fitted to the
received vectors by mean squared error, each row's relative to its own square: in many decoders the
first token's state is a hundred times the others' (massive activations, Sun et al., arXiv
2402.17762), and would be all that is fitted.  The bottom is used through its ordinary forward: a
hook on its input embedding puts the soft embeddings in place of the looked-up ones, so position
embeddings, norms, masks and rotary angles are the model's own.

Given public text, it starts from what the tokens' states say of each row
(:mod:`fedsplit.attacks.inversion.token_states`).  The paper starts at random, which leads nowhere
behind six blocks of a large vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedsplit.attacks.base import TokenAttack, View
from fedsplit.attacks.inversion.embeddings import embedding_table, soft_embeddings
from fedsplit.attacks.inversion.nearest import has_candidates
from fedsplit.attacks.inversion.proposals import proposals
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import AttackError, check
from fedsplit.models.modes import frozen
from fedsplit.privacy.mechanisms.base import clip_rows
from fedsplit.seeding import torch_generator

HEAD = 0.6  # of the likeliest candidate's logit: softmax weight 20 times another's at tau 0.2


@dataclass(frozen=True)
class _Clipped:
    """A bottom, and the norm that owners clip its rows to; 0 = they do not."""

    bottom: nn.Module
    clip: float

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return rows as an owner without noise would send them, ``(B, T, d)`` float32."""
        hidden: Tensor = self.bottom(ids, mask)
        return clip_rows(hidden.float(), self.clip)


@dataclass(frozen=True)
class OptimisationInversion(TokenAttack):
    """The attack: gradient descent on relaxed token choices.

    What it needs: memory and time of ``batch * T * V`` floats per step.  Noise on the vectors only
    makes the fit worse; it is ignored.  The norm C that owners clip rows to is public, and what is
    fitted is clipped to it as well.

    Args:
        steps: at most, per restart.
        lr: of Adam.
        temperature: of the softmax; small is close to a choice.
        restarts: independent starts; per sample the one that fits best as hard tokens is kept.
        batch: samples optimised together.
        check_every: steps between looks at the hard tokens.
        tolerance: stop once every sample's hard tokens fit with a relative squared error below
            this (exact recovery gives rounding error alone).
        samples: read at most (it is slow); 0 for all.
        shortlist: ids tried, public text's most frequent; 0 for the whole vocabulary.
        started: candidates per token that the first start is drawn to and that are tried beside the
            shortlist; 0: all starts are random, as the paper's.
        seed: of the starting logits.
        top_k: guesses ranked per token.
    """

    name: ClassVar[str] = "optimisation"
    knows: ClassVar[str] = (
        "white box: the initial bottom (any k); public text and the noise's law for the start alone"
    )
    budget: ClassVar[tuple[str, ...]] = ("steps", "restarts", "samples", "shortlist", "started")
    keys: ClassVar[Mapping[str, tuple[str, int]]] = {
        "optimisation-steps": ("steps", 1),
        "optimisation-samples": ("samples", 1),
        "shortlist": ("shortlist", 128),
    }
    result_key: ClassVar[str] = "optimisation_inversion"
    words: ClassVar[str] = "inputs fitted to what left"
    steps: int = 200
    lr: float = 0.09
    temperature: float = 0.2
    restarts: int = 1
    batch: int = 8
    check_every: int = 10
    tolerance: float = 1e-5
    samples: int = 16
    shortlist: int = 8192
    started: int = 16
    seed: int = 0
    top_k: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "batch", "check_every", "top_k"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("lr", "temperature"):
            check(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        for name in ("samples", "shortlist", "started"):
            check(getattr(self, name) >= 0, name, getattr(self, name), ">= 0 (0 = all)")

    def applies(self, view: View) -> bool:
        """Return whether blocks are in front of the cut."""
        return super().applies(view) and not has_candidates(view)

    def read(self, view: View) -> Inversion:
        of = view.public
        rows = view.rows[: self.samples or None]
        clip = 0.0 if of.mechanism is None else of.mechanism.sent_norm
        likely = proposals(of, rows, self.started, seed=self.seed) if self.started else None
        frequent = self._frequent(view)
        return self.invert(rows, of.bottom, of.embedding, of.vocab, frequent, clip, likely)

    def knowledge_of(self, view: View) -> str:
        """Return what the attacker is given, with the number of ids that it tries."""
        tried = self._frequent(view)
        if tried is None:
            return self.knowledge
        more = f" and the {self.started} likeliest of each row" if self.started else ""
        return f"{self.knowledge}; tries the {len(tried)} ids most frequent in public text{more}"

    def _frequent(self, view: View) -> Tensor | None:
        """Return the ids tried; None for all."""
        if not 0 < self.shortlist < view.public.vocab:
            return None
        return view.public.log_prior().argsort(descending=True)[: self.shortlist]

    def invert(
        self,
        representations: Sequence[Tensor],
        bottom: nn.Module,
        embedding: nn.Module,
        vocab_size: int,
        shortlist: Tensor | None = None,
        clip: float = 0.0,
        likely: Sequence[Tensor] | None = None,
    ) -> Inversion:
        """Guess the tokens behind ``representations``.

        Args:
            representations: what was received, per sample ``(T_i, d)``, unpadded.
            bottom: ``bottom(input_ids, attention_mask) -> (B, T, d)``, as the attacker knows it;
                put into evaluation mode for the attack.
            embedding: the module inside ``bottom`` that looks up token embeddings, for instance
                ``fedsplit.models.probe(bottom.model).input_embeddings``.
            vocab_size: V.
            shortlist: ids that the attacker considers, ``(V',)``, for instance public text's most
                frequent; None for all.  Cost falls with V', and no other token can be found.
            clip: C, norm that rows were clipped to before they left; 0 = they were not.
            likely: per sample candidates of each row, best first, ``(T_i, n)``, that the first
                start is drawn to; None: it is random.

        Raises:
            AttackError: if ``bottom`` does not use ``embedding``, or a shape does not fit.
        """
        start = time.perf_counter()
        order = sorted(range(len(representations)), key=lambda i: representations[i].shape[0])
        top: list[Tensor] = [torch.empty(0)] * len(representations)
        with frozen(bottom):
            device = next(bottom.parameters()).device
            known = _Clipped(bottom, clip)
            whole = embedding_table(embedding, vocab_size, device)  # (V, d_e)
            ids = torch.arange(vocab_size) if shortlist is None else shortlist.cpu()
            for at in range(0, len(order), self.batch):
                group = order[at : at + self.batch]
                rows = [representations[i] for i in group]
                near = None if likely is None else [likely[i].cpu() for i in group]
                tried = torch.unique(torch.cat([ids, *(x.flatten() for x in near or ())]))
                if not len(tried) or int(tried[0]) < 0 or int(tried[-1]) >= vocab_size:
                    told = f"must be in 0..{vocab_size - 1}"
                    raise AttackError(f"shortlist: {len(tried)} ids: {told}")
                tried = tried.to(device)
                found = self._batch(rows, known, embedding, whole[tried], tried, near)
                for i, guess in zip(group, found, strict=True):
                    top[i] = guess
        return Inversion(top, time.perf_counter() - start)

    def _batch(
        self,
        targets: list[Tensor],
        bottom: _Clipped,
        embedding: nn.Module,
        table: Tensor,
        ids: Tensor,
        likely: list[Tensor] | None,
    ) -> list[Tensor]:
        """Return the top guesses ``(T_i, k)`` of each sample of one batch."""
        lengths = [len(x) for x in targets]
        device = table.device
        target = nn.utils.rnn.pad_sequence(
            [x.detach().to(device, torch.float32) for x in targets], batch_first=True
        )  # (B, T, d)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(device)
        power = target.square().sum(2).clamp(min=1e-12)  # (B, T)
        best_error = torch.full((len(targets),), torch.inf, device=device)
        best: Tensor | None = None
        for restart in range(self.restarts):
            size = (*mask.shape, len(ids))
            generator = torch_generator(
                self.seed, "attacks", "optimisation", f"{lengths}:{restart}"
            )
            first = 0.01 * torch.randn(size, generator=generator)
            if likely is not None and not restart:
                _draw_to(first, likely, ids.cpu())
            logits, error = self._descend(
                bottom, embedding, table, ids, target, mask, power, first.to(device)
            )
            better = error < best_error
            best = logits if best is None else torch.where(better[:, None, None], logits, best)
            best_error = torch.where(better, error, best_error)
            if bool((best_error < self.tolerance).all()):
                break
        assert best is not None, "restarts >= 1"
        guesses = ids[best.topk(min(self.top_k, len(ids)), dim=2).indices].cpu()  # (B, T, k)
        return [g[:n] for g, n in zip(guesses, lengths, strict=True)]

    def _descend(
        self,
        bottom: _Clipped,
        embedding: nn.Module,
        table: Tensor,
        ids: Tensor,
        target: Tensor,
        mask: Tensor,
        power: Tensor,
        logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits ``(B, T, V)`` that fit best as hard tokens, and their errors (B,)."""
        logits.requires_grad_()
        optimiser = torch.optim.Adam([logits], lr=self.lr)
        weight = (mask / power).unsqueeze(2) / mask.sum()
        kept = logits.detach().clone()
        lowest = torch.full((len(target),), torch.inf, device=table.device)
        for step in range(self.steps + 1):
            if step % self.check_every == 0 or step == self.steps:
                with torch.no_grad():
                    hard = bottom(ids[logits.argmax(2)], mask)
                    gap = ((hard - target).square().sum(2) * mask / power).sum(1) / mask.sum(1)
                better = gap < lowest
                kept = torch.where(better[:, None, None], logits.detach(), kept)
                lowest = torch.where(better, gap, lowest)
                if bool((lowest < self.tolerance).all()) or step == self.steps:
                    break
            soft = torch.softmax(logits / self.temperature, dim=2) @ table  # (B, T, d_e)
            with soft_embeddings(embedding) as slot:
                slot.append(soft)
                hidden = bottom(torch.zeros_like(mask), mask)
            if hidden.shape != target.shape or not hidden.requires_grad:
                raise AttackError(
                    f"bottom output={tuple(hidden.shape)}: must be {tuple(target.shape)} and "
                    "depend on the given embedding module"
                )
            loss = ((hidden - target).square() * weight).sum()
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
        return kept, lowest


def _draw_to(logits: Tensor, likely: Sequence[Tensor], ids: Tensor) -> None:
    """Raise logits (B, T, V) of each row's candidates, the best by ``HEAD`` and the next less."""
    for sample, ranked in zip(logits, likely, strict=True):
        places = torch.searchsorted(ids, ranked)  # (T_i, n)
        raised = HEAD * (1 - torch.arange(ranked.shape[1]) / ranked.shape[1])
        sample[: len(ranked)].scatter_add_(1, places, raised.expand(len(ranked), -1))
