"""Figures of an owner's measurement of itself: made once, kept in the ledger, judged by policy."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

from fedsplit.errors import PolicyError
from fedsplit.owners.ledger.chain import Entry, Ledger
from fedsplit.owners.ledger.disclosure import Disclosure, Measured, Source, json_bytes
from fedsplit.owners.ledger.session import SessionFacts
from fedsplit.owners.measuring import (
    LABELS,
    TOKENS,
    Figures,
    OwnTexts,
    looks_allowed,
    measured_labels,
    measured_tokens,
    views_allowed,
)
from fedsplit.owners.policy.rules import Breach, Policy
from fedsplit.privacy import empirical
from fedsplit.privacy.empirical import Measure
from fedsplit.privacy.perturb import SamplePerturber
from fedsplit.privacy.secret import OwnerSecret

log = logging.getLogger(__name__)


class OwnFigures:
    """An owner's figures about its own protection.

    Args:
        ledger: holds the figures of earlier sessions.
        policy: asks for figures, and judges them.
        secret: the owner's; None: nothing can be measured.
        measure: runs the attackers; None: nothing can be measured.
    """

    def __init__(
        self, ledger: Ledger, policy: Policy, secret: OwnerSecret | None, measure: Measure | None
    ) -> None:
        self._ledger = ledger
        self._policy = policy
        self._secret = secret
        self._measure = measure

    def breaches(
        self, source: Source, session: SessionFacts, record: Callable[[Disclosure, Entry], None]
    ) -> list[Breach]:
        """Return the rules that a source breaks by what the owner's own attackers read of it.

        Args:
            source: of representations, and of gradients in a training session.
            session: that it belongs to.
            record: writes a line of figures that were not known yet.

        Raises:
            PolicyError: a rule asks for figures, and nothing here can measure.
        """
        own, found = source.own, []
        for rule in (TOKENS, LABELS):
            if rule not in self._policy or (rule == LABELS and own and own.labels is None):
                continue
            if own is None or self._measure is None or self._secret is None:
                raise PolicyError(f"owner's policy: {rule}: cannot be measured here", (rule,))
            key = self._key(rule, source, own, session)
            known = self._ledger.totals.measured.get(key)
            if known is not None:
                figures = Figures.from_json(known)
            else:
                if rule == LABELS and own.labels is not None:
                    figures = measured_labels(self._policy, own.labels, self._secret)
                else:
                    bottom, perturber = source.bottom, source.perturber
                    figures = measured_tokens(self._measure, self._policy, bottom, perturber, own)
                log.info("measured before anything leaves: %s", figures)
                record(Measured(key=key, figures=figures), {"bytes": 0})
            found.append(figures.breach(self._policy))
        return [breach for breach in found if breach is not None]

    def _key(self, rule: str, source: Source, own: OwnTexts, session: SessionFacts) -> str:
        """Return what names a measurement: everything that moves it but the texts themselves.

        A bottom that learns is measured anew in every session, and every bottom once this version's
        attackers read more than those of the figures at hand.
        """
        policy = self._policy
        asked = {name: policy[name] for name in policy.rules if name.startswith("measure.")}
        facts: list[Any] = [rule, session.digest, asked, own.max_tokens, own.samples is not None]
        facts.append(empirical.ATTACKERS)
        if rule == TOKENS:
            facts += [draw_name(source.perturber), views_allowed(policy)]
        elif own.labels is not None:
            facts += [dict(own.labels.protection), looks_allowed(policy)]
        if source.moves:
            facts += [session.run, session.round, session.mode]
        return hashlib.sha256(json_bytes(facts)).hexdigest()[:24]


def draw_name(perturber: SamplePerturber) -> str:
    """Return the name of the way in which texts become noisy vectors."""
    chosen = "" if perturber.cti is None else sorted(perturber.cti.token_ids)
    identity: list[Any] = [
        perturber.mechanism.describe(),
        perturber.representation_id,
        perturber.rho,
        chosen,
    ]
    return hashlib.sha256(json_bytes(identity)).hexdigest()[:16]
