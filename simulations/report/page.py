"""One page per run: what was asked, what came out, and the pictures, in a file that needs no other.

``report.html`` lies beside ``results.json`` and is made from it and from what the server wrote; it
loads nothing from anywhere.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from simulations.core import units
from simulations.core.run_folder import TOP_LEVEL, write_atomically
from simulations.report import words
from simulations.report.charts import Point, Series, chart
from simulations.report.facts import Curve, Facts, Row, read_facts
from simulations.report.holders import picture
from simulations.report.score_tables import class_rows, confusion_rows, score_rows

FILE = "report.html"
FOLDER = Path(__file__).parent
MOST_ROWS = 500
MOST_PICTURE_BYTES = 8 << 20
# What the page shows in a form of its own, so not again as a table.
SHOWN = {
    *("about", "utility", "privacy", "lineage", "traffic", "owners", "rounds", "sent"),
    *("classes", "model", "seed", "data_digest", "speed", "stages_s"),
}
SPLIT_ONLY = {"rounds", "owners", "privacy", "lineage", "traffic", "model", "speed"}


def write_report(folder: Path) -> Path:
    """Write ``report.html`` from the folder's results and pictures, and return its path.

    Raises:
        RunError: no readable results, or the page cannot be written.
    """
    page = render(read_facts(folder), sorted(folder.glob("*.png")))
    path = folder / FILE
    write_atomically(path, page.encode("utf-8", "replace"))
    return path


def environment() -> Environment:
    """Return the templates; whatever a value holds is text in a page, never markup."""
    found = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    found.filters |= {
        "cell": cell,
        "words": lambda name: str(name).replace("_", " "),
        "score_name": lambda name: units.score_name(str(name)),
        "size": units.size,
        "percent": words.percent,
        "duration": units.duration,
        "most_of": _most_of,
    }
    found.globals |= {
        "columns": _columns,
        "tables": _tables,
        "most_rows": MOST_ROWS,
        "style": Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
    }
    return found


def render(facts: Facts, pictures: Sequence[Path] = ()) -> str:
    """Return the page.

    Args:
        facts: of the run.
        pictures: PNG files to embed; one over 8 MiB is only named.
    """
    results = facts.results
    shown = SHOWN if facts.owners else SHOWN - SPLIT_ONLY
    own = {k: v for k, v in results.items() if k not in (*TOP_LEVEL, *shown)}
    return environment().get_template("page.html.jinja").render(
        facts=facts,
        results=results,
        summary=words.summary(facts),
        measured_at=words.measured_at(facts),
        figures=_figures(facts),
        holders=picture(facts),
        curves=_curves(facts),
        frontier=_frontier(facts),
        scores=_scores(facts),
        noise=words.noise(facts),
        scored=score_rows(facts.get("utility")),
        confusion=confusion_rows(facts),
        by_class=class_rows(facts),
        told=words.what_the_server_reads(facts),
        partial=words.partial(facts.get("utility")),
        pictures=[_picture(path) for path in pictures],
        sections=[(key, own[key]) for key in sorted(own, key=_position)],
    )  # fmt: skip


def _figures(facts: Facts) -> list[tuple[str, str, str]]:
    """Return the (figure, what it is, remark) that stand first."""
    found: list[tuple[str, str, str]] = []
    utility = facts.get("utility")
    if utility.get("federated") is not None:
        metric = str(utility["metric"])
        name = units.score_name(metric)
        beside = utility.get("centralised")
        remark = f"centralised {words.figure(metric, beside)}" if beside is not None else ""
        found.append((words.figure(metric, utility["federated"]), f"held-out {name}", remark))
    if facts.attackers:
        worst = facts.attackers[-1]
        found.append(
            (words.percent(worst.hidden), "of tokens stay hidden", "from the strongest attacker")
        )
    if traffic := facts.get("traffic"):
        token = f"{traffic.get('bytes_per_token') or 0:.0f} bytes per token"
        found.append((units.size(traffic.get("bytes_up", 0)), "sent by the owners", token))
    if facts.lineage:
        verdict = str(facts.lineage[-1].get("verdict", "")).replace("_", " ")
        score = facts.lineage[-1].get("score")
        found.append((verdict, "lineage", "" if score is None else f"score {score:.3f}"))
    found.append((units.duration(facts.results["time_s"]), "from start to end", ""))
    return found


def _curves(facts: Facts) -> list[tuple[str, Markup]]:
    """Return (heading, chart) of training loss and held-out figures over the rounds."""
    found = []
    for mode, figure, heading in (
        ("train", "loss", "Training loss"),
        ("evaluate", "accuracy", "Held-out accuracy, %"),
        ("evaluate", "loss", "Held-out loss"),
    ):
        scale = 100.0 if figure == "accuracy" else 1.0
        curves = facts.curves(mode, figure)
        if any(len(curve.points) > 1 for curve in curves):
            drawn = chart(_series(curves, scale), title=heading, x="round", whole_x=True)
            found.append((heading, drawn))
    return found[:2]


def _series(curves: Sequence[Curve], scale: float) -> list[Series]:
    return [
        Series(c.name, [Point(x, scale * y) for x, y in c.points], faint=number > 0)
        for number, c in enumerate(curves)
    ]


def _frontier(facts: Facts) -> Markup:
    """Return accuracy against privacy: of one run's attackers, or of a sweep's variants."""
    utility = facts.get("utility")
    accuracy = utility.get("federated")
    if facts.attackers and accuracy is not None and utility["metric"] == "accuracy":
        series = [
            Series(
                a.name,
                [Point(100 * a.hidden, 100 * accuracy, 100 * a.interval[0], 100 * a.interval[1])],
                joined=False,
            )
            for a in facts.attackers
        ]
        told = {"trained in one place": "centralised", str(utility.get("baseline_is")): "baseline"}
        levels = [
            (name, 100 * utility[key]) for name, key in told.items() if utility.get(key) is not None
        ]
        return against_privacy(series, levels)
    summary = facts.results.get("summary")
    if not isinstance(summary, list):
        return Markup("")
    variants: dict[str, list[Point]] = {}
    for row in summary:
        hidden = row.get("empirical_privacy_map", row.get("empirical_privacy"))
        if hidden is not None and row.get("accuracy") is not None:
            label = "" if row.get("eta") is None else f"{row['eta']:g}"
            point = Point(100 * hidden, 100 * row["accuracy"], label=label)
            variants.setdefault(str(row.get("variant", "")), []).append(point)
    series = [Series(v, sorted(points, key=lambda p: p.x)) for v, points in variants.items()]
    return against_privacy(series, [])


def against_privacy(series: Sequence[Series], levels: Sequence[tuple[str, float]]) -> Markup:
    """Return the chart of held-out accuracy against what an attacker does not recover."""
    return chart(
        series,
        title="accuracy against privacy",
        x="tokens that the attacker does not recover, %",
        y="held-out accuracy, %",
        levels=levels,
        x_range=(0.0, 100.0),
        y_range=(0.0, 100.0),
    )


def _scores(facts: Facts) -> Markup:
    points = {
        name: [Point(row["round"], row[key]) for row in facts.lineage if row.get(key) is not None]
        for name, key in (("score", "score"), ("worst block", "worst"), ("parameter cosine", "pcs"))
    }
    series = [Series(name, found) for name, found in points.items() if len(found) > 1]
    gate = [
        (name, float(facts.config[key]))
        for name, key in (("in lineage from", "lineage.in-lineage"), ("block", "lineage.block"))
        if key in facts.config
    ]
    title = "lineage score per round"
    return chart(
        series, title=title, x="round", y="score", levels=gate, y_range=(0.0, 1.0), whole_x=True
    )


def _most_of(spread: Mapping[str, Any] | None) -> str:
    """Return maximum and median over texts."""
    return f"{spread['max']:.4g} ({spread['median']:.4g})" if spread else ""


def _position(key: str) -> tuple[bool, bool]:
    """Return a sort key: what summarises comes first, long lists last."""
    return key not in ("summary", "utility", "privacy"), key == "rows"


def _tables(section: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Yield (heading, rows) of a section: its plain values first, then each nested table."""
    if plain := {k: v for k, v in section.items() if not isinstance(v, Mapping | list)}:
        yield "", _pairs(plain)
    for key, nested in section.items():
        if isinstance(nested, Mapping):
            yield str(key), _pairs(nested)


def _pairs(table: Mapping[str, Any]) -> list[Row]:
    return [{"": k, "value": v} for k, v in table.items() if not isinstance(v, Mapping)]


def _columns(rows: Sequence[Row]) -> list[str]:
    """Return the names of all values that fit into a cell."""
    return list(
        dict.fromkeys(
            name
            for row in rows
            for name, value in row.items()
            if not isinstance(value, Mapping) and not (isinstance(value, list) and len(value) > 8)
        )
    )


def cell(value: Any) -> str:
    """Return a value as text of a table's cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(cell(v) for v in value)
    return "" if value is None else str(value)[:400]


def _picture(path: Path) -> dict[str, str]:
    small = path.stat().st_size <= MOST_PICTURE_BYTES
    data = base64.b64encode(path.read_bytes()).decode() if small else ""
    return {"name": path.stem, "file": path.name, "data": data}
