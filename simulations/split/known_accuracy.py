"""Accuracy beside what attackers read: measured by a sweep, joined to another experiment's rows.

A cell is known by its blocks, its mechanism, the settings of the mechanism's level and its seed:
cells of one model that agree in these have one noise level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsplit.attacks.files import read_config
from fedsplit.config import RunConfig
from fedsplit.errors import AttackError, ConfigError, RunError
from fedsplit.privacy import mechanism_type
from simulations.core.run_folder import read_results
from simulations.sweep.frontier import SETTINGS
from simulations.sweep.plan import Cell

CELL = (*(name for name in SETTINGS if name != "variant"), "seed")
LEVELS = ("eta", "noise_ratio")
"""Settings of a level that a sweep's rows have: a cell whose level another one sets is not found
in them."""


class KnownAccuracy:
    """Accuracies of the cells of a sweep, finished or not.

    Args:
        place: the sweep's folder, such as a run of ``sap-llm-accuracy``; empty: nothing is known.
        config: of the run that asks; the sweep's model must be its own.

    Raises:
        ConfigError: ``place`` is no such folder, is of another model, or has two rows of one cell;
            names the option, its value and what it must be.
    """

    def __init__(self, place: str, config: RunConfig) -> None:
        self._config = config
        self._found: dict[tuple[Any, ...], float] = {}
        if not place:
            return
        said = f"options.accuracy={place!r}"
        folder = Path(place).expanduser()
        try:
            rows = [row for row in read_results(folder)["rows"] if not row.get("error")]
            model = read_config(folder / "config.toml").get("model.name")
        except (RunError, AttackError) as error:
            told = str(error)
            raise ConfigError(f"{said}: must be the folder of a sweep's run: {told:.300}") from None
        except (KeyError, TypeError, AttributeError):
            raise ConfigError(f"{said}: must be the folder of a sweep's run: has no rows") from None
        if model != config.model.name:
            raise ConfigError(f"{said}: model.name={model!r}: must be {config.model.name!r}")
        for row in rows:
            if missing := sorted({*CELL, "accuracy"} - row.keys()):
                raise ConfigError(f"{said}: rows must have {', '.join(missing)}, as a sweep's have")
            if row["accuracy"] is None:
                continue
            key = _key(row)
            if key in self._found:
                told = ", ".join(f"{name}={row[name]}" for name in CELL)
                raise ConfigError(f"{said}: must have one row of {told}; has several")
            self._found[key] = float(row["accuracy"])

    def of(self, k: int, seed: int) -> float | None:
        """Return the accuracy of ``k`` blocks and a run's ``seed``; None: there is no such cell."""
        privacy = self._config.privacy
        level = mechanism_type(privacy).level
        if level is not None and level.setting not in LEVELS and not privacy.noise_ratio:
            return None
        split = replace(self._config.split, k=k)
        return self._found.get(
            _key(Cell("", replace(self._config, split=split, seed=seed)).columns())
        )


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a cell; an eta that is not set is infinite, and null in JSON."""
    eta = float("inf") if row["eta"] is None else row["eta"]
    return tuple(({**row, "eta": eta})[name] for name in CELL)
