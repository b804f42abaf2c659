"""Status of a run at this moment, as one JSON-able page.

The page is the only source of what is shown: ``progress.json`` in ``output.dir`` is the page, the
metrics endpoint writes the same page as OpenMetrics (:mod:`strategies.telemetry.metrics`), and
``python -m simulations watch`` reads the file.  It holds counts, sizes, times, owners' public names
and what ``server.json`` says after each round; no text, no label, no tensor.
"""

from __future__ import annotations

import statistics
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import fedsplit
from fedsplit.config import RunConfig
from fedsplit.privacy import mechanism_type
from fedsplit.privacy.labels.table import said
from fedsplit.wire.link import Link

SCHEMA = 1
MOST_OWNERS = 1000  # on one page; the counts by state are of all
# Upper bounds in seconds; a step is one forward and backward for a whole cohort.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
STATES = ("connected", "closed", "finished", "lost", "benched", "quarantined")
_RECENT = 256


@dataclass
class _Owner:
    """Sessions of one owner so far."""

    node: int
    state: str = "connected"
    round: int = 0
    sessions: int = 0
    reason: str = ""
    links: list[Link] = field(default_factory=list)
    up: int = 0  # of links that are closed
    down: int = 0
    frames: int = 0

    def settle(self) -> None:
        """Add up the figures of closed links and drop the links."""
        for link in [link for link in self.links if link.closed]:
            self.links.remove(link)
            self.up += link.traffic.bytes_in
            self.down += link.traffic.bytes_out
            self.frames += link.traffic.frames_in + link.traffic.frames_out
        if self.state == "connected" and not self.links:
            self.state = "closed"

    def row(self, name: str) -> dict[str, Any]:
        """Return the owner's line of the page."""
        self.settle()
        live = [link.traffic for link in self.links]
        row: dict[str, Any] = {
            "name": name,
            "node": str(self.node),
            "state": self.state,
            "round": self.round,
            "sessions": self.sessions,
            "bytes_up": self.up + sum(t.bytes_in for t in live),
            "bytes_down": self.down + sum(t.bytes_out for t in live),
            "frames": self.frames + sum(t.frames_in + t.frames_out for t in live),
        }
        return row | ({"reason": self.reason[:300]} if self.reason else {})


