"""What every attack is: it reads a view of what crossed, and a scorer compares with the truth.

A :class:`View` holds recorded arrays (both directions) and public knowledge; a :class:`Truth` is
for the scorer alone.  ``attack.run(view, truth)`` is the one way to carry an attack out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedsplit.attacks.gradients.known_head import LinearHead
from fedsplit.attacks.gradients.token_recovery import GradientNoise
from fedsplit.attacks.scoring import AttackResult, Inversion, score_tokens
from fedsplit.errors import AttackError
from fedsplit.models.anatomy import probe
from fedsplit.privacy.denoising.candidates import Candidates
from fedsplit.privacy.denoising.ngram import NgramModel
from fedsplit.privacy.denoising.position_candidates import candidates_of
from fedsplit.privacy.denoising.posterior import Touched
from fedsplit.privacy.mechanisms.base import Mechanism
from fedsplit.statistics import Floats


@dataclass
class Public:
    """What every attacker knows before anything is received.

    Args:
        bottom: a :class:`fedsplit.models.splitting.halves.Bottom`, the initial one.
        mechanism: announced by the settings; None for no noise.
        public_ids: public texts' tokens, specials included; never the owners' own.
        special_ids: ids that are not scored.
        touched: reduced noise on some tokens (CTI), as announced.
        model: the whole model, for attacks on updates of all of it.
        candidate_set: a finite set of vectors to read rows against; None: the bottom's own, k = 0.
        states: the bottom's clean output for ``public_ids``, per text ``(T_j, d)``; None: computed.
        head: of a language model, what maps final hidden states to logits, as the server knows it.
        gradient_noise: announced protection of gradients, of each target's own loss.
        inverter: what the learned attack taught, once it has: searches try its guesses too.
        token_reader: what the attack by tokens' states made, once it has: searches start from its
            guesses.
    """

    bottom: Any = None
    mechanism: Mechanism | None = None
    public_ids: Sequence[Sequence[int]] = ()
    special_ids: frozenset[int] = frozenset()
    touched: Touched | None = None
    model: Any = None
    candidate_set: Candidates | None = None
    states: Sequence[Tensor] | None = None
    head: LinearHead | None = None
    gradient_noise: GradientNoise = field(default_factory=GradientNoise)
    inverter: Any = None
    token_reader: Any = None

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return int(self.bottom.vocab)

    @property
    def noisy(self) -> bool:
        """Whether rows are a clean vector plus noise of a known law."""
        return self.mechanism is not None and self.mechanism.adds_noise

    @property
    def known_mechanism(self) -> Mechanism:
        """The mechanism.

        Raises:
            AttackError: none was given.
        """
        if self.mechanism is None:
            raise AttackError("mechanism: must be given to an attack that knows the noise's law")
        return self.mechanism

    @cached_property
    def embedding(self) -> nn.Module:
        """The module that looks up token embeddings."""
        return probe(self.bottom.model).input_embeddings

    @cached_property
    def language(self) -> NgramModel:
        """Bigrams and trigrams of the public text."""
        return NgramModel(self.public_ids, self.vocab)

    def log_prior(self) -> Tensor:
        """Return the unigram log prior, ``(V,)``."""
        return torch.from_numpy(self.language.unigram(np.arange(self.vocab))).float()

    def candidates(self, rows: Sequence[Tensor]) -> Candidates:
        """Return the candidate set for ``rows``, each ``(T_i, d)``."""
        if self.candidate_set is not None:
            return self.candidate_set
        clip = 0.0 if self.mechanism is None else self.mechanism.sent_norm
        return candidates_of(self.bottom, self.vocab, max(len(x) for x in rows), clip=clip)


@dataclass(frozen=True)
class Update:
    """One update of weights: of one owner, or an average.

    Attributes:
        before: tensors as they were sent out, by name.
        after: as they came back, by name; empty where the gradient itself is known.
        gradient: of the mean loss of one batch, by name.
        shape: (B, T) of the batch; None: not known.
        labels: its labels ``(B,)``, where the attacker has them.
    """

    before: Mapping[str, Tensor] = field(default_factory=dict)
    after: Mapping[str, Tensor] = field(default_factory=dict)
    gradient: Mapping[str, Tensor] = field(default_factory=dict)
    shape: tuple[int, int] | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One language model's text in one step of training, both directions.

    Attributes:
        output: what the server sent: ``(T, V)`` logits or ``(T, d)`` final hidden states.
        gradient: what came back for it, the same shape, of each target's own loss.
    """

    output: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Confidences:
    """What a tuned model says of samples, and what the attacker's shadow models say.

    Attributes:
        target: confidence in each sample's label, ``(N,)``.
        shadows: the shadow models', ``(S, N)``; None where the attacker has none.
        shadow_members: what each shadow was trained on, ``(S, N)``.
    """

    target: Floats
    shadows: Floats | None = None
    shadow_members: Any = None


