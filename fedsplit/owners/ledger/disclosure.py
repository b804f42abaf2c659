"""Everything that leaves an owner goes through here: the policy's amounts, the ledger, then out.

One line per frame, written and synced before the frame is sent.  A line is refused, and with it the
frame, where a rule about amounts would be broken; totals come from the ledger, so that neither a
restart nor a new run starts them afresh.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.errors import LedgerError, PolicyError
from fedsplit.owners.ledger.chain import Entry, Ledger, Totals, now
from fedsplit.owners.policy.noise_ratio import too_clear
from fedsplit.owners.policy.refusals import tellable
from fedsplit.owners.policy.rules import Breach, Policy, refuse
from fedsplit.owners.split.owner import SplitOwner
from fedsplit.privacy.labels.table import head_at_owner
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.wire.codecs import decode_rows
from fedsplit.wire.frames import PREFIX_BYTES, Kind
from fedsplit.wire.link import Link

log = logging.getLogger(__name__)

# What the ledger calls a frame; a kind that is not here is called by its own name.  With the head
# at the owner, GRAD carries gradients of the server's hidden states.
KINDS = {Kind.BATCH: "representations", Kind.GRAD: "logit-gradients"}


@dataclass(frozen=True)
class Trip:
    """What a line says of the session it belongs to.

    Attributes:
        run: Flower's run id.
        round: server round.
        mode: ``train`` or ``evaluate``.
        owner: public name.
        bottom: digest of the bottom.
        labels: the label protection in force, by its settings.
    """

    run: int
    round: int
    mode: str
    owner: str
    bottom: str
    labels: Mapping[str, Any]


class Outbox:
    """The one way out of an owner.

    Args:
        ledger: the owner's.
        policy: the owner's.
        trip: the session.
        secret: keys the digests by which the ledger knows samples.
    """

    def __init__(self, ledger: Ledger, policy: Policy, trip: Trip, secret: OwnerSecret) -> None:
        self.ledger = ledger
        self.policy = policy
        self.trip = trip
        self._kinds = dict(KINDS)
        if head_at_owner(str(trip.labels.get("labels.protection", "none"))):
            self._kinds[Kind.GRAD] = "hidden-gradients"
        self._key = secret.stream("fedsplit.ledger.samples.v1").uniform(8).tobytes()
        self._owner: SplitOwner | None = None
        self._names: dict[int, str] = {}

    def attach(self, owner: SplitOwner) -> None:
        """Tell whose frames follow.

        Raises:
            PolicyError: the owner as it was built (bottom, mechanism, texts) breaks a rule.
        """
        perturber, bottom = owner.perturber, owner.bottom
        mechanism = perturber.mechanism
        ratio = None
        if "noise.min_ratio" in self.policy:
            vocabulary = int(getattr(bottom, "vocab", 0))
            ratio = mechanism.noise_ratio(bottom, vocabulary) if vocabulary else None
        found = self.policy.mechanism_breaches(mechanism.name, mechanism.describe(), ratio)
        checks: list[tuple[str, float]] = [("model.max_tokens", max(owner.samples.lengths))]
        if perturber.cti is not None and mechanism.protects():
            checks.append(("cti.max_share", perturber.cti.running_share))
            found += self._below("cti.min_rho", perturber.rho)
        k = getattr(bottom, "k", None)
        if isinstance(k, int):
            found += self._below("model.min_k", k)
        for rule, value in checks:
            found += self._above(rule, value)
        refuse(found)
        self._owner = owner
        self._names = {}

    # ---- what leaves ------------------------------------------------------------------------

    def send(self, link: Link, kind: Kind, header: Mapping[str, Any], body: bytes = b"") -> None:
        """Check, record and send one frame.

        Raises:
            PolicyError: an amount is used up; nothing was sent.
            LedgerError: it cannot be recorded; nothing was sent.
            FrameError, SessionError: as :meth:`Link.send`; recorded although it may not have left.
        """
        self.record(kind, header, body)
        link.send(kind, header, body)

    def record(self, kind: Kind, header: Mapping[str, Any], body: bytes) -> Entry:
        """Check and record one frame that is about to leave."""
        size = PREFIX_BYTES + len(_text(header)) + len(body)
        entry: Entry = {
            "kind": self._kinds.get(kind, kind.name.lower().replace("_", "-")),
            "bytes": size,
            "body": len(body),
            "digest": hashlib.sha256(body or _text(header)).hexdigest(),
        }
        if "step" in header:
            entry["step"] = int(header["step"])
        if "codec" in header:
            entry["codec"] = str(header["codec"])
        if "shape" in header:
            entry["shape"] = [int(x) for x in header["shape"]]
        if kind is Kind.READY:
            entry["batches"] = int(header["batches"])
        if kind is Kind.BATCH:
            entry |= self._batch(header, body)
        elif kind.name.endswith("GRAD"):
            entry["protection"] = dict(self.trip.labels)
        return self._append(entry)

    def report(
        self, metrics: Mapping[str, float | int], weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Record the session's averages and, for a joint bottom, its weights."""
        text = _text(metrics)
        self._append(
            {
                "kind": "metrics",
                "bytes": len(text),
                "shape": [len(metrics)],
                "digest": hashlib.sha256(text).hexdigest(),
            }
        )
        if not weights:
            return
        whole = hashlib.sha256()
        for name in sorted(weights):
            whole.update(name.encode())
            whole.update(weights[name].detach().cpu().float().contiguous().numpy().tobytes())
        count = sum(w.numel() for w in weights.values())
        digest = whole.hexdigest()
        self._append({"kind": "weights", "bytes": 4 * count, "shape": [count], "digest": digest})

    def words(self, kind: str, text: str) -> None:
        """Record words: the owner's name, or why it gives up (which no budget keeps back)."""
        data = text.encode("utf-8", "replace")
        digest = hashlib.sha256(data).hexdigest()
        self._append({"kind": kind, "bytes": len(data), "digest": digest}, bounded=False)

    def fail(self, link: Link, error: Exception) -> None:
        """Tell the server why this side gives up; nothing is told that cannot be recorded."""
        told = tellable(error)
        try:
            self.words("error", f"{type(told).__name__}: {told}")
        except LedgerError as broken:
            log.error("%s; the server is told nothing", broken)
            link.close(type(broken).__name__)
            return
        link.fail(told)

    # ---- lines ------------------------------------------------------------------------------

    def _append(self, entry: Entry, *, bounded: bool = True) -> Entry:
        trip = self.trip
        entry |= {
            "run": str(trip.run),
            "round": trip.round,
            "mode": trip.mode,
            "owner": trip.owner,
            "bottom": trip.bottom,
        }

        def make(totals: Totals) -> Entry:
            if bounded:
                refuse(self._over_budget(totals, entry))
            return entry

        return self.ledger.append(make)

    def _batch(self, header: Mapping[str, Any], body: bytes) -> Entry:
        owner = self._owner
        if owner is None:
            raise PolicyError("owner's policy: a batch before its owner was checked")
        slots, fresh = list(header["slots"]), list(header["fresh"])
        entry: Entry = {}
        if self.trip.mode == "train":
            entry["epochs"] = len(slots) / len(owner.samples)
        if not fresh:
            return entry | {"kind": "slots", "shape": [len(slots)]}
        tokens = sum(int(n) for n in header["lengths"])
        perturber = owner.perturber
        mechanism = perturber.mechanism.describe()
        view = int(owner.views[int(header["step"])])
        chosen = "" if perturber.cti is None else sorted(perturber.cti.token_ids)
        # In generation a view stands for the text before: part of what is shown, not a new draw.
        drawn = 0 if self.trip.mode == "predict" else view
        identity: list[Any] = [mechanism, perturber.representation_id, perturber.rho, chosen, drawn]
        if owner.settings.joint:  # the bottom has moved since the last one with that number
            identity += [self.trip.run, self.trip.round, self.trip.mode]
        entry |= {
            "shape": [tokens, int(header["dim"])],
            "mechanism": mechanism,
            "rho": perturber.rho,
            "representation": perturber.representation_id,
            "view": view,
            "draw": hashlib.sha256(_text(identity)).hexdigest()[:16],
            "samples": [self._name(slot, view - drawn) for slot in fresh],
            "tokens": tokens,
            "touched": self._touched(fresh),
        }
        self._look(header, body, tokens)
        return entry

    def _name(self, slot: int, before: int) -> str:
        """Return the keyed digest of a sample's content: tells nothing without the noise secret.

        Args:
            slot: of the sample.
            before: stands for the text that a piece continues; 0 where it is a whole text.
        """
        if slot not in self._names:
            assert self._owner is not None
            ids = self._owner.samples.ids[slot].to(torch.int64).numpy().astype("<i8").tobytes()
            ids += str(before).encode() if before else b""
            self._names[slot] = hmac.digest(self._key, ids, "sha256")[:8].hex()
        return self._names[slot]

    def _touched(self, slots: Sequence[int]) -> int:
        assert self._owner is not None
        perturber = self._owner.perturber
        if perturber.cti is None or perturber.rho == 1.0:
            return 0
        ids = torch.cat([self._owner.samples.ids[slot] for slot in slots])
        return int((perturber.cti.multipliers(ids, perturber.rho) < 1).sum())

    # ---- amounts ----------------------------------------------------------------------------

    def _over_budget(self, totals: Totals, entry: Entry) -> list[Breach]:
        run = totals.run(str(self.trip.run))
        bottom = self.trip.bottom
        size = int(entry["bytes"])
        found = self._above("budget.bytes_total", totals.bytes + size)
        found += self._above("budget.bytes_per_run", run.bytes + size)
        if entry["kind"] == "hello":
            today = totals.days.get(now()[:10], 0)
            found += self._above("budget.sessions_per_run", run.sessions + 1)
            found += self._above("budget.sessions_per_day", today + 1)
        if "epochs" in entry:
            step = float(entry["epochs"])
            found += self._above("budget.epochs_per_run", _whole(run.epochs + step))
            epochs = totals.epochs.get(bottom, 0.0) + step
            found += self._above("budget.epochs_per_bottom", _whole(epochs))
        if "draw" in entry:
            views = totals.exposure.views_after(entry["draw"], bottom, entry["samples"])
            found += self._above("budget.views_per_bottom", views[0])
            found += self._above("budget.views_total", views[1])
            found += self._share(run.tokens, run.touched, entry)
        return found

    def _share(self, tokens: dict[str, int], touched: dict[str, int], entry: Entry) -> list[Breach]:
        """Judge the share of the tokens sent in this run whose noise was reduced."""
        rule, mode = "cti.max_share", self.trip.mode
        if rule not in self.policy or not entry["touched"]:
            return []
        assert self._owner is not None
        whole = sum(self._owner.samples.lengths)
        many = max(whole, tokens.get(mode, 0) + int(entry["tokens"]))
        share = (touched.get(mode, 0) + int(entry["touched"])) / many
        if mode != "train":  # selected on the training texts; others have as many by chance only
            bound = float(self.policy[rule])
            share -= 3 * math.sqrt(bound * (1 - bound) / many)
        return self._above(rule, share)

    def _look(self, header: Mapping[str, Any], body: bytes, tokens: int) -> None:
        """Refuse rows that are too long for the demanded noise, whatever the bottom makes of it."""
        if "noise.min_ratio" not in self.policy:
            return
        assert self._owner is not None
        mechanism = self._owner.perturber.mechanism
        width = int(header["dim"])
        length = mechanism.mean_noise_norm(width)
        if length is None or not mechanism.adds_noise:
            return  # refused when it was attached; clean vectors of other tokens carry no noise
        rows = decode_rows(body, (tokens, width), str(header["codec"]))
        ratio = float(self.policy["noise.min_ratio"])
        if too_clear(rows, length, ratio):
            bound = f">= {ratio:g}, and on this owner's own texts it is far below"
            refuse([Breach("noise.min_ratio", "a bottom with long representations", bound)])

    def _above(self, rule: str, value: float) -> list[Breach]:
        if rule not in self.policy or value <= self.policy[rule]:
            return []
        return [Breach(rule, value, f"<= {self.policy[rule]:g}")]

    def _below(self, rule: str, value: float) -> list[Breach]:
        if rule not in self.policy or value >= self.policy[rule]:
            return []
        return [Breach(rule, value, f">= {self.policy[rule]:g}")]


def _whole(epochs: float) -> float:
    """Return a sum of parts of an epoch without the rounding errors of the sum."""
    return round(epochs, 6)


def _text(value: Any) -> bytes:
    """Return JSON as frames carry it."""
    return json.dumps(value, separators=(",", ":"), default=str).encode()
