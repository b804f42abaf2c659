"""The lineage gate inside a strategy: every owner's update, every aggregate, evidence of both.

A round's order: :meth:`LineageWatch.open_round`, :meth:`screen` for what owners returned,
:meth:`check_average` for their average, :meth:`check_model` for what the server itself trained,
:meth:`close_round`.  The strategy then looks at ``row["rejected"]`` (go back to the last good
state) and :func:`stop_reason` (raise).  Nothing here imports Flower: the same class serves any
strategy.

What ``lineage.gate`` does, where an update or an aggregate is not in lineage:

============ =======================================================================================
``warn``       it is recorded and goes on as it is
``reject``     an owner's update is not averaged and the owner is quarantined; a failed aggregate is
               not taken, and the owner whom leave-one-out names is quarantined
``stop``       the run ends with :class:`LineageError`; the evidence is on disk
============ =======================================================================================

An update whose blocks keep the base's products in another basis (permuted hidden units, say) is in
lineage but would wreck an average: it is *set aside* for the round (``reject``, ``stop``), without
blame.  Owners that return no weights (frozen bottoms) cannot be told apart: only the aggregate is
checked, and the round's row says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fedsplit.config import LineageConfig
from fedsplit.errors import LineageError, ModelError
from fedsplit.fingerprints.evidence.chain import Chain, StateDigest
from fedsplit.fingerprints.gate.lineage_gate import LineageGate, LineageReport
from fedsplit.fingerprints.gate.owner_updates import MatrixGate, Update, base_state, leave_one_out
from fedsplit.fingerprints.portraits.round_portrait import RoundPortrait, pack_vector
from fedsplit.fingerprints.view import WeightView

log = logging.getLogger(__name__)

ACCEPT, QUARANTINE, ASIDE, WARN = "accept", "quarantine", "set aside", "warn"
NO_WEIGHTS = (
    "owners return no weights: only the aggregate was checked, and no owner can be named by "
    "leave-one-out"
)


def stop_reason(row: Mapping[str, Any]) -> str | None:
    """Return why the run must end, or None."""
    return None if row.get("action") != "stop" else str(row.get("reason"))


class LineageWatch:
    """Checks what a strategy receives and makes, and remembers who is quarantined.

    Args:
        config: what to do, and the thresholds.
        gate: of the model that the server trains; None if it trains none.
        owners: of the weights that owners return; None if they return none.
        chain: evidence; None writes none.
        check_owners: judge each owner's update before the average (turned off only to measure what
            the aggregate's check alone would miss).
    """

    def __init__(
        self,
        config: LineageConfig,
        gate: LineageGate | None,
        *,
        owners: LineageGate | MatrixGate | None = None,
        chain: Chain | None = None,
        check_owners: bool = True,
    ) -> None:
        self.config = config
        self.gate = gate
        self.owners = owners
        self.chain = chain
        self.check_owners = check_owners
        self.quarantined: dict[str, str] = {}
        self.quarantined_nodes: set[int] = set()
        self._state = base_state(owners) if owners is not None else {}
        if owners is not None:
            owners.check(self._state)  # later checks recompute only what an owner returned
        self._before: dict[str, Tensor] | None = None
        self._digest = StateDigest()
        self._report: LineageReport | None = None
        self._portraits: dict[str, Any] = {}
        self._base_portrait = ""
        self._resumed: dict[str, int] | None = None
        self._drawer = self._make_drawer() if chain is not None else None

    # ---- a round ----------------------------------------------------------------------------

    def open_round(self, number: int) -> dict[str, Any]:
        """Return a new row for the round's report."""
        self._report, self._portraits, self._before = None, {}, None
        if self.gate is None and self.owners is None:
            return {"round": number, "verdict": "off"}
        row: dict[str, Any] = {"round": number, "verdict": "in_lineage", "seconds": 0.0}
        if self.owners is None:
            row["note"] = NO_WEIGHTS
        return row

    def screen(
        self,
        row: dict[str, Any],
        updates: Mapping[str, Update],
        nodes: Mapping[str, int] | None = None,
    ) -> list[str]:
        """Judge each owner's own update; return the names of those to be averaged.

        Args:
            row: from :meth:`open_round`; gets ``owners`` and ``quarantined``.
            updates: owner -> the tensors it returned, under the base's names.
            nodes: owner -> node id, so that a new name does not end a quarantine.
        """
        if self.owners is None or not self.check_owners:
            return list(updates)
        began = time.perf_counter()
        rows: dict[str, dict[str, Any]] = {}
        for owner, update in updates.items():
            rows[owner] = self._judge_owner(owner, self._covered(update))
            action, reason = rows[owner]["action"], rows[owner].get("reason")
            if action == QUARANTINE:
                told = f"round {row['round']}: {reason}"
                self.quarantine(owner, told, (nodes or {}).get(owner))
            elif action != ACCEPT:
                log.warning("round %d: %s: %s: %s", row["round"], owner, action, reason)
        row["owners"] = rows
        if self.config.gate == "stop":
            failed = [o for o, r in rows.items() if r["verdict"] != "in_lineage"]
            if failed:
                row["reason"] = f"update of {failed[0]}: {rows[failed[0]]['reason']}"
                row["stopped"] = True
        row["seconds"] += time.perf_counter() - began
        return [o for o, r in rows.items() if r["action"] in (ACCEPT, WARN)]

    def check_average(
        self,
        row: dict[str, Any],
        mean: Update,
        updates: Mapping[str, Update],
        weights: Mapping[str, float],
        nodes: Mapping[str, int] | None = None,
    ) -> bool:
        """Check the owners' average; on failure find the owner by leave-one-out.

        Args:
            row: gets ``average``, and on failure ``leave_one_out`` and ``named``.
            mean: the average, as it would be sent on.
            updates: what it was made of.
            weights: each owner's weight in it.
            nodes: owner -> node id.
        """
        if self.owners is None:
            return True
        began = time.perf_counter()
        mean = self._covered(mean)
        state = {**self._state, **{name: t.detach().clone() for name, t in mean.items()}}
        found, error = self._check(self.owners, state, list(mean), commit=False)
        passed = found is not None and found.verdict == "in_lineage"
        figures = _report_fields(found, error)
        self._record_verdict(row, found, error)
        if self.gate is None:  # nothing but owners' weights is trained: this is the round's figure
            self._report = found
            row |= {name: value for name, value in figures.items() if name != "verdict"}
            if self.chain is not None:
                row["weights"] = self._digest.update(state.items(), mean)
                self._draw("aggregate", state)
        else:
            row["average"] = {n: v for n, v in figures.items() if n != "per_layer"}
        if not passed:
            parts = {owner: self._covered(update) for owner, update in updates.items()}
            found_out = leave_one_out(self.owners, self._state, parts, weights)
            row["leave_one_out"] = dict(found_out.scores)
            row["named"] = found_out.named
            if found_out.named is None:
                row["note"] = "the average failed, and no single owner's absence mends it"
            elif self.config.gate == "reject":
                reason = f"round {row['round']}: the average passes only without this owner"
                self.quarantine(found_out.named, reason, (nodes or {}).get(found_out.named))
        if passed or self.config.gate == "warn":
            self._before = self._state
            self._accept_state(state, list(mean))
        row["seconds"] += time.perf_counter() - began
        return passed

    def check_model(self, row: dict[str, Any], model: nn.Module, changed: Iterable[str]) -> None:
        """Check what the server trained; the row gets ``score``, ``pcs``, ``per_layer`` ...

        Args:
            row: from :meth:`open_round`.
            model: the live model or half.
            changed: names of the parameters that training may have changed.
        """
        if self.gate is None:
            return
        began = time.perf_counter()
        names = list(changed)
        found, error = self._check(self.gate, model, names, commit=True)
        self._report = found
        verdict = row["verdict"]
        row |= _report_fields(found, error)
        row["verdict"] = verdict
        self._record_verdict(row, found, error)
        if self.chain is not None:
            row["weights"] = self._digest.update(model.named_parameters(), names)
            if found is not None:
                self._draw("aggregate", model)
        row["seconds"] += time.perf_counter() - began

    def close_round(self, row: dict[str, Any]) -> dict[str, Any]:
        """Decide, write the evidence, and return the row for the round's report."""
        if row["verdict"] == "off":
            return row
        began = time.perf_counter()
        action = "stop" if row.pop("stopped", False) else ACCEPT
        if row["verdict"] != "in_lineage":
            log.warning("round %d: lineage %s (%s)", row["round"], row["verdict"], row.get("score"))
            row.setdefault("reason", f"lineage {row['verdict']}, score {row.get('score')}")
            action = self.config.gate
        if action == "reject":
            row["rejected"] = True
            if self._before is not None:  # what owners trained goes back with the rest
                self._accept_state(self._before, list(self._before))
        row["action"] = action
        if self.quarantined:
            row["quarantined"] = dict(self.quarantined)
        if self.chain is not None:
            row["record"] = self._record(row, action)
        row["seconds"] += time.perf_counter() - began
        return row

    # ---- who takes part ---------------------------------------------------------------------

    def quarantine(self, owner: str, reason: str, node: int | None = None) -> None:
        """Leave an owner out of every later round."""
        log.warning("owner %s is quarantined: %s", owner, reason)
        self.quarantined.setdefault(owner, reason)
        if node is not None:
            self.quarantined_nodes.add(node)

    def lift_quarantine(self, owner: str, node: int | None = None) -> None:
        """End a quarantine."""
        self.quarantined.pop(owner, None)
        if node is not None:
            self.quarantined_nodes.discard(node)

    def is_quarantined(self, node: int, owner: str | None) -> bool:
        """Return whether a node, or the owner that it says it is, is quarantined."""
        return node in self.quarantined_nodes or owner in self.quarantined

    # ---- over restarts ----------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a restarted run must know: quarantines, and where the evidence ends."""
        chain = self.chain
        return {
            "quarantined": dict(self.quarantined),
            "nodes": sorted(self.quarantined_nodes),
            "chain": None if chain is None else {"count": chain.count, "head": chain.head},
        }

    def restore(self, state: Mapping[str, Any], owners: Update) -> None:
        """Go on from :meth:`state`; the next record says that the run was interrupted.

        Args:
            state: as the interrupted run saved it.
            owners: what owners train, as it was then.

        Raises:
            LineageError: the evidence ends before that state: lines are missing.
        """
        self.quarantined.update(state["quarantined"])
        self.quarantined_nodes.update(int(node) for node in state["nodes"])
        known = state["chain"]
        if self.chain is not None and known is not None:
            if self.chain.count < known["count"]:
                raise LineageError(
                    f"{self.chain.path}: {self.chain.count} records: must be {known['count']} or "
                    "more, as the state of the interrupted run says"
                )
            again = self.chain.count - known["count"]
            self._resumed = {"known": known["count"], "repeated": again}
            if known["count"]:
                self._base_portrait = ""  # it is in the first record already
        covered = self._covered(owners)
        if self.owners is not None and covered:
            self._accept_state({**self._state, **covered}, list(covered))

    # ---- the parts --------------------------------------------------------------------------

    def _covered(self, update: Update) -> dict[str, Tensor]:
        """Return the tensors that the base has counterparts of; a new head, say, has none."""
        return {name: tensor for name, tensor in update.items() if name in self._state}

    def _accept_state(self, state: dict[str, Tensor], changed: list[str]) -> None:
        """Take a state as the last good one."""
        assert self.owners is not None
        self._state = state
        self._check(self.owners, state, changed, commit=True)

    def _judge_owner(self, owner: str, update: Update) -> dict[str, Any]:
        assert self.owners is not None
        state = {**self._state, **update}
        found, error = self._check(self.owners, state, list(update), commit=False)
        row = _report_fields(found, error) | {"action": ACCEPT}
        row.pop("per_layer", None)
        careful = self.config.gate in ("reject", "stop")
        if found is None or found.verdict != "in_lineage":
            where = f", blocks {list(found.diverged)}" if found and found.diverged else ""
            told = error if found is None else f"{found.verdict}, score {found.score:.3f}{where}"
            row["reason"] = f"update is not in lineage: {told}"
            row["action"] = QUARANTINE if careful else WARN
            if found is not None and self.gate is None:
                self._draw(owner, state)
        elif found.moved:
            row["reason"] = (
                f"blocks {list(found.moved)} keep the base's products in another basis: in "
                f"lineage, but an average with the others would wreck them"
            )
            row["action"] = ASIDE if careful else WARN
        return row

    def _check(
        self, gate: LineageGate | MatrixGate, state: Any, changed: list[str], *, commit: bool
    ) -> tuple[LineageReport | None, str | None]:
        try:
            return gate.check(state, changed, commit=commit), None
        except (LineageError, ModelError) as error:  # NaN weights, for one
            return None, f"{type(error).__name__}: {error}"

    def _record_verdict(
        self, row: dict[str, Any], found: LineageReport | None, error: str | None
    ) -> None:
        if found is None:
            row["verdict"], row["error"] = "not_shown", error
        elif found.verdict != "in_lineage":
            row["verdict"] = found.verdict

    def _make_drawer(self) -> RoundPortrait | None:
        gate = self.gate if self.gate is not None else self.owners
        if not isinstance(gate, LineageGate):
            return None
        try:
            drawer = RoundPortrait(gate.base)
        except LineageError as error:  # too narrow, or no embedding rows: no picture, no harm
            log.info("no portraits: %s", error)
            return None
        self._base_portrait = pack_vector(drawer.vector(gate.base))
        return drawer

    def _draw(self, name: str, state: Any) -> None:
        gate = self.gate if self.gate is not None else self.owners
        if self._drawer is None or not isinstance(gate, LineageGate):
            return
        view = (
            WeightView.of_module(state)
            if isinstance(state, nn.Module)
            else WeightView.of_tensors(state, gate.base.layout)
        )
        try:
            drawn = pack_vector(self._drawer.vector(view))
        except (LineageError, ModelError) as error:
            log.info("no portrait of %s: %s", name, error)
            return
        if name == "aggregate":
            self._portraits[name] = drawn
        else:
            self._portraits.setdefault("owners", {})[name] = drawn

    def _record(self, row: dict[str, Any], action: str) -> str:
        assert self.chain is not None
        kept = ["owners", "average", "leave_one_out", "named", "quarantined", "note", "error"]
        kept.append("charged")
        details: dict[str, Any] = {name: row[name] for name in kept if row.get(name)}
        if self._resumed is not None:
            details["resumed"], self._resumed = self._resumed, None
        if self._base_portrait:  # once, in the run's first record
            self._portraits["base"], self._base_portrait = self._base_portrait, ""
        if self._portraits:
            details["portraits"] = self._portraits
        return self.chain.append(
            row["round"],
            self._report,
            weights=str(row.get("weights", "")),
            action=action,
            details=details,
        )


def _report_fields(found: LineageReport | None, error: str | None) -> dict[str, Any]:
    if found is None:
        return {"verdict": "not_shown", "error": error}
    return {
        "verdict": found.verdict,
        "score": found.score,
        "pcs": found.pcs,
        "ics": found.ics,
        "worst": min(found.per_layer),
        "per_layer": list(found.per_layer),
    }
