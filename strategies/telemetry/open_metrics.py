"""The live page as OpenMetrics text (openmetrics.io, version 1.0.0).

No label carries an owner's name or anything that an owner chose: whoever may scrape the server
learns how many owners there are, never which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
VERDICTS = ("in_lineage", "not_shown", "independent", "off")
_SERVED = ("sessions", "failed", "texts", "tokens", "forwards")

Sample = tuple[str, Mapping[str, str], float]


def render(page: Mapping[str, Any]) -> str:
    """Return the exposition of one page (:meth:`strategies.telemetry.status.Live.page`)."""
    steps = page.get("step_seconds") or {}
    parts = [
        _family(
            "fedsplit_run",
            "info",
            "The run.",
            [("_info", {k: str(page.get(k, "")) for k in ("run", "strategy", "version")}, 1)],
        ),
        _gauge("fedsplit_round", "Round under way, from 1; 0 before the first.", page.get("round")),
        _gauge("fedsplit_rounds", "Rounds that the run is to have.", page.get("rounds")),
        _counter("fedsplit_rounds_done", "Training rounds closed.", page.get("rounds_done")),
        _counter("fedsplit_steps", "Cohort steps of the top.", page.get("steps_done")),
        _counter("fedsplit_samples", "Samples in closed rounds.", page.get("samples")),
        _counter(
            "fedsplit_tokens_seen",
            "Tokens whose privatised representation was received in closed rounds.",
            page.get("tokens"),
        ),
        _counter("fedsplit_owners_lost", "Times that an owner was left out.", page.get("lost")),
        _family(
            "fedsplit_owners",
            "gauge",
            "Owners by what became of their last session.",
            [("", {"state": s}, n) for s, n in dict(page.get("states") or {}).items()],
        ),
        _family(
            "fedsplit_session_bytes",
            "counter",
            "Bytes of sessions' frames, from owners (up) and to them (down).",
            [("_total", {"direction": way}, page.get(f"bytes_{way}", 0)) for way in ("up", "down")],
            unit="bytes",
        ),
        _family(
            "fedsplit_loss",
            "gauge",
            "Owners' mean loss in the last closed round.",
            _of_modes(page, "loss"),
        ),
        _family(
            "fedsplit_accuracy",
            "gauge",
            "Owners' mean accuracy in the last closed round.",
            _of_modes(page, "accuracy"),
        ),
        _family(
            "fedsplit_step_seconds",
            "histogram",
            "Seconds from one cohort step's end to the next one's.",
            list(_histogram(steps)),
            unit="seconds",
        ),
        *_lineage(page),
        *_serving(page),
    ]
    return "".join(parts) + "# EOF\n"


def _gauge(name: str, help_: str, value: Any) -> str:
    return _family(name, "gauge", help_, [("", {}, value)])


def _counter(name: str, help_: str, value: Any) -> str:
    return _family(name, "counter", help_, [("_total", {}, value)])


def _family(name: str, kind: str, help_: str, samples: Iterable[Any], unit: str = "") -> str:
    """Return one metric family; samples whose value is no finite number are left out."""
    lines = [f"# TYPE {name} {kind}"]
    if unit:
        lines.append(f"# UNIT {name} {unit}")
    lines.append(f"# HELP {name} {help_}")
    for suffix, labels, value in samples:
        if isinstance(value, (int, float)) and math.isfinite(value):
            lines.append(f"{name}{suffix}{_labels(labels)} {_number(value)}")
    return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items()) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _of_modes(page: Mapping[str, Any], key: str) -> list[Sample]:
    found = {mode: (page.get(mode) or {}).get(key) for mode in ("train", "evaluate")}
    return [("", {"mode": mode}, value) for mode, value in found.items() if value is not None]


def _histogram(steps: Mapping[str, Any]) -> Iterable[Sample]:
    count = steps.get("count", 0)
    for bound, below in steps.get("buckets", ()):
        yield "_bucket", {"le": repr(float(bound))}, below
    yield "_bucket", {"le": "+Inf"}, count
    yield "_count", {}, count
    yield "_sum", {}, steps.get("sum", 0.0)


def _lineage(page: Mapping[str, Any]) -> Iterable[str]:
    found = page.get("lineage")
    if not found:
        return
    verdict, name = str(found.get("verdict")), "fedsplit_lineage_verdict"
    known = VERDICTS if verdict in VERDICTS else (*VERDICTS, verdict)
    yield _family(
        name,
        "stateset",
        "What the last closed round's lineage check found.",
        [("", {name: each}, int(each == verdict)) for each in known],
    )
    yield _gauge("fedsplit_lineage_score", "Mean score over blocks.", found.get("score"))


def _serving(page: Mapping[str, Any]) -> Iterable[str]:
    found = page.get("serving") or {}
    for key in _SERVED:
        if key in found:
            yield _counter(f"fedsplit_served_{key}", f"{key} since serving began.", found[key])
