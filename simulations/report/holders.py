"""The picture of who held what: owners' texts by class, the model owner's part, what crossed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from simulations.core.units import size
from simulations.report.charts import COLOURS, WIDTH, framed, line, text
from simulations.report.facts import Facts, Row

PITCH, BAR = 46, 236  # of one owner: height, and the width of the longest bar
SERVER = 308  # where the model owner's box begins
MOST_OWNERS = 12


def picture(facts: Facts) -> Markup:
    """Return the picture; empty where the run has no owners."""
    owners = facts.owners[:MOST_OWNERS]
    if not owners:
        return Markup("")
    left_out = len(facts.owners) - len(owners)
    height = 26 + PITCH * max(3, len(owners)) + (20 if left_out else 0)
    most = max([1, *(_count(owner) for owner in facts.owners)])
    parts = [text(0, 13, "data owners", "head"), text(SERVER, 13, "model owner", "head")]
    for number, owner in enumerate(owners):
        parts += _owner(owner, 26 + number * PITCH, most, facts.classes)
    if left_out:
        parts.append(text(0, height - 4, f"and {left_out} more owners", "small"))
    parts += _server(facts, height)
    classes = facts.classes if any(owner.get("labels") for owner in owners) else []
    told = ", ".join(f"{owner['name']}: {_count(owner)} texts" for owner in owners)
    return framed(f"Who held what. {told}", "".join(parts), classes, len(classes), height)


def _count(owner: Row) -> int:
    held = int(owner.get("train") or 0) + int(owner.get("test") or 0)
    return max(held, sum(owner.get("labels") or ()))


def _short(name: str) -> str:
    """Return a name of 14 characters at most; of several that begin alike, ends tell them apart."""
    return name if len(name) <= 14 else f"{name[:5]}\N{HORIZONTAL ELLIPSIS}{name[-8:]}"


def _owner(owner: Row, top: int, most: int, classes: Sequence[str]) -> Iterable[str]:
    told = f"{int(owner.get('train') or 0):,} texts, {int(owner.get('test') or 0):,} held out"
    yield text(0, top + 12, _short(str(owner["name"])), "strong")
    yield text(BAR + 8, top + 12, told, "small end")
    counts = owner.get("labels") or [int(owner.get("train") or 0)]
    left = 0.0
    for index, count in enumerate(counts):
        width = BAR * count / most
        what = f"{classes[index]}: {count}" if index < len(classes) else f"{count} texts"
        yield (
            f'<rect class="s{index % COLOURS}" x="{left:.1f}" y="{top + 18}" '
            f'width="{max(0.0, width - 1):.1f}" height="14" rx="2">'
            f"<title>{escape(what)}</title></rect>"
        )
        left += width


def _server(facts: Facts, height: int) -> Iterable[str]:
    """Draw the model owner's box, and what crossed on its left."""
    traffic, middle = facts.get("traffic"), 26 + (height - 26) / 2
    yield (
        f'<rect class="box" x="{SERVER}" y="22" width="{WIDTH - SERVER - 1}" '
        f'height="{height - 26}" rx="8"/>'
    )
    model = facts.get("model")
    lines = [_blocks(facts), "labels: not held", "texts: not held"]
    if model.get("trained_parameters") is not None:
        lines.insert(1, f"tunes {model['trained_parameters']:,}")
        lines.insert(2, "parameters")
    for number, words in enumerate(lines):
        yield text(SERVER + 10, middle + 16 * (number - (len(lines) - 1) / 2), words, "small")
    sent = sum(int(row.get("bytes") or 0) for row in facts.results.get("sent") or [])
    up = size(traffic.get("bytes_up") or sent) if traffic or sent else ""
    down = size(traffic["bytes_down"]) if traffic.get("bytes_down") is not None else ""
    for at, words, (start, end) in (
        (middle - 12, up, (BAR + 14, SERVER - 4)),
        (middle + 18, down, (SERVER - 4, BAR + 14)),
    ):
        tip = 7 if end < start else -7
        if not words:
            continue
        yield line(start, at, end, at, "arrow")
        yield f'<path class="tip" d="M{end} {at} l{tip} -4 v8 z"/>'
        yield text((start + end) / 2, at - 5, words, "small middle")


def _blocks(facts: Facts) -> str:
    if facts.config.get("strategy") == "offsite-tuning":
        return "the full model"
    k = int(facts.config.get("split.k") or 0)
    blocks = f"blocks from {k + 1} on" if k else "all blocks"
    parts = str(facts.config.get("labels.protection")).split("+")
    return blocks if {"client-head", "client-tail"} & set(parts) else f"{blocks}, head"
