"""What a ledger's lines add up to, by run, day, bottom and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedsplit.owners.ledger.exposure import Draw, Exposure
from fedsplit.owners.ledger.spending import ReportTotals, TrainingTotals

_NESTED = ("runs", "training", "reports", "exposure")


@dataclass
class RunTotals:
    """What one run has cost so far."""

    bytes: int = 0
    sessions: int = 0
    passes: dict[str, float] = field(default_factory=dict)  # over a split's texts, by mode
    tokens: dict[str, int] = field(default_factory=dict)  # by mode
    touched: dict[str, int] = field(default_factory=dict)
    training: TrainingTotals = field(default_factory=TrainingTotals)

    def to_json(self) -> dict[str, Any]:
        """Return everything, JSON-able."""
        return {**vars(self), "training": vars(self.training)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunTotals:
        """Return what :meth:`to_json` was taken of."""
        return cls(**{**content, "training": TrainingTotals(**content.get("training", {}))})


@dataclass
class Totals:
    """What all lines add up to."""

    bytes: int = 0
    torn: int = 0  # bytes of ledger.torn that lines tell of
    kinds: dict[str, list[int]] = field(default_factory=dict)  # kind -> [lines, bytes]
    runs: dict[str, RunTotals] = field(default_factory=dict)
    days: dict[str, int] = field(default_factory=dict)  # UTC day -> sessions
    passes: dict[str, dict[str, float]] = field(default_factory=dict)  # by bottom and mode
    training: TrainingTotals = field(default_factory=TrainingTotals)
    reports: ReportTotals = field(default_factory=ReportTotals)
    exposure: Exposure = field(default_factory=Exposure)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)  # key -> figures

    def run(self, run: str) -> RunTotals:
        """Return the totals of one run."""
        return self.runs.setdefault(run, RunTotals())

    def apply(self, entry: Mapping[str, Any]) -> None:
        """Add one line."""
        kind, size = str(entry["kind"]), int(entry.get("bytes", 0))
        row = self.kinds.setdefault(kind, [0, 0])
        row[0] += 1
        row[1] += size
        if kind == "repair":
            self.torn += int(entry["torn"])
            return
        self.bytes += size
        run = self.run(str(entry.get("run", "")))
        run.bytes += size
        if kind == "hello":
            run.sessions += 1
            day = str(entry["time"])[:10]
            self.days[day] = self.days.get(day, 0) + 1
        if kind == "measured":
            self.measured[str(entry["key"])] = dict(entry["measured"])
        if kind == "metrics":
            self.reports.apply(entry)
        if "training" in entry:
            for totals in (run.training, self.training):
                totals.apply(entry["training"], str(entry["time"]))
        if "epochs" in entry:
            files = str(entry["bottom"] if "bottom" in entry else entry["emulator"])
            mode, part = str(entry["mode"]), float(entry["epochs"])
            for passes in (run.passes, self.passes.setdefault(files, {})):
                passes[mode] = passes.get(mode, 0.0) + part
        if "draw" in entry:
            mode = str(entry["mode"])
            run.tokens[mode] = run.tokens.get(mode, 0) + int(entry["tokens"])
            run.touched[mode] = run.touched.get(mode, 0) + int(entry["touched"])
            draw = Draw(
                str(entry["representation"]),
                str(entry["bottom"]),
                dict(entry["mechanism"]),
                float(entry["rho"]),
            )
            names, views = entry["samples"], entry.get("views")
            if views is None:  # of a time when one noise served a whole line
                self.exposure.apply_old(str(entry["draw"]), draw, names)
            else:
                self.exposure.apply(str(entry["draw"]), draw, list(zip(names, views, strict=True)))

    def to_json(self) -> dict[str, Any]:
        """Return everything, JSON-able."""
        plain = {k: v for k, v in vars(self).items() if k not in _NESTED}
        runs = {run: totals.to_json() for run, totals in self.runs.items()}
        return {
            **plain,
            "runs": runs,
            "training": vars(self.training),
            "reports": vars(self.reports),
            "exposure": self.exposure.to_json(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Totals:
        """Return what :meth:`to_json` was taken of."""
        plain = {k: v for k, v in content.items() if k not in _NESTED}
        return cls(
            **plain,
            runs={run: RunTotals.from_json(totals) for run, totals in content["runs"].items()},
            training=TrainingTotals(**content["training"]),  # without it, all lines are read again
            reports=ReportTotals(**content["reports"]),
            exposure=Exposure.from_json(content["exposure"]),
        )