@dataclass
class View:
    """What one attacker has; sample i is the same in every field that lists samples.

    Args:
        public: public knowledge.
        rows: received representations, per sample ``(T_i, d)``.
        repeats: further views of the same samples, each like ``rows``.
        gradients: what each sample returned: ``(C,)`` of its logits or ``(d,)`` at the cut for
            classification, ``(T_i, V)`` or ``(T_i, d)`` for language models.
        steps: of a language model: per sample, every step with it whose two directions were
            recorded, in their order.
        known: sample -> private label or attribute that the attacker has been told.
        groups: who wrote each sample; empty: everyone wrote one.
        update: an update of weights.
        confidences: a tuned model's, on samples whose membership is asked.
        emulator: what an offsite-tuning owner was sent.
        text: ids (N, T) of the attacker's text, in blocks.
        teacher: a full model that answers queries; None: it does not.
        seed: of the attacks that draw.
    """

    public: Public = field(default_factory=Public)
    rows: Sequence[Tensor] = ()
    repeats: Sequence[Sequence[Tensor]] = ()
    gradients: Sequence[Tensor] = ()
    steps: Sequence[Sequence[Step]] = ()
    known: Mapping[int, int] = field(default_factory=dict)
    groups: Sequence[int | str] = ()
    update: Update | None = None
    confidences: Confidences | None = None
    emulator: Any = None
    text: Tensor | None = None
    teacher: Any = None
    seed: int = 0


@dataclass(frozen=True)
class Truth:
    """What a scorer compares with; no attack sees it.

    Attributes:
        ids: true tokens per sample ``(T_i,)``.
        labels: private label or attribute of each sample ``(N,)``.
        members: whether each sample was trained on ``(N,)``.
        gap: what an extraction is measured on.
    """

    ids: Sequence[Tensor] = ()
    labels: Tensor | None = None
    members: Any = None
    gap: Any = None


class Attack(ABC):
    """One attacker; a subclass is a frozen dataclass of what it may spend.

    Attributes:
        name: its row in :data:`fedsplit.attacks.ATTACKS`.
        reads: what it learns: tokens, labels, an attribute, membership, the emulator's gap.
        needs: fields of :class:`View` that it cannot do without.
        uses: further fields that it reads where they are there.
        knows: what it is given, for tables.
        budget: its own fields that are what it may spend.
        keys: short names for its budget: key -> (field, factor).
        result_key: its key among a run's results; empty: ``name``.
        words: the attacker in words, for a run's table.
    """

    name: ClassVar[str]
    reads: ClassVar[str] = "tokens"
    needs: ClassVar[tuple[str, ...]] = ("rows",)
    uses: ClassVar[tuple[str, ...]] = ()
    knows: ClassVar[str] = ""
    budget: ClassVar[tuple[str, ...]] = ()
    keys: ClassVar[Mapping[str, tuple[str, int]]] = {}
    result_key: ClassVar[str] = ""
    words: ClassVar[str] = ""

    @property
    def knowledge(self) -> str:
        """What the attacker is given."""
        return self.knows

    def applies(self, view: View) -> bool:
        """Return whether the attack fits a view, so that it is run where none is named."""
        return not self.missing(view)

    def missing(self, view: View) -> str:
        """Return the first needed field that the view lacks; empty: none."""
        for name in self.needs:
            value = getattr(view, name)
            if value is None or (not isinstance(value, Tensor) and _empty(value)):
                return name
        return ""

    def check(self, view: View) -> None:
        """Check that the view has what the attack needs.

        Raises:
            AttackError: names the field.
        """
        lacking = self.missing(view)
        if lacking:
            raise AttackError(f"{lacking}: 0 samples: must be >= 1 for the attack {self.name!r}")

    @abstractmethod
    def run(self, view: View, truth: Truth) -> AttackResult:
        """Carry the attack out on ``view``, and score it.

        Raises:
            AttackError: the view lacks something, or the truth does not fit.
        """


def _empty(value: Any) -> bool:
    return isinstance(value, Sequence | Mapping) and len(value) == 0


class TokenAttack(Attack):
    """An attack that reads tokens; scored by position, with an interval over samples."""

    @abstractmethod
    def read(self, view: View) -> Inversion:
        """Return the guesses for the view's first samples.

        Raises:
            AttackError, PrivacyError: it does not fit this bottom.
        """

    def knowledge_of(self, view: View) -> str:
        """Return what the attacker is given, this view's figures included."""
        return self.knowledge

    def unaided_guess(self, view: View) -> Sequence[Tensor] | None:
        """Return what is guessed without the channel that the attack reads, per sample ``(T_i,)``.

        None: the most frequent target stands for it.
        """
        return None

    def run(self, view: View, truth: Truth) -> AttackResult:
        """Carry the attack out, and score the guesses by position.

        Raises:
            AttackError, PrivacyError: it does not fit the view, or there is nothing to score.
        """
        self.check(view)
        found = self.read(view)
        return score_tokens(
            self.name,
            found,
            list(truth.ids[: len(found.ids)]),
            special_ids=view.public.special_ids,
            knowledge=self.knowledge_of(view),
            extra={"samples": len(found.ids)},
            guess=self.unaided_guess(view),
        )
