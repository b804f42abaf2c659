"""Experiment files: a kind, a sentence, the run's settings, and overrides from the command line.

::

    kind = "split"
    about = "one sentence that says what is measured"
    minutes = 6                     # on 2 cores, for the reader

    [run.train]                     # groups and keys as in [tool.flwr.app.config]
    rounds = 3

    [options]                       # the kind's own options
    cpus-per-owner = 0.5
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedsplit.config import RunConfig, Scalar
from fedsplit.errors import ConfigError
from fedsplit.settings import read_settings

CONFIGS = Path(__file__).parents[1] / "configs"
# Relative paths mean the caller's folder; Flower's and Ray's processes run elsewhere.
PATHS = ("data.path", "model.name", "privacy.public-text", "offsite.public", "offsite.scores")
ALIASES = {"model": "model.name", "models": "options.models"}
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Experiment:
    """One experiment, ready to run.

    Attributes:
        name: file name without suffix.
        kind: a row of ``simulations.core.kinds.KINDS``.
        about: one sentence.
        run: flat run settings (only those that differ from the defaults).
        options: the kind's own options.
    """

    name: str
    kind: str
    about: str
    run: Mapping[str, Scalar]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def result_kind(self) -> str:
        """Which keys its results must have (see :mod:`simulations.core.run_folder`)."""
        return "split" if self.kind == "split" else "table"

    @property
    def config(self) -> RunConfig:
        """The run's validated settings.

        Raises:
            ConfigError: names the setting, its value and its bound.
        """
        return read_settings(dict(self.run))


def names() -> list[str]:
    """Return the names of the experiments that come with the project."""
    return sorted(p.stem for p in CONFIGS.glob("*.toml"))


def load_experiment(name_or_path: str, overrides: Iterable[str] = ()) -> Experiment:
    """Read an experiment and apply ``key=value`` overrides.

    Args:
        name_or_path: a name from :func:`names`, or the path of a TOML file.
        overrides: ``data.path=...``, ``train.rounds=5``, ``model=...`` (short for model.name), or
            ``options.KEY=...``.  Values are TOML; what is no TOML value is taken as text.

    Raises:
        ConfigError: no such experiment, a malformed file or override, an unknown setting.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = CONFIGS / f"{name_or_path}.toml"
        if not path.exists():
            raise ConfigError(f"experiment={name_or_path!r}: must be one of {', '.join(names())}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: must be a readable TOML file: {error}") from None
    unknown = content.keys() - {"kind", "about", "minutes", "run", "options"}
    if unknown:
        raise ConfigError(f"{path}: unknown key {sorted(unknown)[0]!r}")
    run = dict(flatten(content.get("run", {})))
    options = dict(content.get("options", {}))
    changes: dict[str, Scalar] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = ALIASES.get(key.strip(), key.strip())
        if not equals or not key:
            raise ConfigError(f"--set {override!r}: must be key=value")
        if key.startswith("options."):
            options[key.removeprefix("options.")] = _value(text)
        else:
            changes[key] = _value(text)
    run = with_changes(run, changes)
    experiment = Experiment(
        path.stem, str(content.get("kind", "")), str(content.get("about", "")), run, options
    )
    for key in PATHS:
        if key in run:
            run[key] = resolved(run[key])
    _ = experiment.config  # refuse what is wrong before anything starts
    return experiment


def with_changes(run: Mapping[str, Scalar], changes: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return flat settings with some changed; a checksum goes with the model that it belongs to."""
    changed = {**run, **changes}
    if changed.get("model.name") != run.get("model.name") and "model.sha256" not in changes:
        changed.pop("model.sha256", None)
    return changed


def resolved(value: Any) -> Any:
    """Return a path, or several separated as in PATH, from the root; anything else as it is."""
    if not isinstance(value, str) or not value:
        return value
    parts = value.split(os.pathsep)
    return os.pathsep.join(str(Path(p).resolve()) if p and Path(p).exists() else p for p in parts)


def read_options(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a kind's options: those given over the defaults, each of its default's type.

    Raises:
        ConfigError: an unknown option, or one of another type (an int is taken for a float).
    """
    options = dict(defaults)
    for key, value in given.items():
        if key not in defaults:
            raise ConfigError(f"options.{key}: must be one of {', '.join(defaults)}")
        wanted = type(defaults[key])
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise ConfigError(f"options.{key}={value!r}: must be of type {wanted.__name__}")
        options[key] = value
    return options


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Return the numbers of an option such as ``10,30,100``.

    Raises:
        ConfigError: not of that form.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"options.{option}={text!r}: must be numbers, as 10,30,100") from None


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Scalar]]:
    """Yield (dotted key, value) of nested tables.

    Raises:
        ConfigError: a value is neither a table nor a scalar; names its key.
    """
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            yield f"{prefix}{key}", value
        else:
            raise ConfigError(f"{prefix}{key}: must be a bool, number or text")


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text
