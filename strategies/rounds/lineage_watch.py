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
from fedsplit.errors import LineageError
from fedsplit.fingerprints.evidence.chain import Chain, StateDigest
from fedsplit.fingerprints.gate.lineage_gate import LineageGate, LineageReport
from fedsplit.fingerprints.gate.owner_updates import MatrixGate, Update, base_state, leave_one_out
from fedsplit.fingerprints.gate.scale import ScaleGate
from fedsplit.fingerprints.portraits.round_portrait import PortraitDrawer

from .lineage_checks import (
    check_sizes,
    check_state,
    record_verdict,
    report_fields,
    scales_of_top,
    trained_tensors,
)

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
        self._scales_before: dict[str, Tensor] | None = None
        self._digest = StateDigest()
        self._report: LineageReport | None = None
        self._portraits: dict[str, Any] = {}
        self._resumed: dict[str, int] | None = None
        judge = gate if gate is not None else owners
        drawn = chain is not None and isinstance(judge, LineageGate)
        self._drawer = PortraitDrawer.of(judge.base) if drawn else None  # type: ignore[union-attr]
        self._base_portrait = self._drawer.base if self._drawer is not None else ""
        self._scales: ScaleGate | None = None
        self._top_scales: ScaleGate | None = None
        if chain is not None:  # of an earlier run into the same folder
            self.quarantined |= chain.quarantined

    def expect(
        self,
        owners: Mapping[str, Tensor],
        top: Mapping[str, Tensor] | None = None,
        fresh: frozenset[str] = frozenset(),
    ) -> None:
        """Take note of everything that training can change, as it begins.

        Norms and scales of all of it are checked from now on.

        Args:
            owners: what owners train and return.
            top: what the server trains.
            fresh: names in ``top`` that the base has not (a new head).
        """
        slack = self.config.scale
        if self.config.gate == "off" or not slack:
            return
        added = frozenset(owners.keys() - self._state.keys())
        if owners:
            self._scales = ScaleGate({**self._state, **{n: owners[n] for n in added}}, added, slack)
        if self.gate is not None and top:
            self._top_scales = scales_of_top(self.gate, top, fresh, slack)

    # ---- a round ----------------------------------------------------------------------------

    def open_round(self, number: int) -> dict[str, Any]:
        """Return a new row for the round's report."""
        self._report, self._portraits, self._before, self._scales_before = None, {}, None, None
        if self.gate is None and self.owners is None and self._scales is None:
            return {"round": number, "verdict": "off"}
        row: dict[str, Any] = {"round": number, "verdict": "in_lineage", "seconds": 0.0}
        if not self.judges_owners:
            row["note"] = NO_WEIGHTS
        return row

    @property
    def judges_owners(self) -> bool:
        """Whether owners return weights that are judged."""
        return self.owners is not None or self._scales is not None

    def screen(
        self,
        row: dict[str, Any],
        updates: Mapping[str, Update],
        nodes: Mapping[str, int] | None = None,
    ) -> list[str]:
        """Judge each owner's own update; return the names of those to be averaged.

        Args:
            row: from :meth:`open_round`; gets ``owners`` and ``quarantined``.
            updates: owner -> the tensors it returned, under the base's names; those that the base
                has not, under their own.
            nodes: owner -> node id, so that a new name does not end a quarantine.
        """
        if not self.judges_owners or not self.check_owners:
            return list(updates)
        began = time.perf_counter()
        rows: dict[str, dict[str, Any]] = {}
        for owner, update in updates.items():
            rows[owner] = self._judge_owner(owner, update)
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
        began = time.perf_counter()
        whole = {name: t.detach().clone() for name, t in mean.items()}
        sized = check_sizes(self._scales, row, whole, "average: ")
        if self.owners is None:
            if self._scales is not None and (sized or self.config.gate == "warn"):
                self._scales_before = self._scales.accept(whole)
            row["seconds"] += time.perf_counter() - began
            return sized
        mean = self._covered(whole)
        state = {**self._state, **mean}
        found, error = check_state(self.owners, state, list(mean), commit=False)
        passed = sized and found is not None and found.verdict == "in_lineage"
        figures = report_fields(found, error)
        record_verdict(row, found, error)
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
            if self._scales is not None:
                self._scales_before = self._scales.accept(whole)
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
        found, error = check_state(self.gate, model, names, commit=True)
        self._report = found
        verdict = row["verdict"]
        row |= report_fields(found, error)
        row["verdict"] = verdict
        record_verdict(row, found, error)
        if self._top_scales is not None:
            check_sizes(
                self._top_scales, row, trained_tensors(model, names), "the server's model: "
            )
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
            row.setdefault("reason", f"lineage {row['verdict']}, score {row.get('score')}")
            log.warning("round %d: %s", row["round"], row["reason"])
            action = self.config.gate
        if action == "reject":
            row["rejected"] = True
            if self._before is not None:  # what owners trained goes back with the rest
                self._accept_state(self._before, list(self._before))
            if self._scales is not None and self._scales_before is not None:
                self._scales.accept(self._scales_before)
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
        if self._scales is not None and owners:
            self._scales.accept(owners)
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
        check_state(self.owners, state, changed, commit=True)

    def _judge_owner(self, owner: str, update: Update) -> dict[str, Any]:
        row: dict[str, Any] = {"verdict": "in_lineage", "action": ACCEPT}
        found, error, state = None, None, {**self._state, **self._covered(update)}
        if self.owners is not None:
            names = list(self._covered(update))
            found, error = check_state(self.owners, state, names, commit=False)
            row |= report_fields(found, error)
            row.pop("per_layer", None)
        careful = self.config.gate in ("reject", "stop")
        if row["verdict"] != "in_lineage":
            where = f", blocks {list(found.diverged)}" if found and found.diverged else ""
            told = error if found is None else f"{found.verdict}, score {found.score:.3f}{where}"
            row["reason"] = f"update is not in lineage: {told}"
            row |= {"action": QUARANTINE if careful else WARN, "tests": ["score"]}
            if found is not None and self.gate is None:
                self._draw(owner, state)
        elif found is not None and found.moved:
            row["reason"] = (
                f"blocks {list(found.moved)} keep the base's products in another basis: in "
                f"lineage, but an average with the others would wreck them"
            )
            row["action"] = ASIDE if careful else WARN
        elif not check_sizes(self._scales, row, update):
            row["action"] = QUARANTINE if careful else WARN
        return row

    def _draw(self, name: str, state: Any) -> None:
        drawn = self._drawer.draw(state) if self._drawer is not None else None
        if drawn is None:
            return
        if name == "aggregate":
            self._portraits[name] = drawn
        else:
            self._portraits.setdefault("owners", {})[name] = drawn

    def _record(self, row: dict[str, Any], action: str) -> str:
        assert self.chain is not None
        kept = ["owners", "average", "leave_one_out", "named", "quarantined", "note", "error"]
        kept += ["charged", "tests", "scale", "scale of the model", "reason"]
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
