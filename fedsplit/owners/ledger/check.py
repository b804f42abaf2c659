"""The disclosure check: everything that leaves an owner is judged and recorded here, then sent.

One ledger line per act, written and synced before it leaves.  Where a rule would be broken nothing
is written and nothing leaves; amounts come from the ledger's totals, so that neither a restart nor
a new run starts them afresh.  Rules are looked up by the type of the disclosure, never by the name
of the strategy.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math

from fedsplit.errors import LedgerError, PolicyError
from fedsplit.owners.ledger.chain import Entry, Ledger, now
from fedsplit.owners.ledger.disclosure import (
    Announcement,
    Averages,
    Disclosure,
    MaskedWeights,
    Notice,
    Outgoing,
    Reply,
    Representations,
    Source,
    Training,
    Weights,
    Words,
    json_bytes,
)
from fedsplit.owners.ledger.exposure import RAW_TEXT
from fedsplit.owners.ledger.figures import OwnFigures, draw_name
from fedsplit.owners.ledger.reports import report_breaches
from fedsplit.owners.ledger.session import SessionFacts
from fedsplit.owners.ledger.spending import DELTA
from fedsplit.owners.ledger.totals import Totals
from fedsplit.owners.ledger.training import training_breaches
from fedsplit.owners.policy.noise_ratio import too_clear
from fedsplit.owners.policy.refusals import tellable
from fedsplit.owners.policy.rules import Breach, Policy, refuse
from fedsplit.privacy.dp.accounting import NoisySteps
from fedsplit.privacy.empirical import Measure
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.wire.frames import PREFIX_BYTES
from fedsplit.wire.link import Link

log = logging.getLogger(__name__)

# Strategy and mode -> what may leave in a session beside words and the protocol's own frames.
_SHOWN = frozenset({"ready", "representations"})
_SUMMED = frozenset({"secure-sum", "masked-weights"})
ACTS: dict[tuple[str, str], frozenset[str]] = {
    ("split-tuning", "train"): _SHOWN
    | {"logit-gradients", "hidden-gradients", "metrics", "weights"}
    | _SUMMED,
    ("split-tuning", "evaluate"): _SHOWN | {"metrics"},
    ("offsite-tuning", "train"): frozenset({"training", "metrics", "weights"}) | _SUMMED,
    ("offsite-tuning", "evaluate"): frozenset({"metrics"}),
    ("serving", "predict"): _SHOWN,
}


class DisclosureCheck:
    """The one way out of an owner.

    Args:
        ledger: the owner's.
        session: what the lines belong to.
        policy: the owner's; None: it has not been read, and only words may leave.
        secret: keys the digests by which the ledger knows texts.
        measure: runs attackers on what would leave; None: a policy that asks for it refuses.
    """

    def __init__(
        self,
        ledger: Ledger,
        session: SessionFacts,
        policy: Policy | None = None,
        secret: OwnerSecret | None = None,
        measure: Measure | None = None,
    ) -> None:
        self.session = session
        self._ledger = ledger
        self._policy = policy if policy is not None else Policy({})
        self._words_only = policy is None or secret is None
        self._key = b""
        if secret is not None:
            self._key = secret.stream("fedsplit.ledger.samples.v1").uniform(8).tobytes()
        self._figures = OwnFigures(ledger, self._policy, secret, measure)
        self._judged: set[Source] = set()

    # ---- what leaves ------------------------------------------------------------------------

    def send(self, link: Link, outgoing: Outgoing) -> None:
        """Check, encode, record and send one frame.

        Raises:
            PolicyError: a rule is broken or an amount is used up; nothing was sent.
            LedgerError: it cannot be recorded; nothing was sent.
            FrameError, SessionError: as :meth:`Link.send`; recorded although it may not have left.
        """
        body = self.record(outgoing)
        link.send(outgoing.kind, outgoing.header, body)

    def record(self, outgoing: Outgoing) -> bytes:
        """Check and record one frame that is about to leave, and return its body."""
        disclosure, header = outgoing.disclosure, outgoing.header
        self._judge(disclosure)
        body = outgoing.encode()
        text = json_bytes(header)
        frame: Entry = {
            "bytes": PREFIX_BYTES + len(text) + len(body),
            "body": len(body),
            "digest": hashlib.sha256(body or text).hexdigest(),
        }
        frame |= {key: header[key] for key in ("step", "codec") if key in header}
        self._append(disclosure, frame)
        return body

    @property
    def policy(self) -> Policy:
        """The owner's rules."""
        return self._policy

    def count_session(self) -> None:
        """Record a session that opens no link: it counts like one that does.

        Raises:
            PolicyError: the number of sessions is used up.
            LedgerError: it cannot be recorded.
        """
        self._append(Notice(kind="hello"), {"bytes": 0})

    def release(self, disclosure: Reply) -> None:
        """Check and record one part of a reply that is about to leave.

        Raises:
            PolicyError: a rule is broken or an amount is used up; it must not leave.
            LedgerError: it cannot be recorded; it must not leave.
        """
        self._judge(disclosure)
        size, digest = disclosure.measure()
        self._append(disclosure, {"bytes": size, "digest": digest})

    def fail(self, link: Link, error: Exception) -> None:
        """Tell the server why this side gives up; nothing is told that cannot be recorded."""
        told = tellable(error)
        try:
            self.release(Words(kind="error", text=f"{type(told).__name__}: {told}"))
        except LedgerError as broken:
            log.error("%s; the server is told nothing", broken)
            link.close(type(broken).__name__)
            return
        link.fail(told)

    # ---- rules about what an act shows ------------------------------------------------------

    def _judge(self, disclosure: Disclosure) -> None:
        if self._words_only and not isinstance(disclosure, Words):
            raise PolicyError(f"owner's policy: not read yet; {disclosure.kind} must not leave")
        self._judge_act(disclosure)
        if isinstance(disclosure, Announcement):
            self._judge_source(disclosure.source)
        if isinstance(disclosure, Representations):
            self._judge_source(disclosure.source)
            self._judge_rows(disclosure)

    def _judge_act(self, disclosure: Disclosure) -> None:
        """Refuse an act that is none of the accepted strategy and mode, whatever message asked."""
        if isinstance(disclosure, Words | Notice):
            return
        session = self.session
        if disclosure.kind not in ACTS.get((session.strategy, session.mode), ()):
            where = f"{session.strategy or 'no strategy'} in mode {session.mode!r}"
            told = f"owner's policy: {disclosure.kind}: must not leave in {where}"
            raise PolicyError(told, ("app.strategies",))
        allowed = self._policy.rules.get("app.strategies")
        if allowed is not None and session.strategy not in allowed:
            refuse([Breach("app.strategies", session.strategy, "one of " + ", ".join(allowed))])

    def _judge_source(self, source: Source) -> None:
        """Refuse a source that breaks a rule as it was built (bottom, mechanism, texts)."""
        if source in self._judged:
            return
        perturber, bottom = source.perturber, source.bottom
        mechanism = perturber.mechanism
        ratio = None
        if "noise.min_ratio" in self._policy:
            vocabulary = int(getattr(bottom, "vocab", 0))
            ratio = mechanism.noise_ratio(bottom, vocabulary) if vocabulary else None
        found = self._policy.mechanism_breaches(mechanism.name, mechanism.describe(), ratio)
        found += self._above("model.max_tokens", source.longest)
        if perturber.cti is not None and mechanism.protects():
            found += self._above("cti.max_share", perturber.cti.running_share)
            found += self._below("cti.min_rho", perturber.rho)
        k = getattr(bottom, "k", None)
        if isinstance(k, int):
            found += self._below("model.min_k", k)
        refuse(found)
        refuse(self._figures.breaches(source, self.session, self._append))
        self._judged.add(source)

    def _judge_rows(self, shown: Representations) -> None:
        """Refuse rows that are too long for the demanded noise, whatever the bottom makes of it."""
        if "noise.min_ratio" not in self._policy or shown.rows is None:
            return
        mechanism = shown.source.perturber.mechanism
        if mechanism.row_clip:
            return  # no row is longer than what the mechanism's own ratio is to
        length = mechanism.mean_noise_norm(int(shown.rows.shape[1]))
        if length is None or not mechanism.adds_noise:
            return  # refused with its source; clean vectors of other tokens carry no noise
        ratio = float(self._policy["noise.min_ratio"])
        if too_clear(shown.rows, length, ratio):
            bound = f">= {ratio:g}, and on this owner's own texts it is far below"
            refuse([Breach("noise.min_ratio", "a bottom with long representations", bound)])

    # ---- lines and amounts ------------------------------------------------------------------

    def _append(self, disclosure: Disclosure, facts: Entry) -> None:
        entry: Entry = {"kind": disclosure.kind, **facts, **disclosure.line()}
        if isinstance(disclosure, Representations) and disclosure.texts:
            entry["version"] = RAW_TEXT
            entry["draw"] = draw_name(disclosure.source.perturber)
            entry["samples"] = [self._name(text) for text in disclosure.texts]
            entry["views"] = [noise[:8].hex() for noise in disclosure.noises]
        entry |= self.session.line()

        def make(totals: Totals) -> Entry:
            if not isinstance(disclosure, Words):
                refuse(self._over_budget(totals, entry, disclosure))
            training = entry.get("training", {})
            if "noise" in training:  # what all of the owner's noisy steps have cost by then
                delta = float(self._policy.rules.get("budget.dp_delta", DELTA))
                steps = NoisySteps.from_json(training["noise"])
                spent = totals.training.epsilon(delta, steps)
                training |= {"dp-epsilon": spent, "dp-delta": delta}
            return entry

        self._ledger.append(make)

    def _name(self, text: bytes) -> str:
        """Return the keyed digest of a text: it tells nothing without the noise secret."""
        return hmac.digest(self._key, text, "sha256")[:8].hex()

    def _over_budget(self, totals: Totals, entry: Entry, disclosure: Disclosure) -> list[Breach]:
        run, bottom = totals.run(entry["run"]), self.session.digest
        size = int(entry["bytes"])
        found = self._trained(totals, entry, disclosure)
        found += self._above("budget.bytes_total", totals.bytes + size)
        found += self._above("budget.bytes_per_run", run.bytes + size)
        if entry["kind"] == "hello":
            today = totals.days.get(now()[:10], 0)
            found += self._above("budget.sessions_per_run", run.sessions + 1)
            found += self._above("budget.sessions_per_day", today + 1)
        if "epochs" in entry:  # passes over held-out texts count like those over training texts
            step, mode = float(entry["epochs"]), self.session.mode
            passes = run.passes.get(mode, 0.0) + step
            found += self._above("budget.epochs_per_run", _rounded(passes))
            passes = totals.passes.get(bottom, {}).get(mode, 0.0) + step
            found += self._above("budget.epochs_per_bottom", _rounded(passes))
        if isinstance(disclosure, Representations) and disclosure.texts:
            named = list(zip(entry["samples"], entry["views"], strict=True))
            views = totals.exposure.views_after(bottom, named)
            found += self._above("budget.views_per_bottom", views[0])
            found += self._above("budget.views_total", views[1])
            found += self._share(run.tokens, run.touched, disclosure)
        return found

    def _trained(self, totals: Totals, entry: Entry, disclosure: Disclosure) -> list[Breach]:
        """Judge what the owner trains, and what it reports of a session."""
        run, today = totals.run(entry["run"]), now()[:10]
        if isinstance(disclosure, Averages):
            return report_breaches(self._policy, disclosure, totals.reports, today)
        if isinstance(disclosure, Weights):
            refuse(self._policy.unmasked("an update that the server can read"))
        trained = isinstance(disclosure, Weights | MaskedWeights)
        if trained and not run.training.sessions:
            raise PolicyError("owner's policy: weights: their training was not recorded")
        training = disclosure.training if isinstance(disclosure, Announcement) else disclosure
        if not isinstance(training, Training):
            return []
        return training_breaches(self._policy, training, run.training, totals.training, today)

    def _share(
        self, tokens: dict[str, int], touched: dict[str, int], shown: Representations
    ) -> list[Breach]:
        """Judge the share of the tokens sent in this run whose noise was reduced."""
        rule, mode = "cti.max_share", self.session.mode
        if rule not in self._policy or not shown.touched:
            return []
        many = max(shown.source.tokens, tokens.get(mode, 0) + shown.tokens)
        share = (touched.get(mode, 0) + shown.touched) / many
        if mode != "train":  # selected on the training texts; others have as many by chance only
            bound = float(self._policy[rule])
            share -= 3 * math.sqrt(bound * (1 - bound) / many)
        return self._above(rule, share)

    def _above(self, rule: str, value: float) -> list[Breach]:
        breach = self._policy.most(rule, value)
        return [] if breach is None else [breach]

    def _below(self, rule: str, value: float) -> list[Breach]:
        breach = self._policy.least(rule, value)
        return [] if breach is None else [breach]


def _rounded(epochs: float) -> float:
    """Return a sum of parts of an epoch without the rounding errors of the sum."""
    return round(epochs, 6)
