"""An owner's measurement of its own protection, made before anything leaves.

On the first contact with a bottom (and head) under a run's settings, the project's attackers read
what would leave of a sample of the owner's own texts.  The figures go into the ledger, which is
also where later sessions find them, and are judged by the policy's rules ``measure.*``.

The noise of the measurement comes from the owner's secret, a text and a number alone.  So a server
that changes its bottom a little does not get another draw of luck, and what is read of the measured
rows tells nothing of the noise on those that leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedsplit.models.splitting.representations import represent
from fedsplit.owners.own_tokens import own_tokens
from fedsplit.owners.policy.rules import Breach, Policy
from fedsplit.owners.samples import Samples, tokenise
from fedsplit.privacy.denoising.posterior import Touched
from fedsplit.privacy.empirical import Exposed, Measure, Reading
from fedsplit.privacy.labels.readers import READERS
from fedsplit.privacy.perturb import SamplePerturber
from fedsplit.privacy.public_text import public_ids, public_texts
from fedsplit.privacy.secret import OwnerSecret

TOKENS, LABELS = "measure.min_empirical_privacy", "measure.max_label_recovery"
TEXTS, SECONDS, PUBLIC_TEXT = "measure.texts", "measure.seconds", "measure.public_text"
DEFAULT_TEXTS, DEFAULT_SECONDS = 64, 60
MOST_OTHERS = 4000
"""Texts of the owner's beside the sample that its attackers are taken to have the like of."""
MOST_PUBLIC = 4000
"""Public texts that attackers know at most, evenly chosen."""
MOST_LOOKS = 40
"""Looks at one label's gradient that are tried at most."""
MOST_LABELS = 256

Told = Callable[[Tensor, Sequence[int]], Tensor | None]
"""Outputs of a server for slots -> evidence of each label, (readers, B, C); None: everything."""


@dataclass(frozen=True)
class LabelChannel:
    """What gradients of a session would tell of labels.

    Attributes:
        told: what an owner's protected gradients say, by whatever the server sent.
        width: numbers per row that the server sends.
        rows: slots -> rows that it sends for them.
        truth: true labels by slot; None: a language model's, which are the text itself.
        protection: the label protection in force, by its settings.
    """

    told: Told
    width: int
    rows: Callable[[Sequence[int]], int]
    truth: Tensor | None
    protection: Mapping[str, Any]


@dataclass(frozen=True)
class OwnTexts:
    """What an owner measures on.

    Attributes:
        tokenizer: that came with the bottom.
        samples: reads the owner's training texts, tokens by slot; None: it has none of its own.
        labels: of a training session; None: no gradients leave.
        max_tokens: that texts are cut at.
        docstrings: whether the interpreter's docstrings are public, not the owner's own texts.
    """

    tokenizer: Any
    samples: Callable[[], Samples] | None
    labels: LabelChannel | None = None
    max_tokens: int = 128
    docstrings: bool = True


