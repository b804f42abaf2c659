"""Which cells a sweep has: products of axes over an experiment's settings, and seeds.

::

    kind = "sweep"
    [run.privacy]                         # what all cells share
    mechanism = "dchi"
    [options]
    seeds = 3
    [[options.cells]]                     # one group; a list is an axis
    variant = "as published"
    "privacy.eta" = [15.0, 12.0, 10.0, 8.0]
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedsplit.config import RunConfig, Scalar
from fedsplit.errors import ConfigError, check
from fedsplit.privacy import mechanism_type
from fedsplit.settings import read_settings
from simulations.core.cells import product
from simulations.core.settings import PATHS, Experiment, resolved, with_changes

# Settings that say where a run writes or how fast it computes, not what comes out of it.
IRRELEVANT = ("output.dir", "output.threads", "output.owner-threads", "output.save", "session.port")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        variant: the name of its group, for tables and plots.
        config: its settings.
    """

    variant: str
    config: RunConfig

    @property
    def key(self) -> str:
        """A digest of everything that decides the cell's result.

        Settings at their defaults are left out, so that a setting added later changes no key.
        """
        usual = RunConfig().to_flat()
        flat = {
            k: v for k, v in self.config.to_flat().items() if k not in IRRELEVANT and v != usual[k]
        }
        text = json.dumps([self.variant, flat], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def columns(self) -> dict[str, Scalar]:
        """Return the cell's settings that tables and plots are made from."""
        c = self.config
        touched = c.privacy.cti != "off" and mechanism_type(c.privacy).protects()
        return {
            "variant": self.variant,
            "mechanism": c.privacy.mechanism,
            "eta": c.privacy.eta if c.privacy.eta else float("inf"),
            "noise_ratio": c.privacy.noise_ratio,
            "clip": c.privacy.row_clip,
            "spare": mechanism_type(c.privacy).public_settings(c.privacy).get("spare", 1.0),
            "k": c.split.k,
            "cti": c.privacy.cti,
            "rho": c.privacy.cti_rho if touched else 1.0,
            "denoise": c.privacy.denoise,
            "label_protection": str(c.to_flat().get("labels.protection", "none")),
            "seed": c.seed,
        }


def cells_of(
    run: Mapping[str, Scalar], groups: Sequence[Mapping[str, Any]], seeds: int
) -> list[Cell]:
    """Return every cell, seed by seed, so that an unfinished sweep has whole seeds.

    Args:
        run: flat settings that all cells share.
        groups: per group, settings whose values are one value or a list (an axis), and
            optionally ``variant``.
        seeds: number of seeds, from the run's own ``seed`` on.

    Raises:
        ConfigError: an unknown setting or a value out of range, in any cell; two equal cells; an
            axis of seeds, which ``seeds`` makes.
    """
    check(1 <= seeds <= 1000, "options.seeds", seeds, "in [1, 1000]")
    first = int(run.get("seed", 0))
    cells: list[Cell] = []
    known: set[str] = set()
    for seed in range(first, first + seeds):
        for group in groups or [{}]:
            variant = str(group.get("variant", ""))
            axes = {k: v if isinstance(v, list) else [v] for k, v in group.items()}
            axes.pop("variant", None)
            if "seed" in axes:  # every cell gets its own below
                raise ConfigError("axis seed: must be left out; --seeds N makes N of them")
            for values in product(**axes):
                paths = {k: resolved(v) for k, v in values.items() if k in PATHS}
                flat = with_changes(run, {**values, **paths, "seed": seed})
                cell = Cell(variant or _name(values), read_settings(flat))
                if cell.key in known:
                    raise ConfigError(f"cell {cell.columns()}: occurs twice in the sweep")
                known.add(cell.key)
                cells.append(cell)
    return cells


def with_public_text(groups: Sequence[Mapping[str, Any]], paths: str) -> list[Mapping[str, Any]]:
    """Return the groups, those that denoise with this ``privacy.public-text`` for their prior.

    Raises:
        ConfigError: a file or folder is not there: told before the first cell, not in the ninth.
    """
    for part in filter(None, paths.split(os.pathsep)):
        if not Path(part).exists():
            raise ConfigError(
                f"options.public-text={part!r}: must be a file or folder of text "
                "(options.public-text='' takes what the interpreter ships)"
            )
    more = {"privacy.public-text": paths} if paths else {}
    return [
        {**group, **more} if group.get("privacy.denoise", "off") != "off" else group
        for group in groups
    ]


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """Return (setting, values) of ``key=v1,v2,...`` from the command line.

    Raises:
        ConfigError: not of that form.
    """
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise ConfigError(f"--axis {text!r}: must be key=value,value,...")
    return key.strip(), [_value(v.strip()) for v in values.split(",")]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)


def _name(values: Mapping[str, Scalar]) -> str:
    return ", ".join(f"{k.partition('.')[2] or k} {v}" for k, v in values.items()) or "all"


def as_sweep(
    experiment: Experiment, axes: Mapping[str, Sequence[Any]], seeds: int, workers: int
) -> Experiment:
    """Return ``experiment`` as a sweep over ``axes``.

    Axes multiply the cells that it has already; options of the kind ``split`` that are of no use
    to a cell are dropped.

    Raises:
        ConfigError: an experiment that is no federated run.
    """
    check(experiment.kind in ("split", "sweep"), "kind", experiment.kind, "split or sweep")
    options = dict(experiment.options) if experiment.kind == "sweep" else {}
    for name in ("attack-samples", "ray-address"):
        if name in experiment.options:
            options[name] = experiment.options[name]
    groups = list(options.get("cells", [])) or [{}]
    options["cells"] = [{**group, **{k: list(v) for k, v in axes.items()}} for group in groups]
    if seeds:
        options["seeds"] = seeds
    if workers:
        options["workers"] = workers
    return replace(experiment, kind="sweep", options=options)
