"""One page for several runs: figures, curves on one chart, and the settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedsplit.errors import ConfigError
from simulations.core import units
from simulations.core.run_folder import write_atomically
from simulations.report import words
from simulations.report.charts import Point, Series, chart
from simulations.report.facts import Facts, read_facts
from simulations.report.page import against_privacy, environment

FILE = "compare.html"
MOST_RUNS = 40
# Where a run's files lie is no setting that one compares.
PLACES = {"output.dir", "session.port", "session.host"}


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write the page that compares the runs of ``folders`` and return its path.

    Raises:
        ConfigError: fewer than two runs, or too many.
        RunError: a folder without readable results, or the page cannot be written.
    """
    if not 2 <= len(folders) <= MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs: must be 2 to {MOST_RUNS} to be compared")
    write_atomically(out, render([read_facts(f) for f in folders]).encode("utf-8", "replace"))
    return out


def render(runs: Sequence[Facts]) -> str:
    """Return the page."""
    names = _names(runs)
    return environment().get_template("comparison.html.jinja").render(
        rows=[_row(name, facts) for name, facts in zip(names, runs, strict=True)],
        names=names,
        differing=_differing(runs),
        summary=_summary(names, runs),
        frontier=_frontier(names, runs),
        curves=_curves(names, runs),
        measured_at=[words.measured_at(facts) for facts in runs],
    )  # fmt: skip


def _names(runs: Sequence[Facts]) -> list[str]:
    """Return the folders' names; where two are equal, with their parents' as far as needed."""
    for depth in range(1, 6):
        names = ["/".join(facts.folder.absolute().parts[-depth:]) for facts in runs]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {name}" for number, name in enumerate(names, 1)]


def _row(name: str, facts: Facts) -> dict[str, Any]:
    utility, traffic = facts.get("utility"), facts.get("traffic")
    metric = str(utility.get("metric", ""))
    row: dict[str, Any] = {"run": name, "status": facts.results["status"]}
    row["metric"] = units.score_name(metric)
    for key in ("federated", "centralised"):
        row[key] = words.figure(metric, utility[key]) if utility.get(key) is not None else ""
    worst = facts.attackers[-1] if facts.attackers else None
    row["not recovered"] = words.percent(worst.hidden) if worst else ""
    row["strongest attacker"] = worst.name if worst else ""
    row["noise"] = words.noise(facts)
    row["sent"] = units.size(traffic["bytes_up"]) if traffic.get("bytes_up") is not None else ""
    last = facts.lineage[-1] if facts.lineage else {}
    row["lineage"] = str(last.get("verdict", "")).replace("_", " ")
    row["time"] = units.duration(facts.results["time_s"])
    row["commit"] = str(facts.results["versions"].get("commit") or "")[:10]
    return row


def _differing(runs: Sequence[Facts]) -> list[dict[str, Any]]:
    """Return (setting, value in each run) of those that are not equal in all."""
    keys = dict.fromkeys(key for facts in runs for key in facts.config)
    found = []
    for key in keys:
        values = [facts.config.get(key) for facts in runs]
        if key not in PLACES and any(value != values[0] for value in values):
            found.append({"setting": key, "values": values})
    return found


def _summary(names: Sequence[str], runs: Sequence[Facts]) -> str:
    """Say which run is best at what, and whether they were measured at one commit."""
    told = [f"{len(runs)} runs."]
    scored = [
        (facts.get("utility")["federated"], name)
        for name, facts in zip(names, runs, strict=True)
        if facts.get("utility").get("federated") is not None
        and facts.get("utility").get("metric") == "accuracy"
    ]
    if len(scored) > 1:
        best, name = max(scored)
        told.append(f"The highest held-out accuracy is {words.percent(best)}, of {name}.")
    hidden = [(f.attackers[-1].hidden, n) for n, f in zip(names, runs, strict=True) if f.attackers]
    if len(hidden) > 1:
        most, name = max(hidden)
        told.append(f"Most stays hidden in {name}: {words.percent(most)} of the tokens.")
    commits = {str(facts.results["versions"].get("commit")) for facts in runs}
    if len(commits) > 1:
        told.append(f"They were measured at {len(commits)} commits, so code differs too.")
    data = {facts.results.get("data_digest") for facts in runs}
    if len(data) > 1:
        told.append("Their data are not the same.")
    return " ".join(told)


def _frontier(names: Sequence[str], runs: Sequence[Facts]) -> Markup:
    series = []
    for name, facts in zip(names, runs, strict=True):
        utility = facts.get("utility")
        if facts.attackers and utility.get("metric") == "accuracy":
            worst, y = facts.attackers[-1], utility.get("federated")
            if y is not None:
                low, high = worst.interval
                at = Point(100 * worst.hidden, 100 * y, 100 * low, 100 * high, worst.name)
                series.append(Series(name, [at], joined=False))
    return against_privacy(series, [])


def _curves(names: Sequence[str], runs: Sequence[Facts]) -> list[tuple[str, Markup]]:
    found = []
    for mode, figure, heading, scale in (
        ("train", "loss", "Training loss", 1.0),
        ("evaluate", "accuracy", "Held-out accuracy, %", 100.0),
        ("evaluate", "loss", "Held-out loss", 1.0),
    ):
        series = []
        for name, facts in zip(names, runs, strict=True):
            curves = facts.curves(mode, figure)
            if curves and len(curves[0].points) > 1:
                series.append(Series(name, [Point(x, scale * y) for x, y in curves[0].points]))
        if series:
            found.append((heading, chart(series, title=heading, x="round", whole_x=True)))
    return found[:2]