@dataclass(frozen=True)
class Figures:
    """What was measured of one source, or of one label channel.

    Attributes:
        rule: that judges it.
        value: empirical privacy of tokens against the best reader, or the share of labels read.
        views: of each text (or looks at each label) that the readers had.
        texts: of the sample.
        readings: of every attacker, the best first.
    """

    rule: str
    value: float
    views: int
    texts: int
    readings: tuple[Reading, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a ledger line carries them."""
        return asdict(self) | {"readings": [asdict(reading) for reading in self.readings]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Figures:
        """Return what :meth:`to_json` was taken of."""
        readings = tuple(Reading(**reading) for reading in content["readings"])
        return cls(**{**content, "readings": readings})

    def breach(self, policy: Policy) -> Breach | None:
        """Return the rule if the figures break it."""
        if self.rule not in policy:
            return None
        if self.rule == TOKENS:
            return policy.least(self.rule, self.value)
        count, bound = self.readings[0].targets, float(policy[self.rule])
        # Two standard errors of as many independent guesses: draws are made once, not drawn again.
        # Where nothing was tried (a language model's next tokens) there is no chance in the figure.
        chance = 2 * math.sqrt(bound * (1 - bound) / count) if count else 0.0
        return None if self.value <= bound + chance else policy.most(self.rule, self.value)

    def __str__(self) -> str:
        best = self.readings[0]
        what = "empirical privacy" if self.rule == TOKENS else "share of labels read"
        return (
            f"{what} {self.value:.3f} against {best.attack} over {best.targets} targets of "
            f"{self.texts} texts, {self.views} view(s)"
        )


def views_allowed(policy: Policy) -> int:
    """Return how many noises of one text the policy lets leave, over all bottoms."""
    found = [policy[r] for r in ("budget.views_total", "budget.views_per_bottom") if r in policy]
    return int(found[0]) if found else 1


def measured_tokens(
    measure: Measure, policy: Policy, bottom: Any, perturber: SamplePerturber, own: OwnTexts
) -> Figures:
    """Return what attackers read of the owner's own texts as they would leave.

    Raises:
        AttackError, PrivacyError: an attack cannot be carried out.
    """
    count = int(policy.rules.get(TEXTS, DEFAULT_TEXTS))
    path = str(policy.rules.get(PUBLIC_TEXT, ""))
    if own.samples is not None:
        samples = own.samples()
        public = _public_ids(own.tokenizer, path, own.docstrings, own.max_tokens)
    else:  # then on public texts, which the attackers' prior is not made of
        texts = _texts(path, own.docstrings)
        step = max(1, len(texts) // count)
        chosen, texts = texts[::step][:count], [t for i, t in enumerate(texts) if i % step]
        most = own.max_tokens
        samples = tokenise(own.tokenizer, chosen, None, max_tokens=most, classes=2, shortest=1)
        public = public_ids(own.tokenizer, _some(texts), most)
    ids, names = list(samples.ids[:count]), list(samples.texts[:count])
    taken = set(names)
    rest = zip(samples.ids[count:], samples.texts[count:], strict=True)
    others = [x.tolist() for x, text in rest if text not in taken][:MOST_OTHERS]
    views = views_allowed(policy)
    with torch.no_grad():
        clean = represent(bottom, ids)
    shown = [
        [perturber.trial(h, x, name, view) for h, x, name in zip(clean, ids, names, strict=True)]
        for view in range(views)
    ]
    cti, raw = perturber.cti, samples.raw[:count]
    found = measure(
        Exposed(
            bottom=bottom,
            mechanism=perturber.mechanism,
            views=shown,
            ids=ids,
            known=public,
            others=others,
            touched=None if cti is None else Touched(cti.running_share, perturber.rho),
            own=own_tokens(own.tokenizer, raw, ids, own.max_tokens) if raw else None,
            seconds=float(policy.rules.get(SECONDS, DEFAULT_SECONDS)),
        )
    )
    return Figures(TOKENS, 1.0 - found[0].read, views, len(ids), tuple(found))


def measured_labels(policy: Policy, channel: LabelChannel, secret: OwnerSecret) -> Figures:
    """Return what the closed-form readers read of labels off gradients as they would leave.

    The server is played by outputs that it may send: zeros, and random ones of several sizes; each
    pass over the texts is one look, and what looks tell adds up.
    """
    looks = looks_allowed(policy)
    if channel.truth is None:
        best = Reading("next tokens", 1.0, 1.0, 1.0, 0, 0.0)
        return Figures(LABELS, 1.0, looks, 0, (best,))
    slots = list(range(min(MOST_LABELS, len(channel.truth))))
    found = []
    for size in (0.0, 1.0, 8.0):
        stream = secret.stream("fedsplit.measure.outputs.v1", str(size))
        total: Tensor | None = None
        for look in range(looks):
            shape = (channel.rows(slots), channel.width)
            drawn = torch.from_numpy(stream.normal(shape)).float()
            # Zeros that differ in their last bits are other outputs, with noise of their own.
            values = drawn * size if size else drawn * 1e-6 * (look > 0)
            told = channel.told(values, slots)
            if told is None:
                break
            total = told if total is None else total + told
            if bool((total.argmax(2) == channel.truth[slots]).all(1).any()):
                break  # every label is read
        found += _label_readings(total, channel.truth[slots], size)
    found.sort(key=lambda reading: -reading.read)
    return Figures(LABELS, found[0].read, looks, len(slots), tuple(found))


def looks_allowed(policy: Policy) -> int:
    """Return how many passes over the texts the policy allows, at most ``MOST_LOOKS``."""
    rules = ("budget.epochs_per_bottom", "budget.epochs_per_run")
    bounds = [float(policy[rule]) for rule in rules if rule in policy]
    return max(1, min([MOST_LOOKS, *(int(b) for b in bounds)]))


def _label_readings(total: Tensor | None, truth: Tensor, size: float) -> list[Reading]:
    if total is None:
        return [Reading("known label", 1.0, 1.0, 1.0, len(truth), 0.0)]
    found = []
    for name, evidence in zip(READERS, total, strict=True):
        share = float((evidence.argmax(1) == truth).double().mean())
        found.append(Reading(f"{name}, outputs {size:g}", share, share, share, len(truth), 0.0))
    return found


@lru_cache(maxsize=2)
def _texts(path: str, docstrings: bool) -> list[str]:
    return public_texts(path, docstrings=docstrings)


@lru_cache(maxsize=1)
def _public_ids(tokenizer: Any, path: str, docstrings: bool, most: int) -> list[list[int]]:
    return public_ids(tokenizer, _some(_texts(path, docstrings)), most)


def _some(texts: Sequence[str]) -> Sequence[str]:
    return texts[:: -(-len(texts) // MOST_PUBLIC)]
