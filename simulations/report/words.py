"""A run in one paragraph, and its figures as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsplit.errors import FedsplitError
from fedsplit.privacy import MECHANISMS
from fedsplit.registry import pick
from simulations.core.units import duration, score, score_name, size
from simulations.report.facts import Facts

ENDED = {
    "interrupted": "It was interrupted after {}; what stands here is what was recorded by then.",
    "failed": "It failed after {}; what stands here is what was recorded by then.",
    "running": "It goes on, or was killed; {} in, this was recorded.",
}


def summary(facts: Facts) -> str:
    """Return what was done and what came of it, in a few sentences."""
    told = [_who(facts), _utility(facts), _privacy(facts), _traffic(facts), _lineage(facts)]
    if not facts.owners:
        about = str(facts.results.get("about") or "").rstrip(".")
        rows = facts.results.get("rows") or []
        told = [f"{about}." if about else ""]
        told.append(f"The table below has {_count(len(rows), 'row')}." if rows else "")
    status = str(facts.results["status"])
    told.append(ENDED.get(status, "").format(duration(facts.results["time_s"])))
    return " ".join(f"{text[0].upper()}{text[1:]}" for text in told if text)


def measured_at(facts: Facts) -> str:
    """Return when, where and at which commit the figures were measured."""
    results = facts.results
    versions, machine = results["versions"], results["machine"]
    commit = versions.get("commit")
    at = "outside a checkout"
    if commit:
        changed = commit.endswith("+")
        at = f"at commit {commit.rstrip('+')[:12]}" + (" with changes" if changed else "")
    memory = float(machine.get("memory_bytes") or 0) / 2**30
    gpus = ", ".join(machine.get("gpus") or [])
    return (
        f"Measured {at}, fedsplit {versions.get('fedsplit') or '?'}, on {machine.get('cpu')}, "
        f"{machine.get('cores')} cores, {memory:.0f} GiB{f', {gpus}' if gpus else ''}; "
        f"{str(results['started']).replace('T', ' ')}, {duration(results['time_s'])}."
    )


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share as text."""
    return "not measured" if value is None else f"{100 * value:.{digits}f} %"


def figure(metric: str, value: float | None) -> str:
    """Return a figure of utility in its own unit."""
    return score(metric, value)


def extent(utility: Mapping[str, Any], figure: str = "scores") -> str:
    """Return which owners' texts a figure is of, where that is not all; empty: all of them.

    Args:
        utility: of a run's results.
        figure: an average (``accuracy``, ``loss``), or ``scores``: whatever comes of counts.
    """
    covered = utility.get("covered")
    own = covered.get(figure) if isinstance(covered, Mapping) else None
    whole = utility.get("reporting") or 0
    if not isinstance(own, Mapping) or own["owners"] >= whole:
        return ""
    texts = f"{own['texts']:,} of {utility.get('samples', 0):,} texts"
    return f"{own['owners']} of {whole} owners ({texts})"


def partial(utility: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each figure that is not of all owners, with the reason."""
    found = []
    for figure, told in (
        ("accuracy", "Accuracy is of"),
        ("loss", "The loss is of"),
        ("scores", "Scores that come of counts (F1, recalls, correlations) are of"),
    ):
        if own := extent(utility, figure):
            found.append(f"{told} {own}: the policies of the others keep theirs back.")
    return found


def noise(facts: Facts) -> str:
    """Return what protected the representations."""
    privacy = facts.get("privacy")
    if not privacy.get("mechanism"):
        return ""
    try:
        return pick(MECHANISMS, privacy["mechanism"], "mechanism").label(privacy)
    except (FedsplitError, KeyError, TypeError):
        return str(privacy["mechanism"])


def _who(facts: Facts) -> str:
    owners = facts.owners
    if not owners:
        return ""
    texts = sum(owner.get("train", 0) for owner in owners)
    model = str(facts.config.get("model.name", "a model")).rsplit("/", 1)[-1]
    rounds = sum(1 for row in facts.rounds if (row.get("train") or {}).get("steps"))
    tuned = "tuned" if facts.results["status"] == "completed" else "began to tune"
    return (
        f"{_count(len(owners), 'owner')} with {texts:,} training texts {tuned} "
        f"{model.removeprefix('package:')} together"
        + (f", in {_count(rounds, 'round')}." if rounds else ".")
    )


def _count(number: int, what: str) -> str:
    small = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    told = small[number] if number < len(small) else f"{number:,}"
    return f"{told} {what}{'' if number == 1 else 's'}"


def _utility(facts: Facts) -> str:
    found = facts.get("utility")
    if found.get("federated") is None:
        return ""
    metric = found["metric"]
    text = f"Held-out {score_name(metric)} is {figure(metric, found['federated'])}"
    own = extent(found, metric if metric == "accuracy" else "scores")
    text += f" on the texts of {own}" if own else ""
    beside = []
    if found.get("centralised") is not None:
        beside.append(f"{figure(metric, found['centralised'])} when trained in one place")
    if found.get("baseline") is not None:
        what = found.get("baseline_is") or "nothing learned"
        before = "before any training" if what == "zero-shot" else f"for the {what}"
        beside.append(f"{figure(metric, found['baseline'])} {before}")
    return f"{text}; {' and '.join(beside)}." if beside else f"{text}."


def _privacy(facts: Facts) -> str:
    if not facts.attackers:
        return ""
    worst = facts.attackers[-1]
    how, count = noise(facts), len(facts.attackers)
    low, high = (percent(1 - end) for end in reversed(worst.interval))
    left = "without noise" if how == "none" else f"({how})"
    which = f"the strongest of {count} attackers" if count > 1 else "the one attacker tried"
    return (
        f"Texts left as vectors{f' {left}' if how else ''}; {which}, {worst.name}, recovers "
        f"{percent(1 - worst.hidden)} of the tokens ({low} to {high})."
    )


def what_the_server_reads(facts: Facts) -> list[str]:
    """Return what the model owner can read although it holds none of it; empty: see the attacks."""
    config, found = facts.config, []
    if not config or config.get("strategy", "split-tuning") != "split-tuning":
        return []
    language = config.get("model.task") in ("causal-lm", "multiple-choice")
    if config.get("privacy.mechanism") == "none":
        found.append("The vectors left without noise, so the texts can be read off them.")
    if str(config.get("labels.protection")).split("+")[-1] in ("none", "auto") and not language:
        found.append("No label protection was asked for: each gradient tells its text's label.")
    return found


def _traffic(facts: Facts) -> str:
    found: Mapping[str, Any] = facts.get("traffic")
    if not found:
        return ""
    return (
        f"The owners sent {size(found.get('bytes_up', 0))} and got "
        f"{size(found.get('bytes_down', 0))}."
    )


def _lineage(facts: Facts) -> str:
    rows = facts.lineage
    if not rows:
        return ""
    last = str(rows[-1].get("verdict", "")).replace("_", " ")
    good = sum(row.get("verdict") == "in_lineage" for row in rows)
    if good == len(rows):
        after = "its round" if len(rows) == 1 else f"each of {_count(len(rows), 'round')}"
        return f"The tuned model was of its base's line after {after}."
    return f"The lineage gate passed {good} of {len(rows)} rounds; the last verdict is {last}."
