"""The joint attacker: rows and gradients of a text together, read as language.

A beam search reads left to right; every token's candidates come from the gradients, from the
public model behind the text read so far, from the server's own prediction, and from the row itself:
in front of any block by its distance, behind blocks by tokens' states (and as a learned inverter
reads it, where one was taught).  Where none of them explains a row without noise the whole
vocabulary is searched.  The best text is then read again: at the tokens that are least certain each
candidate is put in, and the whole text judged anew, so that what follows counts too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.attacks.base import TokenAttack, View
from fedsplit.attacks.gradients.next_tokens import logits_of, reads_logits
from fedsplit.attacks.gradients.text_evidence import CachedReader, TextEvidence, union
from fedsplit.attacks.inversion.embeddings import embedding_table
from fedsplit.attacks.inversion.nearest import has_candidates
from fedsplit.attacks.inversion.proposals import proposals
from fedsplit.attacks.inversion.token_search import (
    UNEXPLAINED,
    ExactSearch,
    PrefixRunner,
    first_states,
)
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import check
from fedsplit.models.modes import frozen
from fedsplit.privacy.denoising.candidate_search import search
from fedsplit.privacy.denoising.posterior import posterior_search

RANKED = 10


@dataclass(frozen=True)
class JointDecoding(TokenAttack):
    """The attack; it needs rows or gradients, and uses what there is.

    Args:
        beams: texts kept while reading.
        shortlist: candidates of each kind per token and beam.
        rereads: times that the best text is read again.
        doubtful: least certain tokens that a reading again looks at.
        samples: read at most; 0 for all.
    """

    name: ClassVar[str] = "joint"
    needs: ClassVar[tuple[str, ...]] = ()
    uses: ClassVar[tuple[str, ...]] = ("rows", "steps")
    knows: ClassVar[str] = (
        "everything that crossed, both ways; the initial model, the laws of all noise, word "
        "frequencies of public text"
    )
    words: ClassVar[str] = "rows and gradients together, read as language"
    budget: ClassVar[tuple[str, ...]] = ("beams", "shortlist", "rereads", "doubtful", "samples")
    beams: int = 4
    shortlist: int = 12
    rereads: int = 1
    doubtful: int = 16
    samples: int = 64

    def __post_init__(self) -> None:
        for name, least in (("beams", 1), ("shortlist", 2), ("rereads", 0), ("doubtful", 0)):
            check(getattr(self, name) >= least, name, getattr(self, name), f">= {least}")
        check(self.samples >= 0, "samples", self.samples, ">= 0 (0 = all)")

    def applies(self, view: View) -> bool:
        """Return whether a causal model's rows or gradients crossed, and the model is known."""
        bottom = view.public.bottom
        causal = bottom is not None and bottom.task == "causal-lm"
        return causal and view.public.model is not None and bool(view.rows or view.steps)

    def read(self, view: View) -> Inversion:
        """Return the guesses; see :meth:`TokenAttack.read`."""
        start = time.perf_counter()
        count = len(view.rows or view.steps)
        count = min(count, self.samples or count)
        alone = _by_row(view, count, self.shortlist)
        runner = PrefixRunner(view.public.bottom, view.public.embedding)
        first = None if alone else first_states(runner, view.public.vocab)
        proposed = None
        if not alone and view.rows:
            proposed = proposals(view.public, list(view.rows[:count]), self.shortlist)
        top = []
        for sample in range(count):
            evidence = TextEvidence(view, sample)
            own = alone[sample] if alone else _first_tokens(evidence, first, self.shortlist)
            if proposed is not None and evidence.has_rows:
                own = _with_first(own[:1], proposed[sample])
            top.append(_Reading(self, view, evidence, runner, own).ranked())
        return Inversion(top, time.perf_counter() - start)

    def unaided_guess(self, view: View) -> Sequence[Tensor] | None:
        """Return the server's own top-1 from what it received; the first token is most frequent."""
        if not view.steps or not (reads_logits(view) or view.public.head is not None):
            return None
        first = view.public.log_prior().argmax().view(1)
        count = min(len(view.steps), self.samples or len(view.steps))
        return [torch.cat([first, logits_of(view, s[-1]).argmax(1)]) for s in view.steps[:count]]


def _by_row(view: View, count: int, shortlist: int) -> list[Tensor] | None:
    """Return each row's own best candidates, ``(T, n)`` a text; None behind blocks."""
    public = view.public
    if not view.rows or not has_candidates(view):
        return None
    rows = list(view.rows[:count])
    candidates = public.candidates(rows)
    if public.noisy:
        law = public.known_mechanism
        return posterior_search(rows, candidates, law, shortlist, None, public.touched)[0]
    return search(rows, candidates, shortlist)[0]


def _first_tokens(evidence: TextEvidence, states: Tensor | None, shortlist: int) -> Tensor:
    """Return the best candidates of the first token, ``(1, n)``; none where no row says more."""
    if states is None or not evidence.has_rows:
        return torch.zeros(0, 0, dtype=torch.int64)
    found = evidence.of_rows(states.unsqueeze(1))[:, 0] + evidence.first_prior
    return found.topk(shortlist).indices[None]


def _with_first(first: Tensor, proposed: Tensor) -> Tensor:
    """Return proposals ``(T, n)`` with a text's first token (1, m), if any, from those given."""
    if not len(first):
        return proposed
    ids = torch.cat([first[0], proposed[0][~torch.isin(proposed[0], first[0])]])
    return torch.cat([ids[None, : proposed.shape[1]], proposed[1:]])


