"""Whole texts that explain all received rows: behind blocks, by the law of the noise.

What reads row by row (:mod:`fedsplit.attacks.inversion.token_states`, and
:mod:`fedsplit.attacks.inversion.learned` where it was taught) knows the neighbours' part in a row
as an average alone.  But the bottom is public: a text can be sent through it, and what comes out
compared with *every* row by the exact law of the noise.  So the others only propose.  Where states
depend on what stands before them alone, a beam reads left to right, each candidate behind the text
read so far (as SipIt does without noise, Nikolaou et al., arXiv 2510.15511).  Then the best text is
read again, position by position: each candidate is put in and the whole text judged anew, prior
included, which is coordinate ascent on the posterior of the text (iterated conditional modes, Besag
1986).  That needs no order of reading, so bidirectional bottoms are read as well.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsplit.attacks.base import Public, TokenAttack, View
from fedsplit.attacks.inversion.nearest import has_candidates
from fedsplit.attacks.inversion.proposals import proposals
from fedsplit.attacks.inversion.row_evidence import RowEvidence, lawful
from fedsplit.attacks.inversion.token_search import (
    UNEXPLAINED,
    PrefixRunner,
    reads_left_to_right,
)
from fedsplit.attacks.inversion.token_states import teaches
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import AttackError, check
from fedsplit.models.modes import frozen

AT_ONCE = 256  # candidates run together where a row is searched for


@dataclass(frozen=True)
class TextSearch(TokenAttack):
    """The attack: others' proposals, judged by the bottom itself and the law of the noise.

    Args:
        beams: texts kept while reading left to right.
        shortlist: candidates per position.
        rereads: times at most that the best text is read again; ends when nothing changes.
        retried: candidates per position of a reading again.
        searched: candidates tried where none of the first ``shortlist`` explains a row without
            noise; never again in a text once that has failed, since its prefix is wrong then.
        samples: read at most; 0 for all.
        seconds: of searching at most; the sample at work is then read as proposed from where it
            is.  0 = no bound.
        top_k: guesses ranked per token.
        seed: of what proposes.
    """

    name: ClassVar[str] = "text_search"
    knows: ClassVar[str] = (
        "white box: the initial bottom (any k), the mechanism's law, bigrams of public text"
    )
    budget: ClassVar[tuple[str, ...]] = ("beams", "shortlist", "rereads", "samples")
    keys: ClassVar[Mapping[str, tuple[str, int]]] = {"text-samples": ("samples", 1)}
    words: ClassVar[str] = "texts that explain all rows, sent through the same bottom"
    beams: int = 4
    shortlist: int = 24
    rereads: int = 2
    retried: int = 8
    searched: int = 2048
    samples: int = 8
    seconds: float = 0.0
    top_k: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("beams", "top_k", "searched"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("rereads", "samples", "seconds"):
            check(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        for name in ("shortlist", "retried"):
            check(getattr(self, name) >= 2, name, getattr(self, name), ">= 2 (candidates)")

    def applies(self, view: View) -> bool:
        """Return whether rows of a known law were received, behind blocks, and none knows more.

        A language model's rows are read by ``joint``, which has the public model as its prior.
        """
        of = view.public
        if not super().applies(view) or has_candidates(view) or not lawful(of):
            return False
        return teaches(of) and (of.model is None or of.bottom.task != "causal-lm")

    def read(self, view: View) -> Inversion:
        """Return the guesses; see :meth:`TokenAttack.read`."""
        start = time.perf_counter()
        of = view.public
        rows = list(view.rows[: self.samples or None])
        count = self.shortlist if of.noisy else max(self.shortlist, self.searched)
        proposed = proposals(of, rows, count, seed=self.seed, seconds=self.seconds / 2)
        if proposed is None:
            raise AttackError(
                "public text: 0 texts of two tokens, or rows of no known law: must be"
            )
        top: list[Tensor] = []
        with frozen(of.bottom):
            reader = _Reader.of(self, of)
            for received, ids in zip(rows, proposed, strict=True):
                top.append(reader.ranked(RowEvidence(of, received), ids))
                if reader.late():
                    break
        return Inversion(top, time.perf_counter() - start)


@dataclass
class _Reader:
    """What is the same for all texts.

    Attributes:
        attack: its budget.
        public: what is known.
        unigram: log prior of a first token, ``(V,)``.
        runner: runs a token behind a prefix; None: states depend on what follows.
        until: when the budget of seconds ends.
    """

    attack: TextSearch
    public: Public
    unigram: Tensor
    runner: PrefixRunner | None
    until: float

    @classmethod
    def of(cls, attack: TextSearch, public: Public) -> _Reader:
        causal = reads_left_to_right(public.bottom)
        runner = PrefixRunner(public.bottom, public.embedding) if causal else None
        until = time.perf_counter() + (attack.seconds or float("inf"))
        return cls(attack, public, public.log_prior(), runner, until)

    def late(self) -> bool:
        """Return whether the budget of seconds is spent."""
        return time.perf_counter() > self.until

    def ranked(self, evidence: RowEvidence, proposed: Tensor) -> Tensor:
        """Return the ranked guesses of one text, best first, ``(T, k)``."""
        starts = [proposed[:, 0]]
        if self.runner is not None:
            starts.append(self._beam(evidence, proposed))
        totals = self._totals(evidence, torch.stack(starts))
        text = starts[int(totals.argmax())].clone()
        judged = [proposed[t] for t in range(len(text))]
        for _ in range(self.attack.rereads):
            before = text.clone()
            for t in range(len(text)):
                if self.late():
                    break
                ids = _distinct(text[t : t + 1], judged[t])[: self.attack.retried]
                tried = text.repeat(len(ids), 1)
                tried[:, t] = ids
                order = ids[self._totals(evidence, tried).argsort(descending=True)]
                judged[t] = _distinct(order, judged[t])
                text[t] = order[0]
            if torch.equal(before, text):
                break
        out = [_distinct(text[t : t + 1], judged[t])[: self.attack.top_k] for t in range(len(text))]
        width = min(map(len, out))
        return torch.stack([ids[:width] for ids in out])

    @torch.no_grad()
    def _totals(self, evidence: RowEvidence, texts: Tensor) -> Tensor:
        """Return the log posterior of whole texts up to a constant, ``(n, T) -> (n,)``."""
        states = self.public.bottom(texts, torch.ones_like(texts)).float()  # (n, T, d)
        prior = self.unigram[texts[:, 0]] + self._bigram(texts[:, :-1], texts[:, 1:]).sum(1)
        total: Tensor = evidence(states).sum(1) + prior
        return total

    def _bigram(self, before: Tensor, after: Tensor) -> Tensor:
        found = self.public.language.bigram(before.numpy(), after.numpy())
        return torch.from_numpy(np.asarray(found)).float()

    def _beam(self, evidence: RowEvidence, proposed: Tensor) -> Tensor:
        """Return the best text that reading left to right finds, ``(T,)``."""
        texts: list[list[int]] = [[]]
        totals = torch.zeros(1)
        searching = evidence.exact and proposed.shape[1] > self.attack.shortlist
        for t, own in enumerate(proposed):
            if self.late():
                return torch.cat([torch.tensor(texts[0]).long(), proposed[t:, 0]])
            ids = own[: self.attack.shortlist] if evidence.exact else own
            rows = self._behind(evidence, texts, ids, t)
            if searching and float(rows.max()) < UNEXPLAINED:
                ahead = [texts[int(totals.argmax())]]
                for more in torch.split(own[len(ids) :], AT_ONCE):
                    found = self._behind(evidence, ahead, more, t)[0]
                    if float(found.max()) >= UNEXPLAINED:
                        ids = _distinct(more[found.argmax()].view(1), ids)
                        rows = self._behind(evidence, texts, ids, t)
                        break
                else:
                    searching = False
            if t:
                last = torch.tensor([[text[-1]] for text in texts]).expand(-1, len(ids))
                prior = self._bigram(last, ids.expand(len(texts), -1))
            else:
                prior = self.unigram[ids].unsqueeze(0)
            joint = totals[:, None] + rows + prior
            best = joint.flatten().topk(min(self.attack.beams, joint.numel()))
            totals = best.values
            parents, picked = best.indices // len(ids), ids[best.indices % len(ids)]
            texts = [[*texts[int(p)], int(v)] for p, v in zip(parents, picked, strict=True)]
        return torch.tensor(texts[int(totals.argmax())])

    @torch.no_grad()
    def _behind(
        self, evidence: RowEvidence, texts: Sequence[list[int]], ids: Tensor, t: int
    ) -> Tensor:
        """Return row ``t``'s evidence for each of ``ids`` behind each text, ``(n, m)``."""
        assert self.runner is not None, "asked where states depend on the past alone"
        found = []
        for text in texts:
            self.runner.advance(text)
            found.append(evidence(self.runner.tokens(ids).unsqueeze(1), t)[:, 0])
        return torch.stack(found)


def _distinct(first: Tensor, more: Tensor) -> Tensor:
    """Return ``first`` and what else is in ``more``, in their order."""
    return torch.cat([first, more[~torch.isin(more, first)]])