class Live:
    """State of a run and the page that shows it; any thread may call anything.

    Args:
        config: the run's settings.
        run: Flower's run id.
    """

    def __init__(self, config: RunConfig, run: int) -> None:
        self._lock = threading.RLock()
        self._owners: dict[str, _Owner] = {}
        self._times: deque[float] = deque(maxlen=_RECENT)  # of the round's latest steps
        self._buckets = [0] * (len(BUCKETS) + 1)
        self._seconds = 0.0
        self._facts: dict[str, Any] = {
            "schema": SCHEMA,
            "run": str(run),
            "strategy": config.strategy,
            "model": config.model.name,
            "version": fedsplit.__version__,
            "status": "starting",
            "started": _now(),
            "privacy": spent_on(config),
            "rounds": config.train.rounds,
            "round": 0,
            "mode": "",
            "step": 0,
            "steps": 0,
            "asked": 0,
            "steps_done": 0,
            "rounds_done": 0,
            "samples": 0,
            "tokens": 0,
            "lost": 0,
        }

    # ---- what happens -----------------------------------------------------------------------

    def round_started(self, number: int, mode: str, asked: int) -> None:
        """Note that a round's offers go out to ``asked`` owners."""
        with self._lock:
            self._times.clear()
            self._facts |= {"round": number, "mode": mode, "asked": asked, "step": 0, "steps": 0}

    def session_opened(self, name: str, node: int, link: Link) -> None:
        """Note that an owner's session was accepted."""
        with self._lock:
            owner = self._owners.setdefault(name, _Owner(node))
            owner.settle()
            owner.links.append(link)
            owner.node, owner.state, owner.reason = node, "connected", ""
            owner.round = self._facts["round"]
            owner.sessions += 1

    def step_done(self, values: Mapping[str, Any]) -> None:
        """Note that a cohort step is done; ``values`` are a progress line's."""
        now = time.monotonic()
        with self._lock:
            known = ("round", "rounds", "mode", "step", "steps")
            self._facts |= {key: values[key] for key in known if key in values}
            self._facts["steps_done"] += 1
            if self._times and values.get("step") != 1:
                took = now - self._times[-1]
                self._buckets[bisect_left(BUCKETS, took)] += 1
                self._seconds += took
            self._times.append(now)

    def round_recorded(self, row: Mapping[str, Any]) -> None:
        """Note a round's row; one that comes twice (train, then evaluate) is added to."""
        with self._lock:
            for mode in ("train", "evaluate"):
                part = row.get(mode)
                if isinstance(part, Mapping):
                    self._part(mode, part)
            lineage = row.get("lineage")
            if isinstance(lineage, Mapping):
                kept = ("round", "verdict", "score", "pcs", "ics", "action", "reason")
                self._facts["lineage"] = {k: lineage[k] for k in kept if k in lineage}
                for name, reason in dict(lineage.get("quarantined") or {}).items():
                    self._set(name, "quarantined", str(reason))
            if isinstance(row.get("plug_in_loss"), float):
                self._facts["plug_in_loss"] = row["plug_in_loss"]

    def _part(self, mode: str, part: Mapping[str, Any]) -> None:
        facts = self._facts
        metrics = part.get("metrics") or {}
        facts[mode] = {
            key: float(metrics[key])
            for key in ("loss", "accuracy", "epsilon", "share-touched")
            if isinstance(metrics.get(key), (int, float))
        }
        facts["samples"] += int(part.get("samples", 0))
        facts["tokens"] += int(part.get("row_tokens", 0))
        facts["rounds_done"] += mode == "train"
        for name in part.get("finished", ()):
            self._set(name, "finished")
        lost = dict(part.get("lost") or {})
        facts["lost"] += len(lost)
        for state, owners in (("lost", lost), ("benched", dict(part.get("benched") or {}))):
            for name, reason in owners.items():
                self._set(name, state, str(reason))

    def _set(self, name: str, state: str, reason: str = "") -> None:
        owner = self._owners.setdefault(name, _Owner(0))
        owner.settle()
        owner.state, owner.reason, owner.round = state, reason, self._facts["round"]

    def results_changed(self, values: Mapping[str, Any]) -> None:
        """Note top-level values of ``server.json`` that were set."""
        kept = ("status", "error", "serving", "run_s")
        with self._lock:
            self._facts |= {key: values[key] for key in kept if key in values}

    # ---- what is shown ----------------------------------------------------------------------

    @property
    def where(self) -> dict[str, Any]:
        """Return run, round and mode, for log lines."""
        facts = self._facts
        return {"run": facts["run"], **{k: facts[k] for k in ("round", "mode") if facts[k]}}

    def page(self) -> dict[str, Any]:
        """Return the page."""
        with self._lock:
            rows = [owner.row(name) for name, owner in self._owners.items()]
            gaps = [b - a for a, b in zip(self._times, list(self._times)[1:], strict=False)]
            return {
                **self._facts,
                "time": _now(),
                "steps_per_s": 1 / statistics.fmean(gaps) if gaps and sum(gaps) > 0 else 0.0,
                "step_seconds": {
                    "buckets": self._cumulative(),
                    "count": sum(self._buckets),
                    "sum": self._seconds,
                    "p50": quantile(gaps, 0.5),
                    "p99": quantile(gaps, 0.99),
                },
                "bytes_up": sum(row["bytes_up"] for row in rows),
                "bytes_down": sum(row["bytes_down"] for row in rows),
                "frames": sum(row["frames"] for row in rows),
                "states": {s: sum(row["state"] == s for row in rows) for s in STATES},
                "owners": rows[:MOST_OWNERS],
            }

    def _cumulative(self) -> list[list[float]]:
        """Return [upper bound, steps not slower], the last of which is all that are bounded."""
        total, found = 0, []
        for bound, count in zip(BUCKETS, self._buckets, strict=False):
            total += count
            found.append([bound, total])
        return found


def quantile(values: Iterable[float], share: float) -> float | None:
    """Return the value that ``share`` of all are not above (nearest rank); None for no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


def spent_on(config: RunConfig) -> dict[str, Any]:
    """Return the settings that protect representations in this run."""
    p = config.privacy
    told: dict[str, Any] = {"mechanism": p.mechanism, **mechanism_type(p).public_settings(p)}
    if said(config.labels.protection) != "none":
        told["labels"] = config.labels.protection
    if config.dp.noise_multiplier:
        told["dp-noise-multiplier"] = config.dp.noise_multiplier
    return told


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
