"""What a run's files say, in the form that pages show; a part that is missing is empty."""

from __future__ import annotations

import base64
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsplit import storage
from fedsplit.attacks import ATTACKS
from fedsplit.config import RunConfig
from fedsplit.errors import FedsplitError
from simulations.core.run_folder import read_results

Row = Mapping[str, Any]
MOST_BYTES = 64 << 20
WORDS = {row.result_key or row.name: row.words for row in ATTACKS.values()}


@dataclass(frozen=True)
class Attacker:
    """One attack's outcome: the share of tokens that it does not recover, with its interval."""

    name: str
    words: str
    hidden: float
    interval: tuple[float, float]
    knowledge: str


@dataclass(frozen=True)
class Curve:
    """One figure over the rounds, of one owner or of all."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Facts:
    """One run.

    Attributes:
        folder: where it lies.
        results: the content of ``results.json``.
        config: its settings as text, and flat.
        rounds: rows of the rounds; of a run that failed, those its server wrote.
        portraits: (label, SVG as a data URI) of the base and of what was tuned.
    """

    folder: Path
    results: Mapping[str, Any]
    config_text: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    rounds: Sequence[Row] = ()
    portraits: Sequence[tuple[str, str]] = ()

    def get(self, key: str) -> Any:
        """Return a part of the results; an empty mapping where there is none."""
        return self.results.get(key) or {}

    @property
    def owners(self) -> Sequence[Row]:
        """Rows of the owners: ``name``, ``train``, ``test``, ``tokens``, ``labels``."""
        found = self.results.get("owners") or []
        return found if isinstance(found, list) and all(isinstance(x, dict) for x in found) else []

    @property
    def classes(self) -> list[str]:
        """Names of the classes, or their numbers."""
        count = max((len(owner.get("labels") or []) for owner in self.owners), default=0)
        names = [str(name) for name in self.results.get("classes") or []]
        return names if len(names) >= count else [f"class {index}" for index in range(count)]

    @property
    def attackers(self) -> list[Attacker]:
        """Every attack on tokens that was measured, the strongest last."""
        found = []
        for key, row in self.get("privacy").items():
            if isinstance(row, Mapping) and "knowledge" in row and "empirical_privacy" in row:
                low, high = row["interval"]  # of what is recovered
                hidden = float(row["empirical_privacy"])
                name = str(row.get("name") or key)
                words = WORDS.get(key, "").replace("... and", "also knows")
                found.append(Attacker(name, words, hidden, (1 - high, 1 - low), row["knowledge"]))
        return sorted(found, key=lambda attacker: -attacker.hidden)

    def curves(self, mode: str, figure: str) -> list[Curve]:
        """Return a curve of ``figure`` for all owners together, then one for each owner."""
        names = sorted({name for row in self.rounds for name in _metrics(row, mode)["owners"]})
        whole = [(row["round"], _metrics(row, mode).get(figure)) for row in self.rounds]
        found = {"all owners": whole}
        for name in names if len(names) <= 12 else ():
            found[name] = [
                (row["round"], _metrics(row, mode)["owners"].get(name, {}).get(figure))
                for row in self.rounds
            ]
        curves = []
        for name, values in found.items():
            points = tuple((float(x), float(y)) for x, y in values if isinstance(y, int | float))
            if points:
                curves.append(Curve(name, points))
        return curves

    @property
    def lineage(self) -> list[Row]:
        """A row per round that the gate looked at."""
        rows = self.results.get("lineage") or [
            {**row["lineage"], "round": row["round"]} for row in self.rounds if row.get("lineage")
        ]
        return [row for row in rows if isinstance(row, Mapping) and row.get("verdict") != "off"]

    @property
    def changed(self) -> list[tuple[str, Any, Any]]:
        """Return (setting, value, default) of every setting that is not at its default."""
        usual = RunConfig().to_flat()
        return [
            (key, value, usual.get(key))
            for key, value in self.config.items()
            if key in usual and value != usual[key]
        ]


def read_facts(folder: Path) -> Facts:
    """Read a run's folder.

    Raises:
        RunError: no readable results.
    """
    results = read_results(folder)
    text = _text(folder / "config.toml")
    flat: dict[str, Any] = {}
    with suppress(tomllib.TOMLDecodeError):
        flat = dict(_flat(tomllib.loads(text)))
    rounds = results.get("rounds") or _server(folder).get("rounds") or []
    sound = [row for row in rounds if isinstance(row, dict) and isinstance(row.get("round"), int)]
    return Facts(folder, results, text, flat, sound, _portraits(folder))


def _metrics(row: Row, mode: str) -> dict[str, Any]:
    metrics = dict((row.get(mode) or {}).get("metrics") or {})
    return {**metrics, "owners": metrics.get("owners") or {}}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _server(folder: Path) -> Mapping[str, Any]:
    """Return what the server wrote; empty if nothing that can be read."""
    try:
        content = json.loads(storage.read_bounded(folder / "server" / "server.json", MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _portraits(folder: Path) -> list[tuple[str, str]]:
    """Return the portraits in the run's evidence; none where it has no usable ones."""
    from fedsplit.commands.lineage import portraits
    from fedsplit.fingerprints.evidence.chain import read
    from fedsplit.fingerprints.portraits.portrait import portrait_svg

    chain = folder / "server" / "lineage.jsonl"
    if not chain.exists():
        return []
    try:
        columns = portraits(list(read(chain)))
        return [
            (label if title == "run" else f"{title}, {label}", _uri(portrait_svg(vector, 160)))
            for title, entries in columns
            for label, vector in entries
        ]
    except (FedsplitError, KeyError, TypeError, ValueError):
        return []


def _uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
