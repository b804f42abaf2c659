"""Every inversion attack that fits a transcript, from one set of public knowledge.

At k = 0 the candidate set is finite: nearest neighbour, MAP, and MAP in context.  With blocks there
is none: optimisation and the learned inverter; for causal models without noise, exact search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsplit.attacks.inversion.contextual import ContextualInversion
from fedsplit.attacks.inversion.learned import LearnedInversion, represent
from fedsplit.attacks.inversion.map_decoding import MapInversion
from fedsplit.attacks.inversion.nearest import NearestNeighbour
from fedsplit.attacks.inversion.optimisation import OptimisationInversion
from fedsplit.attacks.inversion.token_search import ExactSearch
from fedsplit.attacks.ngram import NgramModel
from fedsplit.attacks.scoring import AttackResult, Inversion, score_tokens
from fedsplit.errors import AttackError, check
from fedsplit.privacy.denoising.candidates import Candidates
from fedsplit.privacy.denoising.position_candidates import candidates_of
from fedsplit.privacy.denoising.posterior import Touched
from fedsplit.privacy.mechanisms.base import Mechanism
from fedsplit.registry import pick
from fedsplit.seeding import numpy_generator


@dataclass(frozen=True)
class Budget:
    """What an attacker may spend.

    Args:
        optimisation_steps: of :class:`OptimisationInversion`.
        optimisation_samples: samples that it is run on (the first ones; it is slow).
        learned_steps: of :class:`LearnedInversion`.
        public_samples: public texts the learned inverter is trained on.
        shortlist: of :class:`ContextualInversion`; also, times 128, the ids that the optimisation
            considers (public text's most frequent).
        search_samples: samples that :class:`ExactSearch` is run on.
    """

    optimisation_steps: int = 200
    optimisation_samples: int = 16
    learned_steps: int = 200
    public_samples: int = 3000
    shortlist: int = 64
    search_samples: int = 8

    def __post_init__(self) -> None:
        for name in ("optimisation_steps", "optimisation_samples", "public_samples"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        check(self.learned_steps >= 0, "learned_steps", self.learned_steps, ">= 0")
        check(self.shortlist >= 10, "shortlist", self.shortlist, ">= 10 (candidates)")
        check(self.search_samples >= 1, "search_samples", self.search_samples, ">= 1")


@dataclass
class Attacker:
    """Public knowledge, and what was received.

    Args:
        bottom: a :class:`fedsplit.models.splitting.halves.Bottom`, the initial one.
        mechanism: announced by the settings.
        public_ids: public texts' tokens, specials included; never the owners' own.
        special_ids: ids that are not scored.
        touched: reduced noise on some tokens (CTI), as announced.
        budget: what may be spent.
        seed: of the attacks that draw.
    """

    bottom: Any
    mechanism: Mechanism
    public_ids: Sequence[Sequence[int]]
    special_ids: frozenset[int] = frozenset()
    touched: Touched | None = None
    budget: Budget = field(default_factory=Budget)
    seed: int = 0

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return int(self.bottom.vocab)

    @cached_property
    def embedding(self) -> nn.Module:
        """The module that looks up token embeddings."""
        from fedsplit.models.anatomy import probe

        return probe(self.bottom.model).input_embeddings

    @cached_property
    def language(self) -> NgramModel:
        """Bigrams and trigrams of the public text."""
        return NgramModel(self.public_ids, self.vocab)

    def log_prior(self) -> Tensor:
        """Return the unigram log prior, ``(V,)``."""
        return torch.from_numpy(self.language.unigram(np.arange(self.vocab))).float()

    def candidates(self, rows: Sequence[Tensor]) -> Candidates:
        """Return the candidate set for k = 0."""
        return candidates_of(self.bottom, self.vocab, max(len(x) for x in rows))

    def suited(self) -> tuple[str, ...]:
        """Return the names of the attacks that fit: strongest last."""
        if self.bottom.k == 0:
            # Clean vectors, of other tokens too, are read off by distance alone.
            noisy = self.mechanism.adds_noise
            return ("nearest", "map", "contextual") if noisy else ("nearest",)
        clean = not self.mechanism.adds_noise
        causal = self.bottom.task == "causal-lm"
        return ("optimisation", "learned", *(("exact_search",) if causal and clean else ()))

    def run(self, name: str, rows: Sequence[Tensor], truth: Sequence[Tensor]) -> AttackResult:
        """Carry out one attack and score it.

        Args:
            name: a row of :data:`INVERSIONS`.
            rows: what was received, per sample ``(T_i, d)``.
            truth: its tokens, per sample ``(T_i,)``, for scoring alone.

        Raises:
            ConfigError: no such attack.
            AttackError, PrivacyError: it does not fit this bottom, or there is nothing to attack.
        """
        if not rows:
            raise AttackError("rows: 0 samples: must be >= 1")
        carry_out = pick(INVERSIONS, name, "attack")
        inversion, knowledge = carry_out(self, rows)
        return score_tokens(
            name,
            inversion,
            list(truth[: len(inversion.ids)]),
            special_ids=self.special_ids,
            knowledge=knowledge,
            extra={"samples": len(inversion.ids)},
        )


Outcome = tuple[Inversion, str]


def _nearest(of: Attacker, rows: Sequence[Tensor]) -> Outcome:
    attack = NearestNeighbour()
    return attack.invert(rows, of.candidates(rows)), attack.knowledge


def _map(of: Attacker, rows: Sequence[Tensor]) -> Outcome:
    attack = MapInversion()
    found = attack.invert(rows, of.candidates(rows), of.mechanism, of.log_prior(), of.touched)
    return found, attack.knowledge


def _contextual(of: Attacker, rows: Sequence[Tensor]) -> Outcome:
    attack = ContextualInversion(shortlist=of.budget.shortlist)
    found = attack.invert(rows, of.candidates(rows), of.mechanism, of.language, of.touched)
    return found, attack.knowledge


def _optimisation(of: Attacker, rows: Sequence[Tensor]) -> Outcome:
    attack = OptimisationInversion(steps=of.budget.optimisation_steps, seed=of.seed)
    frequent = of.log_prior().argsort(descending=True)[: 128 * of.budget.shortlist]
    found = attack.invert(
        rows[: of.budget.optimisation_samples], of.bottom, of.embedding, of.vocab, frequent
    )
    return found, f"{attack.knowledge}; tries the {len(frequent)} ids most frequent in public text"


def _learned(of: Attacker, rows: Sequence[Tensor]) -> Outcome:
    from fedsplit.attacks.inversion.optimisation import embedding_table

    attack = LearnedInversion(steps=of.budget.learned_steps, seed=of.seed)
    order = numpy_generator(of.seed, "attacks", "public").permutation(len(of.public_ids))
    chosen = order[: of.budget.public_samples]
    ids = [torch.tensor(of.public_ids[i]) for i in chosen if len(of.public_ids[i]) >= 2]
    table = embedding_table(of.embedding, of.vocab, torch.device("cpu"))
    seen = represent(of.bottom, ids)
    return attack.invert(rows, seen, ids, table, of.mechanism), attack.knowledge


def _exact(of: Attacker, rows: Sequence[Tensor]) -> Outcome:
    # What comes over the wire was rounded (bf16: relative squared error about 1e-6).
    attack = ExactSearch(tolerance=1e-5)
    found = attack.invert(rows[: of.budget.search_samples], of.bottom, of.embedding, of.vocab)
    return found, attack.knowledge


# name -> (attacker, received rows) -> guesses and the knowledge that they took
INVERSIONS: dict[str, Callable[[Attacker, Sequence[Tensor]], Outcome]] = {
    "contextual": _contextual,
    "exact_search": _exact,
    "learned": _learned,
    "map": _map,
    "nearest": _nearest,
    "optimisation": _optimisation,
}
