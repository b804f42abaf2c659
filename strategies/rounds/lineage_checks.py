"""The checks behind :mod:`.lineage_watch`: a state against a gate, as figures of a round's row."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fedsplit.errors import LineageError, ModelError
from fedsplit.fingerprints.gate.lineage_gate import LineageGate, LineageReport
from fedsplit.fingerprints.gate.owner_updates import MatrixGate, Update
from fedsplit.fingerprints.gate.scale import ScaleGate, ScaleReport


def scales_of_top(
    gate: LineageGate, top: Mapping[str, Tensor], fresh: frozenset[str], slack: float
) -> ScaleGate:
    """Return the check of norms and scales of what the server trains.

    Args:
        gate: of the base; its copy of the weights is shared.
        top: what is trained, as it begins, under the top's names.
        fresh: names that the base has not.
        slack: of the bounds.
    """
    own = {name: plain for name in top if (plain := _plain(name, gate.base.names)) is not None}
    begun = {**top, **{name: gate.base.get(plain) for name, plain in own.items()}}
    return ScaleGate(begun, frozenset(top.keys() - own.keys()) | fresh, slack)


def trained_tensors(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the parameters of a model that a top's names mean, under these names."""
    live = dict(model.named_parameters())
    return {n: live[plain] for n in names if (plain := _plain(n, live)) is not None}


def _plain(name: str, known: Container[str]) -> str | None:
    """Return a top's parameter name as its model has it, or None."""
    return next((n for n in (name, name.removeprefix("model.")) if n in known), None)


def check_sizes(
    scales: ScaleGate | None, row: dict[str, Any], update: Update, what: str = ""
) -> bool:
    """Check norms and scales; return whether they passed, and say in the row what failed."""
    if scales is None:
        return True
    try:
        found = scales.check(update)
    except ModelError as error:  # NaN weights, for one
        found = ScaleReport({}, (str(error),))
    row[f"scale{' of the model' if 'model' in what else ''}"] = found.to_dict()
    if not found.failed:
        return True
    row["tests"] = [*row.get("tests", []), "scale"]
    told = "; ".join(found.failed[:4])
    row["reason"] = "; ".join(filter(None, (row.get("reason"), f"{what}scale: {told}")))
    row["verdict"] = "not_shown"
    return False


def check_state(
    gate: LineageGate | MatrixGate, state: Any, changed: list[str], *, commit: bool
) -> tuple[LineageReport | None, str | None]:
    """Return (what a gate finds, what kept it from judging)."""
    try:
        return gate.check(state, changed, commit=commit), None
    except (LineageError, ModelError) as error:  # NaN weights, for one
        return None, f"{type(error).__name__}: {error}"


def record_verdict(row: dict[str, Any], found: LineageReport | None, error: str | None) -> None:
    """Write a failed check's verdict into the round's row."""
    if found is None:
        row["verdict"], row["error"] = "not_shown", error
    elif found.verdict != "in_lineage":
        row["verdict"] = found.verdict
    else:
        return
    row["tests"] = [*row.get("tests", []), "score"]


def report_fields(found: LineageReport | None, error: str | None) -> dict[str, Any]:
    """Return a check's figures for a row."""
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