@dataclass
class _Reading:
    """One text being read.

    Attributes:
        alone: candidates of each row by itself, ``(t, n)``, of the first t positions.
        scores: per position, (candidates, their scores) along the text that was kept.
    """

    attack: JointDecoding
    view: View
    evidence: TextEvidence
    runner: PrefixRunner
    alone: Tensor
    scores: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def ranked(self) -> Tensor:
        """Return the ranked guesses, ``(T, RANKED)``."""
        text = self._best([self._beam(), *self._by_position()])
        for _ in range(self.attack.rereads):
            text = self._reread(text)
        self.scores = self.scores or self._local(text)
        out = torch.zeros(len(text), RANKED, dtype=torch.int64)
        for t, (ids, scores) in enumerate(self.scores):
            order = ids[scores.argsort(descending=True)]
            order = torch.cat([text[t : t + 1], order[order != text[t]]])
            out[t] = torch.cat([order, order[:1].expand(RANKED)])[:RANKED]
        return out

    def _best(self, texts: list[Tensor]) -> Tensor:
        return max(texts, key=lambda text: float(self.evidence.total(text[None])))

    def _by_position(self) -> list[Tensor]:
        """Return readings in which each token stands for itself."""
        e, found = self.evidence, []
        if e.served is not None:
            alone = e.served + e.tokens  # (T, V)
            found.append(alone.argmax(1))
        if len(self.alone) == e.length:
            found.append(self.alone[:, 0])
        return found

    def _candidates(self, t: int, prior: Tensor) -> Tensor:
        """Return ids worth a look at position ``t``; ``prior`` is ``(n, V)``."""
        n, e = self.attack.shortlist, self.evidence
        parts = [(prior + e.tokens[t]).topk(n, dim=1).indices]
        if e.served is not None:
            parts.append((e.served[t] + e.tokens[t]).topk(n).indices)
            parts.append(e.tokens[t].topk(n).indices)
        if t < len(self.alone):
            parts.append(self.alone[t])
        return union(parts)

    def _extended(self, prefix: list[int], ids: Tensor, t: int) -> Tensor:
        """Return the row's evidence for each of ``ids`` behind ``prefix``, ``(n,)``."""
        if not self.evidence.has_rows:
            return torch.zeros(len(ids))
        self.runner.advance(prefix)
        with torch.no_grad():
            states = self.runner.tokens(ids)  # (n, d)
        return self.evidence.of_rows(states.unsqueeze(1), t)[:, 0]

    @cached_property
    def _table(self) -> Tensor:
        """Every token's embedding, ``(V, d_e)``."""
        public = self.view.public
        return embedding_table(public.embedding, public.vocab, self.evidence.row(0).device)

    def _searched(self, prefix: list[int], t: int) -> Tensor:
        """Return the tokens of the whole vocabulary that explain row ``t`` best, ``(n,)``."""
        self.runner.advance(prefix)
        with torch.enable_grad(), frozen(self.view.public.bottom):
            return ExactSearch(top_k=2).position(self.evidence.row(t), self.runner, self._table)

    @torch.no_grad()
    def _beam(self) -> Tensor:
        """Return the best text that a beam search finds, ``(T,)``."""
        e, width = self.evidence, self.attack.beams
        reader = CachedReader(self.view.public.model)
        texts: list[list[int]] = [[]]
        totals = torch.zeros(1)
        prior = e.first_prior.unsqueeze(0)  # (1, V)
        for t in range(e.length):
            ids = self._candidates(t, prior)
            rows = torch.stack([self._extended(text, ids, t) for text in texts])  # (n, m)
            if e.exact_rows and float(rows.max()) < UNEXPLAINED:
                ids = union([ids, self._searched(texts[int(totals.argmax())], t)])
                rows = torch.stack([self._extended(text, ids, t) for text in texts])
            own = prior[:, ids] + e.tokens[t, ids] + rows
            joint = totals[:, None] + own
            best = joint.flatten().topk(min(width, joint.numel()))
            parents, picked = best.indices // len(ids), ids[best.indices % len(ids)]
            totals = best.values
            texts = [[*texts[int(p)], int(v)] for p, v in zip(parents, picked, strict=True)]
            if t + 1 < e.length:
                prior = e.prior(reader.advance(parents, picked), t + 1)
        return torch.tensor(texts[int(totals.argmax())])

    @torch.no_grad()
    def _local(self, text: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (candidates, scores) of every position given the text before it."""
        e = self.evidence
        prior = torch.cat(
            [e.first_prior[None], e.prior(e.predictions(text[None]), slice(1, None))[0]]
        )
        found = []
        for t in range(e.length):
            ids = union([self._candidates(t, prior[t : t + 1]), text[t : t + 1]])
            rows = self._extended(text[:t].tolist(), ids, t)
            found.append((ids, prior[t, ids] + e.tokens[t, ids] + rows))
        return found

    def _reread(self, text: Tensor) -> Tensor:
        """Return the text after another look at its least certain tokens."""
        self.scores = self._local(text)
        text = text.clone()
        for t in self._doubtful(text):
            ids, scores = self.scores[t]
            ids = union([ids[scores.topk(min(RANKED, len(ids))).indices], text[t : t + 1]])
            tried = text.repeat(len(ids), 1)
            tried[:, t] = ids
            judged = self.evidence.total(tried)
            self.scores[t] = (ids, judged)
            text[t] = ids[judged.argmax()]
        return text

    def _doubtful(self, text: Tensor) -> list[int]:
        """Return the positions whose token leads least, in their order."""
        leads = []
        for t, (ids, scores) in enumerate(self.scores):
            mine = scores[ids == text[t]].max()
            others = scores[ids != text[t]]
            leads.append(float(mine - others.max()) if len(others) else float("inf"))
        chosen = sorted(range(len(leads)), key=leads.__getitem__)[: self.attack.doubtful]
        return sorted(t for t in chosen if leads[t] < 30.0)
